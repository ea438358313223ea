"""IW-OPD: early tokens count more.  arXiv:2606.22600."""

from opd.losses.surrogates import Clipped
from opd.losses.terms import PolicyGradient
from opd.losses.token_weights import PrefixAgreement
from opd.methods.method import Method


def iw_opd(gamma: float = 0.5, clip: float = 0.2) -> Method:
    """OPD whose token weights fall as the two models' disagreement accumulates.  IW-OPD, arXiv:2606.22600.

    Args:
        gamma: Weight of the first token minus the weight of the last (the released code's weight_max - 1).  0 is `opd`.
        clip: Clip range of the importance ratio.  It has no effect with one update per rollout batch, where the ratio
            is 1.
    """
    return Method((PolicyGradient(surrogate=Clipped(clip, clip), weights=(PrefixAgreement(gamma),)),))
