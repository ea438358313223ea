"""AsyncOPD: an older student's rollouts, the advantage and the ratio of now.  arXiv:2606.24143."""

from opd.estimators import Sampled, Several
from opd.method import Method, PolicyGradient
from opd.rollouts import OnPolicy
from opd.surrogates import OffPolicy


def async_opd(samples: int = 1) -> Method:
    """OPD on rollouts of an older student, exact at their contexts.  AsyncOPD, arXiv:2606.24143.

    Loss -p/p_old sg(log q - log p), unclipped, p and the advantage of the weights being trained, p_old of those that
    wrote: the paper's best of four.  The run's --staleness says how old they may be (4 in the paper; without it this is
    opd); contexts stay the older student's.

    Args:
        samples: tokens drawn at each context by the weights that wrote, the response's own among them; the loss is
            their mean, with 1/samples of the variance at a context (4 and 64 in the paper).  A teacher with logits
            gives the limit for nothing (opd-full); of a server this asks so many log-probs a token.
    """
    several = Several() if samples > 1 else Sampled()
    return Method((PolicyGradient(surrogate=OffPolicy(), estimator=several),), rollouts=OnPolicy(samples=samples))
