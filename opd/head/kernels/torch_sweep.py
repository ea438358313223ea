"""The sweep over rows of logits in plain torch: the naive twin of the C and Triton kernels."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from opd.head.closed_forms import Sums


def sweep_(
    student: Float[Tensor, "r V"],
    teacher: Float[Tensor, "r V"],
    ids: Int[Tensor, " r"],
    out: Sums,
    scratch: Float[Tensor, "2 r V"],
) -> tuple[Float[Tensor, "r V"], Float[Tensor, "r V"]]:
    """Fill the sums, turn the student's logits into e, and return (u, v), which are stored in the scratch.

    The teacher's logits are overwritten only if they are stored in scratch[1].  A logit of -inf gives nan.
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
    """Fill the sums of the student only, turn its logits into e, and return u, which is stored in the scratch."""
    u = torch.sub(student, student.amax(-1, keepdim=True), out=scratch)
    e = torch.exp(u, out=student)
    torch.sum(e, -1, out=out.e)
    torch.linalg.vecdot(e, u, out=out.eu)
    torch.gather(u, -1, ids[:, None], out=out.u[:, None])
    return u
