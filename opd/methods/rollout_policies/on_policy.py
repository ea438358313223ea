"""Rollouts of the student, or of a mixture of student, teacher and data (GKD)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from opd.core.rng import uniform
from opd.core.types import DATA, STUDENT, TEACHER
from opd.losses.terms import PolicyGradient
from opd.methods.rollout_policies.base import RolloutPolicy


@dataclass(frozen=True)
class OnPolicy(RolloutPolicy):
    """The policy in which the student generates; a response continues with the first of `samples` tokens."""

    per_prompt: int = 1
    updates: int = 1
    samples: int = 1
    on_policy: ClassVar[bool] = True
    stationary: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 1:
            raise ValueError(f"samples={self.samples}: at least the response's own token is drawn at each position")

    def worker_refusal(self) -> str:
        return ""  # a worker has the student, which is sufficient


@dataclass(frozen=True)
class Mixture(RolloutPolicy):
    """The policy in which the student generates with probability `share`, else `other`.  GKD, arXiv:2306.13649."""

    share: float = 0.5
    other: int = TEACHER
    per_prompt: int = 1
    updates: int = 1
    stationary: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.share <= 1:
            raise ValueError(f"share={self.share}: the on-policy share lies in [0, 1]")
        if self.other not in (TEACHER, DATA):
            raise ValueError(f"other={self.other}: the rest comes from TEACHER ({TEACHER}) or DATA ({DATA})")

    def check_policy_gradient(self, term: PolicyGradient, columns: frozenset[str]) -> None:
        raise ValueError(
            f"{self} lets others speak, and a policy gradient is a sum over the student's own "
            "tokens: use OnPolicy(), or match distributions instead (opd-full, opd-topk, gkd)"
        )

    def worker_refusal(self) -> str:
        return "" if self.other == DATA else super().worker_refusal()  # a worker reads the data with the prompts

    def source(self, step: int, rollout: int, seed: int) -> int:
        coin = uniform(seed, step, rollout, -1)  # key -1: no token uses this noise
        return STUDENT if coin < self.share else self.other

    def source_shares(self) -> Mapping[int, float]:
        return {STUDENT: self.share, self.other: 1 - self.share}
