"""Tables, `table(data) -> Task`: rows of files, folders and hub datasets, and the prompts made of their columns."""

import csv
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from string import ascii_uppercase as LETTERS
from typing import Any

import datasets

from opd.config.data import Data
from opd.core.disk import nearest
from opd.core.errors import Refusal
from opd.core.sampling import Prompt
from opd.data import hub
from opd.data.tasks.task import LazyPrompts, Task, by_answer, make_prompt
from opd.data.verifiers.verify import VERIFIERS, find

datasets.disable_progress_bars()  # reading a table is quick, and its bars drown the lines that matter
KINDS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
Row = Mapping[str, Any]
ROLES = ("prompt", "answer", "response", "choices")
Columns = Mapping[str, str]  # the selected column for each of ROLES; "" for a missing column


def table(data: Data, dataset: datasets.Dataset | None = None) -> Task:
    """Make a task of `data.limit` rows of a file, folder or hub dataset, or of `dataset`, scored against their answers.

    Each prompt is made when it is accessed.  Raises Refusal for a missing column, an empty prompt, or answers that are
    all missing or that the verifier cannot read.
    """
    score, rows, scored = find(data.verifier), dataset or read(data), data.verifier != "none"
    needs_answers = scored and data.verifier in VERIFIERS
    columns = _select_columns(rows, data, needs_answers=needs_answers)
    row_numbers: Sequence[int] = range(len(rows))
    if 0 < data.limit < len(rows):
        order = list(row_numbers)
        random.Random(data.seed).shuffle(order)
        row_numbers = sorted(order[: data.limit])
        rows = rows.select(row_numbers)
    _check(rows, row_numbers, columns, data.source, needs_answers=needs_answers)
    prompts = LazyPrompts(partial(_prompt, rows, columns, data), len(rows))
    for i in range(0, len(prompts) if needs_answers else 0, 1 + len(prompts) // 200):
        answer = prompts[i].answer
        if answer and not score(answer, answer):  # a score that is always 0 may not be noticed for days
            raise Refusal(
                f"--verifier {data.verifier} cannot read the expected answer {answer[:80]!r} of prompt {i} of"
                f" {data.source}; choose another verifier or answer_column"
            )
    path = Path(data.source).expanduser()
    name = path.stem if path.is_file() else path.name if path.is_dir() else data.source
    return Task(name=name, prompts=prompts, verify=partial(by_answer, score), scored=scored, by_answer=scored)


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


def _select_columns(rows: datasets.Dataset, data: Data, *, needs_answers: bool) -> Columns:
    """Select the columns by the values in the first row, as described in the help of each flag."""
    available = f"the columns are {', '.join(rows.column_names)}"
    fits = {"prompt": _is_question, "answer": lambda value: bool(_text(value, ", ").strip())}
    wanted = {role: str(getattr(data, f"{role}_column")) for role in ROLES}
    columns = {role: _pick(rows[0], names, fits.get(role, lambda value: True)) for role, names in wanted.items()}
    if not columns["prompt"]:
        raise Refusal(
            f"--prompt-column {data.prompt_column}: no such column with text or chat messages; {available}; name one"
        )
    for role, names in wanted.items():
        if names and "," not in names and not columns[role]:
            raise Refusal(f"--{role}-column {names} is not there; {available}")
    if needs_answers and not columns["answer"]:
        raise Refusal(
            f"--answer-column {data.answer_column}: not there, or empty in the first row, and"
            f" --verifier {data.verifier} needs answers; {available}; name one, or --verifier none"
        )
    return columns


def _pick(row: Row, wanted: str, fits: Callable[[object], bool]) -> str:
    """Return the first of some comma-separated names whose value fits; a single name only has to exist."""
    names = [name.strip() for name in wanted.split(",")]
    existing = [name for name in names if name in row or _value_at(row, name) is not None]
    return next((name for name in existing if len(names) == 1 or fits(_value_at(row, name))), "")


def _value_at(row: Row, name: str) -> Any:
    """Return the value of a column or of a nested field (reward_model.ground_truth); None if it is missing."""
    if name in row:
        return row[name]
    value: object = row
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _check(
    rows: datasets.Dataset, row_numbers: Sequence[int], columns: Columns, source: str, *, needs_answers: bool
) -> None:
    """Refuse rows without a valid prompt, and data whose answers are all missing; warn if some answers are missing."""
    top_names = {name if name in rows.column_names else name.partition(".")[0] for name in columns.values() if name}
    without_prompt, without_answer = [], []
    for number, row in zip(row_numbers, rows.select_columns(sorted(top_names)), strict=True):
        value = _value_at(row, columns["prompt"])
        if value is not None and not _is_question(value):
            raise Refusal(
                f"--prompt-column {columns['prompt']}, row {number} of {source}: {str(value)[:80]!r} is neither text"
                ' nor a list of {"role": ..., "content": text}; name another column or correct the row'
            )
        last = value if isinstance(value, str) else ([{"content": ""}, *_without_reply(value or ())])[-1]["content"]
        if not last.strip():
            without_prompt.append(number)
        if needs_answers and not _text(_value_at(row, columns["answer"]), ", ").strip():
            without_answer.append(number)
    if without_prompt:
        raise Refusal(
            f"--prompt-column {columns['prompt']}: {len(without_prompt)} of {len(rows)} rows have an empty prompt, the"
            f" first is row {without_prompt[0]} of {source}; remove these rows"
        )
    if len(without_answer) == len(rows):
        raise Refusal(
            f"--answer-column {columns['answer']} is empty in all {len(rows)} rows of {source}; name another column,"
            " or set verifier to none"
        )
    if without_answer:
        warnings.warn(
            f"{len(without_answer)} of {len(rows)} rows of {source} have no answer in {columns['answer']!r}, the first"
            f" is row {without_answer[0]}: whatever the response, they score 0",
            stacklevel=2,
        )


def _prompt(rows: datasets.Dataset, columns: Columns, data: Data, index: int) -> Prompt:
    """Make the prompt of a row; its unselected columns are kept in `Prompt.columns`."""
    row = rows[index]
    question, value = _value_at(row, columns["prompt"]), _value_at(row, columns["answer"])
    labels, texts = _options(_value_at(row, columns["choices"]))
    answer = _text(value, ", ")
    if isinstance(value, int) and 0 <= value < len(texts):
        answer = LETTERS[value]
    elif answer in (*labels, *texts):
        answer = LETTERS[(labels if answer in labels else texts).index(answer)]
    response = _text(_value_at(row, columns["response"]), "\n\n")
    if not isinstance(question, str):
        response = response or _text(question[len(_without_reply(question)) :], "\n\n")
        question = _without_reply(question)
    return make_prompt(
        question,
        data,
        options="\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, texts, strict=False)),
        answer=answer,
        response=response,
        columns={name: value for name, value in row.items() if name not in columns.values()},
    )


def _is_question(value: object) -> bool:
    """Return whether a value is text or a list of chat turns."""
    if not isinstance(value, list):
        return isinstance(value, str)
    turns = [turn if isinstance(turn, dict) else {} for turn in value]
    return all(isinstance(turn.get(key), str) for turn in turns for key in ("role", "content"))


def _without_reply(turns: Sequence[Row]) -> tuple[Row, ...]:
    """Return the turns without a closing assistant turn."""
    end = len(turns) - 1 if turns and turns[-1]["role"] == "assistant" else len(turns)
    return tuple({"role": t["role"], "content": t["content"]} for t in turns[:end])


def _options(value: object) -> tuple[list[str], list[str]]:
    """Return the labels (empty if the data has none) and the texts of the options of a multiple-choice question."""
    if isinstance(value, dict):
        return [_text(label, "") for label in value.get("label") or []], [_text(t, "") for t in value.get("text") or []]
    return [], [_text(t, "") for t in value] if isinstance(value, list) else []


def _text(value: object, joint: str) -> str:
    """Return a value as text: 27.0 becomes 27, a list is joined, a chat turn becomes its content, None becomes ""."""
    if isinstance(value, list | tuple):
        return joint.join(_text(item, joint) for item in value)
    if isinstance(value, dict):
        return _text(value["content"], joint) if "content" in value else str(value)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return "" if value is None else str(value)
