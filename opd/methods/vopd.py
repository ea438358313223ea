"""vOPD: subtract the value of a state, which has a closed form.  arXiv:2605.07865."""

from opd.losses.baselines import TopKValue, Value
from opd.losses.terms import PolicyGradient
from opd.methods.method import Method


def vopd() -> Method:
    """Log-ratio reward minus its mean over the vocabulary, A = r + KL.  vOPD, arXiv:2605.07865, Eq. 9-10."""
    return Method((PolicyGradient(baseline=Value()),))


def vopd_topk(k: int = 20) -> Method:
    """vOPD with the baseline on the student's top k, both models renormalised on it.  arXiv:2605.07865, Eq. 14-15.

    Args:
        k: Number of tokens in the baseline (paper 20, released configuration 100; 1 is `opd`, the vocabulary size is
            `vopd`).
    """
    return Method((PolicyGradient(baseline=TopKValue(k)),))
