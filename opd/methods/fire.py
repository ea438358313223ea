"""FiRe-OPD: filter rollouts, then reweight tokens.  arXiv:2606.02684."""

from dataclasses import dataclass

from opd.losses.shapes import Mask, PerToken
from opd.losses.surrogates import Clipped
from opd.losses.terms import PolicyGradient
from opd.losses.token_weights import Confidence, row_mean
from opd.methods.method import Method


@dataclass(frozen=True)
class LikelyRollouts:
    """Filter that removes the share `drop` of rollouts to which the teacher assigns the lowest likelihood.  Eq. 4.

    Rollouts are ranked by mean log q(y), among all rollouts of the batch that have trained tokens.  Rollouts that tie
    at the threshold are kept.
    """

    drop: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.drop < 1:
            raise ValueError(f"drop={self.drop}: the share of rollouts to drop lies in [0, 1)")

    def __call__(self, teacher_logp: PerToken, mask: Mask) -> Mask:
        score, some = row_mean(teacher_logp, mask), mask.any(1)
        if not some.any():
            return mask
        return mask & (score >= score[some].quantile(self.drop))[:, None]


def fire(drop: float = 0.2, alpha: float = 1.0, beta: float = 1.0, clip: float = 0.2) -> Method:
    """OPD on rollouts likely under the teacher, weighted by both models' entropy.  FiRe-OPD, arXiv:2606.02684.

    Args:
        drop: Share of the batch's rollouts to remove, those of lowest mean log q(y).  0 matches the released code,
            which filters one rollout at a time and so removes none.
        alpha: Weight of the teacher's confidence.  Tokens where the teacher is certain count more.
        beta: Weight of the student's uncertainty.  Tokens where the student is uncertain count more.
        clip: Clip range of the importance ratio.  It has no effect with one update per rollout batch, where the ratio
            is 1.
    """
    term = PolicyGradient(surrogate=Clipped(clip, clip), weights=(Confidence(alpha, beta),))
    return Method((term,), filters=(LikelyRollouts(drop),) if drop else ())
