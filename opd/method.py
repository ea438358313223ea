"""A method is a value: who speaks, what is rewarded, what is matched, which tokens count.

    prepare(batch)           -> targets   once per optimizer step, whole batch, no gradient
    loss(positions, targets) -> [*N]      inside the head pass, differentiable, additive over tokens

Targets that carry no advantage are scored inside the head pass itself: the fast path of methods whose leaves are all
token-local.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import mul

import torch
from jaxtyping import Float, Int
from torch import Tensor

from opd.against import Against, Extrapolated, Teacher, models
from opd.divergences import Divergence, OnSupport, ReverseKL, Support
from opd.estimators import Baseline, Estimator, Full, Sampled, Several, Stratified, TopKValue
from opd.questions import Question
from opd.representation import Bridge, distance
from opd.rewards import LogRatio, One, Reward
from opd.rollouts import Blend, Mixture, OnPolicy, Rollouts, Snapshot, StopOnAgreement, TeacherPrefix, listens
from opd.surrogates import Reinforce
from opd.transforms import Discount, DiscountExpected, MeanFuture
from opd.types import ASKED, GIVEN, MEASURED, Batch, Column, call, reads
from opd.weights import TokenMean, TruncatedImportance

SAMPLED = frozenset({"ids", "student_logp", "teacher_logp"})  # columns that depend on the token drawn


@dataclass(frozen=True)
class Positions:
    """The models' next-token distributions: of a chunk in the head pass, of a whole small world in tests."""

    ids: Int[Tensor, "*N"]  # the token that was sampled
    student_logp: Float[Tensor, "*N V"]  # differentiable in the student's logits
    teacher_logp: Float[Tensor, "*N V"]
    reference_logp: Float[Tensor, "*N V"] | None = None  # where a term is against the reference model

    def sampled(self, x: Float[Tensor, "*N V"]) -> Float[Tensor, "*N"]:
        """x at the sampled token."""
        return x.gather(-1, self.ids[..., None])[..., 0]

    def of(self, against: Against) -> Float[Tensor, "*N V"]:
        """What a term compares the student with."""
        return against(**{name: getattr(self, name) for name in models(against)})


@dataclass(frozen=True)
class Target:
    """What one term asks of each token."""

    weight: Float[Tensor, "*N"]
    advantage: Float[Tensor, "*N"] | None  # None: scored in the head pass
    old: Float[Tensor, "*N"] | None  # log p that a ratio divides by: when the batch was measured, or of who wrote it
    others: Int[Tensor, "*N k"] | None = None  # tokens drawn beside the sampled one, for `Several`
    others_old: Float[Tensor, "*N k"] | None = None  # `old` of them

    def each(self, f: Callable[[Tensor], Tensor]) -> "Target":
        """The target with something done to each of its columns."""
        return Target(*(None if x is None else f(x) for x in vars(self).values()))  # type: ignore[arg-type]

    def __getitem__(self, at: slice | Tensor) -> "Target":
        """The same target at some rows or tokens."""
        return self.each(lambda x: x[at])

    def to(self, device: torch.device) -> "Target":
        """The same target on a device."""
        return self.each(lambda x: x.to(device))


