"""Files of rows, `read_file(path) -> rows`: JSON, CSV, Parquet and Arrow, without a change of type or text.

Readers that infer the type of a column rewrite its values: 2020-01-01 becomes a time, 0.1000 becomes 0.1, and 1 beside
a missing value becomes 1.0.  Here a JSON value keeps its type, a JSON number keeps its digits, and a CSV field is text.
"""

import copy
import csv
import gzip
import io
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import pyarrow
import pyarrow.compute
import pyarrow.parquet

from opd.core import json_text
from opd.core.errors import Refusal

Row = Mapping[str, Any]
Binary: TypeAlias = io.BufferedReader | gzip.GzipFile
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
CSV_CHUNK = 1_000  # rows of a CSV file that are Python objects at the same time
_BLANK = re.compile(r"[ \t\n\r]*")


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

    A row stays text until it is accessed, so that a file takes about its size in memory.
    """

    items: Sequence[bytes | Row]
    column_names: Sequence[str]  # of all rows together; a row has None in a column that it lacks

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Row:
        item = self.items[index]
        return dict.fromkeys(self.column_names) | (parse_json(item) if isinstance(item, bytes) else dict(item))

    def __iter__(self) -> Iterator[Row]:
        return (self[i] for i in range(len(self)))

    def select(self, indices: Sequence[int]) -> "JsonRows":
        return JsonRows([self.items[i] for i in indices], self.column_names)

    def select_columns(self, column_names: Sequence[str]) -> "JsonRows":
        """Return the same rows: a row is parsed as a whole."""
        return self


Rows: TypeAlias = datasets.Dataset | JsonRows


def parse_json(text: str | bytes) -> Any:
    """Parse JSON; numbers keep their digits."""
    return json_text.parse(text, parse_float=Number)


def file_kind(path: Path) -> str:
    """Return the suffix that tells a file's format: .csv for rows.CSV.gz."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def read_file(path: Path) -> Rows:
    """Read one file, gzipped or not.  Raises Refusal, with the place, for text that is not the file's format."""
    kind = file_kind(path)
    if kind not in SUFFIXES:
        raise Refusal(
            f"--prompts {path} is not a {', '.join(SUFFIXES)} file (or .gz of one): convert it to one of these"
        )
    with path.open("rb") as file:  # not by its path: `datasets` takes brackets and :: for a pattern
        if kind in (".parquet", ".arrow"):
            return _arrow_rows(file, kind)
        is_gzip = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        content: Binary = gzip.GzipFile(fileobj=file) if is_gzip else file
        if not any(line.strip() for line in content):
            raise Refusal(f"--prompts {path} could not be read: the file is empty")
        content.seek(0)
        try:
            return _csv_rows(path, content, kind) if kind in (".csv", ".tsv") else _json_rows(path, content)
        except UnicodeDecodeError as error:
            raise Refusal(f"--prompts {path} is not UTF-8 text ({error}): convert it to UTF-8") from error


def joined(parts: Sequence[Rows]) -> Rows:
    """Return the rows of several files in a row."""
    tables = [part for part in parts if isinstance(part, datasets.Dataset)]
    if len(tables) == len(parts):
        return datasets.concatenate_datasets(tables)
    names = dict.fromkeys(name for part in parts for name in part.column_names)
    items = [item for part in parts for item in (part.items if isinstance(part, JsonRows) else part)]
    return JsonRows(items, list(names))


def undecoded(rows: Rows) -> Rows:
    """Return rows whose pictures and sounds stay bytes or paths: nothing reads them, and a file may be missing."""
    if isinstance(rows, datasets.Dataset):
        rows = copy.deepcopy(rows)  # of the columns' types; the table is shared
        _stop_decoding(rows.info.features)
    return rows


def _stop_decoding(feature: Any) -> None:
    """Switch the decoding of media off, in the type of a column and in all types inside it."""
    if isinstance(feature, dict):
        for inside in feature.values():
            _stop_decoding(inside)
    elif isinstance(feature, list):
        _stop_decoding(feature[0])
    elif hasattr(feature, "feature"):  # a list
        _stop_decoding(feature.feature)
    elif hasattr(feature, "decode"):
        feature.decode = False


def _dataset(table: pyarrow.Table) -> datasets.Dataset:
    return datasets.Dataset(table, fingerprint="rows")  # without a fingerprint, `datasets` pickles the table for a hash


def _arrow_rows(file: Binary, kind: str) -> datasets.Dataset:
    """Read a Parquet or Arrow file.  Floats of 32 bits keep their digits: 0.1 does not become 0.10000000149011612."""
    if kind == ".parquet":
        table = pyarrow.parquet.read_table(file)
    else:
        is_stream = file.read(6) != b"ARROW1"
        file.seek(0)
        table = (pyarrow.ipc.open_stream if is_stream else pyarrow.ipc.open_file)(file).read_all()
    for i, field in enumerate(table.schema):
        if field.type == pyarrow.float32():
            text = pyarrow.compute.cast(table.column(i), pyarrow.string())
            table = table.set_column(i, field.name, pyarrow.compute.cast(text, pyarrow.float64()))
    return _dataset(table)


