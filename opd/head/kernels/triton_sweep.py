"""The sweep over rows in Triton: both models' logits are read once for the sums, the student's once for the gradient.

`closed_forms.py` has the definitions.  A program processes a row.  Each of its lanes shifts its sums by the largest
logit that it has read, so that lanes are combined only at the end of the row.  A logit of -inf is a probability of 0.
"""

from dataclasses import dataclass
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opd.head.closed_forms import Form, Sums
from opd.head.vocabulary import Head, Vocabulary

WARPS, DEPTH = 4, 4  # warps of a program; logits that a lane reads at once.  Not tuned on a GPU
NOTHING = tl.constexpr(-1e30)  # the largest logit of a lane that has read none


@triton.jit
@no_type_check
def _logits(raw, bias, inner, outer, columns, width):
    """Return inner (W h + b), or outer tanh(inner (W h + b)); -inf beyond the vocabulary."""
    inside = (columns >= 0) & (columns < width)
    z = tl.load(raw + columns, mask=inside, other=-float("inf")).to(tl.float32)
    if bias is not None:
        z += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    if inner is not None:
        z *= inner
    if outer is not None:
        z = tl.where(inside, outer * (2 / (1 + _exp(-2 * z)) - 1), -float("inf"))
    return z


@triton.jit
@no_type_check
def _exp(x):
    return tl.exp2(x * 1.4426950408889634)  # tl.exp is slower because it handles denormal numbers


@triton.jit
@no_type_check
def _times(p, x):
    """Return p x, and 0 where p is 0 and x infinite."""
    return tl.where(p == 0, 0.0, p * x)


