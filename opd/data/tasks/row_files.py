"""Files of rows, `read_file(path) -> rows`: .jsonl, .json, .csv and .parquet, without a change of type or text.

Readers that infer the type of a column rewrite its values: 2020-01-01 becomes a time, 0.1000 becomes 0.1, and 1 beside
a missing value becomes 1.0.  Here a JSON value keeps its type, a JSON number keeps its digits, and a CSV field is text.
"""

import csv
import io
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import pyarrow.parquet

from opd.core.errors import Refusal

Row = Mapping[str, Any]
SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")


class Number(float):
    """A JSON number with a fraction or an exponent; its text is that of the file, such as 0.1000 or 1e400."""

    text: str

    def __new__(cls, text: str) -> "Number":
        number = super().__new__(cls, text)
        number.text = text
        return number

    def __reduce__(self) -> tuple[Any, ...]:
        return Number, (self.text,)

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class JsonRows:
    """Rows of JSON files, with the part of the interface of `datasets.Dataset` that tasks use.

    A row of a .jsonl file stays text until it is accessed.
    """

    items: Sequence[str | Row]
    column_names: Sequence[str]  # of all rows together; a row has None in a column that it lacks

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Row:
        item = self.items[index]
        return dict.fromkeys(self.column_names) | (parse_json(item) if isinstance(item, str) else dict(item))

    def __iter__(self) -> Iterator[Row]:
        return (self[i] for i in range(len(self)))

    def select(self, indices: Sequence[int]) -> "JsonRows":
        return JsonRows([self.items[i] for i in indices], self.column_names)

    def select_columns(self, column_names: Sequence[str]) -> "JsonRows":
        """Return the same rows: a row is parsed as a whole."""
        return self


Rows: TypeAlias = datasets.Dataset | JsonRows


def parse_json(text: str) -> Any:
    """Parse JSON; numbers keep their digits."""
    return json.loads(text, parse_float=Number)


def read_file(path: Path) -> Rows:
    """Read one file.  Raises Refusal, with the place, for text that is not the file's format."""
    if path.suffix not in SUFFIXES:
        raise Refusal(f"--prompts {path} is not a {', '.join(SUFFIXES)} file: convert it to one of these")
    if path.suffix == ".parquet":
        with path.open("rb") as file:  # not by its path: `datasets` takes brackets and :: for a pattern
            return datasets.Dataset(pyarrow.parquet.read_table(file))
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refusal(f"--prompts {path} is not UTF-8 text ({error}): convert it to UTF-8") from error
    if not text.strip():
        raise Refusal(f"--prompts {path} could not be read: the file is empty")
    return _csv_rows(path, text) if path.suffix == ".csv" else _json_rows(path, text)


def joined(parts: Sequence[Rows]) -> Rows:
    """Return the rows of several files in a row."""
    tables = [part for part in parts if isinstance(part, datasets.Dataset)]
    if len(tables) == len(parts):
        return datasets.concatenate_datasets(tables)
    names = dict.fromkeys(name for part in parts for name in part.column_names)
    items = [item for part in parts for item in (part.items if isinstance(part, JsonRows) else part)]
    return JsonRows(items, list(names))


def _json_rows(path: Path, text: str) -> JsonRows:
    """Read JSON lines, or a list of objects; a .json file may contain either."""
    if text.lstrip().startswith("["):
        try:
            items = parse_json(text)
        except ValueError as error:
            raise Refusal(f"--prompts {path} is not JSON ({error}): correct this place") from error
        for i, item in enumerate(items):
            if not isinstance(item, dict):
                raise Refusal(f"--prompts {path}: item {i} is {str(item)[:80]!r}, not an object with columns")
        return JsonRows(items, list(dict.fromkeys(name for item in items for name in item)))
    lines, names = [], dict[str, None]()
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise Refusal(
                f"--prompts {path}, line {number} is not JSON ({error}): {line.strip()[:80]!r}; correct it, with one "
                "object on each line"
            ) from error
        if not isinstance(row, dict):
            raise Refusal(f"--prompts {path}, line {number}: {line.strip()[:80]!r} is not an object with columns")
        lines.append(line)
        names.update(dict.fromkeys(row))
    return JsonRows(lines, list(names))


def _csv_rows(path: Path, text: str) -> datasets.Dataset:
    """Read a .csv file as text.  A row with more or fewer fields than columns is refused: its values would shift."""
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[list[str]] = []
    try:
        names = next(reader)
        for fields in filter(None, reader):
            if len(fields) != len(names):
                raise Refusal(
                    f"--prompts {path}, row {len(rows)} (line {reader.line_num}) has {len(fields)} fields, and the "
                    f"header has {len(names)} columns ({', '.join(names)}): {short_fields(fields)}; quote a field that "
                    'contains a comma, and write a quote inside it twice ("")'
                )
            rows.append(fields)
    except csv.Error as error:
        raise Refusal(
            f'--prompts {path}, line {reader.line_num}: {error}; write a quote inside a quoted field twice ("")'
        ) from error
    columns = list(zip(*rows, strict=True)) or [()] * len(names)
    for i, name in enumerate(names):
        if names.count(name) > 1 and name:
            raise Refusal(f"--prompts {path}: two columns have the name {name!r}; rename one")
        if not name and i and any(columns[i]):
            raise Refusal(f"--prompts {path}: column {i + 1} has no name in the header; give it one, or remove it")
    # The first column of a file by pandas' `to_csv` has no name: it numbers the rows.
    named = {name: column for name, column in zip(names, columns, strict=True) if name}
    return datasets.Dataset.from_dict(named, features=datasets.Features(dict.fromkeys(named, datasets.Value("string"))))


def short_fields(fields: Sequence[str]) -> str:
    """Return the fields of a row as text for a message."""
    return ", ".join(repr(field[:30]) for field in fields[:6])