def _json_rows(path: Path, file: Binary) -> JsonRows:
    """Read JSON lines, a list of objects, an object, or a list under "data"; each file may contain any of them."""
    first = next(line for line in file if line.strip()).decode("utf-8-sig").strip()
    file.seek(0)
    if first.startswith("["):
        return _json_list(path, file.read().decode("utf-8-sig"))
    if not _is_json(first) and _is_json(text := file.read().decode("utf-8-sig")):
        return _unwrapped(parse_json(text))
    file.seek(0)
    items, names = [], dict[str, None]()
    for number, line in enumerate(file, 1):
        text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        if not text:
            continue
        try:
            row = parse_json(text)
        except (ValueError, RecursionError) as error:
            raise Refusal(
                f"--prompts {path}, line {number} is not JSON ({error}): {text[:80]!r}; correct it, with one object on "
                "each line"
            ) from error
        if not isinstance(row, dict):
            raise Refusal(f"--prompts {path}, line {number}: {text[:80]!r} is not an object with columns")
        items.append(text.encode())
        names.update(dict.fromkeys(row))
    return JsonRows(items, list(names)) if len(items) > 1 else _unwrapped(row)


def _is_json(text: str) -> bool:
    try:
        return isinstance(parse_json(text), dict)
    except (ValueError, RecursionError):
        return False


def _unwrapped(document: Row) -> JsonRows:
    """Return the rows of a file with a single object: those under "data", or the object as a row."""
    rows = document.get("data")
    if not (isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows)):
        rows = [document]
    return JsonRows(rows, list(dict.fromkeys(name for row in rows for name in row)))


def _json_list(path: Path, text: str) -> JsonRows:
    """Read a list of objects; each object is parsed alone, so that the list as a whole never takes memory."""
    decoder, items, names = json.JSONDecoder(parse_float=Number), list[bytes](), dict[str, None]()
    skip = lambda position: _BLANK.match(text, position).end()  # type: ignore[union-attr]
    position = skip(text.index("[") + 1)
    try:
        while not (text.startswith("]", position) and not items):
            row, end = decoder.raw_decode(text, position)
            if not isinstance(row, dict):
                shown = text[position:end][:80]
                raise Refusal(f"--prompts {path}: item {len(items)} is {shown!r}, not an object with columns")
            json_text.check(row, text[position:end])
            items.append(text[position:end].encode())
            names.update(dict.fromkeys(row))
            position = skip(end)
            if not text.startswith(",", position):
                break
            position = skip(position + 1)
        if not text.startswith("]", position):
            raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
        if skip(position + 1) < len(text):
            raise json.JSONDecodeError("Extra data behind the list", text, position + 1)
    except Refusal:
        raise
    except (ValueError, RecursionError) as error:
        raise Refusal(f"--prompts {path}: item {len(items)} is not JSON ({error}): correct this place") from error
    return JsonRows(items, list(names))


def _csv_rows(path: Path, file: Binary, kind: str) -> datasets.Dataset:
    """Read a table as text.  A row with more or fewer fields than columns is refused: its values would shift."""
    csv.field_size_limit(sys.maxsize)
    with io.TextIOWrapper(file, "utf-8-sig", newline="") as text:
        header = next(line for line in text if line.strip())
        text.seek(0)
        marks = "\t" if kind == ".tsv" else ",;\t|"
        separator = next((mark for mark in marks if mark in header), ",")
        reader = csv.reader(text, strict=True, delimiter=separator, skipinitialspace=f"{separator} " in header)
        tables, rows, count = list[pyarrow.Table](), list[list[str]](), 0
        try:
            names = [name.strip() for name in next(fields for fields in reader if "".join(fields).strip())]
            for fields in reader:
                if len(fields) < min(2, len(names)) and not "".join(fields).strip():
                    continue
                if len(fields) != len(names):
                    raise Refusal(
                        f"--prompts {path}, row {count} (line {reader.line_num}) has {len(fields)} fields, and the "
                        f"header has {len(names)} columns ({', '.join(names)}): {short_fields(fields)}; quote a field "
                        f'that contains {separator!r}, and write a quote inside it twice ("")'
                    )
                rows.append(fields)
                count += 1
                if len(rows) == CSV_CHUNK:
                    tables.append(_text_table(path, names, rows))
                    rows = []
        except csv.Error as error:
            raise Refusal(
                f'--prompts {path}, line {reader.line_num}: {error}; write a quote inside a quoted field twice ("")'
            ) from error
    return _dataset(pyarrow.concat_tables([*tables, _text_table(path, names, rows)]))


def _text_table(path: Path, names: Sequence[str], rows: Sequence[Sequence[str]]) -> pyarrow.Table:
    """Return rows as columns of text, without columns that have no name: row numbers by pandas, and empty ones."""
    columns = list(zip(*rows, strict=True)) or [()] * len(names)
    for i, name in enumerate(names):
        if names.count(name) > 1 and name:
            raise Refusal(f"--prompts {path}: two columns have the name {name!r}; rename one")
        if not name and any(value and not (i == 0 and value.isdigit()) for value in columns[i]):
            raise Refusal(f"--prompts {path}: column {i + 1} has no name in the header; give it one, or remove it")
    named = {name: column for name, column in zip(names, columns, strict=True) if name}
    return pyarrow.table({name: pyarrow.array(column, pyarrow.string()) for name, column in named.items()})


def short_fields(fields: Sequence[str]) -> str:
    """Return the fields of a row as text for a message."""
    return ", ".join(repr(field[:30]) for field in fields[:6])
