"""Rewards: how strongly the teacher prefers a token, elementwise `(student_logp, teacher_logp) -> reward`.

A reward carries no gradient.  Fields are hyper-parameters.  Any shape is allowed: the head pass evaluates a reward on
the sampled token, and on the whole vocabulary if a baseline or an estimator requires it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from opd.losses.shapes import Elementwise

Reward = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class LogRatio:
    """The log ratio log q - log p, one sample of -KL(student || teacher).  vOPD, arXiv:2605.07865, Eq. 3."""

    def __call__(self, student_logp: Elementwise, teacher_logp: Elementwise) -> Elementwise:
        return teacher_logp - student_logp


@dataclass(frozen=True)
class Power:
    """The bounded reward q^alpha - p^alpha, in [-1, 1].  PowerOPD, arXiv:2606.17199, Eq. 4.

    It depends on probabilities, not on their ratio.  Divided by alpha it tends to `LogRatio` as alpha -> 0.
    """

    alpha: float = 5.0

    def __post_init__(self) -> None:
        if not self.alpha > 0:
            raise ValueError(f"alpha={self.alpha}: the power reward needs alpha > 0 (alpha -> 0 is `opd`)")

    def __call__(self, student_logp: Elementwise, teacher_logp: Elementwise) -> Elementwise:
        return (self.alpha * teacher_logp).exp() - (self.alpha * student_logp).exp()


@dataclass(frozen=True)
class Clip:
    """Another reward clipped to [low, high].  Post-hoc baseline of arXiv:2606.17199, Table 1."""

    low: float = -1.0
    high: float = 1.0
    of: Reward = LogRatio()

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"low={self.low}, high={self.high}: a clip needs low < high")

    def __call__(self, student_logp: Elementwise, teacher_logp: Elementwise) -> Elementwise:
        return self.of(student_logp, teacher_logp).clamp(self.low, self.high)


@dataclass(frozen=True)
class Tanh:
    """tanh(reward / scale).  Post-hoc baseline of arXiv:2606.17199, Table 1; scale 5 comes from the authors' code."""

    scale: float = 5.0
    of: Reward = LogRatio()

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise ValueError(f"scale={self.scale}: tanh needs scale > 0")

    def __call__(self, student_logp: Elementwise, teacher_logp: Elementwise) -> Elementwise:
        return (self.of(student_logp, teacher_logp) / self.scale).tanh()


@dataclass(frozen=True)
class One:
    """The constant reward 1; its policy gradient is the negative log-likelihood of the sampled token."""

    def __call__(self, student_logp: Elementwise, teacher_logp: Elementwise) -> Elementwise:
        return torch.ones_like(student_logp)


@dataclass(frozen=True)
class Floor:
    """max(reward, log(share) / (1 - share)), which limits the penalty of a token.  Reopold, arXiv:2603.11137, Eq. 7.

    The floor is the limit q/p -> 0 of log(share + (1 - share) q/p) / (1 - share), whose slope at q = p is 1.
    """

    share: float = 0.3
    of: Reward = LogRatio()

    def __post_init__(self) -> None:
        _inside_unit("share", self.share)

    def __call__(self, student_logp: Elementwise, teacher_logp: Elementwise) -> Elementwise:
        return self.of(student_logp, teacher_logp).clamp(min=math.log(self.share) / (1 - self.share))


@dataclass(frozen=True)
class Proximal:
    """log(alpha q/p + 1 - alpha): the log ratio to the teacher alpha q + (1 - alpha) p.  TOP-D, arXiv:2607.04751.

    It is never below log(1 - alpha).  In expectation it descends JSD(alpha) / (1 - alpha).
    """

    alpha: float = 0.1

    def __post_init__(self) -> None:
        _inside_unit("alpha", self.alpha)

    def __call__(self, student_logp: Elementwise, teacher_logp: Elementwise) -> Elementwise:
        return _log_mixture(teacher_logp - student_logp, self.alpha)


@dataclass(frozen=True)
class SignedLog:
    """sign(reward) log(1 + |reward|): compresses large gaps, keeps small ones.  Demystifying OPD, arXiv:2607.13399."""

    of: Reward = LogRatio()

    def __call__(self, student_logp: Elementwise, teacher_logp: Elementwise) -> Elementwise:
        reward = self.of(student_logp, teacher_logp)
        return reward.sign() * reward.abs().log1p()


@dataclass(frozen=True)
class Sign:
    """sign(log q - log p): descends twice the total variation in expectation.  TV-OPD, arXiv:2609.08341."""

    def __call__(self, student_logp: Elementwise, teacher_logp: Elementwise) -> Elementwise:
        return (teacher_logp - student_logp).sign()


@dataclass(frozen=True)
class Trusted:
    """min(q/p, 1) (log q - log p): the log ratio times the probability that the teacher accepts the token.

    It is the mean over the coin of TrOPD's mask times its reward, arXiv:2606.01249, Eq. 5-6.  It is never below -1/e.
    """

    def __call__(self, student_logp: Elementwise, teacher_logp: Elementwise) -> Elementwise:
        ratio = teacher_logp - student_logp
        ratio = ratio.where(ratio > -math.inf, 0)  # u log u -> 0
        return ratio.clamp(max=0).exp() * ratio


@dataclass(frozen=True)
class ReverseKLPlus:
    """log u - 1, from f = -log u, KL(student || teacher): `LogRatio` minus a constant.  OPD+, arXiv:2606.01039."""

    def __call__(self, student_logp: Elementwise, teacher_logp: Elementwise) -> Elementwise:
        return teacher_logp - student_logp - 1


@dataclass(frozen=True)
class ForwardKLPlus:
    """u, from f = u log u, KL(teacher || student).  OPD+, arXiv:2606.01039.  Unbounded, with high variance."""

    def __call__(self, student_logp: Elementwise, teacher_logp: Elementwise) -> Elementwise:
        return (teacher_logp - student_logp).clamp(max=85).exp()  # exp overflows fp32 beyond about 88


@dataclass(frozen=True)
class JSDPlus:
    """(1 - beta) log(beta u + 1 - beta), from `JSD(beta)`.  OPD+, arXiv:2606.01039."""

    beta: float = 0.5

    def __post_init__(self) -> None:
        _inside_unit("beta", self.beta)

    def __call__(self, student_logp: Elementwise, teacher_logp: Elementwise) -> Elementwise:
        return (1 - self.beta) * _log_mixture(teacher_logp - student_logp, self.beta)


def _log_mixture(ratio: Elementwise, share: float) -> Elementwise:
    """Return log(share e^ratio + 1 - share)."""
    return torch.logaddexp(ratio + math.log(share), torch.full_like(ratio, math.log1p(-share)))


def _inside_unit(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise ValueError(f"{name}={value}: a mixture of teacher and student needs 0 < {name} < 1")
