"""TRB: rollouts from between student and teacher, at first; the loss is OPD's.  arXiv:2605.31159."""

from opd.divergences import BucketKL, Support
from opd.method import Match, Method
from opd.rollouts import Blend


def trb(eps0: float = 0.02, anneal: int = 50, k: int = 16, per_prompt: int = 4) -> Method:
    """Top-k OPD on rollouts drawn as near to the teacher as a KL ball around the student allows.  arXiv:2605.31159.

    mu ~ p^(1-b) q^b with the largest b such that KL(mu || p) <= eps at each token; eps falls from eps0 to 0.

    Args:
        eps0: radius of the ball at the first step (nats); 0 is the student alone.
        anneal: steps over which the radius falls to 0; from then on the student speaks alone.
        k: tokens on which the reverse KL is matched, the student's, with one bucket for the rest.
        per_prompt: rollouts of a prompt.
    """
    return Method((Match(BucketKL(Support(k))),), rollouts=Blend(eps0, anneal, per_prompt))
