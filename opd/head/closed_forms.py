"""One sweep over rows of logits, in place: per-token sums, then the logits become a gradient.

With u = z - max z of the student, v of the teacher, e = exp u, f = exp v: seven sums hold all that a loss needs of the
vocabulary when it sees the student through one number per token.  The shift keeps their terms of the size of an
entropy, so that differences of them stay exact in fp32.  The KL's sum is of e (u - v): where both models are close,
a difference of the sums of e u and e v would keep few digits.  On a CPU a block of rows stays in the cache across its
passes.
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
    """A loss that sees the student through log p(y) alone: sampled policy gradients with any reward and baseline."""

    column = "student_logp"
    sign = -1.0
    shifted = False  # whether the gradient is made of u and v, too

    def gradient_(self, e: Tensor, u: Tensor, v: Tensor, ids: Int[Tensor, " r"], sums: Sums) -> None:
        """e becomes sums.e (p - 1_y), the one-hot subtracted before any rounding: p_y may be near 1."""
        e.scatter_add_(-1, ids[:, None], -sums.e[:, None])

    def loss(self, terms: tuple[Term, ...], logp: Tensor, scores: tuple, targets: tuple[Target, ...]) -> Tensor:
        """Weighted sum over terms, differentiable in log p(y)."""
        parts = zip(terms, scores, targets, strict=True)
        some = (x.weight * term.sampled_loss(logp, s, x) for term, s, x in parts if isinstance(term, PolicyGradient))
        return reduce(torch.add, some)


@dataclass(frozen=True)
class ThroughKL:
    """A loss that sees the student through KL(student || teacher) alone: the reverse KL matched, with any weights."""

    column = "reverse_kl"
    sign = 1.0
    shifted = True

    def gradient_(self, e: Tensor, u: Tensor, v: Tensor, ids: Int[Tensor, " r"], sums: Sums) -> None:
        """e becomes sums.e p (u - v - E_p[u - v]); u is consumed."""
        e.mul_(u.sub_(v).sub_((sums.euv / sums.e)[:, None]))

    def loss(self, terms: tuple[Term, ...], kl: Tensor, scores: tuple, targets: tuple[Target, ...]) -> Tensor:
        """Weighted sum over terms, differentiable in the KL."""
        return reduce(torch.add, [x.weight * kl for t, x in zip(terms, targets, strict=True) if isinstance(t, Match)])


@dataclass(frozen=True)
class ThroughSome:
    """A loss that sees the student through log p of k tokens, and of the others together: a divergence on a support."""

    divergence: OnSupport
    column = "d"
    sign = 1.0
    shifted = True

    def gradient_(self, e: Tensor, u: Tensor, v: Tensor, ids: Int[Tensor, " r"], sums: Sums) -> None:
        """e becomes sums.e times the gradient of sums.d; v is consumed.

        The mass outside is summed; its gradient is shared out by e, that of log p on the support is copied there.
        """
        some, whole = self.divergence.support(u, v), sums.e[:, None]
        inside, u, t = e.gather(-1, some), u.gather(-1, some), v.gather(-1, some)
        rest = e.scatter_(-1, some, 0).sum(-1, keepdim=True)
        other = v.scatter_(-1, some, -torch.inf).exp_().sum(-1, keepdim=True)
        p, q = torch.cat((u, rest.log()), -1) - whole.log(), torch.cat((t, other.log()), -1) - sums.f.log()[:, None]
        k = slice(None if isinstance(self.divergence, Bucketed) else -1)
        with torch.enable_grad():
            d = self.divergence.on(p.requires_grad_()[:, k], q[:, k])
            (g,) = torch.autograd.grad(d.sum(), p)
        sums.d.copy_(d.detach())
        total = g.sum(-1, keepdim=True)
        e.mul_((g[:, -1:] * whole / rest).where(rest > 0, 0) - total)
        e.scatter_(-1, some, g[:, :-1] * whole - inside * total)

    def loss(self, terms: tuple[Term, ...], d: Tensor, scores: tuple, targets: tuple[Target, ...]) -> Tensor:
        """Weighted, differentiable in the divergence."""
        return reduce(torch.add, [x.weight * d for t, x in zip(terms, targets, strict=True) if isinstance(t, Match)])


Form = ThroughLogp | ThroughKL | ThroughSome


def closed_form(method: Method) -> Form | None:
    """How a method's gradient follows from the sums; None where autograd has to find it."""
    terms = [t for t in method.terms if not isinstance(t, MatchHidden)]
    if all(map(scored, terms)):
        return ThroughLogp()
    if all(isinstance(t, Match) and t == replace(t, divergence=ReverseKL(), against=Teacher()) for t in terms):
        return ThroughKL()
    if len(terms) == 1 and isinstance(terms[0], Match) and terms[0].against == Teacher():
        divergence = terms[0].divergence
        if isinstance(divergence, OnSupport):
            return ThroughSome(divergence)
    return None


def scored(term: Term) -> bool:
    """Whether a term scores the sampled token."""
    return isinstance(term, PolicyGradient) and isinstance(term.estimator, Sampled)


def scored_by_sums(term: Term) -> bool:
    """Whether the columns decide that score, without a look at the vocabulary."""
    assert isinstance(term, PolicyGradient)
    plain = term.baseline is None or (isinstance(term.baseline, Value) and isinstance(term.reward, LogRatio))
    return plain and isinstance(term.against, Teacher)


def score(term: Term, columns: dict[str, Float[Tensor, " n"]]) -> Float[Tensor, " n"]:
    """Reward minus baseline; the value of the log ratio is -KL."""
    assert isinstance(term, PolicyGradient)
    reward = term.reward(columns["student_logp"], columns["teacher_logp"])
    return reward if term.baseline is None else reward + columns["reverse_kl"]
