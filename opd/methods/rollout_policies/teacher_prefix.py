"""Rollouts that begin with tokens of the teacher (TrOPD)."""

import math
from dataclasses import dataclass

from opd.methods.rollout_policies.base import _counts


@dataclass(frozen=True)
class TeacherPrefix:
    """The policy in which the teacher generates the first tokens of each response and the student continues.

    The prefix has at most `length` (1 + cos(pi s/S)) / 2 tokens after s of S steps.  TrOPD, arXiv:2606.01249, Eq. 8.
    """

    length: int = 0  # tokens; 0: the maximum response length
    per_prompt: int = 1
    updates: int = 1

    def __post_init__(self) -> None:
        _counts(self)
        if self.length < 0:
            raise ValueError(f"length={self.length}: a teacher's prefix has length >= 1 token (0: --max-new-tokens)")

    def limit(self, step: int, total: int, longest: int) -> int:
        """Return the maximum number of prefix tokens, for a response of at most `longest` tokens."""
        most = min(self.length or longest, longest)
        return round(most * (1 + math.cos(math.pi * (step - 1) / total)) / 2)
