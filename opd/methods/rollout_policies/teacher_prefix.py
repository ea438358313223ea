"""Rollouts that begin with tokens of the teacher (TrOPD)."""

import math
from dataclasses import dataclass

from opd.losses.terms import PolicyGradient
from opd.methods.rollout_policies.base import RolloutPolicy, RunState


@dataclass(frozen=True)
class TeacherPrefix(RolloutPolicy):
    """The policy in which the teacher generates the first tokens of each response and the student continues.

    The prefix has at most `length` (1 + cos(pi s/S)) / 2 tokens after s of S steps.  TrOPD, arXiv:2606.01249, Eq. 8.
    """

    length: int = 0  # tokens; 0: the maximum response length
    per_prompt: int = 1
    updates: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length < 0:
            raise ValueError(f"length={self.length}: a teacher's prefix has length >= 1 token (0: --max-new-tokens)")

    def check_policy_gradient(self, term: PolicyGradient, columns: frozenset[str]) -> None:
        if "prefix" not in columns:
            raise ValueError(
                f"{self} lets the teacher write the first tokens, and a policy gradient is a sum over the "
                "student's own: add the weight StudentTokens(), or match distributions instead (opd-topk)"
            )

    def teacher_takes_part(self) -> bool:
        return True  # it generates the prefix

    def moving_teacher_refusal(self) -> str:
        return (  # a prompt has the same prefix at every step
            "would begin each response once for all steps: switch "
            "the prefix off (tropd --no-prefix), or name base or another model"
        )

    def prefix_limit(self, state: RunState) -> int:
        length = min(self.length or state.longest, state.longest)
        return round(length * (1 + math.cos(math.pi * (state.step - 1) / state.total)) / 2)

    def notes(self, state: RunState) -> dict[str, float]:
        return {"prefix_limit": float(self.prefix_limit(state))}
