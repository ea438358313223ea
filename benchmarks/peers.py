"""The head pass as opd and other libraries compute it: arms `(case, shape) -> loss` that run forward and backward."""

from collections.abc import Callable
from dataclasses import replace
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.case import Case, Objective, Shape
from opd.head.head_pass import head_pass
from opd.head.inputs import FrozenOutputs, Hidden
from opd.head.matmul import addmm, mm, wide
from opd.head.sweep import FROZEN_PARTS
from opd.head.vocabulary import Head, Vocabulary
from opd.losses.baselines import Value
from opd.losses.terms import Match, PolicyGradient, Target
from opd.methods.method import Method

METHODS = {"vopd": Method((PolicyGradient(baseline=Value()),)), "reverse-kl": Method((Match(),))}
Run = Callable[[Case, Shape], Tensor]  # forward and backward of a sum over tokens; returns the loss


def ours(case: Case, shape: Shape) -> Tensor:
    """Run `opd.head.head_pass.head_pass`."""
    vocabulary = Vocabulary(shape.vocabulary, rounded=shape.rounded)
    token_bytes = vocabulary.tile(case.weight.dtype, case.weight.device).itemsize * (1 + 1 / FROZEN_PARTS)
    vocabulary = replace(vocabulary, chunk_bytes=round(shape.chunk * shape.vocabulary * token_bytes))
    target = Target(torch.ones(len(case.ids), device=case.ids.device), None, None)
    student = Hidden(case.states, Head(case.weight))
    teacher = Hidden(case.teacher_states, Head(case.teacher_weight))
    loss, _ = head_pass(METHODS[shape.objective], student, FrozenOutputs(teacher), case.ids, (target,), vocabulary)
    loss.backward()
    return loss.detach()


def ours_autograd(case: Case, shape: Shape) -> Tensor:
    """Run the head pass without closed-form gradients, as for methods that have none: autograd in blocks of rows."""
    with patch("opd.head.sweep.closed_form", lambda method: None):
        return ours(case, shape)


def ours_torch(case: Case, shape: Shape) -> Tensor:
    """Run the head pass with closed-form gradients in torch, as on machines without Triton and C compiler."""
    with (
        patch("opd.head.sweep.uses_triton", lambda device: False),
        patch("opd.head.sweep.native.runs", lambda *logits: False),
    ):
        return ours(case, shape)


def naive(case: Case, shape: Shape) -> Tensor:
    """Run plain autograd over log_softmax of both models, with full [N, V] logits."""
    p = _wide(case.states @ case.weight.T).log_softmax(-1)
    with torch.no_grad():
        q = _wide(case.teacher_states @ case.teacher_weight.T).log_softmax(-1)
    if shape.objective == "reverse-kl":
        loss = (p.exp() * (p - q)).sum()
    else:
        with torch.no_grad():
            kl = (p.exp() * (p - q)).sum(-1)
            advantage = _at(q - p, case.ids) + kl
        loss = -(advantage * _at(p, case.ids)).sum()
    loss.backward()
    return loss.detach()


def careful(case: Case, shape: Shape) -> Tensor:
    """Run a careful version with full [N, V] logits: gather minus logsumexp, in-place operations, early frees.

    The loss is always vopd.
    """
    z = _wide(case.states @ case.weight.T)
    logp = _at(z, case.ids) - z.logsumexp(-1)
    with torch.no_grad():
        t = _wide(case.teacher_states @ case.teacher_weight.T)
        mass = t.logsumexp(-1)
        ratio = _at(t, case.ids) - mass - logp
        gap = torch.sub(z, t, out=t)
        p = torch.softmax(z, -1)
        kl = p.mul_(gap).sum(-1) - (_at(z, case.ids) - logp) + mass
        del t, gap, p
    loss = -((ratio + kl) * logp).sum()
    loss.backward()
    return loss.detach()


