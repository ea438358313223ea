"""Tables, `table(data) -> Task`: rows of files, folders and hub datasets, and the prompts made of their columns."""

import random
import re
import tempfile
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets

from opd.config.data import Data
from opd.core.disk import nearest
from opd.core.errors import Refusal
from opd.core.sampling import Prompt
from opd.data import hub
from opd.data.tasks.answers import LETTERS, answer_texts, chosen, option_texts, value_text
from opd.data.tasks.conversation import Unusable, parse_turns, parsed, split_reply, without_nulls
from opd.data.tasks.row_files import SUFFIXES, Row, Rows, file_kind, joined, read_file, undecoded
from opd.data.tasks.task import LazyPrompts, Task, by_answer, make_prompt
from opd.data.verifiers.verify import VERIFIERS, find

datasets.disable_progress_bars()  # reading a table is quick, and its bars drown the lines that matter
ROLES = ("prompt", "answer", "response", "choices")
PATTERN = re.compile(r"[][*?]|::")  # marks in a path that `datasets` takes for a pattern or another file system
Columns = Mapping[str, str]  # the selected column for each of ROLES; "" for a missing column
# Usual names of columns that belong to a question, with what a user can do so that a model reads them.
MEDIA = dict.fromkeys(("image", "images", "audio", "audios", "video", "videos"), "models read the text of a row only")
OPTIONS = dict.fromkeys(("choices", "options", "endings"), "--choices-column shows its options")
OPTIONS |= dict.fromkeys(
    ("A", "option_a", "opa", "option1"), "--choices-column A+B+C, by your names, shows such options"
)
PASSAGES = dict.fromkeys(("input", "context", "passage"), "--prompt-column {name}+{prompt} joins the two")
TURNS = dict.fromkeys(("system", "system_prompt", "history", "functions"), "make turns of it in a column messages")
UNREAD = MEDIA | OPTIONS | PASSAGES | TURNS | {"input": "--prompt-column {prompt}+input joins the two"}


def table(data: Data, dataset: Rows | None = None) -> Task:
    """Make a task of `data.limit` rows of a file, folder or hub dataset, or of `dataset`, scored against their answers.

    Each prompt is made when it is accessed.  Raises Refusal for a missing column, an empty prompt, or answers that are
    all missing or that the verifier cannot read.
    """
    score, rows, scored = find(data.verifier), undecoded(dataset or read(data)), data.verifier != "none"
    needs_answers = scored and data.verifier in VERIFIERS
    columns = _select_columns(rows, data, needs_answers=needs_answers)
    row_numbers: Sequence[int] = range(len(rows))
    if 0 < data.limit < len(rows):
        order = list(row_numbers)
        random.Random(data.seed).shuffle(order)
        row_numbers = sorted(order[: data.limit])
        rows = rows.select(row_numbers)
    lengths = _check(rows, row_numbers, columns, data, needs_answers=needs_answers)
    prompts = LazyPrompts(partial(_prompt, rows, columns, data), len(rows), lengths)
    for i in range(0, len(prompts) if needs_answers else 0, 1 + len(prompts) // 200):
        for answer in filter(None, (prompts[i].answer, *prompts[i].other_answers)):
            if not score(answer, answer):  # a score that is always 0 may not be noticed for days
                raise Refusal(
                    f"--verifier {data.verifier} cannot read the expected answer {answer[:80]!r} of prompt {i} of"
                    f" {data.source}; choose another --verifier or --answer-column"
                )
    path = Path(data.source).expanduser()
    name = path.stem if path.is_file() else path.name if path.is_dir() else data.source
    return Task(name=name, prompts=prompts, verify=partial(by_answer, score), scored=scored, by_answer=scored)


def read(data: Data) -> Rows:
    """Load one split; a path that exists is read from disk, any other name on the hub or in its cache."""
    path, repository = Path(data.source).expanduser(), hub.Repository(*data.source.partition("@")[::2])
    if not path.exists():
        # Hub ids are NAME or OWNER/NAME, and a revision may hold slashes.
        if data.source.startswith((".", "/", "~")) or repository.id.count("/") > 1 or file_kind(path) in SUFFIXES:
            raise Refusal(f"--prompts {data.source} does not exist{nearest(path)}; correct the path")
        if ":" in data.source:
            raise Refusal(f"--prompts {data.source}: before a colon only embedded and reasoning-gym are known")
    try:
        if path.is_file():
            rows: Rows = read_file(path)
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


def _folder(path: Path, data: Data) -> Rows:
    """Read a folder that `save_to_disk` wrote, or one of data files, whose names give the splits."""
    if (path / "state.json").exists():
        return datasets.load_from_disk(str(path))
    if (path / "dataset_dict.json").exists():
        splits = datasets.load_from_disk(str(path))
        if data.split not in splits:
            raise Refusal(f"--split {data.split} is not in --prompts {data.source}, which has {', '.join(splits)}")
        return splits[data.split]
    files = [file for file in path.rglob("*") if file.is_file()]
    if not any(PATTERN.search(str(file)) for file in (path.resolve(), *files)):
        return _data_files(path, data, {})
    with tempfile.TemporaryDirectory() as folder:
        links = {Path(folder).resolve() / PATTERN.sub("_", str(file.relative_to(path))): file for file in files}
        for link, file in links.items():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file.absolute())
        return _data_files(Path(folder), data, links)


