"""Rollouts of the student, or of a mixture of student, teacher and data (GKD)."""

from dataclasses import dataclass

from opd.core.types import DATA, TEACHER
from opd.methods.rollout_policies.base import _counts


@dataclass(frozen=True)
class OnPolicy:
    """The policy in which the student generates.

    `samples` tokens are sampled at each position; the response continues with the first of them.
    """

    per_prompt: int = 1
    updates: int = 1
    samples: int = 1

    def __post_init__(self) -> None:
        _counts(self)
        if self.samples < 1:
            raise ValueError(f"samples={self.samples}: at least the response's own token is drawn at each position")


@dataclass(frozen=True)
class Mixture:
    """The policy in which the student generates with probability `share`; otherwise the teacher or the data's response.

    This is GKD's lambda, arXiv:2306.13649, Algorithm 1.
    """

    share: float = 0.5
    other: int = TEACHER
    per_prompt: int = 1
    updates: int = 1

    def __post_init__(self) -> None:
        _counts(self)
        if not 0 <= self.share <= 1:
            raise ValueError(f"share={self.share}: the on-policy share lies in [0, 1]")
        if self.other not in (TEACHER, DATA):
            raise ValueError(f"other={self.other}: the rest comes from TEACHER ({TEACHER}) or DATA ({DATA})")
