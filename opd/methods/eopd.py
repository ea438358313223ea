"""EOPD: forward KL beside the reverse one where the teacher is unsure.  arXiv:2603.07079."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from opd.divergences import BucketForwardKL, ReverseKL, Support, kl
from opd.estimators import top
from opd.method import Match, Method, PolicyGradient
from opd.surrogates import Clipped
from opd.weights import TeacherEntropyAbove, TopTeacherEntropy


@dataclass(frozen=True)
class TopKForwardKL:
    """KL(teacher renormalised on its top k || student): not stationary where the models agree.  EOPD, Eq. 10."""

    k: int = 16

    def __call__(self, student_logp: Float[Tensor, "*N V"], teacher_logp: Float[Tensor, "*N V"]) -> Float[Tensor, "*N"]:
        ids = top(self.k, teacher_logp)
        return kl(teacher_logp.gather(-1, ids).log_softmax(-1), student_logp.gather(-1, ids))


def eopd(quantile: float = 0.8, k: int = 16) -> Method:
    """Reverse KL everywhere, forward KL too where the teacher is least sure.  EOPD, arXiv:2603.07079, Eq. 9.

    Made exact: whole distributions, and a tail bucket, so that it is stationary where the models agree.
    `eopd-sampled` is the published loss.

    Args:
        quantile: of the teacher's entropy over the batch's tokens, above which the forward KL is added.
        k: the teacher's most probable tokens on which it is taken; the rest is one bucket.
    """
    if not 0 <= quantile < 1:
        raise ValueError(f"quantile={quantile}: the gate opens above a quantile in [0, 1)")
    gate = TopTeacherEntropy(round(1 - quantile, 9))
    return Method((Match(ReverseKL()), Match(BucketForwardKL(Support(k, "teacher")), weights=(gate,))))


def eopd_sampled(nats: float = 0.8, k: int = 16, clip: float = 0.2) -> Method:
    """Sampled-token OPD, and forward KL too where the teacher is unsure.  EOPD, arXiv:2603.07079, Eq. 7-10.

    Args:
        nats: entropy of the teacher above which the forward KL is added.
        k: the teacher's most probable tokens on which it is taken, the teacher renormalised there, no tail.
        clip: bound of the importance ratio, which is 1 with one update per rollout batch.
    """
    gated = Match(TopKForwardKL(k), weights=(TeacherEntropyAbove(nats),))
    return Method((PolicyGradient(surrogate=Clipped(clip, clip)), gated))
