"""One sweep over rows of logits, in place: per-token sums, then the logits become a gradient.

With u = z - max z of the student, v of the teacher, e = exp(u), f = exp(v), everything a method without autograd needs of
the vocabulary is in seven sums.  The shift keeps their terms of the size of an entropy, so differences of them are exact
enough in fp32.  On a CPU a block of rows stays in the cache across its passes.
"""

from dataclasses import dataclass
from functools import reduce

import torch
from jaxtyping import Float, Int
from torch import Tensor

from opd.divergences import ReverseKL
from opd.estimators import Sampled, Value
from opd.method import Match, Method, PolicyGradient, Target
from opd.rewards import LogRatio


@dataclass(frozen=True)
class Sums:
    """Unnormalised sums over the vocabulary, and both shifted logits at the sampled token."""

    e: Float[Tensor, " n"]
    eu: Float[Tensor, " n"]
    ev: Float[Tensor, " n"]
    f: Float[Tensor, " n"]
    fv: Float[Tensor, " n"]
    u: Float[Tensor, " n"]
    v: Float[Tensor, " n"]

    def columns(self) -> dict[str, Float[Tensor, " n"]]:
        """The measured columns, by name."""
        mass, teacher_mass, mean = self.e.log(), self.f.log(), self.eu / self.e
        return {
            "student_logp": self.u - mass,
            "student_entropy": mass - mean,
            "teacher_logp": self.v - teacher_mass,
            "teacher_entropy": teacher_mass - self.fv / self.f,
            "reverse_kl": (mean - self.ev / self.e) - (mass - teacher_mass),
        }


def sweep_(
    student: Float[Tensor, "r V"],
    teacher: Float[Tensor, "r V"],
    ids: Int[Tensor, " r"],
    out: Sums,
    scratch: Float[Tensor, "2 r V"],
) -> tuple[Float[Tensor, "r V"], Float[Tensor, "r V"]]:
    """Fill the sums and return (u, v), which live in the scratch; the student's logits become e."""
    at = ids[:, None]
    v = torch.sub(teacher, teacher.amax(-1, keepdim=True), out=scratch[1])
    f = torch.exp(v, out=scratch[0])
    torch.sum(f, -1, out=out.f)
    torch.linalg.vecdot(f, v, out=out.fv)
    torch.gather(v, -1, at, out=out.v[:, None])
    u = torch.sub(student, student.amax(-1, keepdim=True), out=scratch[0])
    e = torch.exp(u, out=student)
    torch.sum(e, -1, out=out.e)
    torch.linalg.vecdot(e, u, out=out.eu)
    torch.linalg.vecdot(e, v, out=out.ev)
    torch.gather(u, -1, at, out=out.u[:, None])
    return u, v


@dataclass(frozen=True)
class LogpForm:
    """A loss that sees the student through log p(y) alone: its gradient is the slope times 1_y - p."""

    column = "student_logp"

    def gradient_(self, e: Tensor, u: Tensor, v: Tensor, ids: Tensor, sums: Sums) -> None:
        """e (1_y - p) / p = e's sum on y, less e: subtracted before any rounding, since p_y may be near 1."""
        e.neg_().scatter_add_(-1, ids[:, None], sums.e[:, None])


@dataclass(frozen=True)
class KLForm:
    """A loss that sees the student through KL(student || teacher) alone: the slope times p (u - v - E_p[u - v])."""

    column = "reverse_kl"

    def gradient_(self, e: Tensor, u: Tensor, v: Tensor, ids: Tensor, sums: Sums) -> None:
        """The gradient times the sum of e, in place of e; u is consumed."""
        e.mul_(u.sub_(v).sub_(((sums.eu - sums.ev) / sums.e)[:, None]))
