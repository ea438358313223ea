"""Exact gradients in a world small enough to enumerate: student and teacher are tables of logits, in float64.

Every expectation over rollouts is a finite sum, so the bias and the noise of a method are computed exactly.
At a single context, only the vocabulary is enumerated, which is cheap on real models too: `slopes`.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opd.core.errors import Refusal
from opd.core.rng import uniform
from opd.core.types import COLUMNS, DATA, STUDENT, UNPROMPTED_COLUMNS, Batch
from opd.losses.baselines import mean
from opd.losses.divergences import kl
from opd.losses.estimators import Several
from opd.losses.terms import Match, PolicyGradient, Positions, Target
from opd.methods.method import Method


@torch.no_grad()
def measure(method: Method, positions: Positions, **overrides: Tensor) -> Batch:
    """Return a batch with every column that can be computed at the positions [B, T], including each term's score.

    `overrides` are columns that replace the defaults.  By default all tokens are trained, each row is a separate group,
    and the student generated every row.
    """
    student, teacher = positions.sampled(positions.student_logp), positions.sampled(positions.teacher_logp)
    rows = len(positions.ids)
    columns: dict[str, Any] = {
        "mask": torch.ones_like(positions.ids, dtype=torch.bool),
        "group": torch.arange(rows),
        "source": torch.full((rows,), STUDENT),
        "stopped": torch.zeros(rows, dtype=torch.bool),
        "outcome": torch.zeros(rows, dtype=student.dtype),
        "sampler_logp": student,
        "prefix": torch.zeros(rows, dtype=torch.long),
        "coin": torch.from_numpy(uniform(0, 0, np.arange(rows)[:, None], np.arange(positions.ids.shape[1]), 1)),
    }
    return Batch(
        ids=positions.ids,
        student_logp=student,
        student_entropy=-mean(positions.student_logp.exp(), positions.student_logp),
        teacher_logp=teacher,
        teacher_entropy=-mean(positions.teacher_logp.exp(), positions.teacher_logp),
        reverse_kl=kl(positions.student_logp, positions.teacher_logp),
        scores=tuple(term.score(positions) for term in method.terms),
        **columns | overrides,
    )


def gradient_moments(
    probability: Float[Tensor, "*N Y"], gradients: Float[Tensor, "*N Y D"]
) -> tuple[Float[Tensor, "*N D"], Float[Tensor, "*N"]]:
    """Return the mean and the total variance (trace of the covariance) of `gradients` over the outcomes Y."""
    first = (probability[..., None] * gradients).sum(-2)
    return first, (probability * (gradients - first[..., None, :]).square().sum(-1)).sum(-1)


@dataclass(frozen=True)
class Slopes:
    """The gradient of the token loss in log p, for each sampled token y: component v is always_v + [v = y] drawn_y."""

    always: Float[Tensor, "N V"]
    drawn: Float[Tensor, "N V"]

    def mean(self, p: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
        """Return the mean over y ~ p of the gradient in the logits."""
        return to_logits(self.always + p * self.drawn, p)

    def spread(self, p: Float[Tensor, "N V"], tangent: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
        """Return the variance over y ~ p of the gradient along a direction in which log p has derivative `tangent`."""
        along = (self.drawn * tangent).where(p > 0, 0)
        return (p * (along - (p * along).sum(-1, keepdim=True)).square()).sum(-1)

    def variance(self, p: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
        """Return the total variance over y ~ p of the gradient in the logits, in float64."""
        p, drawn = p.double(), self.drawn.double()
        norm2 = (1 - p).square() + p.square().sum(-1, keepdim=True) - p.square()  # |1_y - p|^2
        return (p * drawn.square() * norm2).sum(-1) - to_logits(p * drawn, p).square().sum(-1)


def to_logits(slope: Float[Tensor, "*N V"], p: Float[Tensor, "*N V"]) -> Float[Tensor, "*N V"]:
    """Convert a gradient in the log-probs to a gradient in the logits."""
    return slope - p * slope.sum(-1, keepdim=True)


def dependence_reason(method: Method) -> str:
    """Return the reason why a token's loss depends on more than its position, or "" if it does not."""
    if unsupported := [type(x).__name__ for x in method.terms if not isinstance(x, PolicyGradient | Match)]:
        return f"{', '.join(unsupported)} is not a function of next-token distributions"
    leaves = [*method.filters, *filter(None, [method.rollouts.admits]), *(x for t in method.terms for x in t.weights)]
    leaves += [x for t in method.terms if isinstance(t, PolicyGradient) for x in t.transforms]
    if leaves:
        return f"{', '.join(map(repr, leaves))} looks at the columns of a batch"
    if any(isinstance(t, PolicyGradient) and t.estimator == Several() for t in method.terms):
        return "it looks at several tokens drawn at a position (of m, with 1/m of the variance of one)"
    return ""


