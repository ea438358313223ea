"""FiRe-OPD: filter rollouts, then reweight tokens.  arXiv:2606.02684."""

from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from opd.weights import row_mean


@dataclass(frozen=True)
class LikelyRollouts:
    """The trained tokens, without those of the `drop` of rollouts that the teacher finds least likely.  Eq. 4.

    By mean log q(y), over all rollouts of the batch that have trained tokens; those that tie at the edge stay.
    """

    drop: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.drop < 1:
            raise ValueError(f"drop={self.drop}: the share of rollouts to drop lies in [0, 1)")

    def __call__(self, teacher_logp: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
        score, some = row_mean(teacher_logp, mask), mask.any(1)
        if not some.any():
            return mask
        return mask & (score >= score[some].quantile(self.drop))[:, None]