def _data_files(folder: Path, data: Data, links: Mapping[Path, Path]) -> Rows:
    """Read the files of a split in a folder; `links` has the files behind links whose names are no patterns."""
    files = datasets.load_dataset_builder(str(folder), data.subset or None).config.data_files or {}
    names = [Path(name) for name in files.get(data.split, ())]
    if not names:
        raise Refusal(
            f"--split {data.split}: no data file in --prompts {data.source} belongs to it"
            + (
                f"; its splits are {', '.join(map(str, files))}"
                if files
                else f"; files of rows are {', '.join(SUFFIXES)}"
            )
        )
    if other := [name.name for name in names if file_kind(name) not in SUFFIXES]:
        raise Refusal(
            f"--prompts {data.source}, --split {data.split}: {other[0]} has no rows that can be read; keep files of "
            f"the kinds {', '.join(SUFFIXES)}"
        )
    kinds = {file_kind(name) for name in names}
    unread = sorted(file.name for file in folder.iterdir() if file_kind(file) in {*SUFFIXES} - kinds)
    if unread := [name for name in unread if not name.startswith((".", "_"))]:
        warnings.warn(f"{data.source}: only {', '.join(sorted(kinds))} files are read, not {unread[0]}", stacklevel=2)
    return joined([read_file(links.get(name, name)) for name in names])


def _select_columns(rows: Rows, data: Data, *, needs_answers: bool) -> Columns:
    """Select the columns by the values in the first row, as described in the help of each flag."""
    available = f"the columns are {', '.join(rows.column_names)}"
    fits = {"prompt": lambda value: not _reason(value), "answer": lambda value: value_text(value).strip() != ""}
    wanted = {role: str(getattr(data, f"{role}_column")) for role in ROLES}
    columns = {role: _pick(rows[0], names, fits.get(role, lambda value: True)) for role, names in wanted.items()}
    existing = [name for name in wanted["prompt"].split(",") if name in rows.column_names]
    if not columns["prompt"] and existing:
        raise Refusal(
            f"--prompt-column {existing[0]}, row 0 of {data.source}: {_reason(rows[0][existing[0]])}; correct the row, "
            f"or name another column; {available}"
        )
    if not columns["prompt"]:
        raise Refusal(
            f"--prompt-column {data.prompt_column}: no such column with text or chat messages; {available}; name one"
        )
    for role, names in wanted.items():
        if names and "," not in names and not columns[role]:
            raise Refusal(f"--{role}-column {names} is not there; {available}")
    if needs_answers and not columns["answer"]:
        raise Refusal(
            f"--answer-column {data.answer_column}: {data.source} has no such column, or nothing there in its first "
            f"row, and --verifier {data.verifier} needs answers; {available}; name one, or train without scores by "
            "--verifier none"
        )
    return columns


