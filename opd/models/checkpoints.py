"""The checkpoints of a run folder: which there are, the seal that closes one, and which is the newest whole one.

The seal is the file training_state/state.json.  It is written last and holds the step, the size and digest of every
other file of the checkpoint, the size and digest of the run's metrics.jsonl up to that step, and a digest of itself.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from opd.core.errors import Refusal, first_line

STATE = "training_state"  # a subfolder, because servers load every *.safetensors file of the model folder as weights
SEAL = "state.json"
HISTORY = "metrics.jsonl"
WEIGHTS = "*.safetensors"
_NAME = re.compile(r"step-(\d+)")


def folder_name(step: int) -> str:
    """Return the name of a step's checkpoint."""
    return f"step-{step:06d}"


def checkpoints(run: Path) -> dict[int, Path]:
    """Return the checkpoint folders of a run by step, in ascending order; folders of other names are the user's."""
    found = {m[1]: p for p in (run / "checkpoints").glob("step-*") if (m := _NAME.fullmatch(p.name)) and p.is_dir()}
    return {int(number): found[number] for number in sorted(found, key=int)}


def seal(checkpoint: Path, numbers: Mapping[str, Any], run: Path | None = None) -> None:
    """Write the seal of a checkpoint whose other files are complete, with the history of its run if there is one.

    `numbers` hold the step, and whatever else of the training state is no tensor.
    """
    content = {**numbers, "files": _digests(checkpoint)}
    if run is not None and (run / HISTORY).is_file():
        content["history"] = _digest(run / HISTORY)
    folder = checkpoint / STATE
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SEAL).write_text(json.dumps(content | {"digest": _own_digest(content)}))


def has_weights(folder: Path) -> bool:
    """Return whether a folder holds weights; a checkpoint of a sharded run may hold only the shards."""
    return any(folder.glob(WEIGHTS))


def newest_checkpoint(run: Path, *, history: bool = False) -> tuple[Path | None, list[str]]:
    """Return the newest whole checkpoint of a run, or None if the run has none, and a line for each damaged newer one.

    With `history`, the run's metrics.jsonl must be that of the checkpoint, too.  Raises Refusal if all are damaged.
    """
    damaged: list[str] = []
    for folder in reversed(checkpoints(run).values()):
        damage = damage_of(folder, run if history else None)
        if not damage:
            return folder, damaged
        damaged.append(f"checkpoint {folder} is damaged: {damage}")
    if damaged:
        raise Refusal(f"{'; '.join(damaged)}; no checkpoint of this run is whole: restore one from a copy")
    return None, []


def damage_of(checkpoint: Path, run: Path | None = None, *, weights_only: bool = False) -> str:
    """Return what differs from the state in which a checkpoint was sealed, or "".

    A checkpoint of an earlier version has a seal without digests and counts as whole.  With `run`, metrics.jsonl of
    that run must begin with the lines that it held when the checkpoint was sealed.  With `weights_only`, other files
    than the model's weights may differ, and a folder without a seal is a model of another origin and counts as whole.
    """
    if weights_only and not (checkpoint / STATE / SEAL).is_file():
        return ""
    try:
        content = seal_of(checkpoint)
        own = content.pop("digest", None)
        if "files" not in content:
            return ""
        if own != _own_digest(content):
            return f"{SEAL} was changed after it was saved"
        found, wanted = _digests(checkpoint, weights_only=weights_only), content["files"]
        if weights_only:
            wanted = {name: x for name, x in wanted.items() if "/" not in name and name.endswith(WEIGHTS[1:])}
        if missing := sorted(wanted.keys() - found.keys()):
            return f"{missing[0]} is missing"
        if changed := sorted(name for name in wanted if found[name] != wanted[name]):
            return f"{changed[0]} was changed after it was saved"
        if run is not None and (saved := content.get("history")) is not None:
            return "" if _digest(run / HISTORY, saved["bytes"]) == saved else _history_damage(run / HISTORY)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{SEAL} cannot be read: {first_line(error)}"
    return ""


def _history_damage(path: Path) -> str:
    if not path.is_file():
        return f"{path.name} of the run is missing"
    return f"the lines of {path.name} up to its step are not those that were written"


def sealed_history(checkpoint: Path) -> int | None:
    """Return the bytes of the run's metrics.jsonl when the checkpoint was sealed, or None if its seal does not say."""
    return seal_of(checkpoint).get("history", {}).get("bytes")


def seal_of(checkpoint: Path) -> dict[str, Any]:
    """Return the content of a seal; checkpoints of earlier versions have it in the model folder itself."""
    path = checkpoint / STATE / SEAL
    content = json.loads((path if path.is_file() else checkpoint / SEAL).read_text())
    if not isinstance(content, dict) or type(content.get("step")) is not int:
        raise ValueError("it names no step")
    return content


def _own_digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _digests(checkpoint: Path, *, weights_only: bool = False) -> dict[str, Mapping[str, Any]]:
    """Return the size and digest of the files of a checkpoint but the seal, by their paths in the checkpoint."""
    files = checkpoint.glob(WEIGHTS) if weights_only else checkpoint.rglob("*")
    paths = sorted(p for p in files if p.is_file() and p != checkpoint / STATE / SEAL)
    with ThreadPoolExecutor() as pool:  # hashing releases the GIL
        return dict(zip((str(p.relative_to(checkpoint)) for p in paths), pool.map(_digest, paths), strict=True))


def _digest(path: Path, size: int | None = None) -> Mapping[str, Any]:
    """Return the number of bytes and the digest of a file, or of its first `size` bytes."""
    if not path.is_file():
        return {}
    with path.open("rb") as file:
        if size is None:
            return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
        head = file.read(size)
    return {"bytes": len(head), "sha256": hashlib.sha256(head).hexdigest()}
