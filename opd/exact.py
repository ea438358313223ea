"""A world small enough to enumerate: student and teacher are tables, in float64.

Every expectation over rollouts is a finite sum, so the bias and the noise of a method are measured, not argued.
At one context the vocabulary alone is enumerated, which is cheap on real models too: `slopes`.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opd.divergences import kl
from opd.estimators import Several, mean
from opd.method import Match, Method, PolicyGradient, Positions, Target
from opd.noise import uniform
from opd.rollouts import Mixture, OnPolicy
from opd.types import ALONE, COLUMNS, DATA, STUDENT, Batch, Refusal, at_least


@torch.no_grad()
def measure(method: Method, at: Positions, **given: Tensor) -> Batch:
    """Every column that can be measured of the positions [B, T], the score of each term included.

    `given` are columns to take instead of the defaults: all tokens trained, one group per row, the student's own.
    """
    student, teacher, rows = at.sampled(at.student_logp), at.sampled(at.teacher_logp), len(at.ids)
    columns: dict[str, Any] = {
        "mask": torch.ones_like(at.ids, dtype=torch.bool),
        "group": torch.arange(rows),
        "source": torch.full((rows,), STUDENT),
        "stopped": torch.zeros(rows, dtype=torch.bool),
        "outcome": torch.zeros(rows, dtype=student.dtype),
        "sampler_logp": student,
        "prefix": torch.zeros(rows, dtype=torch.long),
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
    method: Method, student: Float[Tensor, "N V"], *frozen: Float[Tensor, "N V"]
) -> Float[Tensor, "N V V"]:
    """At N fixed contexts given as logits: row y is the gradient in the student's logits when y is the token drawn.

    `frozen` are the teacher's logits and, where the method reads them, the reference's.
    """
    contexts, vocab = student.shape
    logits = student.detach().double().repeat_interleave(vocab, 0)[:, None].requires_grad_()
    ids = torch.arange(vocab).repeat(contexts)[:, None]
    fixed = [x.double().log_softmax(-1).repeat_interleave(vocab, 0)[:, None] for x in frozen]
    at = Positions(ids, logits.log_softmax(-1), *fixed)
    loss = method.loss(at, method.prepare(measure(method, at))).sum()
    return len(ids) * torch.autograd.grad(loss, logits)[0].view(contexts, vocab, vocab)


@dataclass(frozen=True)
class Slopes:
    """The token loss in the student's log-probs, for every y that could be drawn: always_v + [v = y] drawn_y."""

    always: Float[Tensor, "N V"]
    drawn: Float[Tensor, "N V"]

    def double(self) -> "Slopes":
        """The same in float64."""
        return Slopes(self.always.double(), self.drawn.double())

    def mean(self, p: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
        """In the logits, over y ~ p."""
        return to_logits(self.always + p * self.drawn, p)

    def spread(self, p: Float[Tensor, "N V"], tangent: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
        """Variance over y ~ p of the gradient's component along a direction in which log p moves by `tangent`."""
        along = (self.drawn * tangent).where(p > 0, 0)
        return (p * (along - (p * along).sum(-1, keepdim=True)).square()).sum(-1)

    def variance(self, p: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
        """Total variance over y ~ p of the gradient in the logits."""
        norm2 = (1 - p).square() + p.square().sum(-1, keepdim=True) - p.square()  # of 1_y - p
        return (p * self.drawn.square() * norm2).sum(-1) - to_logits(p * self.drawn, p).square().sum(-1)


def to_logits(slope: Float[Tensor, "*N V"], p: Float[Tensor, "*N V"]) -> Float[Tensor, "*N V"]:
    """A gradient in log-probs as one in logits."""
    return slope - p * slope.sum(-1, keepdim=True)


def alone(method: Method) -> str:
    """Why the loss of one token is not a function of its own position; empty where it is."""
    if strange := [type(x).__name__ for x in method.terms if not isinstance(x, PolicyGradient | Match)]:
        return f"{', '.join(strange)} is not a function of next-token distributions"
    leaves = [*method.filters, *(x for t in method.terms for x in t.weights)]
    leaves += [x for t in method.terms if isinstance(t, PolicyGradient) for x in t.transforms]
    if leaves:
        return f"{', '.join(map(repr, leaves))} looks at the columns of a batch"
    if any(isinstance(t, PolicyGradient) and t.estimator == Several() for t in method.terms):
        return "it looks at several tokens drawn at a position (of m, with 1/m of the variance of one)"
    return ""


def slopes(method: Method, at: Positions) -> Slopes:
    """The gradient of each position's token loss (weight 1) for every token at once; `at.ids` are not looked at.

    Raises Refusal for a method that is not `alone`.
    """
    if why := alone(method):
        raise Refusal(f"{why}, and one position alone has none")
    logp = at.student_logp.detach()
    p, nothing = logp.exp(), torch.zeros_like(logp)
    live = logp.clone().requires_grad_()
    always, drawn = nothing, nothing
    for term in method.terms:
        if isinstance(term, Match):
            with torch.enable_grad():
                loss = term.loss(replace(at, student_logp=live), Target(logp[..., 0], None, None)).sum()
            always = always + term.coef * torch.autograd.grad(loss, live)[0]
            continue
        assert isinstance(term, PolicyGradient)
        other, exact = at.of(term.against), term.estimator.exact(logp)
        f = term.reward(logp, other)
        if term.baseline is not None:
            f = f - term.baseline(term.reward, logp, other, exact)[..., None]
        f = f.where(p > 0, 0)
        with torch.enable_grad():
            loss = term.sampled_loss(live, f, Target(f, None, logp)).sum()  # every token as the sampled one
        slope = term.coef * torch.autograd.grad(loss, live)[0].where(p > 0, 0)
        if exact is not None:
            always, slope = always - term.coef * (p * f).where(exact, 0), slope.where(~exact, 0)
        drawn = drawn + slope
    return Slopes(always, drawn)


def speakers(method: Method) -> Mapping[int, float]:
    """Who writes a rollout of the method, and with which chance; empty where the data does."""
    match method.rollouts:
        case Mixture(share, other):
            return {} if other == DATA else {STUDENT: share, other: 1 - share}
    return {STUDENT: 1.0}


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
    reference: Float[Tensor, "S V"] | None = None

    def __post_init__(self) -> None:
        prefixes = sum(self.student.shape[1] ** t for t in range(self.steps))
        assert len(self.student) == prefixes, f"{prefixes} prefixes need as many rows, not {len(self.student)}"

    @classmethod
    def random(cls, vocab: int = 3, steps: int = 3, *, mismatch: float = 1.0, seed: int = 0, stop: int = -1) -> "World":
        """Logits of teacher and reference are normal; those of the student add a normal `mismatch` to the teacher's."""
        shape = (sum(vocab**t for t in range(steps)), vocab)
        draws = torch.randn(3, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        teacher, gap, reference = draws
        return cls((teacher + mismatch * gap).requires_grad_(), teacher, steps, stop, reference)

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
        """The next-token distributions along some sequences; the student's are live."""
        at = self.prefixes(ids)
        tables = [self.student, self.teacher.detach()] + ([] if self.reference is None else [self.reference.detach()])
        return Positions(ids, *(x.double()[at].log_softmax(-1) for x in tables))

    def measure(self, method: Method, ids: Int[Tensor, "B T"], **given: Tensor) -> Batch:
        """Measure some sequences; `given` are columns to take instead of the defaults."""
        mask = self.trained(ids)
        columns = {"mask": mask, "stopped": (mask & (ids == self.stop)).any(1)}
        return measure(method, self.positions(ids), **columns | given)

    def probability(self, ids: Int[Tensor, "B T"], speaker: int = STUDENT) -> Float[Tensor, " B"]:
        """Of each sequence under the one that writes it."""
        at = self.positions(ids)
        return at.sampled(at.student_logp if speaker == STUDENT else at.teacher_logp).sum(1).exp()

    def gradient(self, method: Method, ids: Int[Tensor, "B T"], **given: Tensor) -> Float[Tensor, "S V"]:
        """Of the loss of one optimizer step on these sequences."""
        loss = method.loss(self.positions(ids), method.prepare(self.measure(method, ids, **given)))
        return torch.autograd.grad(loss.sum(), self.student)[0]

    def moments(self, method: Method) -> tuple[Float[Tensor, "S V"], Float[Tensor, ""]]:
        """Mean and total variance of the gradient of a step on one sequence, times T: per sequence, not per token."""
        ids, chances, each = self.sequences(), [], []
        for speaker, share in speakers(method).items():
            chances.append(share * self.probability(ids, speaker).detach())
            source = torch.tensor([speaker])
            each += [self.steps * self.gradient(method, row, source=source).flatten() for row in ids.split(1)]
        first, variance = moments(torch.cat(chances), torch.stack(each))
        return first.view_as(self.student), variance

    def outside(self, method: Method) -> str:
        """Why the method has no row, or one that would mislead; empty where it has."""
        if strange := [type(x).__name__ for x in method.terms if not isinstance(x, PolicyGradient | Match)]:
            return f"{', '.join(strange)} is not a function of next-token distributions, and a table has nothing else"
        if not speakers(method):
            return f"{method.rollouts!r}: the data writes a share of the rollouts, and the world has no data"
        if absent := method.models() - {"teacher_logp", "reference_logp"}:
            return f"is against {', '.join(sorted(absent))}, which the world has not"
        batch = self.measure(method, self.sequences())
        measured = {f.name for f in fields(batch) if getattr(batch, f.name) is not None}
        reasons = {
            "outcome": "reads outcome, and the world has no verifier",
            "coin": "flips a coin, which is not enumerated; its expectation may be a method of its own (tropd --soft)",
        }
        reasons |= dict.fromkeys(ALONE, "reads what is said of a response without its prompt, and the world has none")
        missing = {c: f"reads {c}, which the world does not measure" for c in sorted(COLUMNS - measured)}
        return next((why for c, why in (missing | reasons).items() if c in method.reads()), "")

    def note(self, method: Method) -> str:
        """What was assumed of a method that changes over a run; empty where nothing was."""
        if isinstance(method.rollouts, OnPolicy | Mixture):
            return ""
        return f"{type(method.rollouts).__name__} as where its schedule has ended and nothing is remembered: OnPolicy()"

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


@dataclass(frozen=True, kw_only=True)
class Size:
    """Which world: a draw of `World.random`."""

    vocab: int = 3
    """Tokens there are."""
    length: int = 3
    """Tokens of a sequence."""
    mismatch: float = 1.0
    """Standard deviation of the student's logits around the teacher's."""
    seed: int = 0
    """Seed of both models."""

    def world(self) -> World:
        """The world itself; raises Refusal for one that cannot be enumerated."""
        at_least(self, vocab=2, length=1, seed=0)
        if not 0 < self.mismatch < math.inf:
            raise Refusal(f"--mismatch {self.mismatch}: must be above 0, or there is no gradient to estimate")
        if self.length * math.log(self.vocab) > math.log(4096):
            raise Refusal(
                f"--vocab {self.vocab} --length {self.length}: {self.vocab}^{self.length} sequences are too many to "
                "enumerate; 4096 are the most"
            )
        return World.random(self.vocab, self.length, mismatch=self.mismatch, seed=self.seed)
