"""PowerOPD: bounded rewards.  arXiv:2606.17199."""

from opd.losses.rewards import Power
from opd.losses.terms import PolicyGradient
from opd.methods.method import Method


def poweropd(alpha: float = 5.0) -> Method:
    """Bounded reward q^alpha - p^alpha instead of the log ratio.  PowerOPD, arXiv:2606.17199, Eq. 4.

    Args:
        alpha: Exponent, above 0.  Larger values focus on tokens to which either model gives a high probability (paper:
            0.1 to 500; the authors' script: 5).
    """
    return Method((PolicyGradient(Power(alpha)),))
