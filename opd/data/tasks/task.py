"""The task type: prompts with a verifier `(response, prompt) -> score from 0 to 1`; the settings that choose them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
    lengths: Sequence[int] = ()  # length of each prompt in bytes; empty if all have similar lengths

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> Any:
        selected = range(self.size)[index]
        return tuple(map(self.make, selected)) if isinstance(selected, range) else self.make(selected)


def make_prompt(question: str | Sequence[Mapping[str, Any]], data: Data, *, options: str = "", **fields: Any) -> Prompt:
    """Make a question's prompt: options and `data.instruction` end its last turn, `data.system` is its first turn."""
    *earlier, last = [{"role": "user", "content": question}] if isinstance(question, str) else question
    text = "\n".join(filter(None, (last["content"], options, data.instruction)))
    if isinstance(question, str) and not data.chat:
        return Prompt(text=text, **fields)
    turns = [*earlier, {**last, "content": text}]
    if data.system:
        turns = [{"role": "system", "content": data.system}, *(t for t in turns if t["role"] != "system")]
    return Prompt(messages=tuple(turns), **fields)


def by_answer(score: Callable[[str, str], float], response: str, prompt: Prompt) -> float:
    """Score a response by a function of the response and an answer: the best score over the prompt's answers."""
    return max(score(response, answer) for answer in (prompt.answer, *prompt.other_answers))
