"""Self-distillation: the student's own weights teach, told what the student is not."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from opd.divergences import JSD, BucketForwardKL, BucketJSD, BucketKL, Divergence, ReverseKL, Support
from opd.method import Match, Method, Privileged
from opd.rollouts import OnPolicy


@dataclass(frozen=True)
class ClippedForwardKL:
    """sum_v min(q log(q/p), bound): no single token decides.  OPSD, arXiv:2601.18734, official code."""

    bound: float = 0.05

    def __post_init__(self) -> None:
        if not self.bound > 0:
            raise ValueError(f"bound={self.bound}: the clip of one token's share of the KL is above 0")

    def __call__(self, student_logp: Float[Tensor, "*N V"], teacher_logp: Float[Tensor, "*N V"]) -> Float[Tensor, "*N"]:
        q = teacher_logp.exp()
        return (q * (teacher_logp - student_logp).where(q > 0, 0)).clamp(max=self.bound).sum(-1)


def opsd(beta: float = 0.5, clip: float = 0.0) -> Method:
    """The student, told the solution, teaches the student.  OPSD, arXiv:2601.18734.

    The released runs have --teacher base, the weights as they were before training.

    Args:
        beta: the teacher's share of the Jensen-Shannon mixture, inside (0, 1).
        clip: above 0, the forward KL instead, each vocabulary entry's share of it bounded by this (official code 0.05).
    """
    divergence: Divergence = ClippedForwardKL(clip) if clip else JSD(beta)
    return Method((Match(divergence),), teacher=Privileged("self", "response"))


def sdft() -> Method:
    """The base model, shown a demonstration, teaches by reverse KL; or --teacher ema:RATE.  SDFT, arXiv:2601.19897."""
    return Method((Match(ReverseKL()),), teacher=Privileged("base", "response"))


def sdpo(k: int = 100, beta: float = 0.5, per_prompt: int = 8) -> Method:
    """An average of the student, shown a right answer of the same group, teaches.  SDPO, arXiv:2601.20802.

    As the released configuration has it: an average of rate 0.05, the answer without its thinking.  The authors' runs
    on code are --k 20 --beta 1 --teacher ema:0.01 and add the verifier's words on the attempt itself, which nobody
    gives here: --context COLUMN is the row's, the same for all attempts at it.  The released clip of p / p_old is 1
    with one update a batch, and is not there.  A rollout whose group has no other right one is not trained.

    Args:
        k: the student's most probable tokens on which the divergence is taken; the rest is one bucket.
        beta: the teacher's share of the Jensen-Shannon mixture; 1 is the reverse KL, 0 the forward.
        per_prompt: rollouts of a prompt.
    """
    support = Support(k, "student")
    ends: dict[float, Divergence] = {0.0: BucketForwardKL(support), 1.0: BucketKL(support)}
    term = Match(ends[beta] if beta in ends else BucketJSD(support, beta))
    return Method((term,), rollouts=OnPolicy(per_prompt), teacher=Privileged("ema:0.05", "peer"))
