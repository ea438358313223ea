"""A world small enough to enumerate: student and teacher are tables, in float64.

Every expectation over rollouts is a finite sum, so the bias and the noise of a method are measured, not argued.
"""

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opd.divergences import kl
from opd.estimators import mean
from opd.method import Method, Positions
from opd.noise import uniform
from opd.types import STUDENT, Batch


@torch.no_grad()
def measure(method: Method, at: Positions, **given: Tensor) -> Batch:
    """Every column that can be measured of the positions [B, T], the score of each term included.

    `given` are columns to take instead of the defaults: all tokens trained, one group per row, the student's own.
    """
    student, teacher, rows = at.sampled(at.student_logp), at.sampled(at.teacher_logp), len(at.ids)
    columns = {
        "mask": torch.ones_like(at.ids, dtype=torch.bool),
        "group": torch.arange(rows),
        "source": torch.full((rows,), STUDENT),
        "stopped": torch.zeros(rows, dtype=torch.bool),
        "outcome": torch.zeros(rows, dtype=student.dtype),
        "sampler_logp": student,
        "coin": torch.from_numpy(uniform(0, 0, np.arange(rows)[:, None], np.arange(at.ids.shape[1]), 1)),
    }
    return Batch(
        ids=at.ids,
        student_logp=student,
        student_entropy=-mean(at.student_logp.exp(), at.student_logp),
        teacher_logp=teacher,
        teacher_entropy=-mean(at.teacher_logp.exp(), at.teacher_logp),
        reverse_kl=kl(at.student_logp, at.teacher_logp),
        scores=tuple(term.score(at) for term in method.terms),
        **columns | given,
    )


def moments(
    probability: Float[Tensor, "*N Y"], gradients: Float[Tensor, "*N Y D"]
) -> tuple[Float[Tensor, "*N D"], Float[Tensor, "*N"]]:
    """Mean and total variance (the trace of the covariance) over the outcomes Y."""
    first = (probability[..., None] * gradients).sum(-2)
    return first, (probability * (gradients - first[..., None, :]).square().sum(-1)).sum(-1)


def token_gradients(
    method: Method, student: Float[Tensor, "N V"], teacher: Float[Tensor, "N V"]
) -> Float[Tensor, "N V V"]:
    """At N fixed contexts given as logits: row y is the gradient in the student's logits when y is the token drawn."""
    contexts, vocab = student.shape
    logits = student.detach().double().repeat_interleave(vocab, 0)[:, None].requires_grad_()
    ids = torch.arange(vocab).repeat(contexts)[:, None]
    fixed = teacher.double().log_softmax(-1).repeat_interleave(vocab, 0)[:, None]
    at = Positions(ids, logits.log_softmax(-1), fixed)
    loss = method.loss(at, method.prepare(measure(method, at))).sum()
    return len(ids) * torch.autograd.grad(loss, logits)[0].view(contexts, vocab, vocab)


@dataclass(frozen=True)
class Row:
    """A method against the gradient of the sequence KL, one sequence per optimizer step."""

    cosine: float  # between the expected gradient and that of the sequence KL
    bias: float  # distance of the two, over the norm of the latter
    noise: float  # total variance of the gradient, over the squared norm of its mean


@dataclass(frozen=True, eq=False)
class World:
    """Next-token logits of a student and a teacher, one row per prefix: "", then those of 1 token, of 2, ..."""

    student: Float[Tensor, "S V"]
    teacher: Float[Tensor, "S V"]
    steps: int  # tokens of the longest sequence
    stop: int = -1  # the token that ends a sequence; -1: all have `steps` tokens

    def __post_init__(self) -> None:
        prefixes = sum(self.student.shape[1] ** t for t in range(self.steps))
        assert len(self.student) == prefixes, f"{prefixes} prefixes need as many rows, not {len(self.student)}"

    @classmethod
    def random(cls, vocab: int = 3, steps: int = 3, *, mismatch: float = 1.0, seed: int = 0, stop: int = -1) -> "World":
        """Logits of the teacher are normal; those of the student add a normal `mismatch`."""
        shape = (sum(vocab**t for t in range(steps)), vocab)
        teacher, gap = torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return cls((teacher + mismatch * gap).requires_grad_(), teacher, steps, stop)

    def sequences(self) -> Int[Tensor, "B T"]:
        """Every sequence; after a stop token, with every continuation."""
        return torch.tensor(list(itertools.product(range(self.student.shape[1]), repeat=self.steps)))

    def prefixes(self, ids: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
        """The row of the tables that predicts each token: base-V numerals, so no two prefixes share one."""
        state, out = torch.zeros_like(ids[:, 0]), []
        for token in ids.unbind(1):
            out.append(state)
            state = state * self.student.shape[1] + token + 1
        return torch.stack(out, 1)

    def trained(self, ids: Int[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
        """The tokens up to the first stop token, itself included."""
        stops = ids == self.stop
        return stops.cumsum(1) - stops.long() == 0

    def positions(self, ids: Int[Tensor, "B T"]) -> Positions:
        """Both next-token distributions along some sequences; the student's are live."""
        at = self.prefixes(ids)
        return Positions(ids, *(x.double()[at].log_softmax(-1) for x in (self.student, self.teacher.detach())))

    def measure(self, method: Method, ids: Int[Tensor, "B T"], **given: Tensor) -> Batch:
        """Measure some sequences; `given` are columns to take instead of the defaults."""
        mask = self.trained(ids)
        columns = {"mask": mask, "stopped": (mask & (ids == self.stop)).any(1)}
        return measure(method, self.positions(ids), **columns | given)

    def probability(self, ids: Int[Tensor, "B T"]) -> Float[Tensor, " B"]:
        """Of each sequence under the student."""
        at = self.positions(ids)
        return at.sampled(at.student_logp).sum(1).exp()

    def gradient(self, method: Method, ids: Int[Tensor, "B T"]) -> Float[Tensor, "S V"]:
        """Of the loss of one optimizer step on these sequences."""
        loss = method.loss(self.positions(ids), method.prepare(self.measure(method, ids)))
        return torch.autograd.grad(loss.sum(), self.student)[0]

    def moments(self, method: Method) -> tuple[Float[Tensor, "S V"], Float[Tensor, ""]]:
        """Mean and total variance of the gradient of a step on one sequence, times T: per sequence, not per token."""
        ids = self.sequences()
        each = torch.stack([self.steps * self.gradient(method, row).flatten() for row in ids.split(1)])
        first, variance = moments(self.probability(ids).detach(), each)
        return first.view_as(self.student), variance

    def sequence_kl(self) -> Float[Tensor, ""]:
        """KL(student || teacher) of whole sequences, differentiable in the student's table."""
        ids = self.sequences()
        at, mask = self.positions(ids), self.trained(ids)
        ratio = (at.sampled(at.student_logp) - at.sampled(at.teacher_logp)).where(mask, 0).sum(1)
        return (self.probability(ids) * ratio).sum()

    def row(self, method: Method) -> Row:
        """What a method does to the sequence KL: direction, bias and noise."""
        first, variance = self.moments(method)
        (true,) = torch.autograd.grad(self.sequence_kl(), self.student)
        cosine = torch.nn.functional.cosine_similarity(first.flatten(), true.flatten(), dim=0)
        bias, noise = (first - true).norm() / true.norm(), variance / first.square().sum()
        return Row(cosine.item(), bias.item(), noise.item())
