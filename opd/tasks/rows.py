"""Prompts from the rows of a table: `prompts(rows, data) -> Made`, the columns chosen and every row checked."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import datasets

from opd.tasks.task import Data, Made, ask
from opd.types import Prompt, Refusal

Row = Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The names of the columns that were chosen; "" where there is none."""

    prompt: str
    answer: str
    response: str
    choices: str


def prompts(rows: datasets.Dataset, data: Data, *, needs_answers: bool) -> Made:
    """Choose the columns, keep `data.limit` rows, check them; the prompts are made of them when asked for."""
    columns = choose(rows, data, needs_answers=needs_answers)
    kept: Sequence[int] = range(len(rows))
    if 0 < data.limit < len(rows):
        order = list(kept)
        random.Random(data.seed).shuffle(order)
        kept = sorted(order[: data.limit])
        rows = rows.select(kept)
    made = Made(partial(prompt, rows, columns, data), len(rows))
    read = {name.partition(".")[0] if name not in rows.column_names else name for name in vars(columns).values()}
    checked = partial(prompt, rows.select_columns(sorted(read - {""})), columns, data)
    blank, unanswered = [], []
    for i, row in enumerate(kept):
        try:
            one = checked(i)
        except Refusal as refusal:
            raise Refusal(f"source={data.source!r}, row {row}: {refusal}") from None
        if not (one.columns[QUESTION].strip()):
            blank.append(row)
    return made


def choose(rows: datasets.Dataset, data: Data, *, needs_answers: bool) -> Columns:
    """Choose the columns by what the first row holds, as the help of each option says."""
    first, there = rows[0], f"the columns are {', '.join(rows.column_names)}"
    chosen = Columns(
        prompt=_pick(first, data.prompt_column, lambda value: isinstance(value, str) or _is_chat(value)),
        answer=_pick(first, data.answer_column, lambda value: bool(_text(value).strip())),
        response=_pick(first, data.response_column, lambda value: True),
        choices=_pick(first, data.choices_column, lambda value: True),
    )
