"""Policy-gradient surrogates: `(new log p, advantage, columns) -> loss`, elementwise; the gradient flows to `new`."""

from dataclasses import dataclass

import torch

from opd.losses.shapes import Elementwise


@dataclass(frozen=True)
class Reinforce:
    """The loss -A log p(y), which is exact for one optimizer step per rollout batch."""

    def __call__(self, new: Elementwise, advantage: Elementwise) -> Elementwise:
        return -advantage * new


@dataclass(frozen=True)
class ImportanceSampling:
    """The loss -(p / p_old) A, for several optimizer steps per batch; on policy its gradient is that of `Reinforce`."""

    def __call__(self, new: Elementwise, advantage: Elementwise, student_logp: Elementwise) -> Elementwise:
        return -(new - student_logp).exp() * advantage


@dataclass(frozen=True)
class OffPolicy:
    """The loss -(p / mu) A, unclipped, where mu sampled the token.  AsyncOPD, arXiv:2606.24143.

    It is unbiased for any mu, at the contexts that mu visits: E_mu[(p / mu) A grad log p] = E_p[A grad log p].
    """

    def __call__(self, new: Elementwise, advantage: Elementwise, sampler_logp: Elementwise) -> Elementwise:
        return -(new - sampler_logp).exp() * advantage


@dataclass(frozen=True)
class TruncatedRatio:
    """The loss -sg[min(p / mu, cap)] A log p: `Reinforce` on tokens sampled by another engine from mu.

    Its gradient equals that of the weight `TruncatedImportance`, without the measuring pass that a weight needs.
    """

    cap: float = 2.0

    def __call__(self, new: Elementwise, advantage: Elementwise, sampler_logp: Elementwise) -> Elementwise:
        return -(new.detach() - sampler_logp).exp().clamp(max=self.cap) * advantage * new


@dataclass(frozen=True)
class Clipped:
    """The clipped surrogate of PPO, arXiv:1707.06347; high > low is the clip-higher of DAPO, arXiv:2503.14476."""

    low: float = 0.2
    high: float = 0.2

    def __call__(self, new: Elementwise, advantage: Elementwise, student_logp: Elementwise) -> Elementwise:
        ratio = (new - student_logp).exp()
        return -torch.minimum(ratio * advantage, ratio.clamp(1 - self.low, 1 + self.high) * advantage)
