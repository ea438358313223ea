"""The pass from hidden states to per-token columns and the loss; only here are logits over the vocabulary computed.

`head_pass` goes over chunks of tokens.  For each chunk it computes both models' logits in two buffers that all chunks
reuse, the per-token columns, the loss, and its gradient by the student's logits (in forward).  The matmuls are the
minimum, 2NV(H_S + H_T) forward and 4NVH_S backward; no tensor of [N, V] exists for either model.

Between the matmuls a closed form sweeps the chunk if the method has one: in Triton (`kernels/triton_sweep.py`) on a
GPU; elsewhere, for heads without softcap, in C (`kernels/c_sweep.py`) or torch (`kernels/torch_sweep.py`).  Autograd
computes all other losses in blocks of rows.
"""

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from opd.head.inputs import FrozenOutputs, Hidden
from opd.head.matmul import addmm, mm, wide
from opd.head.outputs import HeadColumns
from opd.head.sweep import CACHE, Sweep, blocks, rows_per_block
from opd.head.vocabulary import Vocabulary
from opd.losses.terms import Target
from opd.methods.method import Method


@torch.no_grad()
def measure(
    method: Method, student: Hidden, frozen: FrozenOutputs, ids: Int[Tensor, " N"], vocabulary: Vocabulary
) -> HeadColumns:
    """Compute all columns and the method's scores, a chunk at a time, without gradient."""
    sweep = Sweep(method, student, frozen, vocabulary.canonical(ids), vocabulary)
    with torch.autocast(ids.device.type, enabled=False):
        for rows in sweep.chunks():
            if sweep.linear:
                sweep.closed_forms(rows, None)
            else:
                sweep.autograd(rows, None)
    return sweep.columns


def head_pass(
    method: Method,
    student: Hidden,
    frozen: FrozenOutputs,
    ids: Int[Tensor, " N"],
    targets: tuple[Target, ...],
    vocabulary: Vocabulary,
) -> tuple[Float[Tensor, ""], HeadColumns]:
    """Return the method's loss, differentiable in the student's states, head weight and bias; and the columns."""
    out: list[HeadColumns] = []
    canonical = lambda x: None if x is None else vocabulary.canonical(x)
    targets = tuple(replace(t, others=canonical(t.others)) for t in targets)
    loss = _HeadPass.apply(
        student.states,
        student.head.weight,
        student.head.bias,
        (method, student.head, frozen, vocabulary.canonical(ids), targets, vocabulary, out),
    )
    return loss, out[0]


class _HeadPass(torch.autograd.Function):
    """The loss and its gradients, computed in forward; backward scales the gradients in place, so it runs once."""

    @staticmethod
    def forward(ctx, states, weight, bias, work):
        method, head, frozen, ids, targets, vocabulary, out = work
        sweep = Sweep(method, Hidden(states, head), frozen, ids, vocabulary)
        w, size = sweep.student.weight, vocabulary.size
        low_dtype, loss = w.dtype, states.new_zeros((), dtype=wide(w.dtype))
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
                    accumulate = addmm if rows.start else mm
                    accumulate(g.T, (states[rows] * factor).to(low_dtype), d_weight[:size])
                if d_bias is not None:
                    for ids in blocks(size, rows_per_block(CACHE, loss.new_empty(0, len(g)))):
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
        unscaled = scale.device.type == "cpu" and scale == 1  # on a device the comparison would synchronise
        return *(d if d is None or unscaled else d.mul_(scale) for d in gradients), None
