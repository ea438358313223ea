r"""Benchmarks by name, `load(name, Data(...)) -> Task`: columns, instruction and verifier for the rows of a local file.

A benchmark is a set of `Data` settings, which the user's settings override.  The instruction after each question and
the number of samples (8 per problem, 32 for AIME) are those of papers on on-policy distillation (vOPD,
arXiv:2605.07865; PowerOPD, arXiv:2606.17199).
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from opd.config.data import Data
from opd.core.errors import Refusal
from opd.data.tasks.task import Task

if TYPE_CHECKING:
    from opd.data.tasks.row_files import JsonRows, Rows

BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."
LETTER = "\nPlease reason step by step, and put the letter of your answer within \\boxed{}."
OPTIONS = "options"  # the column into which `_gather` merges options from several columns


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """The settings of a benchmark; `columns` are fields of `Data`."""

    what: str
    columns: Mapping[str, str]
    verifier: str = "math"
    instruction: str = BOXED
    samples: int = 8
    gathered: tuple[str, ...] = ()  # columns with an option each, the correct option first; `_gather` merges them


def _columns(prompt: str, answer: str, choices: str = "") -> Mapping[str, str]:
    return {"prompt_column": prompt, "answer_column": answer, "choices_column": choices}


BENCHMARKS: Mapping[str, Benchmark] = {
    "gsm8k": Benchmark(
        what="GSM8K, openai/grade-school-math: the answer ends in #### n",
        columns=_columns("question", "answer"),
        verifier="numeric",
        samples=1,
    ),
    "math-500": Benchmark(what="MATH-500 of openai/prm800k", columns=_columns("problem", "answer")),
    "aime24": Benchmark(what="AIME 2024, 30 problems", columns=_columns("problem", "answer"), samples=32),
    "aime25": Benchmark(
        what="AIME 2025, 30 problems",
        columns={**_columns("problem", "expected_answer,answer"), "response_column": "reference_solution,solution"},
        samples=32,
    ),
    "amc23": Benchmark(what="AMC 2023, 40 problems", columns=_columns("problem,question", "answer")),
    "minerva": Benchmark(
        what="Minerva Math, 272 problems: the answer is boxed in the solution", columns=_columns("problem", "solution")
    ),
    "olympiad": Benchmark(what="OlympiadBench, the text-only problems", columns=_columns("question", "final_answer")),
    "gpqa": Benchmark(
        what="GPQA, its csv: the right and three wrong answers in columns, shuffled by --seed",
        columns=_columns("Question", "Correct Answer"),
        verifier="choice",
        instruction=LETTER,
        gathered=("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"),
    ),
    "sciknoweval": Benchmark(
        what="SciKnowEval, multiple choice",
        columns=_columns("question", "answerKey", "choices"),
        verifier="choice",
        instruction=LETTER,
    ),
    "sciknoweval-filling": Benchmark(
        what="SciKnowEval, answers in words and formulas", columns=_columns("question", "answer"), verifier="exact"
    ),
}


def find(name: str) -> Benchmark:
    """Return the benchmark with this name.  Raises Refusal for an unknown name."""
    if name not in BENCHMARKS:
        raise Refusal(
            f"--set {name} is not known: choose {', '.join(BENCHMARKS)}; or leave it out and name the columns"
        )
    return BENCHMARKS[name]


def load(name: str, data: Data) -> Task:
    """Make the task of a benchmark from its file; its settings fill all fields that the user left at their defaults.

    Raises Refusal if the source or a column does not fit.
    """
    chosen = find(name)
    fields: dict[str, Any] = {**chosen.columns, "verifier": chosen.verifier, "instruction": chosen.instruction}
    fields |= {"choices_column": OPTIONS} if chosen.gathered else {}
    data = replace(data, **{k: v for k, v in fields.items() if getattr(data, k) == getattr(Data(), k)})
    if data.source.startswith(("embedded:", "reasoning-gym:")):
        raise Refusal(f"--set {name} is read from a file: give it as --prompts, not {data.source}")
    from opd.data.tasks.tables import read, table  # `datasets` takes seconds to import; other tasks do not need it

    rows = read(data)
    if missing := [column for column in chosen.gathered if column not in rows.column_names]:
        column_names = ", ".join(rows.column_names)
        raise Refusal(f"--set {name}: {data.source} has no column {missing[0]!r}; the columns are {column_names}")
    return replace(table(data, _gather(rows, chosen.gathered, data.seed) if chosen.gathered else rows), name=name)


def _gather(rows: "Rows", columns: tuple[str, ...], seed: int) -> "JsonRows":
    """Merge the options of several columns into the column `options`, shuffled by the seed and the row's number."""
    from opd.data.tasks.row_files import JsonRows

    gathered = []
    for number, row in enumerate(rows):
        texts = [str(row[column]).strip() for column in columns]
        options = list(texts)
        random.Random(f"{seed}/{number}").shuffle(options)
        gathered.append({**row, columns[0]: texts[0], OPTIONS: options})
    return JsonRows(gathered, [*rows.column_names, OPTIONS])
