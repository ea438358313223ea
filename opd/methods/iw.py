"""IW-OPD: early tokens count more.  arXiv:2606.22600."""

from opd.method import Method, PolicyGradient
from opd.surrogates import Clipped
from opd.weights import PrefixAgreement


def iw_opd(gamma: float = 0.5, clip: float = 0.2) -> Method:
    """OPD that trusts a rollout as long as its models agreed so far.  IW-OPD, arXiv:2606.22600.

    Args:
        gamma: weight of the first token less that of the last (the released code's weight_max - 1); 0 is `opd`.
        clip: bound of the importance ratio, which is 1 with one update per rollout batch.
    """
    return Method((PolicyGradient(surrogate=Clipped(clip, clip), weights=(PrefixAgreement(gamma),)),))
