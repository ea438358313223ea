"""The sweep over rows of logits in plain torch: the naive twin of the C and Triton kernels."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from opd.head.sums import Sums


def sweep_(
    student: Float[Tensor, "r V"],
    teacher: Float[Tensor, "r V"],
    ids: Int[Tensor, " r"],
    out: Sums,
    scratch: Float[Tensor, "2 r V"],
) -> tuple[Float[Tensor, "r V"], Float[Tensor, "r V"]]:
    """Fill the sums and return (u, v), which live in the scratch; the student's logits become e.

    The teacher's may live in scratch[1]; else they are left as they are.  A logit of -inf gives nan.
    """
    drawn = ids[:, None]
    v = torch.sub(teacher, teacher.amax(-1, keepdim=True), out=scratch[1])
    f = torch.exp(v, out=scratch[0])
    torch.sum(f, -1, out=out.f)
    torch.sum(f.mul_(v), -1, out=out.fv)
    torch.gather(v, -1, drawn, out=out.v[:, None])
    u = sweep_student_(student, ids, out, scratch[0])
    torch.sum((u - v).mul_(student), -1, out=out.euv)
    return u, v


def sweep_student_(
    student: Float[Tensor, "r V"], ids: Int[Tensor, " r"], out: Sums, scratch: Float[Tensor, "r V"]
) -> Float[Tensor, "r V"]:
    """Fill the student's own sums and return u, which lives in the scratch; its logits become e."""
    u = torch.sub(student, student.amax(-1, keepdim=True), out=scratch)
    e = torch.exp(u, out=student)
    torch.sum(e, -1, out=out.e)
    torch.linalg.vecdot(e, u, out=out.eu)
    torch.gather(u, -1, ids[:, None], out=out.u[:, None])
    return u
