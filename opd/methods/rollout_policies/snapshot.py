"""Rollouts of a snapshot of the student, trained on for several epochs (NPD)."""

from dataclasses import dataclass

import torch

from opd.core.types import Batch
from opd.methods.rollout_policies.base import Memory, _counts


@dataclass(frozen=True)
class Snapshot:
    """The policy in which a frozen snapshot of the student generates a pool of rollouts.  NPD, arXiv:2605.05940.

    A snapshot generates `pool` batches.  Each is trained on once per epoch, until the next snapshot replaces them.  A
    cycle has `epochs` epochs over the same prompts and begins with a new snapshot.  Another snapshot is taken after
    each epoch in `refresh`, and when KL(student || snapshot) on a batch exceeds `drift` nats per token.
    """

    pool: int = 16  # number of batches per epoch
    epochs: int = 10
    refresh: tuple[int, ...] = (5,)
    drift: float = 0.10
    per_prompt: int = 1
    updates: int = 1

    def __post_init__(self) -> None:
        _counts(self)
        for name in ("pool", "epochs"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}={value}: a cycle over a pool needs {name} >= 1")
        if any(not 0 < epoch < self.epochs for epoch in self.refresh):
            raise ValueError(f"refresh={self.refresh}: epochs after which a snapshot is taken, 1 to {self.epochs - 1}")
        if not self.drift > 0:
            raise ValueError(f"drift={self.drift}: a bound in nats, above 0; inf never refreshes early")

    def scheduled(self, step: int) -> list[int]:
        """Return the steps before which a snapshot is scheduled, in the cycle of `step`.

        The first step of the next cycle is included.
        """
        cycle = self.pool * self.epochs
        first = (step - 1) // cycle * cycle + 1
        return [first + self.pool * epoch for epoch in (0, *sorted(self.refresh), self.epochs)]

    def start(self, step: int, memory: Memory) -> int:
        """Return the step before which the snapshot used at `step` was taken."""
        early = memory.get("snapshot")
        found = self.scheduled(step) + ([] if early is None else [int(early)])
        return max(x for x in found if x <= step)

    def outdated(self, step: int, memory: Memory) -> int:
        """Return a batch number; before `step`, batches with lower numbers come from a snapshot older than required."""
        if int(memory.get("snapshot", 0)) == step:  # an early snapshot reuses the numbers of the unused batches
            return min(x for x in self.scheduled(step) if x > step)
        return self.start(step, memory)

    def remember(self, memory: Memory, batch: Batch, step: int) -> Memory:
        """Return the memory; if this snapshot has drifted too far, it holds the step before which to take the next."""
        found = drift(batch)
        return {"snapshot": torch.tensor(step + 1)} if found is not None and found > self.drift else memory


def drift(batch: Batch) -> float | None:
    """Return KL(student || generating weights) per token, in nats, or None if it was not measured.

    The estimate is E_mu[rho log rho - rho + 1], rho = p / mu, whose summands are all >= 0.
    """
    if batch.student_logp is None or not (own := batch.written()).any():
        return None
    gap = (batch.student_logp - batch.sampler_logp)[own].double()
    return float((gap.exp() * gap - torch.expm1(gap)).mean())
