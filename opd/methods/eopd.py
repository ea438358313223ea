"""EOPD: add the forward KL to the reverse KL where the teacher's entropy is high.  arXiv:2603.07079."""

from dataclasses import dataclass

from opd.losses.baselines import top
from opd.losses.divergences import BucketForwardKL, ReverseKL, Support, kl
from opd.losses.shapes import OverVocabulary, PerPosition
from opd.losses.surrogates import Clipped
from opd.losses.terms import Match, PolicyGradient
from opd.losses.token_weights import TeacherEntropyAbove, TopTeacherEntropy
from opd.methods.method import Method


@dataclass(frozen=True)
class TopKForwardKL:
    """KL(teacher || student), the teacher renormalised on its top k: not stationary where the models agree.  Eq. 10."""

    k: int = 16

    def __call__(self, student_logp: OverVocabulary, teacher_logp: OverVocabulary) -> PerPosition:
        ids = top(self.k, teacher_logp)
        return kl(teacher_logp.gather(-1, ids).log_softmax(-1), student_logp.gather(-1, ids))


def eopd(quantile: float = 0.8, k: int = 16) -> Method:
    """Reverse KL on every token, plus forward KL where the teacher is least certain.  EOPD, arXiv:2603.07079, Eq. 9.

    This is an exact variant: it uses whole distributions and a tail bucket, so it is stationary where the models agree.
    `eopd-sampled` is the published loss.

    Args:
        quantile: Quantile in [0, 1) of the teacher's entropy over the batch.  Tokens above it get the forward KL.
        k: Number of the teacher's most probable tokens in the forward KL.  The remaining tokens form one bucket.
    """
    if not 0 <= quantile < 1:
        raise ValueError(f"quantile={quantile}: the gate opens above a quantile in [0, 1)")
    gate = TopTeacherEntropy(round(1 - quantile, 9))
    return Method((Match(ReverseKL()), Match(BucketForwardKL(Support(k, "teacher")), weights=(gate,))))


def eopd_sampled(nats: float = 0.8, k: int = 16, clip: float = 0.2) -> Method:
    """Sampled-token OPD, plus forward KL where the teacher is uncertain.  EOPD, arXiv:2603.07079, Eq. 7-10.

    Args:
        nats: Teacher entropy, in nats, above which the forward KL is added.
        k: Number of the teacher's most probable tokens in the forward KL, renormalised without a tail bucket.
        clip: Clip range of the importance ratio, which is 1 with one update per rollout batch.
    """
    gated = Match(TopKForwardKL(k), weights=(TeacherEntropyAbove(nats),))
    return Method((PolicyGradient(surrogate=Clipped(clip, clip)), gated))
