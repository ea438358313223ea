"""KAT: end a rollout where the two models begin to agree for a long time.  arXiv:2606.09471."""

from opd.losses.divergences import BucketKL, Support
from opd.losses.terms import Match
from opd.methods.method import Method
from opd.methods.rollout_policies.stop_on_agreement import StopOnAgreement


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
    """Top-k OPD on rollouts that end once student and teacher agree for several windows.  KAT, arXiv:2606.09471.

    A rollout is cut where the first of `patience` consecutive low-KL windows began, as in Section 4.3; Algorithm 1 cuts
    where the last window ended.  The threshold follows Eq. 6, a (1 - eta) quantile: a smaller eta cuts more, contrary
    to the paper's text.

    Args:
        window: Number of tokens over which the KL is averaged.
        floor: Number of tokens that are always kept (16 for the 1.7B student, 32 for the 4B).
        buffer: Number of rollouts, over all processes, whose lowest window mean is remembered.
        ready: Number of remembered rollouts required before the first cut.
        after: Number of steps before the first cut.
        eta: Sets the threshold to the (1 - eta) quantile of the remembered window means.
        patience: Number of consecutive windows below the threshold that end a rollout.
        k: Number of the student's most probable tokens in the reverse KL.  The remaining tokens form one bucket.
        online: Run the teacher during generation, so that the rest of the rollout is never generated.  Off: generate
            the whole rollout, measure it, then cut it.
    """
    policy = StopOnAgreement(window, floor, buffer, ready, after, eta, patience, online)
    return Method((Match(BucketKL(Support(k))),), rollouts=policy)