@dataclass(frozen=True)
class PolicyGradient:
    """Raise the tokens that were rewarded: loss = -w sg[A] log p(y).  The reward never carries gradient."""

    reward: Reward = LogRatio()
    baseline: Baseline | None = None
    estimator: Estimator = Sampled()
    transforms: tuple[Column, ...] = ()
    surrogate: Column = Reinforce()
    weights: tuple[Column, ...] = ()
    coef: float = 1.0
    against: Against = Teacher()

    def __post_init__(self) -> None:
        drawn = isinstance(self.estimator, Several | Stratified)  # a ratio to whoever drew may weigh those tokens
        ratio = drawn and reads(self.surrogate) <= {"sampler_logp"}
        if self.estimator != Sampled() and (self.transforms or not (ratio or self.surrogate == Reinforce())):
            raise ValueError(
                f"{self.estimator} scores many tokens of a position; the transforms {self.transforms} and the "
                f"surrogate {self.surrogate} act on the sampled token alone: use Sampled(), or neither"
            )
        if drawn and (own := [w for w in self.weights if reads(w) & SAMPLED]):
            raise ValueError(f"{own} would weigh all the tokens that {self.estimator} looks at by the response's own")
        if self.baseline is not None and any(isinstance(x, Discount | MeanFuture) for x in self.transforms):
            raise ValueError(
                f"{self.baseline} under Discount or MeanFuture: the baselines of later tokens depend on this one, "
                "which biases its gradient: use DiscountExpected, or no baseline"
            )
        own = [w for w in self.weights if reads(w) & SAMPLED and not isinstance(w, TruncatedImportance)]
        if self.baseline is not None and own:
            raise ValueError(
                f"{self.baseline} beside {own}: a weight that looks at the sampled token is part of its reward, and "
                "the baseline of another reward biases the gradient: use no baseline, or put the weight in the reward"
            )
        if self.reward != LogRatio() and any(isinstance(x, DiscountExpected) for x in self.transforms):
            raise ValueError(
                f"{self.reward} under DiscountExpected: -KL is the mean of log ratios alone: use Discount, or LogRatio"
            )

    def column_leaves(self) -> tuple[Column, ...]:
        """The leaves that look at [B, T] columns."""
        return (*self.transforms, self.surrogate, *self.weights)

    def local(self) -> bool:
        """Whether the head pass can score this term by itself."""
        return not self.transforms and reads(self.surrogate) <= GIVEN

    def corrected(self) -> bool:
        """Whether others may have drawn the tokens: a ratio to them, nothing that is sampled, or a likelihood of data.

        What a judge or a teacher's texts pay is a reward, not a likelihood.
        """
        read = frozenset().union(*map(reads, self.column_leaves()))
        likelihood = not (self.needs() or self.transforms or read & ASKED)
        return "sampler_logp" in read or self.estimator == Full() or likelihood

    def needs(self) -> frozenset[str]:
        """What a teacher must tell: log q of the sampled token, its whole distribution, or nothing."""
        if (self.reward, self.baseline, self.estimator) == (One(), None, Sampled()):
            return frozenset()
        one = self.baseline is None and self.estimator == Sampled() and self.against == Teacher()
        return frozenset({"teacher_logp" if one else "vocabulary"})

    def drawn(self) -> bool:
        """Whether log q of the tokens drawn is all that it needs."""
        return (self.baseline, self.estimator, self.against) == (None, Several(), Teacher())

    def support(self) -> Support | None:
        """The tokens beside the sampled one whose log q is all that it needs; None where it needs more."""
        some = [x.k for x in (self.baseline, self.estimator) if isinstance(x, TopKValue | Stratified)]
        known = isinstance(self.baseline, TopKValue | None) and isinstance(self.estimator, Sampled | Stratified)
        return Support(max(some), "student") if some and known and self.against == Teacher() and max(some) else None

    @torch.no_grad()
    def score(self, at: Positions) -> Float[Tensor, "*N"] | None:
        """Reward minus baseline at the sampled token; None where the estimator needs more than that token."""
        return self._scored(at, at.ids[..., None])[..., 0] if self.estimator == Sampled() else None

    @torch.no_grad()
    def _scored(self, at: Positions, ids: Int[Tensor, "*N m"]) -> Float[Tensor, "*N m"]:
        other = at.of(self.against)
        value = self.reward(at.student_logp.gather(-1, ids), other.gather(-1, ids))
        if self.baseline is None:
            return value
        return value - self.baseline(self.reward, at.student_logp, other, None)[..., None]

    def sampled_loss(
        self, new: Float[Tensor, "*N"], score: Float[Tensor, "*N"] | None, target: Target
    ) -> Float[Tensor, "*N"]:
        """Unweighted loss of each token under `Sampled`, from its log p; a target's advantage goes before the score."""
        advantage = score if target.advantage is None else target.advantage
        old = {} if target.old is None else dict.fromkeys(reads(self.surrogate), target.old)
        return self.surrogate(new, advantage, **old)

    def loss(self, at: Positions, target: Target) -> Float[Tensor, "*N"]:
        """Unweighted loss of each token."""
        if isinstance(self.estimator, Sampled):
            score = self.score(at) if target.advantage is None else None
            return self.sampled_loss(at.sampled(at.student_logp), score, target)
        if isinstance(self.estimator, Several):
            return self._several_loss(at, target)
        with torch.no_grad():
            p, exact, other = at.student_logp.exp(), self.estimator.exact(at.student_logp), at.of(self.against)
            f = self.reward(at.student_logp, other)
            if self.baseline is not None:
                f = f - self.baseline(self.reward, at.student_logp, other, exact)[..., None]
            coefficient, beside = torch.where(exact & (p > 0), p * f, 0), at.sampled(f.where(~exact, 0))
        summed = -(coefficient * at.student_logp.where(coefficient != 0, 0)).sum(-1)  # 0 * -inf is nan
        return summed + self.sampled_loss(at.sampled(at.student_logp), beside, target)

    def _several_loss(self, at: Positions, target: Target) -> Float[Tensor, "*N"]:
        """The mean of the surrogate over all tokens drawn."""
        assert target.others is not None, "nobody drew more tokens than the response's"
        ids, old = torch.cat((at.ids[..., None], target.others), -1), {}
        if target.old is not None and target.others_old is not None:
            old = dict.fromkeys(reads(self.surrogate), torch.cat((target.old[..., None], target.others_old), -1))
        return self.surrogate(at.student_logp.gather(-1, ids), self._scored(at, ids), **old).mean(-1)


