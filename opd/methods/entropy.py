"""Train only on the tokens where the student's entropy is highest.  arXiv:2506.01939."""

from opd.losses.terms import PolicyGradient
from opd.losses.token_weights import TopEntropy
from opd.methods.method import Method


def entropy(fraction: float = 0.2) -> Method:
    """OPD on the fraction of tokens with the highest student entropy.  arXiv:2506.01939; in OPD, 2606.01249.

    Args:
        fraction: Share of the batch's trained tokens that keep their loss.  The other tokens still count in the
            denominator.
    """
    return Method((PolicyGradient(weights=(TopEntropy(fraction),)),))
