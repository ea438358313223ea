"""One sweep over rows of logits, in place: per-token sums, then the logits become a gradient.

With u = z - max z of the student, v of the teacher, e = exp u, f = exp v: seven sums hold all that a loss needs of the
vocabulary if it depends on the student through one number per token.  The shift keeps the terms at the size of an
entropy, so that differences of them stay exact in fp32.  The KL is computed from the sum of e (u - v): if both models
are close, a difference of the sums of e u and e v would keep few digits.  On a CPU a block of rows stays in the cache
across its passes.
"""

from dataclasses import dataclass, fields, replace
from functools import reduce

import torch
from jaxtyping import Float, Int
from torch import Tensor

from opd.core.tensors import map_tensors
from opd.losses.baselines import Value
from opd.losses.divergences import OnSupport, ReverseKL
from opd.losses.estimators import Sampled
from opd.losses.rewards import LogRatio
from opd.losses.target_distribution import Teacher
from opd.losses.terms import Match, MatchHidden, PolicyGradient, Target, Term
from opd.methods.method import Method


@dataclass(frozen=True)
class Sums:
    """Sums over the vocabulary, not normalised, and both shifted logits of the sampled token."""

    e: Float[Tensor, " n"]
    eu: Float[Tensor, " n"]
    euv: Float[Tensor, " n"]  # of e (u - v)
    f: Float[Tensor, " n"]
    fv: Float[Tensor, " n"]
    u: Float[Tensor, " n"]
    v: Float[Tensor, " n"]
    d: Float[Tensor, " n"]  # the divergence that `ThroughSupport` computes

    @classmethod
    def empty(cls, n: int, like: Tensor) -> "Sums":
        return cls(*like.new_empty(len(fields(cls)), n))

    def __getitem__(self, tokens: slice) -> "Sums":
        return map_tensors(lambda sums: sums[tokens], self)

    def split(self, size: int) -> list["Sums"]:
        """Return views of the sums, of `size` tokens each."""
        return [self[tokens] for tokens in (slice(i, i + size) for i in range(0, len(self.e), size))]

    def student(self) -> dict[str, Float[Tensor, " n"]]:
        """Return the columns of the student only, by name."""
        log_e = self.e.log()
        return {"student_logp": self.u - log_e, "student_entropy": log_e - self.eu / self.e}

    def columns(self) -> dict[str, Float[Tensor, " n"]]:
        """Return the measured columns, by name."""
        log_f = self.f.log()
        return self.student() | {
            "teacher_logp": self.v - log_f,
            "teacher_entropy": log_f - self.fv / self.f,
            "reverse_kl": self.euv / self.e - (self.e / self.f).log(),
        }


@dataclass(frozen=True)
class ThroughLogp:
    """A loss that depends on the student only through log p(y): sampled policy gradients, any reward and baseline."""

    column = "student_logp"
    sign = -1.0
    shifted = False  # whether the gradient is made of u and v, too

    def gradient_(self, e: Tensor, u: Tensor, v: Tensor, ids: Int[Tensor, " r"], sums: Sums) -> None:
        """Turn e into sums.e (p - 1_y); the one-hot is subtracted before any rounding, because p_y may be near 1."""
        e.scatter_add_(-1, ids[:, None], -sums.e[:, None])


@dataclass(frozen=True)
class ThroughKL:
    """A loss that depends on the student only through KL(student || teacher): the reverse KL, with any weights."""

    column = "reverse_kl"
    sign = 1.0
    shifted = True

    def gradient_(self, e: Tensor, u: Tensor, v: Tensor, ids: Int[Tensor, " r"], sums: Sums) -> None:
        """Turn e into sums.e p (u - v - E_p[u - v]); u is overwritten."""
        e.mul_(u.sub_(v).sub_((sums.euv / sums.e)[:, None]))


@dataclass(frozen=True)
class ThroughSupport:
    """A loss that depends on the student through log p of k tokens and of the bucket of the other tokens."""

    divergence: OnSupport
    column = "d"
    sign = 1.0
    shifted = True

    def gradient_(self, e: Tensor, u: Tensor, v: Tensor, ids: Int[Tensor, " r"], sums: Sums) -> None:
        """Turn e into sums.e times the gradient of sums.d; v is overwritten.

        The tokens outside the support act through their total mass: its gradient is spread over them in proportion to
        e.  On the support the gradient of log p is copied.
        """
        support_ids, student_mass = self.divergence.support(u, v), sums.e[:, None]
        inside, u, t = e.gather(-1, support_ids), u.gather(-1, support_ids), v.gather(-1, support_ids)
        outside_mass = e.scatter_(-1, support_ids, 0).sum(-1, keepdim=True)
        teacher_outside_mass = v.scatter_(-1, support_ids, -torch.inf).exp_().sum(-1, keepdim=True)
        p = torch.cat((u, outside_mass.log()), -1) - student_mass.log()
        q = torch.cat((t, teacher_outside_mass.log()), -1) - sums.f.log()[:, None]
        k = slice(None if self.divergence.bucketed else -1)
        with torch.enable_grad():
            d = self.divergence.on(p.requires_grad_()[:, k], q[:, k])
            (g,) = torch.autograd.grad(d.sum(), p)
        sums.d.copy_(d.detach())
        total = g.sum(-1, keepdim=True)
        e.mul_((g[:, -1:] * student_mass / outside_mass).where(outside_mass > 0, 0) - total)
        e.scatter_(-1, support_ids, g[:, :-1] * student_mass - inside * total)


Form = ThroughLogp | ThroughKL | ThroughSupport


def closed_form(method: Method) -> Form | None:
    """Return the closed form of a method's gradient, or None if autograd has to compute it."""
    terms = [t for t in method.terms if not isinstance(t, MatchHidden)]
    if all(map(scored, terms)):
        return ThroughLogp()
    if all(isinstance(t, Match) and t == replace(t, divergence=ReverseKL(), against=Teacher()) for t in terms):
        return ThroughKL()
    if len(terms) == 1 and isinstance(terms[0], Match) and terms[0].against == Teacher():
        divergence = terms[0].divergence
        if isinstance(divergence, OnSupport):
            return ThroughSupport(divergence)
    return None


def weighted_loss(terms: tuple[Term, ...], value: Tensor, scores: tuple, targets: tuple[Target, ...]) -> Tensor:
    """Return the weighted sum over terms, differentiable in `value`, through which alone they depend on the student."""
    loss = lambda term, score, x: term.sampled_loss(value, score, x) if isinstance(term, PolicyGradient) else value
    parts = zip(terms, scores, targets, strict=True)
    return reduce(torch.add, [x.weight * loss(t, s, x) for t, s, x in parts if not isinstance(t, MatchHidden)])


def scored(term: Term) -> bool:
    """Return True if a term scores the sampled token."""
    return isinstance(term, PolicyGradient) and isinstance(term.estimator, Sampled)


def needs_vocabulary(term: Term) -> bool:
    """Return True if the score of the sampled token does not follow from the columns."""
    if not (isinstance(term, PolicyGradient) and scored(term)):
        return False
    plain = term.baseline is None or (isinstance(term.baseline, Value) and isinstance(term.reward, LogRatio))
    return not (plain and isinstance(term.against, Teacher))


def score(term: Term, columns: dict[str, Float[Tensor, " n"]]) -> Float[Tensor, " n"]:
    """Return reward minus baseline.  The value of the log ratio is -KL, so that minus the baseline is plus the KL."""
    assert isinstance(term, PolicyGradient)
    reward = term.reward(columns["student_logp"], columns["teacher_logp"])
    return reward if term.baseline is None else reward + columns["reverse_kl"]
