"""The sweep over rows in Triton: both models' logits are read once for the sums, the student's once for the gradient.

`rows.py` has the definitions.  A program walks along one row.  Each of its lanes sums against the largest logit that it
has met, so that none waits for another before the end of the row.  A logit of -inf is a probability of 0.
"""

from dataclasses import dataclass
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opd.head.closed_forms import Form
from opd.head.sums import Sums
from opd.head.vocabulary import Head, Vocabulary

WARPS, DEPTH = 4, 4  # of a program; logits of a lane at once.  Not tuned on a GPU
NOTHING = tl.constexpr(-1e30)  # the largest logit of a lane that has met none


@triton.jit
@no_type_check
def _logits(raw, bias, inner, outer, at, width):
    """inner (W h + b), or outer tanh(inner (W h + b)); -inf beyond the vocabulary."""
    inside = (at >= 0) & (at < width)
    z = tl.load(raw + at, mask=inside, other=-float("inf")).to(tl.float32)
    if bias is not None:
        z += tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
    if inner is not None:
        z *= inner
    if outer is not None:
        z = tl.where(inside, outer * (2 / (1 + _exp(-2 * z)) - 1), -float("inf"))
    return z


@triton.jit
@no_type_check
def _exp(x):
    return tl.exp2(x * 1.4426950408889634)  # tl.exp is slower by what it does for the least of numbers


@triton.jit
@no_type_check
def _times(p, x):
    """p x, and 0 where p is 0 and x infinite."""
    return tl.where(p == 0, 0.0, p * x)


