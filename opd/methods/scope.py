"""SCOPE: likelihood training on correct rollouts, OPD on wrong rollouts.  arXiv:2604.10688."""

from opd.losses.rewards import One
from opd.losses.terms import PolicyGradient
from opd.losses.token_weights import RightRollouts, WrongRollouts
from opd.methods.method import Method
from opd.methods.rollout_policies.on_policy import OnPolicy


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
