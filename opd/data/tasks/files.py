"""Reading tables: `read(data) -> Dataset`, from files, folders and the hub, all through the `datasets` library."""

import csv
from pathlib import Path

import datasets

from opd.config.data import Data
from opd.core.disk import nearest
from opd.core.errors import Refusal
from opd.data import hub

datasets.disable_progress_bars()  # reading a table is quick, and its bars drown the lines that matter
KINDS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def read(data: Data) -> datasets.Dataset:
    """Load one split; a path that exists is read from disk, any other name is looked up on the hub."""
    path = Path(data.source).expanduser()
    if not path.exists():
        if _is_path(data.source):
            raise Refusal(f"--prompts {data.source} does not exist{nearest(path)}; correct the path")
        if ":" in data.source:
            raise Refusal(f"--prompts {data.source}: before a colon only embedded and reasoning-gym are known")
    try:
        rows = _file(path) if path.is_file() else _folder(path, data) if path.is_dir() else _hub(data)
    except Refusal:
        raise
    except Exception as error:  # disks, parsers and networks fail with some twenty unrelated types
        reason = " ".join(f"{error.__cause__ or error}".split()) or "the file is empty"
        if path.exists():
            raise Refusal(f"--prompts {data.source}, --split {data.split} could not be read: {reason}") from error
        reason = hub.reason(error, hub.Repository(*_id(data.source)), dataset=True).rstrip(".")
        raise Refusal(
            f"--prompts {data.source}, --split {data.split}: {hub.no_path(path, 'file or folder')}{reason}; correct "
            "the path, the dataset id, --subset or --split"
        ) from error
    if len(rows) == 0:
        raise Refusal(f"--prompts {data.source}, --split {data.split} has no rows: give one with at least one prompt")
    return rows


def _is_path(source: str) -> bool:
    """Return whether a name can only be meant as a path: hub ids are NAME or OWNER/NAME."""
    dataset_id, _ = _id(source)  # a revision may hold slashes
    return source.startswith((".", "/", "~")) or dataset_id.count("/") > 1 or Path(source).suffix in KINDS


def _file(path: Path) -> datasets.Dataset:
    """Read one file; everything in a .csv is text, else 007 would be 7 and the answer "None" a hole."""
    if path.suffix not in KINDS:
        raise Refusal(f"--prompts {path} is not a {', '.join(KINDS)} file: convert it to one of these")
    options = {}
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8-sig") as file:
            features = datasets.Features({name: datasets.Value("string") for name in next(csv.reader(file))})
        options = {"features": features, "keep_default_na": False}
    return datasets.load_dataset(KINDS[path.suffix], data_files=str(path), split="train", **options)


def _folder(path: Path, data: Data) -> datasets.Dataset:
    """Read a folder that `save_to_disk` wrote, or one of data files, whose names give the splits."""
    if (path / "state.json").exists():
        return datasets.load_from_disk(str(path))
    if not (path / "dataset_dict.json").exists():
        return datasets.load_dataset(str(path), *_subset(data), split=data.split)
    splits = datasets.load_from_disk(str(path))
    if data.split not in splits:
        raise Refusal(f"--split {data.split} is not in --prompts {data.source}: choose {', '.join(splits)}")
    return splits[data.split]


def _hub(data: Data) -> datasets.Dataset:
    """Fetch one split from the hub, or from the cache of an earlier run if there is no network."""
    dataset_id, revision = _id(data.source)
    return datasets.load_dataset(dataset_id, *_subset(data), split=data.split, revision=revision or None)


def _id(source: str) -> tuple[str, str]:
    """Split NAME@REVISION of the hub into its two parts; the second is empty for the default branch."""
    dataset_id, _, revision = source.partition("@")
    return dataset_id, revision


def _subset(data: Data) -> tuple[str, ...]:
    return (data.subset,) if data.subset else ()
