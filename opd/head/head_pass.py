"""From hidden states to per-token numbers: the only place that sees the vocabulary, and the only shift.

`head_pass` walks over chunks of tokens: both models' logits in two buffers that every chunk reuses, everything per
token, the loss, and its gradient over the student's logits while the chunk is alive (gradient in forward).  Matmuls are
the minimum, 2NV(H_S + H_T) forward and 4NVH_S backward; no tensor of [N, V] exists for either model.

Between the matmuls a chunk is swept by closed forms where the method has one: in Triton (`kernels/fused.py`) on a GPU;
elsewhere, for heads without softcap, in C (`kernels/native.py`) or torch (`kernels/rows.py`).  Autograd sweeps the rest
in blocks of rows.
"""

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from opd.head.inputs import Heard, Hidden
from opd.head.matmul import addmm, mm, wide
from opd.head.outputs import Columns
from opd.head.sweep import CACHE, _rows, _Sweep, blocks
from opd.head.vocabulary import Vocabulary
from opd.losses.terms import Target
from opd.methods.method import Method


@torch.no_grad()
def measure(method: Method, student: Hidden, heard: Heard, ids: Int[Tensor, " N"], vocabulary: Vocabulary) -> Columns:
    """All columns and the method's scores, a chunk at a time, without gradient."""
    sweep = _Sweep.of(method, student, heard, vocabulary.canonical(ids), vocabulary)
    with torch.autocast(ids.device.type, enabled=False):
        for rows in sweep.chunks():
            if sweep.linear:
                sweep.closed(rows, None)
            else:
                sweep.autograd(rows, None)
    return heard.said(sweep.columns)


def head_pass(
    method: Method,
    student: Hidden,
    heard: Heard,
    ids: Int[Tensor, " N"],
    targets: tuple[Target, ...],
    vocabulary: Vocabulary,
) -> tuple[Float[Tensor, ""], Columns]:
    """The method's loss, differentiable in the student's states, head weight and bias; and the columns."""
    out: list[Columns] = []
    known = lambda x: None if x is None else vocabulary.canonical(x)
    targets = tuple(replace(t, others=known(t.others)) for t in targets)
    loss = _HeadPass.apply(
        student.states,
        student.head.weight,
        student.head.bias,
        (method, student.head, heard, vocabulary.canonical(ids), targets, vocabulary, out),
    )
    return loss, heard.said(out[0])


class _HeadPass(torch.autograd.Function):
    """The loss and, while each chunk is alive, its gradients; backward scales them in place, so it runs once."""

    @staticmethod
    def forward(ctx, states, weight, bias, work):
        method, head, heard, ids, targets, vocabulary, out = work
        sweep = _Sweep.of(method, Hidden(states, head), heard, ids, vocabulary)
        w, size = sweep.student.weight, vocabulary.size
        low, loss = w.dtype, states.new_zeros((), dtype=wide(w.dtype))
        d_states = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = torch.empty_like(weight, dtype=loss.dtype)
            d_weight[size if len(states) else 0 :] = 0  # the first chunk writes the rest
        d_bias = torch.zeros_like(bias, dtype=loss.dtype) if bias is not None and ctx.needs_input_grad[2] else None
        with torch.autocast(states.device.type, enabled=False):
            for rows in sweep.chunks():
                part, factor = sweep.differentiate(rows, tuple(target[rows] for target in targets))
                g = sweep.gradient[: len(factor)]
                if d_states is not None:
                    mm(g, w, d_states[rows]).mul_(factor)
                if d_weight is not None:
                    add = addmm if rows.start else mm
                    add(g.T, (states[rows] * factor).to(low), d_weight[:size])
                if d_bias is not None:
                    for ids in blocks(size, _rows(CACHE, loss.new_empty(0, len(g)))):
                        d_bias[ids] += (g[:, ids] * factor).sum(0)  # a product would add token after token
                loss += part
        out.append(sweep.columns)
        ctx.gradients = d_states, d_weight, d_bias
        return loss

    @staticmethod
    def backward(ctx, scale):
        gradients, ctx.gradients = ctx.gradients, ()  # given away: a parameter takes one as its .grad without a copy
        if not gradients:
            raise RuntimeError("the head pass was run backward twice; its gradients were given away by the first")
        unscaled = scale.device.type == "cpu" and scale == 1  # elsewhere the question would wait for the device
        return *(d if d is None or unscaled else d.mul_(scale) for d in gradients), None
