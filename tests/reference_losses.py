"""Definitions that tests compare the closed forms of the package with."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from opd.analysis.exact import measure
from opd.losses.terms import Positions
from opd.methods.method import Method


@dataclass(frozen=True)
class Plus:
    """u f'(u) - f(u) for any f, given as a function of log u: its slope minus its value.  OPD+, arXiv:2606.01039.

    The named rewards above are its closed forms.  This general form loses precision by cancellation if f grows faster
    than its reward.
    """

    f: Callable[[Tensor], Tensor]

    def __call__(self, student_logp: Float[Tensor, "*A"], teacher_logp: Float[Tensor, "*A"]) -> Float[Tensor, "*A"]:
        ratio = teacher_logp - student_logp
        at = torch.func.jvp(self.f, (ratio,), (torch.ones_like(ratio),))  # value and slope
        return at[1] - at[0]


@dataclass(frozen=True)
class DensityPower:
    """alpha / (1 + alpha) times d_alpha: the divergence that `Power` descends in expectation.  Basu et al. 1998.

    d = sum q^(1+a) - (1 + 1/a) p q^a + p^(1+a) / a, p the student.  At a = 1, after scaling, it is half the squared
    distance.
    """

    alpha: float = 5.0

    def __call__(self, student_logp: Float[Tensor, "*N V"], teacher_logp: Float[Tensor, "*N V"]) -> Float[Tensor, "*N"]:
        a = self.alpha
        d = (
            ((1 + a) * teacher_logp).exp()
            - (1 + 1 / a) * (student_logp + a * teacher_logp).exp()
            + ((1 + a) * student_logp).exp() / a
        )
        return a / (1 + a) * d.sum(-1)


def token_gradients(
    method: Method, student: Float[Tensor, "N V"], *frozen: Float[Tensor, "N V"]
) -> Float[Tensor, "N V V"]:
    """Return the gradients [N, V, V] in the student's logits at N contexts: row y is the gradient if y is sampled.

    `frozen` are the teacher's logits and, if the method reads them, the reference's.
    """
    contexts, vocab = student.shape
    logits = student.detach().double().repeat_interleave(vocab, 0)[:, None].requires_grad_()
    ids = torch.arange(vocab).repeat(contexts)[:, None]
    frozen_logp = [x.double().log_softmax(-1).repeat_interleave(vocab, 0)[:, None] for x in frozen]
    positions = Positions(ids, logits.log_softmax(-1), *frozen_logp)
    loss = method.loss(positions, method.prepare(measure(method, positions))).sum()
    return len(ids) * torch.autograd.grad(loss, logits)[0].view(contexts, vocab, vocab)
