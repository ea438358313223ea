"""TRB: at first generate from a blend of student and teacher; the loss is that of OPD.  arXiv:2605.31159."""

from opd.losses.divergences import BucketKL, Support
from opd.losses.terms import Match
from opd.methods.method import Method
from opd.methods.rollout_policies.kl_ball import Blend


def trb(eps0: float = 0.02, anneal: int = 50, k: int = 16, per_prompt: int = 4) -> Method:
    """Top-k OPD on rollouts as close to the teacher as a KL ball around the student allows.  TRB, arXiv:2605.31159.

    Tokens are sampled from mu ~ p^(1-b) q^b with the largest b such that KL(mu || p) <= eps at each token; eps falls
    from eps0 to 0.

    Args:
        eps0: Radius of the ball at the first step, in nats.  0 samples from the student only.
        anneal: Number of steps over which the radius falls to 0.  After them only the student generates.
        k: Number of the student's most probable tokens in the reverse KL.  The remaining tokens form one bucket.
        per_prompt: Number of rollouts per prompt.
    """
    return Method((Match(BucketKL(Support(k))),), rollouts=Blend(eps0, anneal, per_prompt))
