"""Questions to a text-only teacher or a judge about a batch, as values, and the columns that the answers fill.

A question says what it needs; `opd/teachers/judges` sends it.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from opd.losses.shapes import Mask, PerToken


class Question:
    """A question to a text-only teacher or a judge about a batch of rollouts."""

    columns: ClassVar[frozenset[str]]  # batch columns that the answers fill
    uses_judge: ClassVar[bool] = False  # a judge answers, so that --judge has an effect

    @property
    def uses_teacher(self) -> bool:
        """Return whether the teacher generates text for the question."""
        return True

    @property
    def changes_prompts(self) -> bool:
        """Return whether earlier answers change the prompts of later steps, which a worker process cannot render."""
        return False


@dataclass(frozen=True)
class Continue(Question):
    """A request for `texts` continuations of the response before each of `chunks` chunks of `length` tokens.

    OmniOPD, arXiv:2606.01476, Eq. 3 and 6-7.
    """

    chunks: int = 10
    length: int = 50
    texts: int = 10
    temperature: float = 1.0  # the paper gives none; its continuations are independent samples

    columns = frozenset({"chunk", "agreement"})

    def __post_init__(self) -> None:
        for name in ("chunks", "length", "texts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: a number of them, 1 or more")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature}: above 0, or all texts of a chunk are one")

    def chunk_numbers(self, student_entropy: PerToken, mask: Mask) -> Int[Tensor, "B T"]:
        """Return each token's chunk, [B, T]: numbered from 1 by falling entropy of the chunk's first token, 0 outside.

        A chunk starts where the student's entropy is highest, so that the teacher decides that token again.  Chunks do
        not overlap and contain only trained tokens.  A response shorter than a chunk has none.
        """
        chunk = torch.zeros_like(mask, dtype=torch.long)
        if mask.shape[1] < self.length:
            return chunk
        fits = mask.unfold(1, self.length, 1).all(-1)  # [B, starts]: a chunk that starts here has only trained tokens
        for row, free in enumerate(fits):
            entropy = student_entropy[row, : len(free)]
            for number in range(1, self.chunks + 1):
                if not free.any():
                    break
                start = int(entropy.where(free, -torch.inf).argmax())  # the first position in case of a tie
                chunk[row, start : start + self.length] = number
                free[max(0, start - self.length + 1) : start + self.length] = False
        return chunk


@dataclass(frozen=True)
class Grade(Question):
    """A request to score each response by one rubric for all rollouts of a prompt and `references` teacher answers.

    ROPD, arXiv:2605.07396: the rubric has `least` to `most` binary criteria of 1 to 5 points.
    """

    references: int = 4
    least: int = 4
    most: int = 12
    temperature: float = 1.0  # of the references; at the paper's 0 a deterministic server returns identical answers

    columns = frozenset({"verdict", "judged"})
    uses_judge = True

    def __post_init__(self) -> None:
        if self.references < 1:
            raise ValueError(f"references={self.references}: a rubric is drawn from one answer of the teacher or more")
        if not 1 <= self.least <= self.most:
            raise ValueError(f"least={self.least}, most={self.most}: a rubric has 1 <= least <= most criteria")


REFLECT = """{prompt}

An attempt at this question:

{response}

What in this attempt was sound, what went wrong, and at which step? Say it in a few sentences that name the places, \
and what to do next time, here and with questions like it."""
REMEMBER = """{prompt}

A note from an earlier attempt at this question:

{reflection}"""


@dataclass(frozen=True)
class Reflect:
    """A request for `samples` reflections of the student on one rollout of each prompt.

    The best reflection becomes a note that the student reads when the same question returns.  All reflections are
    trained on in the next step.  The run sees `window` batches of prompts, then the same batches again; 0 keeps the
    order of the prompts.
    """

    samples: int = 8
    temperature: float = 0.7
    window: int = 3
    template: str = REFLECT
    remember: str = REMEMBER

    def __post_init__(self) -> None:
        if self.samples < 2:
            raise ValueError(f"samples={self.samples}: reflections are compared with each other, 2 or more of them")
        if self.window < 0:
            raise ValueError(f"window={self.window}: batches that come again, 0 (none) or more")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature}: above 0, or all reflections on a rollout are one")
        for name, parts in (("template", ("{prompt}", "{response}")), ("remember", ("{prompt}", "{reflection}"))):
            if missing := [part for part in parts if part not in getattr(self, name)]:
                raise ValueError(f"{name}={getattr(self, name)!r}: lacks {' and '.join(missing)}")

    def prompt_batch(self, step: int) -> int:
        """Return the number, from 1, of the prompt batch that a step uses."""
        if not self.window:
            return step
        period, place = divmod(step - 1, 2 * self.window)
        return period * self.window + place % self.window + 1


@dataclass(frozen=True)
class Stages(Question):
    """A request to score each stage of a response, by criteria that a judge keeps for each question and revises.

    RubricEM, arXiv:2605.10899.  `tags[k]` opens stage k + 1, `a|b` matches either tag; the last stage is the answer.
    """

    tags: tuple[str, ...]
    caps: tuple[int, ...] = (3, 2, 2, 3)  # number of criteria kept for each stage
    references: int = 0  # number of teacher answers that are also compared
    column: str = "rubric"  # prompt column with criteria for the answer that are never dropped
    questions: int = 4096  # number of questions whose criteria and notes are remembered; the oldest are dropped
    reflect: Reflect | None = None

    columns = frozenset({"stage", "stage_scores", "judged"})
    uses_judge = True

    def __post_init__(self) -> None:
        if len(self.tags) < 2 or not all(word for tag in self.tags for word in tag.split("|")):
            raise ValueError(f"tags={self.tags}: the tags of two stages or more, none of them empty")
        if len(self.caps) != len(self.tags):
            raise ValueError(f"caps={self.caps}: one for each of the {len(self.tags)} stages")
        if min(self.caps) < 1:
            raise ValueError(f"caps={self.caps}: a stage keeps 1 criterion or more")
        if self.references < 0:
            raise ValueError(f"references={self.references}: answers of the teacher, 0 or more")
        if self.questions < 1:
            raise ValueError(f"questions={self.questions}: a number of them, 1 or more")

    @property
    def uses_teacher(self) -> bool:
        return self.references > 0  # the judge also compares answers of the teacher

    @property
    def changes_prompts(self) -> bool:
        return self.reflect is not None  # prompts hold notes from the student's reflections
