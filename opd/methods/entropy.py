"""Only the tokens of which the student is least sure.  arXiv:2506.01939."""

from opd.method import Method, PolicyGradient
from opd.weights import TopEntropy


def entropy(fraction: float = 0.2) -> Method:
    """OPD on the top fraction of the batch's tokens by student entropy.  arXiv:2506.01939; in OPD, 2606.01249.

    Args:
        fraction: share of the batch's trained tokens that keep their loss; the others stay in the denominator.
    """
    return Method((PolicyGradient(weights=(TopEntropy(fraction),)),))
