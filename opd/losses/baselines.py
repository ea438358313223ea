"""Baselines, subtracted from a reward to lower the variance of its gradient.

A baseline is `(reward, student_logp [*N V], teacher_logp [*N V], exact [*N V]) -> [*N]`, where `exact` marks the tokens
that the estimator sums exactly.  It never sees the sampled token, so it is unbiased.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from opd.losses.rewards import Reward
from opd.losses.shapes import Marked, OverVocabulary, PerPosition


def top(k: int, logp: OverVocabulary) -> Int[Tensor, "*N k"]:
    """Return the ids of the k most probable tokens, or of all tokens if k exceeds the vocabulary."""
    return logp.topk(min(k, logp.shape[-1]), -1, sorted=False).indices


def mean(p: OverVocabulary, f: OverVocabulary) -> PerPosition:
    """Return sum_v p_v f_v.  An infinite f on a token of probability 0 contributes 0."""
    return (p * f.where(p > 0, 0)).sum(-1)


@dataclass(frozen=True)
class Value:
    """The mean reward E_p[f]; for the log ratio it is -KL(student || teacher).  vOPD, arXiv:2605.07865, Eq. 9."""

    def __call__(
        self, reward: Reward, student_logp: OverVocabulary, teacher_logp: OverVocabulary, exact: Marked | None
    ) -> PerPosition:
        return mean(student_logp.exp(), reward(student_logp, teacher_logp))


@dataclass(frozen=True)
class TopKValue:
    """`Value` on the student's top k, both models renormalised on it, no tail.  arXiv:2605.07865, Eq. 14-15.

    The sampled token is never added to the set, because the baseline would then depend on it.
    """

    k: int = 20

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k={self.k}: the top-k baseline needs k >= 1 (k = 1 is `opd`, k = V is `vopd`)")

    def __call__(
        self, reward: Reward, student_logp: OverVocabulary, teacher_logp: OverVocabulary, exact: Marked | None
    ) -> PerPosition:
        ids = top(self.k, student_logp)
        p, q = (x.gather(-1, ids).log_softmax(-1) for x in (student_logp, teacher_logp))
        return Value()(reward, p, q, None)


@dataclass(frozen=True)
class Optimal:
    """The baseline of least variance in logit space, for any reward.

    b = (sum p f s - G_f . G_1) / (sum p s - |G_1|^2) over the sampled tokens, where s_v = |1_v - p|^2 and G_x = sum p x
    (1_v - p).  If nothing is summed exactly, G_1 = 0 and b = E[f s] / E[s].  If the denominator underflows (p is a
    point mass), the score vanishes and E_p[f] is returned instead.
    """

    def __call__(
        self, reward: Reward, student_logp: OverVocabulary, teacher_logp: OverVocabulary, exact: Marked | None
    ) -> PerPosition:
        p = student_logp.exp()
        f = reward(student_logp, teacher_logp).where(p > 0, 0)
        # 1 - p and |p|^2 - p_v^2 cancel for a dominant token: sum the other tokens instead.
        largest, largest_id = p.max(-1, keepdim=True)
        other_p = p.scatter(-1, largest_id, 0)
        other_mass, other_squares = other_p.sum(-1, keepdim=True), other_p.square().sum(-1, keepdim=True)
        norm2 = (1 - p).square() + (other_squares + largest.square() - p.square()).clamp(min=0)
        norm2 = norm2.scatter(-1, largest_id, other_mass.square() + other_squares)
        if exact is None:
            numerator, denominator = (p * norm2 * f).sum(-1), (p * norm2).sum(-1)
        else:
            tail = p.where(~exact, 0)
            score = lambda x: tail * x - p * (tail * x).sum(-1, keepdim=True)
            unit_score, reward_score = score(torch.ones_like(f)), score(f)
            numerator = (tail * norm2 * f).sum(-1) - (reward_score * unit_score).sum(-1)
            denominator = (tail * norm2).sum(-1) - unit_score.square().sum(-1)
        return torch.where(denominator > torch.finfo(p.dtype).tiny, numerator / denominator, mean(p, f))


Baseline = Callable[[Reward, Tensor, Tensor, Tensor | None], Tensor]
