"""Token weights: functions `(columns) -> [B T]`, >= 0, multiplied together.

A reduction is the weight that contains the denominator.  It reads the mask of the whole batch, so the micro-batches of
a step add up exactly to the step.
"""

from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opd.losses.shapes import Mask, PerRollout, PerToken


@dataclass(frozen=True)
class TruncatedImportance:
    """The importance ratio min(p_trainer / p_sampler, cap).

    For tokens sampled at another temperature, with top-k or top-p truncation, or by another engine.
    """

    cap: float = 2.0

    def __call__(self, student_logp: PerToken, sampler_logp: PerToken, mask: Mask) -> PerToken:
        return (student_logp - sampler_logp).where(mask, 0).exp().clamp(max=self.cap)


def highest(x: PerToken, mask: Mask, fraction: float) -> Mask:
    """Return the mask [B, T] of the `fraction` of trained tokens with the highest x: at least one, ties included."""
    trained_x = x[mask]
    if not len(trained_x):
        return mask
    count = max(1, round(fraction * len(trained_x)))
    return mask & (x >= trained_x.kthvalue(len(trained_x) + 1 - count).values)


def row_mean(x: PerToken, mask: Mask) -> PerRollout:
    """Return the mean of x over the trained tokens of each row, [B]; 0 for a row without any."""
    return x.where(mask, 0).sum(1) / mask.sum(1).clamp(min=1)


def segment_means(
    x: PerToken, segment: Int[Tensor, "B T"], mask: Mask, segments: int
) -> tuple[Float[Tensor, "B K"], Float[Tensor, "B K"]]:
    """Return the mean of x over the marked tokens of segments 0 to K, 0 where there are none, and their number."""
    number = segment.where(mask, 0)
    zeros = x.new_zeros(len(x), segments + 1)
    count = zeros.scatter_add(1, number, mask.to(x.dtype))
    return zeros.scatter_add(1, number, x.where(mask, 0)) / count.clamp(min=1), count


@dataclass(frozen=True)
class TopEntropy:
    """Weight 1 on the fraction of tokens with the highest student entropy, else 0.  arXiv:2506.01939.

    The threshold is computed over the whole batch.  The removed tokens still count in the denominator.
    """

    fraction: float = 0.2

    def __post_init__(self) -> None:
        _fraction("fraction", self.fraction)

    def __call__(self, student_entropy: PerToken, mask: Mask) -> PerToken:
        return highest(student_entropy, mask, self.fraction).to(student_entropy.dtype)


@dataclass(frozen=True)
class TopTeacherEntropy:
    """Weight 1 on the fraction of tokens with the highest teacher entropy, else 0: the gate of `eopd`."""

    fraction: float = 0.2

    def __post_init__(self) -> None:
        _fraction("fraction", self.fraction)

    def __call__(self, teacher_entropy: PerToken, mask: Mask) -> PerToken:
        return highest(teacher_entropy, mask, self.fraction).to(teacher_entropy.dtype)


@dataclass(frozen=True)
class TeacherEntropyAbove:
    """Weight 1 where the teacher's entropy exceeds `nats`, else 0.  EOPD, arXiv:2603.07079, Eq. 9."""

    nats: float = 0.8

    def __call__(self, teacher_entropy: PerToken) -> PerToken:
        return (teacher_entropy > self.nats).to(teacher_entropy.dtype)


@dataclass(frozen=True)
class Confidence:
    """(1 + teacher c_T)(1 + student c_S), scaled to mean 1 in each rollout.  FiRe-OPD, arXiv:2606.02684, Eq. 5-8.

    c_T = 1 - H(q)/max H(q), c_S = H(p)/max H(p).  The maxima are over the batch before its filters, outliers included.
    """

    teacher: float = 1.0
    student: float = 1.0

    def __post_init__(self) -> None:
        for name, value in (("teacher", self.teacher), ("student", self.student)):
            if not value >= 0:
                raise ValueError(f"{name}={value}: the strength of a confidence is 0 (off) or more")

    def __call__(self, teacher_entropy: PerToken, student_entropy: PerToken, mask: Mask, valid: Mask) -> PerToken:
        sure, confused = 1 - _of_largest(teacher_entropy, valid), _of_largest(student_entropy, valid)
        weight = (1 + self.teacher * sure) * (1 + self.student * confused)
        return weight / row_mean(weight, mask).clamp(min=torch.finfo(weight.dtype).tiny)[:, None]


@dataclass(frozen=True)
class PrefixAgreement:
    """1 + gamma (1 - sum_{k<t} |r_k| / sum_k |r_k|): early tokens count more.  IW-OPD, arXiv:2606.22600.

    r = log q - log p over a rollout's trained tokens.  It depends on the sampled token, so it excludes a baseline.
    """

    gamma: float = 0.5

    def __post_init__(self) -> None:
        if not self.gamma >= 0:
            raise ValueError(f"gamma={self.gamma}: the strength of the prefix weight is 0 (off) or more")

    def __call__(self, student_logp: PerToken, teacher_logp: PerToken, mask: Mask) -> PerToken:
        gap = (teacher_logp - student_logp).where(mask, 0).abs()
        earlier_gap = gap.cumsum(1) - gap
        total_gap = gap.sum(1, keepdim=True)
        return 1 + self.gamma * (1 - earlier_gap / total_gap.clamp(min=torch.finfo(gap.dtype).tiny))