@triton.jit(do_not_specialize=["n"])
@no_type_check
def _sums(
    student, student_bias, student_inner, student_outer, student_stride,
    teacher, teacher_bias, teacher_inner, teacher_outer, teacher_stride,
    ids, out, n, width, DEPTH: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """e, eu, e (u - v), f, fv, u, v of a row, and both largest logits: nine rows of `out`."""
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    most = tl.full((LANES,), NOTHING, tl.float32)
    e, eu, euv = tl.zeros_like(most), tl.zeros_like(most), tl.zeros_like(most)
    top, f, fv = most, tl.zeros_like(most), tl.zeros_like(most)
    if teacher is not None:
        teacher += row * teacher_stride
    tile = tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    for start in range(0, width, DEPTH * LANES):
        z = _logits(student, student_bias, student_inner, student_outer, start + tile, width)
        z = tl.maximum(z, NOTHING, propagate_nan=tl.PropagateNan.ALL)
        peak = tl.maximum(most, tl.max(z, 0))
        keep, rise = _exp(most - peak), peak - most
        u = z - peak[None, :]
        p = _exp(u)
        if teacher is not None:
            t = _logits(teacher, teacher_bias, teacher_inner, teacher_outer, start + tile, width)
            crest = tl.maximum(top, tl.max(t, 0))
            hold, lift = _exp(top - crest), crest - top
            v = t - crest[None, :]
            q = _exp(v)
            euv = _times(keep, euv - (rise - lift) * e) + tl.sum(_times(p, u - v), 0)
            fv = hold * (fv - lift * f) + tl.sum(q * tl.maximum(v, NOTHING), 0)
            f = hold * f + tl.sum(q, 0)
            top = crest
        eu = keep * (eu - rise * e) + tl.sum(p * u, 0)
        e = keep * e + tl.sum(p, 0)
        most = peak

    peak, crest, y = tl.max(most, 0), tl.max(top, 0), tl.load(ids + row)  # all lanes against one largest
    keep, rise, hold, lift = _exp(most - peak), peak - most, _exp(top - crest), crest - top
    out += row
    tl.store(out, tl.sum(keep * e, 0))
    tl.store(out + n, tl.sum(keep * (eu - rise * e), 0))
    tl.store(out + 5 * n, _logits(student, student_bias, student_inner, student_outer, y, width) - peak)
    tl.store(out + 7 * n, peak)
    if teacher is not None:
        tl.store(out + 2 * n, tl.sum(_times(keep, euv - (rise - lift) * e), 0))
        tl.store(out + 3 * n, tl.sum(hold * f, 0))
        tl.store(out + 4 * n, tl.sum(hold * (fv - lift * f), 0))
        tl.store(out + 6 * n, _logits(teacher, teacher_bias, teacher_inner, teacher_outer, y, width) - crest)
        tl.store(out + 8 * n, crest)


@triton.jit(do_not_specialize=["n"])
@no_type_check
def _gradient(
    student, student_bias, student_inner, student_outer, student_stride,
    teacher, teacher_bias, teacher_inner, teacher_outer, teacher_stride,
    ids, sums, out, out_stride, n, width, TILE: tl.constexpr,
):  # fmt: skip
    """p - 1_y, or p (u - v - E_p[u - v]) where there is a teacher, times the softcap's slope.

    `out` may lie in the student's own row, in fewer bytes a logit: a program reads ahead of what it writes.
    """
    row = tl.program_id(0).to(tl.int64)
    student, out, sums = student + row * student_stride, out + row * out_stride, sums + row
    e, euv = tl.load(sums), tl.load(sums + 2 * n)
    most, top, y = tl.load(sums + 7 * n), tl.load(sums + 8 * n), tl.load(ids + row)
    if teacher is not None:
        teacher += row * teacher_stride
    for start in range(0, width, TILE):
        at = start + tl.arange(0, TILE)
        z = _logits(student, student_bias, student_inner, student_outer, at, width)
        u = z - most
        p = _exp(u) / e
        if teacher is None:
            g = p - tl.where(at == y, 1.0, 0.0)
        else:
            v = _logits(teacher, teacher_bias, teacher_inner, teacher_outer, at, width) - top
            g = _times(p, u - v - euv / e)
        if student_outer is not None:
            g *= 1 - (z / student_outer) * (z / student_outer)
        tl.debug_barrier()  # every thread has read before any writes
        tl.store(out + at, g.to(out.dtype.element_ty), mask=at < width)


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
    """Fill the sums from W h of both models; `gradient`, which may lie in the student's own rows, becomes the form's.

    It is that of the form's column by the student's logits, but for sign, scale and temperature.
    """
    (n, width), v = student.shape, vocabulary
    left, right = _side(student, heads[0], v), _side(teacher, heads[1], v)
    sums = student.new_empty(9, n, dtype=torch.float32)
    lanes = WARPS * 32 * 16 // student.itemsize  # each thread reads 16 bytes
    launch = {"num_warps": WARPS, "enable_fp_fusion": True}
    with torch.cuda.device_of(student):
        _sums[(n,)](*left, *right, ids, sums, n, width, DEPTH=DEPTH, LANES=lanes, **launch)
        stop = _Stop.of(student, teacher, ids, sums, heads, v) if len(v.stop) > 1 else None
        if stop is not None:
            stop.merge_(sums)
        for whole, row in zip((out.e, out.eu, out.euv, out.f, out.fv, out.u, out.v), sums, strict=False):
            whole.copy_(row)
        if form is not None:
            seen = right if form.shifted else _side(None, None, v)
            target = gradient, gradient.stride(0)
            _gradient[(n,)](*left, *seen, ids, sums, *target, n, width, TILE=DEPTH * lanes, **launch)
            if stop is not None:
                gradient.index_copy_(-1, stop.ids, stop.gradient(sums, form).to(gradient.dtype))


def _side(raw: Float[Tensor, "n V"] | None, head: Head | None, vocabulary: Vocabulary) -> tuple:
    """A model's arguments of the kernels."""
    if raw is None or head is None:
        return None, None, None, None, 0
    inner, outer = vocabulary.curve(head)
    return raw, vocabulary.bias(head), None if inner == 1 else inner, outer, raw.stride(0)


@dataclass(frozen=True)
class _Stop:
    """The merged class; the kernels see its members apart."""

    ids: Int[Tensor, " m"]
    drawn: Bool[Tensor, " n"]
    u: Float[Tensor, "n m"]
    v: Float[Tensor, "n m"]
    slope: Float[Tensor, "n m"] | float  # of the student's softcap

    @classmethod
    def of(
        cls,
        student: Float[Tensor, "n V"],
        teacher: Float[Tensor, "n V"] | None,
        ids: Int[Tensor, " n"],
        sums: Float[Tensor, "9 n"],
        heads: tuple[Head, Head | None],
        vocabulary: Vocabulary,
    ) -> "_Stop":
        """Read before the gradient takes the place of the logits."""
        stop = torch.tensor(vocabulary.stop, device=ids.device)
        z = vocabulary.logits(student[:, stop].float(), heads[0], stop)
        t = z if teacher is None or heads[1] is None else vocabulary.logits(teacher[:, stop].float(), heads[1], stop)
        outer = vocabulary.curve(heads[0])[1]
        slope = 1.0 if outer is None else 1 - (z / outer).square()
        return cls(stop, ids == stop[0], z - sums[7, :, None], t - sums[8, :, None], slope)

    def merge_(self, sums: Float[Tensor, "9 n"]) -> None:
        """Put the class in the place of its members."""
        whole = lambda x: x.logsumexp(-1)
        u, v = whole(self.u), whole(self.v)
        sums[1] += _mass(u, u) - _mass(self.u, self.u).sum(-1)
        sums[2] += _mass(u, u - v) - _mass(self.u, self.u - self.v).sum(-1)
        sums[4] += _mass(v, v) - _mass(self.v, self.v).sum(-1)
        for row, x in ((5, u), (6, v)):
            sums[row] = x.where(self.drawn, sums[row])

    def gradient(self, sums: Float[Tensor, "9 n"], form: Form) -> Float[Tensor, "n m"]:
        """Of each member: its share of the class's."""
        e, euv, u, v = sums[0], sums[2], self.u.logsumexp(-1), self.v.logsumexp(-1)
        g = _mass(u, u - v - euv / e) / e if form.shifted else u.exp() / e - self.drawn.float()
        return g[:, None] * self.u.softmax(-1) * self.slope


def _mass(logp: Float[Tensor, "*A"], x: Float[Tensor, "*A"]) -> Float[Tensor, "*A"]:
    """exp(logp) x, and 0 where the first is 0 and x infinite."""
    p = logp.exp()
    return (p * x).where(p > 0, 0)
