"""SCOPE: right answers teach by themselves, wrong ones through the teacher.  arXiv:2604.10688."""

from opd.method import Method, PolicyGradient
from opd.rewards import One
from opd.rollouts import OnPolicy
from opd.weights import RightRollouts, WrongRollouts


def scope(tau: float = 1.0, per_prompt: int = 8, reverse_student: bool = False) -> Method:
    """Likelihood of right rollouts, OPD on wrong ones, each weighted in its group.  SCOPE, arXiv:2604.10688, Eq. 4-6.

    Args:
        tau: temperature of both softmaxes over a group, in nats per token.
        per_prompt: rollouts of a prompt.
        reverse_student: right answers that are easy for the student count more, as the released scripts have it; the
            paper says the hard ones.
    """
    right = PolicyGradient(One(), weights=(RightRollouts(tau, reverse_student),))
    return Method((right, PolicyGradient(weights=(WrongRollouts(tau),))), rollouts=OnPolicy(per_prompt))
