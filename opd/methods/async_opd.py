"""AsyncOPD: train on rollouts of older weights, with a current advantage and an importance ratio.  arXiv:2606.24143."""

from opd.losses.estimators import Sampled, Several
from opd.losses.surrogates import OffPolicy
from opd.losses.terms import PolicyGradient
from opd.methods.method import Method
from opd.methods.rollout_policies.on_policy import OnPolicy


def async_opd(samples: int = 1) -> Method:
    """OPD on stale rollouts, with an importance ratio that is exact at their contexts.  AsyncOPD, arXiv:2606.24143.

    The loss is -p/p_old sg(log q - log p), unclipped: the best of the paper's four variants.  p and the advantage come
    from the weights being trained, p_old from the weights that generated the rollout.  --staleness bounds how old those
    weights may be (4 in the paper; without --staleness this is `opd`).  The ratio corrects only the sampled token: the
    contexts remain those of the older weights.

    Args:
        samples: Tokens sampled at each context by the generating weights, the response's token included.  The loss is
            their mean, which has 1/samples of the variance at a context (4 and 64 in the paper).  If vLLM generates,
            the weights before the step sample all but the response's token, with their own p_old.  If the teacher
            provides logits, `opd-full` gives the limit of many samples at no extra cost; a teacher server must return
            this many log-probs per token.
    """
    several = Several() if samples > 1 else Sampled()
    return Method((PolicyGradient(surrogate=OffPolicy(), estimator=several),), rollouts=OnPolicy(samples=samples))