def _pick(row: Row, wanted: str, fits: Callable[[object], bool]) -> str:
    """Return the first of some comma-separated names whose value fits; a single name only has to exist."""
    names = [name.strip() for name in wanted.split(",")]
    existing = [
        x for x in names if x in row or ("+" in x and name_parts(x) <= row.keys()) or _value_at(row, x) is not None
    ]
    return next((name for name in existing if len(names) == 1 or fits(_value_at(row, name))), "")


def name_parts(name: str) -> set[str]:
    """Return the top-level columns that a name such as instruction+input or reward_model.ground_truth reads."""
    return {part.partition(".")[0] for part in name.split("+")} if name else set()


def _reason(value: object) -> str:
    """Return why a value is no question, or "" if it is text or a conversation."""
    try:
        parse_turns(value)
    except Unusable as reason:
        return str(reason)
    return ""


def _value_at(row: Row, name: str) -> Any:
    """Return the value of a column or of a nested field (reward_model.ground_truth); None if it is missing."""
    if name in row:
        return row[name]
    if "+" in name:
        values = [_value_at(row, part) for part in name.split("+")]
        texts = [value for value in values if isinstance(value, str) and value.strip()]
        return "\n\n".join(texts) if isinstance(values[0], str) and name_parts(name) <= row.keys() else None
    value: object = row
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _check(rows: Rows, row_numbers: Sequence[int], columns: Columns, data: Data, *, needs_answers: bool) -> list[int]:
    """Return the length of each prompt in bytes.

    Raises Refusal for a row without a valid prompt or answer, and for data whose answers are all missing.  Warns if
    some answers are missing, and of content that no model reads.
    """
    used = {part for name in columns.values() for part in _top_names(rows, name)}
    without_prompt, without_answer, lengths, unread = [], [], [], dict[str, int]()
    for number, row in zip(row_numbers, rows.select_columns(sorted(used)), strict=True):
        place = f"row {number} of {data.source}"
        value = _value_at(row, columns["prompt"])
        try:
            turns, reply = _question(rows, value if value is not None else "")
        except Unusable as reason:
            raise Refusal(
                f"--prompt-column {columns['prompt']}, {place}: {reason}; name another column or correct the row"
            ) from reason
        last = turns[-1] if turns else {"role": "", "content": ""}
        if last["role"] in ("system", "assistant"):
            raise Refusal(
                f"--prompt-column {columns['prompt']}, {place}: the conversation ends with "
                f"{'a system turn' if last['role'] == 'system' else 'two assistant turns'}, and no turn asks for a "
                "response; add a user turn, or remove the row"
            )
        if not last["content"].strip():
            without_prompt.append(number)
        for key in reply.keys() - {"role", "content"}:
            unread.setdefault(key, number)
        try:
            texts = _answers(row, columns)
        except Unusable as reason:
            role = "choices" if columns["choices"] else "answer"
            raise Refusal(f"--{role}-column {columns[role]}, {place}: {reason}") from reason
        if needs_answers and not texts:
            without_answer.append(number)
        try:
            lengths.append(sum(len("".join(map(str, turn.values())).encode()) for turn in turns))
        except UnicodeEncodeError as error:
            raise Refusal(
                f"--prompt-column {columns['prompt']}, {place}: {error}, and no tokenizer reads it; correct the row"
            ) from error
    if without_prompt:
        raise Refusal(
            f"--prompt-column {columns['prompt']}: {len(without_prompt)} of {len(rows)} rows have an empty prompt, the"
            f" first is row {without_prompt[0]} of {data.source}; remove these rows"
        )
    if len(without_answer) == len(rows):
        raise Refusal(
            f"--answer-column {columns['answer']} is empty in all {len(rows)} rows of {data.source}; name another"
            " column, or train without scores by --verifier none"
        )
    if without_answer:
        warnings.warn(
            f"{len(without_answer)} of {len(rows)} rows of {data.source} have no answer in {columns['answer']!r}, the"
            f" first is row {without_answer[0]}: whatever the response, they score 0",
            stacklevel=2,
        )
    _warn_of_unused(rows, columns, used, unread, data.source)
    _warn_of_inferred(rows, columns["answer"], data.source)
    return lengths


