"""Rollouts of a snapshot of the student, trained on for several epochs (NPD)."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from opd.core.types import MEASURED, ROLLOUT_COLUMNS, Batch, Column
from opd.losses.terms import PolicyGradient
from opd.methods.rollout_policies.base import Memory, RolloutPolicy


@dataclass(frozen=True)
class Snapshot(RolloutPolicy):
    """The policy in which a frozen snapshot of the student generates a pool of rollouts.  NPD, arXiv:2605.05940.

    A snapshot generates `pool` batches, and the next `pool` steps are an epoch.  A cycle has `epochs` epochs over the
    same prompts and begins with a new snapshot, which replaces the pool.  Another snapshot is taken after each epoch in
    `refresh`, and when KL(student || snapshot) on a batch exceeds `drift` nats per token.

    The teacher scores each rollout once, when it enters the pool, and `admits` selects those that are trained on.  The
    steps take them in order, a whole batch each, and after the last again the first.  If `admits` selects a share s, a
    step therefore trains on as many rollouts as without it, and an epoch is 1/s passes over the selected rollouts.
    """

    pool: int = 16  # number of batches per epoch
    epochs: int = 10
    refresh: tuple[int, ...] = (5,)
    drift: float = 0.10
    per_prompt: int = 1
    updates: int = 1
    admits: Column | None = None
    frozen_sampler: ClassVar[bool] = True
    pooled: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("pool", "epochs"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}={value}: a cycle over a pool needs {name} >= 1")
        if any(not 0 < epoch < self.epochs for epoch in self.refresh):
            raise ValueError(f"refresh={self.refresh}: epochs after which a snapshot is taken, 1 to {self.epochs - 1}")
        if not self.drift > 0:
            raise ValueError(f"drift={self.drift}: a bound in nats, above 0; inf never refreshes early")
        if later := self.reads() - ROLLOUT_COLUMNS - {"teacher_logp"}:
            raise ValueError(f"admits={self.admits}: reads {', '.join(sorted(later))}, unknown when a rollout enters")

    def needs(self) -> frozenset[str]:
        return self.reads() & MEASURED

    def check_policy_gradient(self, term: PolicyGradient, columns: frozenset[str]) -> None:
        if not term.corrected():
            raise ValueError(
                f"{self} lets an older student speak, and a policy gradient then needs the ratio to it: "
                "take the surrogate OffPolicy(), or match distributions instead (opd-topk)"
            )

    def worker_refusal(self) -> str:
        return ""  # a worker has the snapshot, which is sufficient

    def tempering_refusal(self) -> str:
        return "takes the log-probs of the draw for the snapshot's own, in its drift and in Delta-IFD"

    def batches(self, step: int, memory: Memory) -> range:
        return self.open_batches(self.start(step, memory), memory)

    def open_batches(self, step: int, memory: Memory) -> range:
        if self.start(step, memory) < step:
            return range(0)
        return range(step, min(step + self.pool, self._next_scheduled(step)))

    def prompt_step(self, batch_number: int) -> int:
        # the epochs of a cycle use the same prompts
        return (batch_number - 1) // (self.pool * self.epochs) * self.pool + (batch_number - 1) % self.pool + 1

    def oldest_valid(self, step: int, memory: Memory) -> int:
        if int(memory.get("snapshot", 0)) == step:  # an early snapshot reuses the numbers of the unused batches
            return self._next_scheduled(step)
        return self.start(step, memory)

    def oldest_needed(self, step: int, memory: Memory) -> int:
        return self.start(step, memory)  # later epochs train on all batches of the snapshot again

    def reads_measured(self) -> bool:
        return self.drift < math.inf

    def after_scoring(
        self, batch: Batch, step: int, memory: Memory, lengths: Int[Tensor, " B"]
    ) -> tuple[Batch, Memory]:
        drift = measured_drift(batch)
        early = drift is not None and drift > self.drift
        return batch, {"snapshot": torch.tensor(step + 1)} if early else memory

    def scheduled(self, step: int) -> list[int]:
        """Return the steps before which a snapshot is scheduled: the cycle of `step`, and the next cycle's first."""
        cycle = self.pool * self.epochs
        first = (step - 1) // cycle * cycle + 1
        return [first + self.pool * epoch for epoch in (0, *sorted(self.refresh), self.epochs)]

    def start(self, step: int, memory: Memory) -> int:
        """Return the step before which the snapshot used at `step` was taken."""
        early = memory.get("snapshot")
        steps = self.scheduled(step) + ([] if early is None else [int(early)])
        return max(x for x in steps if x <= step)

    def _next_scheduled(self, step: int) -> int:
        return min(x for x in self.scheduled(step) if x > step)


def measured_drift(batch: Batch) -> float | None:
    """Return KL(student || generating weights) per token, in nats, or None if it was not measured.

    The estimate is E_mu[rho log rho - rho + 1], rho = p / mu, whose summands are all >= 0.
    """
    if batch.student_logp is None or not (mask := batch.written()).any():
        return None
    gap = (batch.student_logp - batch.sampler_logp)[mask].double()
    return float((gap.exp() * gap - torch.expm1(gap)).mean())
