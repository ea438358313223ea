"""One sweep over rows of logits, in place: per-token sums, then the logits become a gradient.

With u = z - max z of the student, v of the teacher, e = exp u, f = exp v: seven sums hold all that a loss needs of the
vocabulary if it depends on the student through one number per token.  The shift keeps the terms at the size of an
entropy, so that differences of them stay exact in fp32.  The KL is computed from the sum of e (u - v): if both models
are close, a difference of the sums of e u and e v would keep few digits.  On a CPU a block of rows stays in the cache
across its passes.
"""

from dataclasses import dataclass, replace
from functools import reduce

import torch
from jaxtyping import Float, Int
from torch import Tensor

from opd.head.sums import Sums
from opd.losses.baselines import Value
from opd.losses.divergences import Bucketed, OnSupport, ReverseKL
from opd.losses.estimators import Sampled
from opd.losses.rewards import LogRatio
from opd.losses.target_distribution import Teacher
from opd.losses.terms import Match, MatchHidden, PolicyGradient, Target, Term
from opd.methods.method import Method


@dataclass(frozen=True)
class ThroughLogp:
    """A loss that depends on the student only through log p(y): sampled policy gradients, any reward and baseline."""

    column = "student_logp"
    sign = -1.0
    shifted = False  # whether the gradient is made of u and v, too

    def gradient_(self, e: Tensor, u: Tensor, v: Tensor, ids: Int[Tensor, " r"], sums: Sums) -> None:
        """Turn e into sums.e (p - 1_y); the one-hot is subtracted before any rounding, because p_y may be near 1."""
        e.scatter_add_(-1, ids[:, None], -sums.e[:, None])

    def loss(self, terms: tuple[Term, ...], logp: Tensor, scores: tuple, targets: tuple[Target, ...]) -> Tensor:
        """Return the weighted sum over terms, differentiable in log p(y)."""
        parts = zip(terms, scores, targets, strict=True)
        weighted_losses = (
            x.weight * term.sampled_loss(logp, s, x) for term, s, x in parts if isinstance(term, PolicyGradient)
        )
        return reduce(torch.add, weighted_losses)


@dataclass(frozen=True)
class ThroughKL:
    """A loss that depends on the student only through KL(student || teacher): the reverse KL, with any weights."""

    column = "reverse_kl"
    sign = 1.0
    shifted = True

    def gradient_(self, e: Tensor, u: Tensor, v: Tensor, ids: Int[Tensor, " r"], sums: Sums) -> None:
        """Turn e into sums.e p (u - v - E_p[u - v]); u is overwritten."""
        e.mul_(u.sub_(v).sub_((sums.euv / sums.e)[:, None]))

    def loss(self, terms: tuple[Term, ...], kl: Tensor, scores: tuple, targets: tuple[Target, ...]) -> Tensor:
        """Return the weighted sum over terms, differentiable in the KL."""
        return reduce(torch.add, [x.weight * kl for t, x in zip(terms, targets, strict=True) if isinstance(t, Match)])


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
        k = slice(None if isinstance(self.divergence, Bucketed) else -1)
        with torch.enable_grad():
            d = self.divergence.on(p.requires_grad_()[:, k], q[:, k])
            (g,) = torch.autograd.grad(d.sum(), p)
        sums.d.copy_(d.detach())
        total = g.sum(-1, keepdim=True)
        e.mul_((g[:, -1:] * student_mass / outside_mass).where(outside_mass > 0, 0) - total)
        e.scatter_(-1, support_ids, g[:, :-1] * student_mass - inside * total)

    def loss(self, terms: tuple[Term, ...], d: Tensor, scores: tuple, targets: tuple[Target, ...]) -> Tensor:
        """Return the weighted sum over terms, differentiable in the divergence."""
        return reduce(torch.add, [x.weight * d for t, x in zip(terms, targets, strict=True) if isinstance(t, Match)])


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


def scored(term: Term) -> bool:
    """Return True if a term scores the sampled token."""
    return isinstance(term, PolicyGradient) and isinstance(term.estimator, Sampled)


def scored_by_sums(term: Term) -> bool:
    """Return True if the score of the sampled token follows from the columns, without logits of other tokens."""
    assert isinstance(term, PolicyGradient)
    plain = term.baseline is None or (isinstance(term.baseline, Value) and isinstance(term.reward, LogRatio))
    return plain and isinstance(term.against, Teacher)


def score(term: Term, columns: dict[str, Float[Tensor, " n"]]) -> Float[Tensor, " n"]:
    """Return reward minus baseline.  The value of the log ratio is -KL, so that minus the baseline is plus the KL."""
    assert isinstance(term, PolicyGradient)
    reward = term.reward(columns["student_logp"], columns["teacher_logp"])
    return reward if term.baseline is None else reward + columns["reverse_kl"]
