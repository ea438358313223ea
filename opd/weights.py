"""How much each token counts: functions `(columns) -> [B T]`, >= 0, multiplied together.

A reduction is the weight that holds the denominator: it reads the mask of the whole batch, so the micro-batches of a
step add up to the step exactly.
"""

from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True)
class TokenMean:
    """Every trained token of the batch counts the same.  DAPO, arXiv:2503.14476."""

    def __call__(self, mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        return mask / mask.sum().clamp(min=1)


@dataclass(frozen=True)
class SequenceMean:
    """Every sequence counts the same.  GRPO, arXiv:2402.03300."""

    def __call__(self, mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        return mask / mask.sum(1, keepdim=True).clamp(min=1) / len(mask)


@dataclass(frozen=True)
class Constant:
    """Divide by B x `length`, whatever the lengths: the only unbiased one with reward to go.  arXiv:2503.20783."""

    length: int

    def __call__(self, mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        return mask / (len(mask) * self.length)


@dataclass(frozen=True)
class TruncatedImportance:
    """min(p_trainer / p_sampler, cap), for samples drawn at another temperature, truncated, or by another engine."""

    cap: float = 2.0

    def __call__(
        self,
        student_logp: Float[Tensor, "B T"],
        sampler_logp: Float[Tensor, "B T"],
        mask: Bool[Tensor, "B T"],
    ) -> Float[Tensor, "B T"]:
        return (student_logp - sampler_logp).where(mask, 0).exp().clamp(max=self.cap)