def slopes(method: Method, positions: Positions) -> Slopes:
    """Return the gradient of each position's token loss (weight 1) for every sampled token at once.

    The ids of `positions` are ignored.  Raises Refusal if `dependence_reason(method)` gives a reason against it.
    """
    if reason := dependence_reason(method):
        raise Refusal(f"{reason}, and one position alone has none")
    logp = positions.student_logp.detach()
    p, student_logp = logp.exp(), logp.clone().requires_grad_()
    always = drawn = torch.zeros_like(logp)
    for term in method.terms:
        if isinstance(term, Match):
            with torch.enable_grad():
                loss = term.loss(replace(positions, student_logp=student_logp), Target(logp[..., 0], None, None)).sum()
            always = always + term.coef * torch.autograd.grad(loss, student_logp)[0]
            continue
        assert isinstance(term, PolicyGradient)
        target_logp, exact = positions.of(term.against), term.estimator.exact(logp)
        f = term.reward(logp, target_logp)
        if term.baseline is not None:
            f = f - term.baseline(term.reward, logp, target_logp, exact)[..., None]
        f = f.where(p > 0, 0)
        with torch.enable_grad():  # each token in turn is the sampled token
            loss = term.sampled_loss(student_logp, f, Target(f, None, logp)).sum()
        slope = term.coef * torch.autograd.grad(loss, student_logp)[0].where(p > 0, 0)
        if exact is not None:
            always, slope = always - term.coef * (p * f).where(exact, 0), slope.where(~exact, 0)
        drawn = drawn + slope
    return Slopes(always, drawn)


def source_shares(method: Method) -> Mapping[int, float]:
    """Return the probability with which each source generates a rollout; empty if some come from the data."""
    shares = method.rollouts.source_shares()
    return {} if DATA in shares else shares


@dataclass(frozen=True)
class Row:
    """A method's gradient compared with the gradient of the sequence KL, for steps on one sequence."""

    cosine: float  # between the expected gradient and the gradient of the sequence KL
    bias: float  # norm of their difference / norm of the gradient of the sequence KL
    noise: float  # total variance of the gradient / squared norm of its mean


