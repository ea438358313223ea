"""What a text-only teacher or a judge is asked about a batch: values, and the columns that the answers fill.

A run asks (`asking.py`); here is what needs no teacher: which parts of a response a question is about.
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


Question = Continue | Grade