@dataclass(frozen=True)
class Match:
    """Differentiate the divergence itself."""

    divergence: Divergence = ReverseKL()
    weights: tuple[Column, ...] = ()
    coef: float = 1.0
    against: Against = Teacher()

    def __post_init__(self) -> None:
        if isinstance(self.against, Extrapolated):
            raise ValueError(f"{self.against} is not normalised: a divergence needs Teacher() or Reference()")

    def column_leaves(self) -> tuple[Column, ...]:
        """The leaves that look at [B, T] columns."""
        return self.weights

    def local(self) -> bool:
        """Whether the head pass can score this term by itself: always."""
        return True

    def needs(self) -> frozenset[str]:
        """What a teacher must tell: its whole distribution; nothing, where it is not compared with."""
        return frozenset({"vocabulary"} if "teacher_logp" in models(self.against) else ())

    def support(self) -> Support | None:
        """The tokens whose log q is all that it needs, the mass beside them included; None where it needs more."""
        if isinstance(self.divergence, OnSupport):
            return self.divergence.support if self.against == Teacher() else None
        return None

    def score(self, at: Positions) -> None:
        """Nothing is rewarded."""
        return None

    def loss(self, at: Positions, target: Target) -> Float[Tensor, "*N"]:
        """Unweighted loss of each token."""
        return self.divergence(at.student_logp, at.of(self.against))


@dataclass(frozen=True)
class MatchHidden:
    """Match hidden states, layer by layer: loss = w mean_l ||h_S - sg h_T||^2 / d.  The heads play no part.

    Column t is about the states that predict token t.
    """

    layers: tuple[int, ...] = ()  # the student's, from 1; empty: all
    bridge: Bridge | None = None  # for a teacher of another width or depth; without one layer l meets layer l
    weights: tuple[Column, ...] = ()
    coef: float = 1.0

    def __post_init__(self) -> None:
        if any(layer < 1 for layer in self.layers) or len(set(self.layers)) < len(self.layers):
            raise ValueError(f"layers={self.layers}: different numbers from 1, or none of them for all")

    def column_leaves(self) -> tuple[Column, ...]:
        """The leaves that look at [B, T] columns."""
        return self.weights

    def local(self) -> bool:
        """Whether the term needs no measuring pass before it: always."""
        return True

    def needs(self) -> frozenset[str]:
        """What a teacher must tell: its layers' states."""
        return frozenset({"layers"})

    def support(self) -> None:
        """No token."""
        return None

    def score(self, at: Positions) -> None:
        """Nothing is rewarded."""
        return None

    def loss(
        self, student: Sequence[Float[Tensor, "N D"]], teacher: Sequence[Float[Tensor, "N D"]]
    ) -> Float[Tensor, " N"]:
        """Unweighted loss of each token, from the views of the layers."""
        return reduce(torch.add, map(distance, student, teacher)) / len(student)


