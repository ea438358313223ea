"""A method as a value: which model generates the rollouts, the reward or divergence, and which tokens count.

    prepare(batch)           -> targets   once per optimizer step, whole batch, no gradient
    loss(positions, targets) -> [*N]      inside the head pass, differentiable, additive over tokens

If the targets have no advantages, the head pass computes the scores itself.  That is the fast path, for methods whose
leaves are all token-local.
"""

from dataclasses import dataclass, replace
from functools import reduce
from operator import mul

import torch

from opd.core.types import (
    ANSWER_COLUMNS,
    MEASURED,
    ROLLOUT_COLUMNS,
    STUDENT_COLUMNS,
    Batch,
    Column,
    call,
    reads,
)
from opd.losses.estimators import Sampled, Several
from opd.losses.reductions import TokenMean
from opd.losses.rewards import One
from opd.losses.shapes import PerPosition
from opd.losses.target_distribution import Teacher, models
from opd.losses.terms import MatchHidden, PolicyGradient, Positions, Target, Term
from opd.methods.questions import Question
from opd.methods.rollout_policies.base import RolloutPolicy
from opd.methods.rollout_policies.on_policy import OnPolicy


@dataclass(frozen=True)
class Privileged:
    """A teacher with the student's weights that sees additional context."""

    weights: str = "self"  # self: current weights; base: weights before training; ema:RATE: moving average
    context: str = "response"  # a column of the prompt's row; peer: a correct response from the same group
    template: str = ""  # of the teacher's prompt, with {prompt} and {context}; "": the default of --context-template


