"""Reductions: the denominator of each token's loss, `(columns) -> weights [B T]`."""

from dataclasses import dataclass

from opd.losses.shapes import Mask, PerToken


@dataclass(frozen=True)
class TokenMean:
    """Reduction in which every trained token of the batch counts the same.  DAPO, arXiv:2503.14476."""

    def __call__(self, mask: Mask) -> PerToken:
        return mask / mask.sum().clamp(min=1)


@dataclass(frozen=True)
class SequenceMean:
    """Reduction in which every sequence with a trained token counts the same.  GRPO, arXiv:2402.03300."""

    def __call__(self, mask: Mask) -> PerToken:
        return mask / mask.sum(1, keepdim=True).clamp(min=1) / mask.any(1).sum().clamp(min=1)


@dataclass(frozen=True)
class Constant:
    """Reduction that divides by B x `length`; only it is unbiased with reward to go.  arXiv:2503.20783."""

    length: int

    def __call__(self, mask: Mask) -> PerToken:
        return mask / (len(mask) * self.length)


@dataclass(frozen=True)
class LastTokens:
    """Weight of each rollout's last `last` trained tokens, scaled so that a token mean is a mean over them; else 0."""

    last: int = 2000

    def __post_init__(self) -> None:
        if self.last < 1:
            raise ValueError(f"last={self.last}: a number of tokens, 1 or more")

    def __call__(self, mask: Mask) -> PerToken:
        is_last = mask & (mask.flip(1).cumsum(1).flip(1) <= self.last)
        return is_last * (mask.sum() / is_last.sum().clamp(min=1))
