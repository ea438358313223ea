"""What a task is: prompts, a verifier `(response, prompt) -> score from 0 to 1`, and the options that choose them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, overload

import tyro

from opd.types import Prompt

SIZES = {"train": 50_000, "test": 1_000}  # the splits of a procedural source, and their prompts without a limit


@dataclass(frozen=True, kw_only=True)
class Task:
    """Prompts, and the function that scores a response to one of them."""

    name: str
    prompts: Sequence[Prompt]  # may make each prompt anew when it is asked for
    verify: Callable[[str, Prompt], float]  # never raises on what a model says; a user's own function may
    scored: bool = True  # False: there is no verifier and every score is 0
    by_answer: bool = False  # verify looks at nothing of the prompt but its answer: it can compare two responses


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where the prompts come from, how their rows are read, and how responses are scored."""

    source: Annotated[str, tyro.conf.Suppress] = "embedded:ledger"  # --prompts and --eval-prompts on the command line
    """Where the prompts are: a .jsonl, .json, .parquet or .csv file, a folder of such files or one written by
    `Dataset.save_to_disk`, a dataset id of the Hugging Face hub, embedded:ledger, embedded:ledger-short, or
    reasoning-gym:NAME with options as reasoning-gym:NAME?key=value&key=value."""
    subset: str = ""
    """Configuration of a hub dataset ("main" for openai/gsm8k); empty: its default one."""
    split: str = "train"
    """Split to read. Procedural sources have train and test; a single file is whatever split you call it."""
    prompt_column: str = "prompt,messages,question,problem,instruction,query,input"
    """Column with the question, as text or as chat messages: the first of these names that holds either.
    A dot reaches into a nested column. A closing assistant message becomes the reference response."""
    answer_column: str = "answer,expected_answer,final_answer,ground_truth,reward_model.ground_truth,answerKey,label"
    """Column with the expected answer: the first of these names that is filled in the first row."""
    response_column: str = "response,completion,solution,reference_solution"
    """Column with a reference response, for methods that train on data: the first of these names, if there is any."""
    choices_column: str = ""
    """Column with the options of a multiple-choice question, a list of texts or {"label": [...], "text": [...]}.
    They are written under the question as "A. ...", and the answer becomes a letter; empty: no options."""
    verifier: str = "math"
    """How answers are compared: math (LaTeX and expressions), numeric (last number, as for GSM8K), exact (same text),
    choice (a letter), none (prompts without answers; nothing is scored), or module:function for your own
    `(response, answer) -> score from 0 to 1`. Procedural sources bring their own, and it is used
    whatever stands here."""
    chat: bool = True
    """Make a question given as text one user message; off: it is continued as plain text without a chat template."""
    system: str = ""
    """System message put before every conversation, in place of the row's own; empty: leave the rows as they are."""
    instruction: str = ""
    r"""Text put on a new line after the question, such as
    "Please reason step by step, and put your final answer within \boxed{}."."""
    template_args: str = ""
    """Arguments of the chat templates as json, such as '{"enable_thinking": false}'; the teacher gets what it reads."""
    limit: int = 0
    """Number of prompts to keep; 0 keeps all. Of rows, a random choice in the order of the file; a larger limit keeps
    the same ones and more. Of a procedural source, how many there are: 0 is 50000 for train, 1000 for test."""
    seed: Annotated[int, tyro.conf.Suppress] = 0  # the run's --seed on the command line
    """Seed of the rows that `limit` keeps, and of procedural problems. Train and test differ at every seed."""


@dataclass(frozen=True)
class Made(Sequence[Prompt]):
    """Prompts made when asked for: `make(i)` for every i below `size`.  A slice is a tuple."""

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
    """Make the prompt of a question: the options and `data.instruction` end its last turn, `data.system` opens it."""
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
