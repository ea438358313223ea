"""The annotator of a run: it does all that a method's question needs between the measured batch and the targets.

`factory.py` opens the annotator of a question.  A subclass per kind of question stands in a file of its own.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TypeVar

from accelerate.utils import broadcast_object_list
from transformers import PreTrainedTokenizerBase as Tokenizer

from opd.core.types import Batch, Rollout
from opd.data.prompt_stream import Prompts
from opd.data.prompts import Rendered
from opd.data.verifiers import response_text
from opd.data.verifiers.extract import without_thinking
from opd.methods.rollout_policies.base import Memory
from opd.teachers.text.text_models import TextRequest, TextSampling
from opd.teachers.text.text_teacher import TextTeacher

T = TypeVar("T")


@dataclass(frozen=True)
class TrainingStep:
    """A step of the trainer, as an annotator uses it.  Every process must make the same calls."""

    number: int
    # (prompts, samples per prompt, temperature, index of the first rollout) -> rollouts of all processes
    generate: Callable[[Sequence[Rendered], int, float, int], list[Rollout]]
    measure: Callable[[Sequence[Rollout]], Batch]  # all columns of finished rollouts
    clock: Callable[[str], AbstractContextManager[None]]  # adds the seconds of a `with` block to a phase


@dataclass(frozen=True)
class Annotator:
    """An annotator for methods without a question: it changes nothing."""

    prompt_stream: Prompts
    # counters of a judge since the last call, for perf.jsonl
    traffic: Callable[[], dict[str, float]] = field(default=dict, kw_only=True)

    def check(self, sample: Callable[[], Sequence[Rollout]]) -> None:
        """Raise Refusal if the question does not fit the student's rollouts; `sample` generates some to look at."""

    def prompts(self, step: int, count: int, memory: Memory) -> list[Rendered]:
        """Return the `count` prompts of a step."""
        return self.prompt_stream.batch(step, count)

    def extra_rollouts(self, memory: Memory, first: int) -> list[Rollout]:
        """Return rollouts of the previous step to train on, too; the index and group of the first are `first`."""
        return []

    def annotate(
        self, batch: Batch, rollouts: Sequence[Rollout], memory: Memory, step: TrainingStep
    ) -> tuple[Batch, Memory]:
        """Ask the question about a measured batch, whose last rows are the extra rollouts.

        Return the batch with the columns of the answers, and the memory for the next step.
        """
        return batch, memory

    def metrics(self, batch: Batch, extra: Batch) -> dict[str, float]:
        """Return the metrics of the answers: those of the step's own rollouts, and those of the extra rollouts."""
        return {}


@dataclass(frozen=True)
class TeacherTexts:
    """The text-only teachers of a run, and the text of a rollout as teachers and judges read it."""

    teachers: Mapping[str, TextTeacher]  # by the name of --route; "" is --teacher
    tokenizer: Tokenizer  # the student's
    max_tokens: int  # longest answer of a teacher
    seed: int
    main: bool = True  # this is the main process, the only one that sends requests
    think_end: str = ""  # --think-end

    def on_main(self, answer: Callable[[], T]) -> T:
        """Call a function on the main process, and return its result on all processes."""
        answers: list[T | None] = [answer() if self.main else None]
        (result,) = broadcast_object_list(answers)
        return result

    def references(
        self, rollout_by_group: Mapping[int, Rollout], count: int, temperature: float
    ) -> dict[int, list[str]]:
        """Return `count` answers of the teacher for each group, by group; an empty list where the teacher failed.

        The teacher and the prompt of a group are those of its rollout in `rollout_by_group`.
        """
        answers: dict[int, list[str]] = {group: [] for group in rollout_by_group}
        sampling = TextSampling(count, self.max_tokens, temperature, "--max-new-tokens")
        for name, teacher in self.teachers.items() if count else ():
            requests = {group: TextRequest(r.prompt) for group, r in rollout_by_group.items() if r.teacher == name}
            answers |= zip(requests, teacher.texts(list(requests.values()), sampling, self.seed), strict=True)
        return answers

    def span(self, rollout: Rollout, start: int, end: int) -> str:
        """Return the text of the response tokens [start, end), with the marks of thinking."""
        before = (*rollout.prompt_ids, *rollout.ids[:start])
        return response_text.decode(self.tokenizer, rollout.ids[start:end], self.think_end, context_ids=before)

    def response(self, rollout: Rollout) -> str:
        """Return the text of a response after its thinking."""
        return without_thinking(self.span(rollout, 0, len(rollout.ids)))


def rows_by_group(rollouts: Sequence[Rollout]) -> dict[int, list[int]]:
    """Return the batch rows of each group of rollouts, in order."""
    rows: dict[int, list[int]] = {}
    for row, rollout in enumerate(rollouts):
        rows.setdefault(rollout.group, []).append(row)
    return rows
