"""Rollouts from a mixture with the teacher that stays inside a KL ball around the student (TRB)."""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from opd.core.sampling import Sampling
from opd.losses.divergences import kl
from opd.losses.shapes import OverVocabulary, PerPosition, PerRollout
from opd.losses.terms import PolicyGradient
from opd.methods.rollout_policies.base import DecodeHook, LogProbs, RolloutPolicy, RunState

HALVINGS = 30


@dataclass(frozen=True)
class Blend(RolloutPolicy):
    """The policy that samples from the distribution closest to the teacher within KL `eps` of the student (`blend`).

    TRB, arXiv:2605.31159.  eps falls linearly from `eps0` nats to 0, the student alone, over the first `steps` steps.
    """

    eps0: float = 0.02
    steps: int = 50
    per_prompt: int = 1
    updates: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.eps0 >= 0:
            raise ValueError(f"eps0={self.eps0}: the radius of a trust region is 0 (the student alone) or more nats")
        if self.steps < 1:
            raise ValueError(f"steps={self.steps}: the trust region closes over steps >= 1")

    def needs(self) -> frozenset[str]:
        return frozenset({"decoding"})  # the teacher scores each token before it is sampled

    def check_policy_gradient(self, term: PolicyGradient, columns: frozenset[str]) -> None:
        if "sampler_logp" not in columns:
            raise ValueError(
                f"{self} draws from a mixture of both models, and a policy gradient then needs the ratio "
                "p/mu: add the weight TruncatedImportance(), or match distributions instead (opd-topk)"
            )

    def decode_hook(self, state: RunState, logp: LogProbs) -> DecodeHook | None:
        radius = self.radius(state.step)
        return BlendHook(radius) if radius else None

    def radius(self, step: int) -> float:
        """Return eps_k = eps0 (1 - k/K) in nats, where k = step - 1 steps have been made."""
        return self.eps0 * max(0.0, 1 - (step - 1) / self.steps)


def blend(
    student_logp: OverVocabulary, teacher_logp: OverVocabulary, eps: float
) -> tuple[OverVocabulary, PerPosition, PerPosition]:
    """Return (log mu, b, KL(mu || p)) for mu ~ p^(1-b) q^b with the largest b in [0, 1] such that KL(mu || p) <= eps.

    Of all mu in that ball it has the least KL(mu || q).  KL grows with b, so b is computed by bisection from below.  If
    b > 0, tokens of probability 0 under either model get probability 0 under mu.  TRB, arXiv:2605.31159.
    """
    possible = (student_logp > -math.inf) & (teacher_logp > -math.inf)
    step = (teacher_logp - student_logp).where(possible, 0)

    def mixture(b: PerPosition) -> tuple[OverVocabulary, PerPosition]:
        mixed = (student_logp + b[..., None] * step).where(possible | (b == 0)[..., None], -math.inf).log_softmax(-1)
        return mixed, kl(mixed, student_logp)

    low, high = torch.zeros_like(step[..., 0]), torch.ones_like(step[..., 0])
    low = torch.where(mixture(high)[1] <= eps, high, low)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        inside = mixture(middle)[1] <= eps
        low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
    mixed, distance = mixture(low)
    return mixed, low, distance


@dataclass(frozen=True)
class BlendHook(DecodeHook):
    """A hook that samples from the blend of both models within KL `eps` (nats) of the student."""

    eps: float

    def mix(
        self, student: Float[Tensor, "B V"], teacher: Float[Tensor, "B V"], sampling: Sampling, stop: Int[Tensor, " S"]
    ) -> tuple[Float[Tensor, "B V"], Sampling, dict[str, PerRollout]]:
        """Return log mu, to be sampled at temperature 1, with its weight `beta` and its KL from the student in nats.

        The stop ids are merged into one token, the stop id that the student prefers.
        """
        p, q = ((x / sampling.temperature).log_softmax(-1) for x in (student, teacher))
        if len(stop) > 1:
            preferred = stop[p[:, stop].argmax(-1)][:, None]
            sums = [x[:, stop].logsumexp(-1, keepdim=True) for x in (p, q)]
            p, q = (
                x.index_fill(-1, stop, -torch.inf).scatter(-1, preferred, total)
                for x, total in zip((p, q), sums, strict=True)
            )
        mixed, beta, distance = blend(p, q, self.eps)
        return mixed, replace(sampling, temperature=1.0), {"beta": beta, "behavior_kl": distance}