def _warn_of_unused(
    rows: Rows, columns: Columns, used: Collection[str], unread: Mapping[str, int], source: str
) -> None:
    """Warn of content that no model reads; `unread` has the keys of closing turns, each with its first row."""
    for key, number in unread.items():
        warnings.warn(
            f"{source}: the closing assistant turn of row {number} has {key!r}, which is not used: the reference"
            " response is the turn's content",
            stacklevel=2,
        )
    row = rows[0]
    is_text = isinstance(_value_at(row, columns["prompt"]), str)
    for name in [name for name in UNREAD if value_text(row.get(name)).strip() and name not in used]:
        if (name in OPTIONS and columns["choices"]) or (
            name in PASSAGES and not (is_text and isinstance(row[name], str))
        ):
            continue
        remedy = UNREAD[name].format(name=name, prompt=columns["prompt"])
        warnings.warn(f"{source}: column {name!r} is not used: {remedy}", stacklevel=2)
    first_answer = _value_at(row, columns["answer"])
    items = parsed(first_answer) if isinstance(first_answer, str) else None
    if isinstance(items, list) and items and all(isinstance(item, str) for item in items):
        warnings.warn(
            f"{source}: the answer {first_answer[:60]!r} is compared as this text; if it is a list of acceptable "
            "answers, write it as a list (in .jsonl or .parquet)",
            stacklevel=2,
        )


def _warn_of_inferred(rows: Rows, column: str, source: str) -> None:
    """Warn if `datasets` read the answers from JSON or CSV and may have changed their text: hub and saved datasets."""
    if not isinstance(rows, datasets.Dataset) or column not in rows.column_names:
        return
    dtype = getattr(rows.features[column], "dtype", "")
    kept = {"json": ("", "string", "bool", "int64"), "csv": ("", "string")}.get(str(rows.info.builder_name), (dtype,))
    if dtype not in kept:
        warnings.warn(
            f"{source}: `datasets` read the column {column!r} as {dtype}, which changes texts such as 007 and 1.50; to "
            "keep them, download the files (hf download --repo-type dataset) and name their folder",
            stacklevel=2,
        )


def _top_names(rows: Rows, name: str) -> set[str]:
    return {name} if name in rows.column_names else name_parts(name)


def _question(rows: Rows, value: object) -> tuple[tuple[Mapping[str, Any], ...], Mapping[str, Any]]:
    """Return the turns of a question, without the closing assistant turn, and that turn; text is one turn."""
    question = parse_turns(without_nulls(value) if isinstance(rows, datasets.Dataset) else value)
    return split_reply([{"role": "user", "content": question}] if isinstance(question, str) else question)


def _answers(row: Row, columns: Columns) -> tuple[str, ...]:
    """Return the acceptable answers of a row; that of a multiple-choice question is a letter."""
    value = _value_at(row, columns["answer"])
    labels, texts = option_texts(_options(row, columns))
    return chosen(value, labels, texts) if texts else answer_texts(value)


def _options(row: Row, columns: Columns) -> Any:
    """Return the options of a row: those of a column, or those in several columns, such as A+B+C+D."""
    name = columns["choices"]
    return {part: _value_at(row, part) for part in name.split("+")} if "+" in name else _value_at(row, name)


def _prompt(rows: Rows, columns: Columns, data: Data, index: int) -> Prompt:
    """Make the prompt of a row; its unselected columns are kept in `Prompt.columns`."""
    row = rows[index]
    value = _value_at(row, columns["prompt"])
    turns, reply = _question(rows, value)
    _, texts = option_texts(_options(row, columns))
    answer, *other_answers = _answers(row, columns) or ("",)
    used = {part for name in columns.values() if "." not in name or name in row for part in _top_names(rows, name)}
    return make_prompt(
        value if value == turns[0]["content"] else turns,
        data,
        options="\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, texts, strict=False)),
        answer=answer,
        other_answers=tuple(other_answers),
        response=value_text(_value_at(row, columns["response"]), "\n\n") or reply["content"],
        columns={name: value for name, value in row.items() if name not in used},
    )
