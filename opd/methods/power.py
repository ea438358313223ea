"""PowerOPD: bounded rewards.  arXiv:2606.17199."""

from opd.method import Method, PolicyGradient
from opd.rewards import Power


def poweropd(alpha: float = 5.0) -> Method:
    """Reward q^alpha - p^alpha, bounded, instead of the log ratio.  PowerOPD, arXiv:2606.17199, Eq. 4.

    Args:
        alpha: power; larger looks only at tokens of which one model is sure (paper 0.1 to 500, the authors' script 5).
    """
    return Method((PolicyGradient(Power(alpha)),))