def trl_divergence(case: Case, shape: Shape) -> Tensor:
    """Run the reverse KL of TRL's DistillationTrainer, which recomputes logits in the backward."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    args = (case.states, case.weight, None, case.teacher_states, case.teacher_weight, None, 1.0)
    loss = ChunkedDivergenceFunction.apply(*args)[0].sum()
    loss.backward()
    return loss.detach()


def trl_composed(case: Case, shape: Shape) -> Tensor:
    """Run vOPD composed from TRL's functions: three passes for log p, the teacher's log q, and the KL."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    logp = lambda states, weight: ChunkedLogProbFunction.apply(
        states, weight, None, case.ids, 1.0, 32768, None, 1.0, ()
    )[0]
    student = logp(case.states, case.weight)
    with torch.no_grad():
        models = (case.states, case.weight, None, case.teacher_states, case.teacher_weight, None, 1.0)
        kl = ChunkedDivergenceFunction.apply(*models)[0]
        advantage = logp(case.teacher_states, case.teacher_weight) - student + kl
    loss = -(advantage * student).sum()
    loss.backward()
    return loss.detach()


def liger_chunked(case: Case, shape: Shape) -> Tensor:
    """Run Liger's chunked JSD at beta 1, which is the reverse KL, not compiled; its token mean is scaled to a sum."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    leaf = LigerFusedLinearJSDLoss(0.0, 1.0, beta=1.0, compiled=False, chunk_size=shape.chunk)
    loss = leaf(case.states, case.weight, case.teacher_states, case.teacher_weight, case.ids) * len(case.ids)
    loss.backward()
    return loss.detach()


def liger_fused(case: Case, shape: Shape) -> Tensor:
    """Run Liger's fused linear JSD at beta 1, a Triton kernel."""
    from liger_kernel.ops.fused_linear_jsd import LigerFusedLinearJSDFunction

    args = (case.states, case.weight, case.teacher_states, case.teacher_weight, None, 1.0)
    loss = LigerFusedLinearJSDFunction.apply(*args) * len(case.ids)
    loss.backward()
    return loss.detach()


class MatmulFloor:
    """The matmuls only, in preallocated buffers: logits of both models, gradients of states and head.

    Its time is a lower bound for every arm.
    """

    def __init__(self) -> None:
        self.buffers: list[Tensor] = []

    def __call__(self, case: Case, shape: Shape) -> Tensor:
        w, t, n = case.weight.detach(), case.teacher_weight, min(shape.chunk, len(case.ids))
        if not self.buffers:
            tile = Vocabulary(len(w), rounded=shape.rounded).tile(w.dtype, w.device)
            z, tz = (torch.randn(n, len(w), device=w.device).to(tile) for _ in range(2))  # zeros run faster
            self.buffers = [z, tz, z.to(w.dtype), w.new_empty(n, w.shape[1]), w.new_zeros(w.shape, dtype=wide(w.dtype))]
        z, tz, g, dh, dw = self.buffers
        for start in range(0, len(case.ids), n):
            h, th = case.states.detach()[start : start + n], case.teacher_states[start : start + n]
            k = len(h)
            mm(h, w.T, z[:k])
            mm(th, t.T, tz[:k])
            mm(g[:k], w, dh[:k])
            if not shape.frozen:
                addmm(g[:k].T, h, dw)
        return z.new_zeros(())


ARMS: dict[str, Run] = {
    "floor": MatmulFloor(),
    "ours": ours,
    "ours-torch": ours_torch,
    "ours-autograd": ours_autograd,
    "naive": naive,
    "careful": careful,
    "trl-divergence": trl_divergence,
    "trl-composed": trl_composed,
    "liger-chunked": liger_chunked,
    "liger-fused": liger_fused,
}
ALWAYS: dict[str, Objective] = {
    "careful": "vopd",
    "trl-composed": "vopd",
    "trl-divergence": "reverse-kl",
    "liger-chunked": "reverse-kl",
    "liger-fused": "reverse-kl",
}


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _at(x: Tensor, ids: Tensor) -> Tensor:
    return x.gather(-1, ids[:, None])[:, 0]
