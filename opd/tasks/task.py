"""The task type: prompts with a verifier `(response, prompt) -> score from 0 to 1`; the settings that choose them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, overload

import tyro

from opd.sampling import Prompt

SIZES = {"train": 50_000, "test": 1_000}  # prompts in each split of a procedural source if --limit is 0


@dataclass(frozen=True, kw_only=True)
class Task:
    """Prompts with the function that scores a response to a prompt."""

    name: str
    prompts: Sequence[Prompt]  # may create each prompt when it is accessed
    verify: Callable[[str, Prompt], float]  # built-in verifiers never raise on a response; a user's function may
    scored: bool = True  # False: the task has no verifier, and every score is 0
    by_answer: bool = False  # verify reads only the prompt's answer, so it can also compare two responses


@dataclass(frozen=True, kw_only=True)
class Data:
    """Settings of the data: source of the prompts, columns of their rows, and the verifier."""

    source: Annotated[str, tyro.conf.Suppress] = "embedded:ledger"  # --prompts and --eval-prompts on the command line
    """Source of the prompts: a .jsonl, .json, .parquet or .csv file, a folder of such files, a folder written by
    `Dataset.save_to_disk`, a dataset id of the Hugging Face hub, embedded:ledger, embedded:ledger-short, or
    reasoning-gym:NAME, with options as reasoning-gym:NAME?key=value&key=value."""
    subset: str = ""
    """Configuration name of a hub dataset ("main" for openai/gsm8k).  Empty: the dataset's default."""
    split: str = "train"
    """Split to read.  Procedural sources have train and test.  A single file accepts any split name."""
    prompt_column: str = "prompt,messages,question,problem,instruction,query,input"
    """Column with the question, as text or as chat messages: the first of these names that contains either.
    A dot selects a nested field.  A closing assistant message becomes the reference response."""
    answer_column: str = "answer,expected_answer,final_answer,ground_truth,reward_model.ground_truth,answerKey,label"
    """Column with the expected answer: the first of these names that is not empty in the first row."""
    response_column: str = "response,completion,solution,reference_solution"
    """Column with a reference response, for methods that train on data: the first of these names that exists."""
    choices_column: str = ""
    """Column with the options of a multiple-choice question: a list of texts, or {"label": [...], "text": [...]}.
    They are added under the question as "A. ...", and the answer becomes a letter.  Empty: no options."""
    verifier: str = "math"
    """Verifier that compares a response with the expected answer: math (LaTeX and expressions), numeric (last number,
    as for GSM8K), exact (same text), choice (a letter), none (no answers; nothing is scored), or module:function for a
    Python function `(response, answer) -> score from 0 to 1`.  Procedural sources always use their built-in
    verifier."""
    chat: bool = True
    """Turn a question given as text into a user message.  Off: use it as plain text without a chat template."""
    system: str = ""
    """System message for every conversation; it replaces the row's system message.  Empty: do not change the rows."""
    instruction: str = ""
    r"""Text to add on a new line after the question, such as
    "Please reason step by step, and put your final answer within \boxed{}."."""
    template_args: str = ""
    """Arguments of the chat templates, as JSON, such as '{"enable_thinking": false}'.  The teacher's template gets only
    the arguments that it reads."""
    limit: int = 0
    """Number of prompts to keep.  0: all rows, or 50000 (train) and 1000 (test) prompts of a procedural source.  Rows
    are selected at random and keep the order of the file; a larger limit keeps the same rows and adds more."""
    seed: Annotated[int, tyro.conf.Suppress] = 0  # the run's --seed on the command line
    """Seed of the rows that `limit` selects, and of procedural problems.  Train and test differ at every seed."""


@dataclass(frozen=True)
class Made(Sequence[Prompt]):
    """A sequence of prompts that are created on access: `make(i)` for every i below `size`.  A slice is a tuple."""

    make: Callable[[int], Prompt]
    size: int

    def __len__(self) -> int:
        return self.size

    @overload
    def __getitem__(self, index: int) -> Prompt: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Prompt, ...]: ...

    def __getitem__(self, index: int | slice) -> Prompt | tuple[Prompt, ...]:
        if isinstance(index, slice):
            return tuple(self.make(i) for i in range(*index.indices(self.size)))
        if not -self.size <= index < self.size:
            raise IndexError(f"prompt {index} of {self.size}")
        return self.make(index % self.size)


def ask(question: str | Sequence[Mapping[str, str]], data: Data, *, options: str = "", **fields: Any) -> Prompt:
    """Make the prompt of a question.

    The options and `data.instruction` are added to its last turn, and `data.system` becomes its first turn.
    """
    if isinstance(question, str):
        text = "\n".join(filter(None, (question, options, data.instruction)))
        if not data.chat:
            return Prompt(text=text, **fields)
        turns: list[Mapping[str, str]] = [{"role": "user", "content": text}]
    else:
        *before, last = question
        turns = [*before, {**last, "content": "\n".join(filter(None, (last["content"], options, data.instruction)))}]
    if data.system:
        turns = [{"role": "system", "content": data.system}, *(t for t in turns if t["role"] != "system")]
    return Prompt(messages=tuple(turns), **fields)