@dataclass(frozen=True)
class RightRollouts:
    """Softmax of nll_S / tau over a group's correct rollouts, of mean 1; else 0.  SCOPE, arXiv:2604.10688, Eq. 4.

    Correct answers that are harder for the student count more; with `reverse` they count less.  Correct: outcome > 1/2.
    """

    tau: float = 1.0
    reverse: bool = False

    def __post_init__(self) -> None:
        _temperature(self.tau)

    def __call__(self, student_logp: PerToken, outcome: PerRollout, group: Int[Tensor, " B"], mask: Mask) -> PerToken:
        score = row_mean(student_logp, mask) / (self.tau if self.reverse else -self.tau)
        return group_softmax(score, group, (outcome > 0.5) & mask.any(1))[:, None].expand(mask.shape)


@dataclass(frozen=True)
class WrongRollouts:
    """Softmax of -nll_T / tau over a group's wrong rollouts, of mean 1; else 0.  SCOPE, arXiv:2604.10688, Eq. 5.

    Attempts that are more likely under the teacher, from which it can recover, count more.  Wrong: outcome <= 1/2.
    """

    tau: float = 1.0

    def __post_init__(self) -> None:
        _temperature(self.tau)

    def __call__(self, teacher_logp: PerToken, outcome: PerRollout, group: Int[Tensor, " B"], mask: Mask) -> PerToken:
        score = row_mean(teacher_logp, mask) / self.tau
        return group_softmax(score, group, (outcome <= 0.5) & mask.any(1))[:, None].expand(mask.shape)


@dataclass(frozen=True)
class Frozen:
    """Weight `weight` on every listed token, 1 elsewhere.  Rock Tokens, arXiv:2605.09253, Eq. 18-19."""

    ids: tuple[int, ...] = ()
    weight: float = 0.0

    def __call__(self, ids: Int[Tensor, "B T"]) -> PerToken:
        return torch.where(_listed(ids, self.ids), self.weight, 1.0)


@dataclass(frozen=True)
class FrozenWindow:
    """`Frozen`, with `weight` also on high-KL tokens near a listed token.  Rock Tokens, arXiv:2605.09253, Eq. 18-19.

    Near: within `width` tokens.  High: above the `quantile` of the batch's reverse KL.  The paper gives neither value.
    """

    ids: tuple[int, ...] = ()
    weight: float = 0.0
    width: int = 5
    quantile: float = 0.95

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width={self.width}: a window needs width >= 1 (without one: Frozen)")
        _fraction("quantile", self.quantile)

    def __call__(self, ids: Int[Tensor, "B T"], reverse_kl: PerToken, mask: Mask) -> PerToken:
        rock = _listed(ids, self.ids) & mask
        near = torch.nn.functional.max_pool1d(rock.float(), 2 * self.width + 1, 1, self.width) > 0
        high = highest(reverse_kl, mask, 1 - self.quantile)
        return torch.where(rock | (near & high), self.weight, 1.0)


def group_softmax(score: PerRollout, group: Int[Tensor, " B"], among: Bool[Tensor, " B"]) -> PerRollout:
    """Return the softmax over the marked rows of each group, times their number (mean 1); 0 on the other rows."""
    _, group_index = group.unique(return_inverse=True)
    score = score.where(among, -torch.inf)
    largest = score.new_full((len(group_index),), -torch.inf).scatter_reduce(0, group_index, score, "amax")
    weight = (score - largest[group_index]).where(among, -torch.inf).exp()
    group_sum = partial(score.new_zeros(len(group_index)).scatter_add, 0, group_index)
    return weight * (group_sum(among.to(score.dtype)) / group_sum(weight).clamp(min=1))[group_index]


def _listed(ids: Int[Tensor, "B T"], listed: tuple[int, ...]) -> Mask:
    return torch.isin(ids, torch.tensor(listed, dtype=ids.dtype, device=ids.device))


def _of_largest(x: PerToken, mask: Mask) -> PerToken:
    """Return x divided by the largest x of the trained tokens, in [0, 1]; 0 elsewhere."""
    x = x.where(mask, 0).clamp(min=0)  # an entropy of 0 may be rounded to a negative value
    return x / x.max().clamp(min=torch.finfo(x.dtype).tiny)


def _fraction(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise ValueError(f"{name}={value}: a share of the batch's tokens lies in (0, 1]")


def _temperature(tau: float) -> None:
    if not tau > 0:
        raise ValueError(f"tau={tau}: the temperature of a softmax over rollouts is above 0")
