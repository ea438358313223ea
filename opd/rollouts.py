"""Who speaks: a method's rollout policy, as a value.

`source(step, rollout, seed)` says who writes a rollout; `per_prompt` rollouts are drawn of each prompt and `updates`
optimizer steps taken on each batch of them.
"""

from dataclasses import dataclass

from opd.noise import uniform
from opd.types import DATA, STUDENT, TEACHER


@dataclass(frozen=True)
class OnPolicy:
    """The student speaks."""

    per_prompt: int = 1
    updates: int = 1

    def __post_init__(self) -> None:
        for name in ("per_prompt", "updates"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}={value}: a rollout batch needs {name} >= 1")

    def source(self, step: int, rollout: int, seed: int) -> int:
        """Who writes this rollout."""
        return STUDENT


@dataclass(frozen=True)
class Mixture:
    """The student speaks with probability `share`; else the teacher does, or the data's own response stands.

    GKD's lambda, arXiv:2306.13649, Algorithm 1.
    """

    share: float = 0.5
    other: int = TEACHER
    per_prompt: int = 1
    updates: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"share={self.share}: the on-policy share lies in [0, 1]")
        if self.other not in (TEACHER, DATA):
            raise ValueError(f"other={self.other}: the rest comes from TEACHER ({TEACHER}) or DATA ({DATA})")

    def source(self, step: int, rollout: int, seed: int) -> int:
        """Who writes this rollout."""
        coin = uniform(seed, step, rollout, -1)  # token -1: a draw that no token uses
        return STUDENT if coin < self.share else self.other


Rollouts = OnPolicy | Mixture
