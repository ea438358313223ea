"""The task type: prompts with a verifier `(response, prompt) -> score from 0 to 1`; the settings that choose them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

from opd.config.data import Data
from opd.core.sampling import Prompt

SIZES = {"train": 50_000, "test": 1_000}  # prompts in each split of a procedural source if --limit is 0


@dataclass(frozen=True, kw_only=True)
class Task:
    """Prompts with the function that scores a response to a prompt."""

    name: str
    prompts: Sequence[Prompt]  # may create each prompt when it is accessed
    verify: Callable[[str, Prompt], float]  # built-in verifiers never raise on a response; a user's function may
    scored: bool = True  # False: the task has no verifier, and every score is 0
    by_answer: bool = False  # verify reads only the prompt's answer, so it can also compare two responses


@dataclass(frozen=True)
class LazyPrompts(Sequence[Prompt]):
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


def make_prompt(question: str | Sequence[Mapping[str, str]], data: Data, *, options: str = "", **fields: Any) -> Prompt:
    """Make the prompt of a question.

    The options and `data.instruction` are added to its last turn, and `data.system` becomes its first turn.
    """
    if isinstance(question, str):
        text = "\n".join(filter(None, (question, options, data.instruction)))
        if not data.chat:
            return Prompt(text=text, **fields)
        turns: list[Mapping[str, str]] = [{"role": "user", "content": text}]
    else:
        *earlier, last = question
        turns = [*earlier, {**last, "content": "\n".join(filter(None, (last["content"], options, data.instruction)))}]
    if data.system:
        turns = [{"role": "system", "content": data.system}, *(t for t in turns if t["role"] != "system")]
    return Prompt(messages=tuple(turns), **fields)