Term = PolicyGradient | Match | MatchHidden


@dataclass(frozen=True)
class Privileged:
    """A teacher made of the student's own weights, which is told what the student is not."""

    weights: str = "self"  # as they are; base: as they were before training; ema:RATE: their moving average
    context: str = "response"  # a column of the prompt's row; peer: a right response of the same prompt's group


@dataclass(frozen=True)
class Method:
    """A sum of terms over the same rollouts."""

    terms: tuple[Term, ...] = (PolicyGradient(),)
    reduction: Column = TokenMean()
    rollouts: Rollouts = OnPolicy()
    filters: tuple[Column, ...] = ()  # which trained tokens stay; applied before all else, so none is in a denominator
    teacher: Privileged | None = None  # its own choice of one; the run's --teacher and --context win
    asks: Question | None = None  # of teachers that write, and give no log-probs

    def __post_init__(self) -> None:
        if not self.terms:
            raise ValueError("a method needs at least one term")
        if sum(isinstance(term, MatchHidden) for term in self.terms) > 1:
            raise ValueError("a method matches hidden states in one term at most: use one MatchHidden")
        self._check_asked()
        several = [t for t in self.terms if isinstance(t, PolicyGradient) and t.estimator == Several()]
        if several and not (isinstance(self.rollouts, OnPolicy) and self.rollouts.samples > 1):
            raise ValueError(f"{several[0].estimator} with {self.rollouts}: use OnPolicy(samples=...) above 1")
        for term in self.terms:
            if isinstance(term, PolicyGradient):
                self._check_speaker(term)
                if self.rollouts.updates > 1 and not reads(term.surrogate):
                    raise ValueError(
                        f"updates={self.rollouts.updates}: from the second optimizer step on, the rollouts are off "
                        "policy; a policy gradient then needs a surrogate with a ratio (ImportanceSampling, Clipped)"
                    )

    def _check_asked(self) -> None:
        """Refuse columns that nobody fills, and questions about what the student did not write."""
        told = frozenset() if self.asks is None else self.asks.columns
        if missing := self.reads() & ASKED - told:
            raise ValueError(
                f"reads {', '.join(sorted(missing))}, which asks={self.asks} does not fill: Continue(...) fills chunk "
                "and agreement, Grade(...) verdict and judged, Stages(...) stage, stage_scores and judged"
            )
        if self.asks is not None and not isinstance(self.rollouts, OnPolicy):
            raise ValueError(f"{self.rollouts} takes a teacher that reads tokens, and {self.asks} one that reads text")

    def _check_speaker(self, term: PolicyGradient) -> None:
        """Refuse a policy gradient on tokens that the student did not draw."""
        read = frozenset().union(*map(reads, term.column_leaves()))
        match self.rollouts:
            case Mixture():
                raise ValueError(
                    f"{self.rollouts} lets others speak, and a policy gradient is a sum over the student's own "
                    "tokens: use OnPolicy(), or match distributions instead (opd-full, opd-topk, gkd)"
                )
            case Blend() if "sampler_logp" not in read:
                raise ValueError(
                    f"{self.rollouts} draws from a mixture of both models, and a policy gradient then needs the ratio "
                    "p/mu: add the weight TruncatedImportance(), or match distributions instead (opd-topk)"
                )
            case Snapshot() if not term.corrected():
                raise ValueError(
                    f"{self.rollouts} lets an older student speak, and a policy gradient then needs the ratio to it: "
                    "take the surrogate OffPolicy(), or match distributions instead (opd-topk)"
                )
            case TeacherPrefix() if "prefix" not in read:
                raise ValueError(
                    f"{self.rollouts} lets the teacher write the first tokens, and a policy gradient is a sum over the "
                    "student's own: add the weight StudentTokens(), or match distributions instead (opd-topk)"
                )

    def reads(self) -> frozenset[str]:
        """The columns that prepare looks at."""
        leaves = (self.reduction, *self.filters, *(leaf for term in self.terms for leaf in term.column_leaves()))
        return frozenset().union(*map(reads, leaves))

    def needs(self) -> frozenset[str]:
        """What every teacher must provide: measured columns, `vocabulary` (whole distributions), `layers`, `decoding`.

        The last is for rollouts that the teacher reads while they are written.
        """
        heard = {"decoding"} if listens(self.rollouts) else set()
        heard |= {"text"} if self.asks is not None else set()
        heard |= {"reverse_kl"} if isinstance(self.rollouts, StopOnAgreement) else set()
        return frozenset().union(heard, self.reads() & MEASURED, *(term.needs() for term in self.terms))

    def supports(self) -> dict[str, int]:
        """Of how many of whose most probable tokens its terms must know log q, where that is enough for all of them.

        Or `drawn`: of so many that were drawn beside the sampled one.
        """
        out: dict[str, int] = {}
        for term in self.terms:
            if isinstance(term, PolicyGradient) and term.drawn():
                assert isinstance(self.rollouts, OnPolicy)
                out["drawn"] = self.rollouts.samples - 1
            elif "vocabulary" in term.needs():
                if (found := term.support()) is None:
                    return {}
                out[found.of] = max(found.k, out.get(found.of, 0))
        return out

    def needs_of_tokens(self) -> frozenset[str]:
        """`needs` of a teacher that tells of single tokens, where they do: those `chosen` for it, `teacher_top`."""
        needs, tops = self.needs(), self.supports()
        kinds = {"student": "chosen", "drawn": "chosen", "teacher": "teacher_top"}
        return needs - {"vocabulary"} | {"teacher_logp", *(kinds[who] for who in tops)} if tops else needs

    def models(self) -> frozenset[str]:
        """The distributions that its terms compare the student with, by their name in `Positions`."""
        return frozenset().union(*(models(term.against) for term in self.terms if not isinstance(term, MatchHidden)))

    def hidden(self) -> MatchHidden | None:
        """The term on hidden states."""
        return next((term for term in self.terms if isinstance(term, MatchHidden)), None)

    def headless(self) -> bool:
        """Whether no term compares next-token distributions: then training skips the heads."""
        return all(isinstance(term, MatchHidden) for term in self.terms)

    def local(self) -> bool:
        """Whether every leaf is token-local: then measure, prepare and loss are one head pass."""
        if isinstance(self.rollouts, StopOnAgreement) and not self.rollouts.online:
            return False
        if isinstance(self.rollouts, Snapshot) and self.rollouts.drift < math.inf:
            return False
        return self.reads() <= GIVEN and all(term.local() for term in self.terms)

    def advised(self) -> "Method | None":
        """The same on targets that carry advantages, where every term is of the sampled token: it needs no teacher."""
        terms = []
        for term in self.terms:
            if not isinstance(term, PolicyGradient) or term.estimator != Sampled():
                return None
            terms.append(replace(term, reward=One(), baseline=None, transforms=(), against=Teacher()))
        return replace(self, terms=tuple(terms))

    @torch.no_grad()
    def prepare(self, batch: Batch) -> tuple[Target, ...]:
        """One target per term; advantages where the batch was measured."""
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

    def loss(self, at: Positions, targets: tuple[Target, ...]) -> Float[Tensor, "*N"]:
        """Weighted sum over the terms on distributions; the denominators are inside the weights."""
        pairs = zip(self.terms, targets, strict=True)
        parts = [x.weight * term.loss(at, x) for term, x in pairs if not isinstance(term, MatchHidden)]
        return reduce(torch.add, parts)
