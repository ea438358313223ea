"""FiRe-OPD: filter rollouts, then reweight tokens.  arXiv:2606.02684."""

from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from opd.method import Method, PolicyGradient
from opd.surrogates import Clipped
from opd.weights import Confidence, row_mean


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


def fire(drop: float = 0.2, alpha: float = 1.0, beta: float = 1.0, clip: float = 0.2) -> Method:
    """OPD without the rollouts the teacher finds unlikely, on sure teachers and unsure students.  arXiv:2606.02684.

    Args:
        drop: share of the batch's rollouts left out, by mean log q(y); 0 is the released code, which looks at one
            rollout at a time and so drops none.
        alpha: weight of the teacher's confidence.
        beta: weight of the student's confusion.
        clip: bound of the importance ratio, which is 1 with one update per rollout batch.
    """
    term = PolicyGradient(surrogate=Clipped(clip, clip), weights=(Confidence(alpha, beta),))
    return Method((term,), filters=(LikelyRollouts(drop),) if drop else ())
