"""KAT: a rollout ends where the models begin to agree for long.  arXiv:2606.09471."""

from opd.divergences import BucketKL, Support
from opd.method import Match, Method
from opd.rollouts import StopOnAgreement


def kat(
    window: int = 64,
    floor: int = 16,
    buffer: int = 4096,
    ready: int = 512,
    after: int = 50,
    eta: float = 0.3,
    patience: int = 4,
    k: int = 64,
    online: bool = True,
) -> Method:
    """Top-k OPD on rollouts that end where the teacher has come to agree with all that follows.  arXiv:2606.09471.

    Cut where the first of `patience` low windows in a row began, as Section 4.3 has it; Algorithm 1 cuts where the last
    one ended.  The threshold is that of Eq. 6, a (1 - eta) quantile: a smaller eta cuts more, against the text.

    Args:
        window: tokens over which the KL is averaged.
        floor: tokens that always stay (16 for the 1.7B student, 32 for the 4B).
        buffer: rollouts whose least window is remembered, over all processes.
        ready: rollouts remembered before the first cut.
        after: steps before the first cut.
        eta: the threshold is the (1 - eta) quantile of what is remembered.
        patience: windows in a row below the threshold that end a rollout.
        k: tokens on which the reverse KL is matched, the student's, with one bucket for the rest.
        online: the teacher reads along and the rest is never sampled; off cuts once the whole rollout is measured.
    """
    who = StopOnAgreement(window, floor, buffer, ready, after, eta, patience, online)
    return Method((Match(BucketKL(Support(k))),), rollouts=who)
