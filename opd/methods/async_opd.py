"""AsyncOPD: an older student's rollouts, the advantage and the ratio of now.  arXiv:2606.24143."""

from opd.method import Method, PolicyGradient
from opd.surrogates import OffPolicy


def async_opd() -> Method:
    """OPD on rollouts of an older student, exact at their contexts.  AsyncOPD, arXiv:2606.24143.

    Loss -p/p_old sg(log q - log p), unclipped, p and the advantage of the weights being trained, p_old of those that
    wrote: the paper's best of four.  The run's --staleness says how old they may be (4 in the paper; without it this is
    opd); contexts stay the older student's.  Left out: more tokens drawn at each context, which divide the variance.
    """
    return Method((PolicyGradient(surrogate=OffPolicy()),))
