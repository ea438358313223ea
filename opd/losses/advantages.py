"""Transforms from scores to advantages, `(x [B T], columns) -> [B T]`, which combine several tokens of the batch.

They are applied in order.  Masked tokens may hold any value on entry, infinities included.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from opd.losses.shapes import Mask, PerRollout, PerToken


@dataclass(frozen=True)
class GroupAdvantage:
    """x times a judge's verdict minus its group mean, divided by the group's deviation if `norm_std`.

    GRPO, arXiv:2402.03300; without the division it is Dr. GRPO, arXiv:2503.20783.  A group without verdicts has
    advantage 0.  Rollouts without a trained token do not enter the statistics.
    """

    norm_std: bool = False
    eps: float = 1e-6

    def __call__(
        self, x: PerToken, verdict: PerRollout, judged: Bool[Tensor, " B"], group: Int[Tensor, " B"], mask: Mask
    ) -> PerToken:
        advantage = group_centred(verdict.to(x.dtype), group, judged & mask.any(1), self.eps if self.norm_std else None)
        return x.where(mask, 0) * advantage[:, None]


def group_centred(
    x: PerRollout, group: Int[Tensor, " B"], among: Bool[Tensor, " B"], eps: float | None = None
) -> PerRollout:
    """Return x minus its group's mean over the marked rows, over their deviation + `eps` if given; 0 on other rows."""
    _, group_index = group.unique(return_inverse=True)
    group_sum = lambda y: y.new_zeros(len(group_index)).scatter_add(0, group_index, y.where(among, 0))[group_index]
    count = group_sum(torch.ones_like(x)).clamp(min=1)
    centred = (x - group_sum(x) / count).where(among, 0)
    return centred if eps is None else centred / ((group_sum(centred.square()) / count).sqrt() + eps)


def reward_to_go(x: PerToken, gamma: float) -> PerToken:
    """Return the discounted sum sum_k gamma^k x_{t+k} for each position t, [B, T]."""
    out = [x[:, -1]]
    for column in x[:, :-1].flip(1).unbind(1):
        out.append(column + gamma * out[-1])
    return torch.stack(out[::-1], 1)


@dataclass(frozen=True)
class Discount:
    """The reward to go, sum_k gamma^k x_{t+k} over trained tokens."""

    gamma: float = 1.0

    def __call__(self, x: PerToken, mask: Mask) -> PerToken:
        return reward_to_go(x.where(mask, 0), self.gamma)


@dataclass(frozen=True)
class DiscountExpected:
    """The reward to go with future log ratios replaced by their conditional means -KL_s; unbiased for `LogRatio`.

    Its variance is usually, but not always, lower than that of `Discount`: later KLs covary with the current ratio.
    """

    gamma: float = 1.0

    def __call__(self, x: PerToken, reverse_kl: PerToken, mask: Mask) -> PerToken:
        future = reward_to_go(-reverse_kl.where(mask, 0), self.gamma)
        return x.where(mask, 0) + self.gamma * torch.nn.functional.pad(future[:, 1:], (0, 1))


@dataclass(frozen=True)
class Whiten:
    """(x - mean) / std over the trained tokens of the batch.  Z-score baseline of arXiv:2606.17199, Table 1."""

    eps: float = 1e-8

    def __call__(self, x: PerToken, mask: Mask) -> PerToken:
        count = mask.sum().clamp(min=1)
        centred = (x - x.where(mask, 0).sum() / count).where(mask, 0)
        return centred / ((centred.square().sum() / count).sqrt() + self.eps)


@dataclass(frozen=True)
class GroupWhiten:
    """(x - mean) / std over the trained tokens of a prompt's rollouts.  TOP-D, arXiv:2607.04751."""

    eps: float = 1e-6

    def __call__(self, x: PerToken, group: Int[Tensor, " B"], mask: Mask) -> PerToken:
        per_token = group[:, None].expand_as(mask)[mask]
        standardised = group_centred(x[mask], per_token, torch.ones_like(per_token, dtype=torch.bool), self.eps)
        return x.where(mask, 0).masked_scatter(mask, standardised)


@dataclass(frozen=True)
class MeanFuture:
    """x_t plus the mean of x over the later trained tokens of its rollout.  TOP-D, arXiv:2607.04751, Eq. 8."""

    def __call__(self, x: PerToken, mask: Mask) -> PerToken:
        x = x.where(mask, 0)
        later, count = reward_to_go(x, 1.0) - x, reward_to_go(mask.to(x.dtype), 1.0) - mask.to(x.dtype)
        return x + later / count.clamp(min=1)
