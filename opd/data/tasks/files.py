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
    """Load one split; a path that exists is read from disk, any other name on the hub or in its cache."""
    path, repository = Path(data.source).expanduser(), hub.Repository(*data.source.partition("@")[::2])
    if not path.exists():
        # Hub ids are NAME or OWNER/NAME, and a revision may hold slashes.
        if data.source.startswith((".", "/", "~")) or repository.id.count("/") > 1 or path.suffix in KINDS:
            raise Refusal(f"--prompts {data.source} does not exist{nearest(path)}; correct the path")
        if ":" in data.source:
            raise Refusal(f"--prompts {data.source}: before a colon only embedded and reasoning-gym are known")
    try:
        if path.is_file():
            rows = _file(path)
        elif path.is_dir():
            rows = _folder(path, data)
        else:
            revision = repository.revision or None
            rows = datasets.load_dataset(repository.id, data.subset or None, split=data.split, revision=revision)
    except Refusal:
        raise
    except Exception as error:  # disks, parsers and networks fail with some twenty unrelated types
        reason = " ".join(f"{error.__cause__ or error}".split()) or "the file is empty"
        if path.exists():
            raise Refusal(f"--prompts {data.source}, --split {data.split} could not be read: {reason}") from error
        reason = hub.reason(error, repository, dataset=True).rstrip(".")
        raise Refusal(
            f"--prompts {data.source}, --split {data.split}: {hub.no_path(path, 'file or folder')}{reason}; correct "
            "the path, the dataset id, --subset or --split"
        ) from error
    if len(rows) == 0:
        raise Refusal(f"--prompts {data.source}, --split {data.split} has no rows: give one with at least one prompt")
    return rows


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
        return datasets.load_dataset(str(path), data.subset or None, split=data.split)
    splits = datasets.load_from_disk(str(path))
    if data.split not in splits:
        raise Refusal(f"--split {data.split} is not in --prompts {data.source}: choose {', '.join(splits)}")
    return splits[data.split]