@triton.jit(do_not_specialize=["n"])
@no_type_check
def _sums(
    student, student_bias, student_inner, student_outer, student_stride,
    teacher, teacher_bias, teacher_inner, teacher_outer, teacher_stride,
    ids, out, n, width, DEPTH: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Write e, eu, e (u - v), f, fv, u, v of a row, and both largest logits, to the nine rows of `out`."""
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    student_max = tl.full((LANES,), NOTHING, tl.float32)
    e, eu, euv = tl.zeros_like(student_max), tl.zeros_like(student_max), tl.zeros_like(student_max)
    teacher_max, f, fv = student_max, tl.zeros_like(student_max), tl.zeros_like(student_max)
    if teacher is not None:
        teacher += row * teacher_stride
    tile = tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    for start in range(0, width, DEPTH * LANES):
        z = _logits(student, student_bias, student_inner, student_outer, start + tile, width)
        z = tl.maximum(z, NOTHING, propagate_nan=tl.PropagateNan.ALL)
        student_peak = tl.maximum(student_max, tl.max(z, 0))
        student_decay, student_rise = _exp(student_max - student_peak), student_peak - student_max
        u = z - student_peak[None, :]
        p = _exp(u)
        if teacher is not None:
            t = _logits(teacher, teacher_bias, teacher_inner, teacher_outer, start + tile, width)
            teacher_peak = tl.maximum(teacher_max, tl.max(t, 0))
            teacher_decay, teacher_rise = _exp(teacher_max - teacher_peak), teacher_peak - teacher_max
            v = t - teacher_peak[None, :]
            q = _exp(v)
            euv = _times(student_decay, euv - (student_rise - teacher_rise) * e) + tl.sum(_times(p, u - v), 0)
            fv = teacher_decay * (fv - teacher_rise * f) + tl.sum(q * tl.maximum(v, NOTHING), 0)
            f = teacher_decay * f + tl.sum(q, 0)
            teacher_max = teacher_peak
        eu = student_decay * (eu - student_rise * e) + tl.sum(p * u, 0)
        e = student_decay * e + tl.sum(p, 0)
        student_max = student_peak

    # shift all lanes by the same logit
    student_peak, teacher_peak, y = tl.max(student_max, 0), tl.max(teacher_max, 0), tl.load(ids + row)
    student_decay, student_rise = _exp(student_max - student_peak), student_peak - student_max
    teacher_decay, teacher_rise = _exp(teacher_max - teacher_peak), teacher_peak - teacher_max
    out += row
    tl.store(out, tl.sum(student_decay * e, 0))
    tl.store(out + n, tl.sum(student_decay * (eu - student_rise * e), 0))
    tl.store(out + 5 * n, _logits(student, student_bias, student_inner, student_outer, y, width) - student_peak)
    tl.store(out + 7 * n, student_peak)
    if teacher is not None:
        tl.store(out + 2 * n, tl.sum(_times(student_decay, euv - (student_rise - teacher_rise) * e), 0))
        tl.store(out + 3 * n, tl.sum(teacher_decay * f, 0))
        tl.store(out + 4 * n, tl.sum(teacher_decay * (fv - teacher_rise * f), 0))
        tl.store(out + 6 * n, _logits(teacher, teacher_bias, teacher_inner, teacher_outer, y, width) - teacher_peak)
        tl.store(out + 8 * n, teacher_peak)


@triton.jit(do_not_specialize=["n"])
@no_type_check
def _gradient(
    student, student_bias, student_inner, student_outer, student_stride,
    teacher, teacher_bias, teacher_inner, teacher_outer, teacher_stride,
    ids, sums, out, out_stride, n, width, TILE: tl.constexpr,
):  # fmt: skip
    """Write p - 1_y, or p (u - v - E_p[u - v]) with a teacher, times the softcap's slope.

    `out` may share the student's row, with fewer bytes per logit, because a program reads ahead of its writes.
    """
    row = tl.program_id(0).to(tl.int64)
    student, out, sums = student + row * student_stride, out + row * out_stride, sums + row
    e, euv = tl.load(sums), tl.load(sums + 2 * n)
    student_max, teacher_max, y = tl.load(sums + 7 * n), tl.load(sums + 8 * n), tl.load(ids + row)
    if teacher is not None:
        teacher += row * teacher_stride
    for start in range(0, width, TILE):
        columns = start + tl.arange(0, TILE)
        z = _logits(student, student_bias, student_inner, student_outer, columns, width)
        u = z - student_max
        p = _exp(u) / e
        if teacher is None:
            g = p - tl.where(columns == y, 1.0, 0.0)
        else:
            v = _logits(teacher, teacher_bias, teacher_inner, teacher_outer, columns, width) - teacher_max
            g = _times(p, u - v - euv / e)
        if student_outer is not None:
            g *= 1 - (z / student_outer) * (z / student_outer)
        tl.debug_barrier()  # every thread has read before any writes
        tl.store(out + columns, g.to(out.dtype.element_ty), mask=columns < width)


def sweep_(
    student: Float[Tensor, "n V"],
    teacher: Float[Tensor, "n V"] | None,
    ids: Int[Tensor, " n"],
    out: Sums,
    *,
    heads: tuple[Head, Head | None],
    vocabulary: Vocabulary,
    form: Form | None,
    gradient: Float[Tensor, "n V"],
) -> None:
    """Fill the sums from W h of both models, and `gradient`, which may share the student's rows.

    The gradient is that of the form's column by the student's logits, except for sign, scale and temperature.
    """
    (n, width), v = student.shape, vocabulary
    p_args, q_args = (_model_arguments(student, heads[0], v), _model_arguments(teacher, heads[1], v))
    sums = student.new_empty(9, n, dtype=torch.float32)
    lanes = WARPS * 32 * 16 // student.itemsize  # each thread reads 16 bytes
    launch = {"num_warps": WARPS, "enable_fp_fusion": True}
    with torch.cuda.device_of(student):
        _sums[(n,)](*p_args, *q_args, ids, sums, n, width, DEPTH=DEPTH, LANES=lanes, **launch)
        stop = _StopClass.of(student, teacher, ids, sums, heads, v) if len(v.stop) > 1 else None
        if stop is not None:
            stop.merge_(sums)
        for column, values in zip((out.e, out.eu, out.euv, out.f, out.fv, out.u, out.v), sums, strict=False):
            column.copy_(values)
        if form is not None:
            shift_args = q_args if form.shifted else _model_arguments(None, None, v)
            target = gradient, gradient.stride(0)
            _gradient[(n,)](*p_args, *shift_args, ids, sums, *target, n, width, TILE=DEPTH * lanes, **launch)
            if stop is not None:
                gradient.index_copy_(-1, stop.ids, stop.gradient(sums, form).to(gradient.dtype))


def _model_arguments(raw: Float[Tensor, "n V"] | None, head: Head | None, vocabulary: Vocabulary) -> tuple:
    """Return a model's arguments of the kernels."""
    if raw is None or head is None:
        return None, None, None, None, 0
    inner, outer = vocabulary.curve(head)
    return raw, vocabulary.bias(head), None if inner == 1 else inner, outer, raw.stride(0)


@dataclass(frozen=True)
class _StopClass:
    """The merged stop class, whose members the kernels treat as separate tokens."""

    ids: Int[Tensor, " m"]
    drawn: Bool[Tensor, " n"]
    u: Float[Tensor, "n m"]
    v: Float[Tensor, "n m"]
    slope: Float[Tensor, "n m"] | float  # of the student's softcap

    @classmethod
    def of(
        cls, student: Tensor, teacher: Tensor | None, ids: Tensor, sums: Tensor, heads: tuple, vocabulary: Vocabulary
    ) -> "_StopClass":
        """Read the logits of the members, before the gradient overwrites them."""
        stop = torch.tensor(vocabulary.stop, device=ids.device)
        z = vocabulary.logits(student[:, stop].float(), heads[0], stop)
        t = z if teacher is None or heads[1] is None else vocabulary.logits(teacher[:, stop].float(), heads[1], stop)
        outer = vocabulary.curve(heads[0])[1]
        slope = 1.0 if outer is None else 1 - (z / outer).square()
        return cls(stop, ids == stop[0], z - sums[7, :, None], t - sums[8, :, None], slope)

    def merge_(self, sums: Float[Tensor, "9 n"]) -> None:
        """Replace the members by their class in the sums."""
        log_mass = lambda x: x.logsumexp(-1)
        u, v = log_mass(self.u), log_mass(self.v)
        sums[1] += _mass(u, u) - _mass(self.u, self.u).sum(-1)
        sums[2] += _mass(u, u - v) - _mass(self.u, self.u - self.v).sum(-1)
        sums[4] += _mass(v, v) - _mass(self.v, self.v).sum(-1)
        for row, x in ((5, u), (6, v)):
            sums[row] = x.where(self.drawn, sums[row])

    def gradient(self, sums: Float[Tensor, "9 n"], form: Form) -> Float[Tensor, "n m"]:
        """Return each member's share of the gradient of the class."""
        e, euv, u, v = sums[0], sums[2], self.u.logsumexp(-1), self.v.logsumexp(-1)
        g = _mass(u, u - v - euv / e) / e if form.shifted else u.exp() / e - self.drawn.float()
        return g[:, None] * self.u.softmax(-1) * self.slope


def _mass(logp: Float[Tensor, "*A"], x: Float[Tensor, "*A"]) -> Float[Tensor, "*A"]:
    """Return exp(logp) x, and 0 where exp(logp) is 0 and x infinite."""
    p = logp.exp()
    return (p * x).where(p > 0, 0)
