"""What a text-only teacher or a judge is asked about a batch: values, and the columns that the answers fill.

A run asks (`asking.py`, `staging.py`); here is what needs no teacher: which parts of a response a question is about.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Continue:
    """How would you go on?  `texts` continuations of the response before each of `chunks` chunks of `length` tokens.

    OmniOPD, arXiv:2606.01476, Eq. 3 and 6-7.
    """

    chunks: int = 10
    length: int = 50
    texts: int = 10
    temperature: float = 1.0  # the paper states none: its continuations are independent samples

    columns = frozenset({"chunk", "agreement"})

    def __post_init__(self) -> None:
        for name in ("chunks", "length", "texts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: a number of them, 1 or more")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature}: above 0, or all texts of a chunk are one")

    def chosen(self, student_entropy: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Int[Tensor, "B T"]:
        """Each token's chunk, numbered from 1 by falling entropy of its first token; 0 outside.

        A chunk starts where the student is least sure, so that the teacher decides that token again; it overlaps none
        that was chosen before, and all its tokens are trained ones.  A response shorter than a chunk has none.
        """
        out = torch.zeros_like(mask, dtype=torch.long)
        spans = mask.unfold(1, self.length, 1).all(-1) if mask.shape[1] >= self.length else mask[:, :0]
        for row, whole in enumerate(spans):
            free, starts = whole.clone(), student_entropy[row, : len(whole)]
            for number in range(1, self.chunks + 1):
                if not free.any():
                    break
                at = int(starts.where(free, -torch.inf).argmax())  # the first of those that tie
                out[row, at : at + self.length] = number
                free[max(0, at - self.length + 1) : at + self.length] = False
        return out


@dataclass(frozen=True)
class Grade:
    """How good is each response, by one rubric for all rollouts of a prompt and `references` answers of the teacher?

    ROPD, arXiv:2605.07396: `least` to `most` binary criteria of 1 to 5 points.
    """

    references: int = 4
    least: int = 4
    most: int = 12
    temperature: float = 1.0  # of the references; at the paper's 0 a server that repeats itself gives one

    columns = frozenset({"verdict", "judged"})

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
    """What would you do otherwise?  `samples` reflections of the student on one rollout of each prompt.

    The best becomes a note that the student reads when the same question comes again; all are trained on in the next
    step.  `window` batches of prompts come, then the same ones again; 0 leaves the prompts as they come.
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

    def batch(self, step: int) -> int:
        """Which batch of prompts a step sees, from 1."""
        if not self.window:
            return step
        round_, place = divmod(step - 1, 2 * self.window)
        return round_ * self.window + place % self.window + 1


@dataclass(frozen=True)
class Stages:
    """How good is each stage of a response, by criteria that a judge keeps of each question and writes anew?

    RubricEM, arXiv:2605.10899.  `tags[k]` opens stage k + 1, `a|b` is either; the last stage is the answer.
    """

    tags: tuple[str, ...]
    caps: tuple[int, ...] = (3, 2, 2, 3)  # criteria kept of each stage
    references: int = 0  # answers of the teacher that are contrasted, too
    column: str = "rubric"  # of the prompts, with criteria of the answer that stay
    questions: int = 4096  # whose criteria and notes are remembered, the oldest go
    reflect: Reflect | None = None

    columns = frozenset({"stage", "stage_scores", "judged"})

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


Question = Continue | Grade | Stages