@dataclass(frozen=True)
class Method:
    """A sum of loss terms over the same rollouts."""

    terms: tuple[Term, ...] = (PolicyGradient(),)
    reduction: Column = TokenMean()
    rollouts: RolloutPolicy = OnPolicy()
    filters: tuple[Column, ...] = ()  # select trained tokens; applied first, so removed tokens are in no denominator
    teacher: Privileged | None = None  # default teacher; the run's --teacher and --context override it
    asks: Question | None = None  # question to a text-only teacher or a judge

    def __post_init__(self) -> None:
        if not self.terms:
            raise ValueError("a method needs at least one term")
        if sum(isinstance(term, MatchHidden) for term in self.terms) > 1:
            raise ValueError("a method matches hidden states in one term at most: use one MatchHidden")
        self._check_asked()
        several = [t for t in self.terms if isinstance(t, PolicyGradient) and t.estimator == Several()]
        if several and self.rollouts.samples == 1:
            raise ValueError(f"{several[0].estimator} with {self.rollouts}: use OnPolicy(samples=...) above 1")
        for term in self.terms:
            if isinstance(term, PolicyGradient):
                columns = frozenset().union(*map(reads, term.column_leaves()))
                self.rollouts.check_policy_gradient(term, columns)
                if self.rollouts.updates > 1 and not reads(term.surrogate):
                    raise ValueError(
                        f"--updates {self.rollouts.updates}: from the second optimizer step on, the rollouts are off "
                        "policy, and a policy gradient needs the ratio to their sampler: add --importance-cap 2, or "
                        "take a surrogate with a ratio (pg --surrogate clipped)"
                    )

    def _check_asked(self) -> None:
        """Raise ValueError if a column is never filled, or if the rollouts do not fit `asks`."""
        told = frozenset() if self.asks is None else self.asks.columns
        if missing := self.reads() & ANSWER_COLUMNS - told:
            raise ValueError(
                f"reads {', '.join(sorted(missing))}, which asks={self.asks} does not fill: Continue(...) fills chunk "
                "and agreement, Grade(...) verdict and judged, Stages(...) stage, stage_scores and judged"
            )
        if self.asks is not None and not self.rollouts.on_policy:
            raise ValueError(f"{self.rollouts} takes a teacher that reads tokens, and {self.asks} one that reads text")

    def reads(self) -> frozenset[str]:
        """Return the names of the columns that `prepare` reads."""
        leaves = (self.reduction, *self.filters, *(leaf for term in self.terms for leaf in term.column_leaves()))
        return frozenset().union(*map(reads, leaves))

    def rollout_columns(self) -> frozenset[str]:
        """Return the names of the columns that `prepare` or the rollout policy reads."""
        return self.reads() | self.rollouts.reads()

    def needs(self) -> frozenset[str]:
        """Return what every teacher must provide.

        Possible values: names of measured columns, `vocabulary` (whole distributions), `layers` (hidden states),
        `text`, and `decoding` (the teacher scores rollouts while they are generated).
        """
        text = {"text"} if self.asks is not None else set()
        terms = (term.needs() for term in self.terms)
        return frozenset().union(text, self.rollouts.needs(), self.reads() & MEASURED, *terms)

    def supports(self) -> dict[str, int]:
        """Return how many tokens a teacher server must score, or nothing if a term needs the full vocabulary.

        `{"student": k}`, `{"teacher": k}` or both name the model whose top k is meant, `{"drawn": n}` n tokens sampled
        beside the response's token.
        """
        out: dict[str, int] = {}
        for term in self.terms:
            if isinstance(term, PolicyGradient) and term.drawn():
                out["drawn"] = self.rollouts.samples - 1
            elif "vocabulary" in term.needs():
                if (found := term.support()) is None:
                    return {}
                out[found.of] = max(found.k, out.get(found.of, 0))
        return out

    def needs_of_tokens(self) -> frozenset[str]:
        """Return `needs` for a teacher that returns log-probs of single tokens instead of distributions.

        If top-k tokens suffice (`supports`), `vocabulary` is replaced by `teacher_logp` and one or both of two values.
        `chosen` means tokens named by the student, `teacher_top` the teacher's top k.
        """
        needs, tops = self.needs(), self.supports()
        kinds = {"student": "chosen", "drawn": "chosen", "teacher": "teacher_top"}
        return needs - {"vocabulary"} | {"teacher_logp", *(kinds[who] for who in tops)} if tops else needs

    def keeps_scores(self) -> bool:
        """Return True if steps train on log-probs that the teacher gave once, when a rollout entered a pool.

        They are of the response's tokens and of the teacher's top k.
        """
        return self.rollouts.pooled and self.needs_of_tokens() <= STUDENT_COLUMNS | {"teacher_logp", "teacher_top"}

    def models(self) -> frozenset[str]:
        """Return the names, in `Positions`, of the distributions with which the terms compare the student."""
        return frozenset().union(*(models(term.against) for term in self.terms if not isinstance(term, MatchHidden)))

    def hidden(self) -> MatchHidden | None:
        """Return the term that matches hidden states, or None."""
        return next((term for term in self.terms if isinstance(term, MatchHidden)), None)

    def headless(self) -> bool:
        """Return True if no term compares next-token distributions; training then skips the LM heads."""
        return all(isinstance(term, MatchHidden) for term in self.terms)

    def local(self) -> bool:
        """Return True if every leaf is token-local; then one head pass measures, prepares and computes the loss."""
        by_token = self.reads() <= ROLLOUT_COLUMNS and all(term.local() for term in self.terms)
        return by_token and not self.rollouts.reads_measured()

    def advised(self) -> "Method | None":
        """Return the method reduced to advantages, without a teacher; None if a term is not a sampled reward."""
        sampled = [t for t in self.terms if isinstance(t, PolicyGradient) and t.estimator == Sampled()]
        if len(sampled) < len(self.terms):
            return None
        reduced = (replace(t, reward=One(), baseline=None, transforms=(), against=Teacher()) for t in sampled)
        return replace(self, terms=tuple(reduced))

    def bounded(self) -> bool:
        """Return True if the loss is finite on a sampled token to which the teacher gives probability 0."""
        return all(term.bounded() for term in self.terms)

    @torch.no_grad()
    def prepare(self, batch: Batch) -> tuple[Target, ...]:
        """Return a target per term.  Targets have advantages if the batch was measured before."""
        batch = replace(batch, unfiltered=batch.mask)
        for keep in self.filters:
            batch = replace(batch, mask=batch.mask & call(keep, batch))
        scale = call(self.reduction, batch).where(batch.mask, 0)
        scores = batch.scores or (None,) * len(self.terms)
        out = []
        for term, score in zip(self.terms, scores, strict=True):
            assert score is not None or term.local(), f"{term} reads the whole batch, and its scores were not measured"
            weight = reduce(mul, (call(w, batch) for w in term.weights), term.coef * scale).where(batch.mask, 0)
            if isinstance(term, PolicyGradient) and score is not None:
                score = reduce(lambda x, f: call(f, batch, x), term.transforms, score.where(batch.mask, 0))
                score = score.where(batch.mask, 0)
            wrote = isinstance(term, PolicyGradient) and "sampler_logp" in reads(term.surrogate)
            several = isinstance(term, PolicyGradient) and term.estimator == Several()
            others = (batch.others, batch.others_logp) if several else (None, None)
            out.append(Target(weight, score, batch.sampler_logp if wrote else batch.student_logp, *others))
        return tuple(out)

    def loss(self, at: Positions, targets: tuple[Target, ...]) -> PerPosition:
        """Return the weighted sum [*N] of the terms on distributions.  The denominators are inside the weights."""
        pairs = zip(self.terms, targets, strict=True)
        parts = [x.weight * term.loss(at, x) for term, x in pairs if not isinstance(term, MatchHidden)]
        return reduce(torch.add, parts)
