"""Reading of the files of a run folder: `read_object`, `read_rows` and `read_columns`, and `read_rollouts` of three.

A file that `opd` did not write like this raises Refusal: a line with the file, the place in it, and the remedy.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opd.core import json_text
from opd.core.errors import Refusal, one_line
from opd.core.tensors import load_tensors

Row = Mapping[str, Any]
Types = tuple[type, ...]
NUMBER: Types = (int, float)
LARGEST = 1 << 63  # integers are smaller than this
REMEDY = "it is damaged; restore it, or name another folder"
INTEGERS = (torch.int64, torch.int32)
DTYPES = {"mask": (torch.bool,), "ids": INTEGERS, "alternatives_ids": INTEGERS}
DIMENSIONS = {"mask": 2, "ids": 2, "reverse_kl": 2, "alternatives_ids": 3}  # at least so many
ROLLOUT: Mapping[str, Types] = {
    "index": (int,),
    "prompt": (str, list),
    "answer": (str,),
    "response": (str,),
    "tokens": (int,),
    "outcome": NUMBER,
    "stopped": (bool,),
}


@dataclass(frozen=True)
class SavedRollouts:
    """A saved batch of rollouts."""

    rows: Sequence[Row]  # the values of ROLLOUT
    columns: Mapping[str, Tensor]  # [B, ...]; `ids` and `mask` are [B, T]
    texts: Mapping[int, str]  # of every token id in the columns


def read_rollouts(path: Path) -> SavedRollouts:
    """Return the rollouts of three files, which have the suffixes .jsonl, .safetensors and .tokens.json."""
    columns = read_columns(path.with_suffix(".safetensors"))
    rows = read_rows(path.with_suffix(".jsonl"), ROLLOUT, (object,), growing=False)
    texts_path = path.with_suffix(".tokens.json")
    texts = {name: text for name, text in read_object(texts_path, {}, (str,)).items() if name.isdecimal()}
    size, length = columns["mask"].shape
    if len(rows) != size:
        raise Refusal(f"{path.with_suffix('.jsonl')}: {len(rows)} rollouts, and its columns have {size}; {REMEDY}")
    for i, row in enumerate(rows, 1):
        turns = row["prompt"] if isinstance(row["prompt"], list) else []
        if not (0 <= row["tokens"] <= length and all(isinstance(turn, dict) for turn in turns)):
            raise Refusal(f"{path.with_suffix('.jsonl')}, line {i}: its prompt or tokens are not a rollout's; {REMEDY}")
    ids = [columns[name].unique() for name in ("ids", "alternatives_ids") if name in columns]
    if absent := set(map(str, torch.cat(ids).tolist())) - texts.keys():
        raise Refusal(f"{texts_path}: the text of token {min(absent)} is missing; {REMEDY}")
    return SavedRollouts(rows, columns, {int(name): text for name, text in texts.items()})


def read_object(path: Path, required: Mapping[str, Types], other: Types = (object,)) -> Row:
    """Return the object of a JSON file, whose values have the `required` types by key, or else an `other` type."""
    return _object(_text(path), str(path), required, other)


def read_rows(path: Path, required: Mapping[str, Types], other: Types, *, growing: bool) -> list[Row]:
    """Return the objects of a file of JSON lines, with types as in `read_object`.

    The last line of a `growing` log may be incomplete, because a running job is writing it, and is then left out.
    """
    *lines, rest = _text(path).split("\n")
    if (rest or not lines) and not growing:
        raise Refusal(f"{path}, line {len(lines) + 1}: the end of the line is missing; {REMEDY}")
    if "\0" in rest:  # a power cut leaves a tail of zeros
        raise Refusal(f"{path}, line {len(lines) + 1}: {one_line(repr(rest), 60)} is no line; {REMEDY}")
    return [_object(line, f"{path}, line {i}", required, other) for i, line in enumerate(lines, 1)]


def read_columns(path: Path, names: Sequence[str] = ()) -> dict[str, Tensor]:
    """Return columns of saved rollouts: all of them, or `mask` and the named ones that exist."""
    try:
        columns = load_tensors(path, ("mask", *names) if names else ())
    except Exception as error:  # safetensors raises several types, and the disk others
        raise Refusal(f"{path}: cannot be read: {one_line(error)}; {REMEDY}") from error
    if missing := {"mask", *(() if names else ("ids",))} - columns.keys():
        raise Refusal(f"{path}: the column {min(missing)} is missing; {REMEDY}")
    shape = columns["mask"].shape
    for name, x in columns.items():
        fits = x.shape[:2] == shape if x.ndim > 1 and name != "stage_scores" else x.shape[:1] == shape[:1]
        if not fits or x.ndim < DIMENSIONS.get(name, 1) or x.dtype not in DTYPES.get(name, (x.dtype,)):
            raise Refusal(f"{path}: {name} is {x.dtype} {list(x.shape)}, and the mask {list(shape)}; {REMEDY}")
    return columns


def _text(path: Path) -> str:
    """Return the text of a file."""
    if os.path.lexists(path) and not path.is_file():
        raise Refusal(f"{path}: is a folder or a link to nothing, and not a file; {REMEDY}")
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise Refusal(f"{path}, byte {error.start}: is not UTF-8 text; {REMEDY}") from error
    except OSError as error:
        raise Refusal(f"{path}: {error.strerror or error}; {REMEDY}") from error


def _object(text: str, place: str, required: Mapping[str, Types], other: Types) -> Row:
    """Parse an object and check its values; `place` begins the messages."""
    try:
        row = json_text.parse(text)
    except ValueError as error:
        raise Refusal(f"{place}: cannot be read: {one_line(error)}: {one_line(text, 60)!r}; {REMEDY}") from error
    if not isinstance(row, dict):
        raise Refusal(f"{place}: {one_line(text, 60)!r} is not an object; {REMEDY}")
    if missing := sorted(required.keys() - row.keys()):
        raise Refusal(f"{place}: {missing[0]} is missing; {REMEDY}")
    for name, value in row.items():
        types = required.get(name, other)
        if not isinstance(value, types) or (isinstance(value, bool) and not {bool, object} & {*types}):
            kinds = " or ".join(t.__name__ for t in types)
            raise Refusal(f"{place}: {one_line(name, 60)} is {one_line(repr(value), 60)}, and not {kinds}; {REMEDY}")
        if isinstance(value, int) and abs(value) >= LARGEST:
            raise Refusal(f"{place}: {one_line(name, 60)} is a number of {len(str(value))} digits; {REMEDY}")
    return row
