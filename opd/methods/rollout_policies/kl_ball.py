"""Rollouts from a mixture with the teacher that stays inside a KL ball around the student (TRB)."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from opd.losses.divergences import kl
from opd.methods.rollout_policies.base import _counts

HALVINGS = 30


@dataclass(frozen=True)
class Blend:
    """The policy that samples from the distribution closest to the teacher within KL `eps` of the student (`blend`).

    TRB, arXiv:2605.31159.  eps falls linearly from `eps0` nats to 0 over the first `steps` steps; then only the student
    generates.
    """

    eps0: float = 0.02
    steps: int = 50
    per_prompt: int = 1
    updates: int = 1

    def __post_init__(self) -> None:
        _counts(self)
        if not self.eps0 >= 0:
            raise ValueError(f"eps0={self.eps0}: the radius of a trust region is 0 (the student alone) or more nats")
        if self.steps < 1:
            raise ValueError(f"steps={self.steps}: the trust region closes over steps >= 1")

    def radius(self, step: int) -> float:
        """Return eps_k = eps0 (1 - k/K) in nats, where k = step - 1 steps have been made."""
        return self.eps0 * max(0.0, 1 - (step - 1) / self.steps)


def blend(
    student_logp: Float[Tensor, "*N V"], teacher_logp: Float[Tensor, "*N V"], eps: float
) -> tuple[Float[Tensor, "*N V"], Float[Tensor, "*N"], Float[Tensor, "*N"]]:
    """Return (log mu, b, KL(mu || p)) for mu ~ p^(1-b) q^b with the largest b in [0, 1] such that KL(mu || p) <= eps.

    Of all mu in that ball it has the least KL(mu || q).  KL grows with b, so b is computed by bisection from below.  If
    b > 0, tokens of probability 0 under either model get probability 0 under mu.  TRB, arXiv:2605.31159.
    """
    both = (student_logp > -math.inf) & (teacher_logp > -math.inf)
    step = (teacher_logp - student_logp).where(both, 0)

    def at(b: Float[Tensor, "*N"]) -> tuple[Float[Tensor, "*N V"], Float[Tensor, "*N"]]:
        mixed = (student_logp + b[..., None] * step).where(both | (b == 0)[..., None], -math.inf).log_softmax(-1)
        return mixed, kl(mixed, student_logp)

    low, high = torch.zeros_like(step[..., 0]), torch.ones_like(step[..., 0])
    low = torch.where(at(high)[1] <= eps, high, low)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        inside = at(middle)[1] <= eps
        low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
    mixed, distance = at(low)
    return mixed, low, distance
