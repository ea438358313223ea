"""Divergences between next-token distributions, in nats: `(student_logp [*N V], teacher_logp [*N V]) -> [*N]`.

They are differentiable in both arguments, which are normalised log-probs, and pointwise over tokens, so a caller may
evaluate them chunk by chunk.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from opd.losses.baselines import top
from opd.losses.shapes import OverVocabulary, PerPosition

Divergence = Callable[[Tensor, Tensor], Tensor]


def kl(p: OverVocabulary, q: OverVocabulary) -> PerPosition:
    """Return KL(p || q) from log-probs.  Tokens of probability 0 contribute 0."""
    is_possible = p > -math.inf  # mask the inputs, not the products: 0 * inf is nan, also in the gradient
    p, q = p.where(is_possible, 0), q.where(is_possible, 0)
    return (p.exp() * (p - q)).where(is_possible, 0).sum(-1)


@dataclass(frozen=True)
class ReverseKL:
    """KL(student || teacher): mode seeking.  MiniLLM, arXiv:2306.08543."""

    def __call__(self, student_logp: OverVocabulary, teacher_logp: OverVocabulary) -> PerPosition:
        return kl(student_logp, teacher_logp)


@dataclass(frozen=True)
class ForwardKL:
    """KL(teacher || student): mass covering.  Hinton et al., arXiv:1503.02531."""

    def __call__(self, student_logp: OverVocabulary, teacher_logp: OverVocabulary) -> PerPosition:
        return kl(teacher_logp, student_logp)


@dataclass(frozen=True)
class JSD:
    """beta KL(T || M) + (1 - beta) KL(S || M), M = beta T + (1 - beta) S.  GKD, arXiv:2306.13649, Eq. 1."""

    beta: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.beta < 1:
            raise ValueError(
                f"beta={self.beta}: the JSD needs 0 < beta < 1; at the ends it is 0, not a KL: "
                "use `gkd-forward` (KL(teacher || student)) or `gkd-reverse` (KL(student || teacher))"
            )

    def __call__(self, student_logp: OverVocabulary, teacher_logp: OverVocabulary) -> PerPosition:
        # the gradient of logaddexp(-inf, -inf) is nan
        is_possible = (student_logp > -math.inf) | (teacher_logp > -math.inf)
        s, t = student_logp.where(is_possible, 0), teacher_logp.where(is_possible, 0)
        m = torch.logaddexp(t + math.log(self.beta), s + math.log1p(-self.beta))
        return self.beta * kl(teacher_logp, m) + (1 - self.beta) * kl(student_logp, m)


@dataclass(frozen=True)
class Support:
    """The k tokens on which a truncated divergence is computed: the most probable tokens of student or teacher."""

    k: int = 16
    of: Literal["student", "teacher"] = "student"

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k={self.k}: a top-k divergence needs k >= 1")

    def __call__(self, student_logp: OverVocabulary, teacher_logp: OverVocabulary) -> Int[Tensor, "*N k"]:
        return top(self.k, (student_logp if self.of == "student" else teacher_logp).detach())


def outside(logp: OverVocabulary, ids: Int[Tensor, "*N k"]) -> PerPosition:
    """Return the log of the mass outside a support, or -inf.  It is summed: 1 minus the mass inside would cancel."""
    remaining_logp = logp.scatter(-1, ids, -math.inf)
    has_mass = (remaining_logp > -math.inf).any(-1)
    return remaining_logp.where(has_mass[..., None], 0).logsumexp(-1).where(has_mass, -math.inf)


class OnSupport:
    """A divergence computed from log-probs on a support and, if `bucketed`, of all other tokens as one class."""

    support: Support
    bucketed: ClassVar[bool] = True

    def __call__(self, student_logp: OverVocabulary, teacher_logp: OverVocabulary) -> PerPosition:
        ids = self.support(student_logp, teacher_logp)
        classes = [x.gather(-1, ids) for x in (student_logp, teacher_logp)]
        if self.bucketed:
            rest = [outside(x, ids)[..., None] for x in (student_logp, teacher_logp)]
            classes = [torch.cat(pair, -1) for pair in zip(classes, rest, strict=True)]
        return self.on(*classes)

    def on(self, p: Float[Tensor, "*N k"], q: Float[Tensor, "*N k"]) -> PerPosition:
        """Return the divergence from log-probs on the support and, if `bucketed`, of the rest as the last entry."""
        raise NotImplementedError


@dataclass(frozen=True)
class BucketKL(OnSupport):
    """Reverse KL over the support plus a bucket for others: at most the full KL.  arXiv:2606.09471, verl issue 7856."""

    support: Support = Support()

    def on(self, p: Float[Tensor, "*N k"], q: Float[Tensor, "*N k"]) -> PerPosition:
        return kl(p, q)


@dataclass(frozen=True)
class BucketForwardKL(OnSupport):
    """KL(teacher || student) over the support plus one bucket for the rest, a KL of k + 1 classes.  verl issue 7856."""

    support: Support = Support(16, "teacher")

    def on(self, p: Float[Tensor, "*N k"], q: Float[Tensor, "*N k"]) -> PerPosition:
        return kl(q, p)


@dataclass(frozen=True)
class BucketJSD(OnSupport):
    """`JSD` over the support plus one bucket for the rest.  SDPO, arXiv:2601.20802, released code."""

    support: Support = Support()
    beta: float = 0.5

    def __post_init__(self) -> None:
        JSD(self.beta)  # raises ValueError for an invalid beta

    def on(self, p: Float[Tensor, "*N k"], q: Float[Tensor, "*N k"]) -> PerPosition:
        return JSD(self.beta)(p, q)


@dataclass(frozen=True)
class RenormalisedKL(OnSupport):
    """Reverse KL of both models renormalised on the support; it ignores the mass outside."""

    support: Support = Support()
    bucketed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.support.k == 1:
            raise ValueError("k=1: a renormalised top-1 KL is 0 for every pair of models; use k >= 2 or tail=bucket")

    def on(self, p: Float[Tensor, "*N k"], q: Float[Tensor, "*N k"]) -> PerPosition:
        return kl(p.log_softmax(-1), q.log_softmax(-1))


@dataclass(frozen=True)
class GeneralisedKL(OnSupport):
    """sum p log(p/q) - p + q over the support: stationary at p = q without a tail.  MOPD, arXiv:2606.30406, Eq. 5."""

    support: Support = Support(64, "teacher")
    bucketed: ClassVar[bool] = False

    def on(self, p: Float[Tensor, "*N k"], q: Float[Tensor, "*N k"]) -> PerPosition:
        return kl(p, q) + (q.exp() - p.exp()).sum(-1)


@dataclass(frozen=True)
class SupportMeanKL(OnSupport):
    """`GeneralisedKL` divided by the student's detached mass on the support.  Rethinking OPD, arXiv:2604.13016.

    Its gradient is that of the loss of the official code, -sum_v sg[w_v (log q_v - log p_v)] log p_v, where w is p
    renormalised on the support.
    """

    support: Support = Support()
    bucketed: ClassVar[bool] = False

    def on(self, p: Float[Tensor, "*N k"], q: Float[Tensor, "*N k"]) -> PerPosition:
        return GeneralisedKL(self.support).on(p, q) / p.detach().exp().sum(-1)