@dataclass(frozen=True, eq=False)
class World:
    """Tables of next-token logits of a student and a teacher.

    Each prefix has a row: first the empty prefix, then all prefixes of 1 token, of 2 tokens, and so on.
    """

    student: Float[Tensor, "S V"]
    teacher: Float[Tensor, "S V"]
    steps: int  # tokens of the longest sequence
    stop: int = -1  # the token that ends a sequence; -1: all sequences have `steps` tokens
    reference: Float[Tensor, "S V"] | None = None

    def __post_init__(self) -> None:
        prefixes = sum(self.student.shape[1] ** t for t in range(self.steps))
        assert len(self.student) == prefixes, f"{prefixes} prefixes need as many rows, not {len(self.student)}"

    @classmethod
    def random(cls, vocab: int = 3, steps: int = 3, *, mismatch: float = 1.0, seed: int = 0, stop: int = -1) -> "World":
        """Draw normal logits for teacher and reference; the student's are the teacher's + `mismatch` * noise."""
        shape = (sum(vocab**t for t in range(steps)), vocab)
        draws = torch.randn(3, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        teacher, gap, reference = draws
        return cls((teacher + mismatch * gap).requires_grad_(), teacher, steps, stop, reference)

    def sequences(self) -> Int[Tensor, "B T"]:
        """Return all sequences of `steps` tokens, including every continuation after a stop token."""
        return torch.tensor(list(itertools.product(range(self.student.shape[1]), repeat=self.steps)))

    def prefixes(self, ids: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
        """Return the row of the tables that predicts each token; rows are base-V numbers, unique for each prefix."""
        state, out = torch.zeros_like(ids[:, 0]), []
        for token in ids.unbind(1):
            out.append(state)
            state = state * self.student.shape[1] + token + 1
        return torch.stack(out, 1)

    def trained(self, ids: Int[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
        """Return the mask of the tokens up to and including the first stop token."""
        stops = ids == self.stop
        return stops.cumsum(1) - stops.long() == 0

    def positions(self, ids: Int[Tensor, "B T"]) -> Positions:
        """Return the next-token distributions along the sequences; the student's carry gradients."""
        prefix_rows = self.prefixes(ids)
        tables = [self.student, self.teacher.detach()] + ([] if self.reference is None else [self.reference.detach()])
        return Positions(ids, *(x.double()[prefix_rows].log_softmax(-1) for x in tables))

    def measure(self, method: Method, ids: Int[Tensor, "B T"], **overrides: Tensor) -> Batch:
        """Return the batch of the sequences with all columns; `overrides` are columns that replace the defaults."""
        mask = self.trained(ids)
        columns = {"mask": mask, "stopped": (mask & (ids == self.stop)).any(1)}
        return measure(method, self.positions(ids), **columns | overrides)

    def probability(self, ids: Int[Tensor, "B T"], speaker: int = STUDENT) -> Float[Tensor, " B"]:
        """Return the probability [B] of each sequence under the model that generates it (`speaker`)."""
        positions = self.positions(ids)
        return positions.sampled(positions.student_logp if speaker == STUDENT else positions.teacher_logp).sum(1).exp()

    def gradient(self, method: Method, ids: Int[Tensor, "B T"], **overrides: Tensor) -> Float[Tensor, "S V"]:
        """Return the gradient of the loss of one optimizer step on these sequences."""
        loss = method.loss(self.positions(ids), method.prepare(self.measure(method, ids, **overrides)))
        return torch.autograd.grad(loss.sum(), self.student)[0]

    def moments(self, method: Method) -> tuple[Float[Tensor, "S V"], Float[Tensor, ""]]:
        """Return mean and total variance of T times the gradient of a step on one sequence: that is per sequence."""
        ids, probabilities, gradients = self.sequences(), [], []
        for speaker, share in source_shares(method).items():
            probabilities.append(share * self.probability(ids, speaker).detach())
            source = torch.tensor([speaker])
            gradients += [self.steps * self.gradient(method, row, source=source).flatten() for row in ids.split(1)]
        first, variance = gradient_moments(torch.cat(probabilities), torch.stack(gradients))
        return first.view_as(self.student), variance

    def unsupported_reason(self, method: Method) -> str:
        """Return the reason why the method has no valid row in this world, or "" if it has."""
        if unsupported := [type(x).__name__ for x in method.terms if not isinstance(x, PolicyGradient | Match)]:
            return (
                f"{', '.join(unsupported)} is not a function of next-token distributions, and a table has nothing else"
            )
        if not source_shares(method):
            return f"{method.rollouts!r}: the data writes a share of the rollouts, and the world has no data"
        if absent := method.models() - {"teacher_logp", "reference_logp"}:
            return f"is against {', '.join(sorted(absent))}, which the world has not"
        batch = self.measure(method, self.sequences())
        measured = {name for name in COLUMNS if getattr(batch, name) is not None}
        reasons = {
            "outcome": "reads outcome, and the world has no verifier",
            "coin": "flips a coin, which is not enumerated; its expectation may be a method of its own (tropd --soft)",
        }
        reasons |= dict.fromkeys(
            UNPROMPTED_COLUMNS, "reads what is said of a response without its prompt, and the world has none"
        )
        missing = {c: f"reads {c}, which the world does not measure" for c in sorted(COLUMNS - measured)}
        return next((reason for c, reason in (missing | reasons).items() if c in method.rollout_columns()), "")

    def note(self, method: Method) -> str:
        """Return what is assumed about a method whose rollouts change over a run, or "" if nothing is."""
        if method.rollouts.stationary:
            return ""
        return f"{type(method.rollouts).__name__} as where its schedule has ended and nothing is remembered: OnPolicy()"

    def sequence_kl(self) -> Float[Tensor, ""]:
        """Return KL(student || teacher) of whole sequences in nats, differentiable in the student's table."""
        ids = self.sequences()
        positions, mask = self.positions(ids), self.trained(ids)
        ratio = positions.sampled(positions.student_logp) - positions.sampled(positions.teacher_logp)
        return (self.probability(ids) * ratio.where(mask, 0).sum(1)).sum()

    def row(self, method: Method) -> Row:
        """Compare a method's gradient with that of the sequence KL: direction, bias and noise."""
        mean_gradient, variance = self.moments(method)
        (kl_gradient,) = torch.autograd.grad(self.sequence_kl(), self.student)
        cosine = torch.nn.functional.cosine_similarity(mean_gradient.flatten(), kl_gradient.flatten(), dim=0)
        bias, noise = (mean_gradient - kl_gradient).norm() / kl_gradient.norm(), variance / mean_gradient.square().sum()
        return Row(cosine.item(), bias.item(), noise.item())
