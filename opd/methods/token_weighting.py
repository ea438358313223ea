"""OPD with a weight per token: by entropy, by position, by the likelihood of the rollout, or by its outcome."""

from dataclasses import dataclass

from opd.losses.rewards import One
from opd.losses.shapes import Mask, PerToken
from opd.losses.surrogates import Clipped
from opd.losses.terms import PolicyGradient
from opd.losses.token_weights import Confidence, PrefixAgreement, RightRollouts, TopEntropy, WrongRollouts, row_mean
from opd.methods.method import Method
from opd.methods.rollout_policies.on_policy import OnPolicy


def entropy(fraction: float = 0.2) -> Method:
    """OPD on the fraction of tokens with the highest student entropy.  arXiv:2506.01939; in OPD, 2606.01249.

    Args:
        fraction: Share of the batch's trained tokens that keep their loss.  The denominator still counts all.
    """
    return Method((PolicyGradient(weights=(TopEntropy(fraction),)),))


def iw_opd(gamma: float = 0.5, clip: float = 0.2) -> Method:
    """OPD whose token weights fall as the two models' disagreement accumulates.  IW-OPD, arXiv:2606.22600.

    Args:
        gamma: Weight of the first token minus the weight of the last (the released code's weight_max - 1).  0 is `opd`.
        clip: Clip range of the importance ratio, which is 1 with one update per rollout batch.
    """
    return Method((PolicyGradient(surrogate=Clipped(clip, clip), weights=(PrefixAgreement(gamma),)),))


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
        clip: Clip range of the importance ratio, which is 1 with one update per rollout batch.
    """
    term = PolicyGradient(surrogate=Clipped(clip, clip), weights=(Confidence(alpha, beta),))
    return Method((term,), filters=(LikelyRollouts(drop),) if drop else ())


def scope(tau: float = 1.0, per_prompt: int = 8, reverse_student: bool = False) -> Method:
    """Likelihood of correct rollouts, OPD on wrong ones, weighted within each group.  SCOPE, arXiv:2604.10688, Eq. 4-6.

    Args:
        tau: Temperature of both softmaxes over a group, in nats per token.
        per_prompt: Number of rollouts per prompt.
        reverse_student: Give more weight to correct rollouts that are easy for the student, as in the released scripts.
            Off: more weight to hard ones, as in the paper.
    """
    right = PolicyGradient(One(), weights=(RightRollouts(tau, reverse_student),))
    return Method((right, PolicyGradient(weights=(WrongRollouts(tau),))), rollouts=OnPolicy(per_prompt))
