"""The terms of a method: a sampled reward, a differentiated divergence, or matched hidden states.

A term defines what the teacher must provide (`needs`) and the unweighted loss of each token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from jaxtyping import Float, Int
from torch import Tensor

from opd.core.tensors import map_tensors
from opd.core.types import ANSWER_COLUMNS, ROLLOUT_COLUMNS, Column, reads
from opd.losses.advantages import Discount, DiscountExpected, MeanFuture
from opd.losses.baselines import Baseline, TopKValue
from opd.losses.divergences import Divergence, OnSupport, ReverseKL, Support
from opd.losses.estimators import Estimator, Full, Sampled, Several, Stratified
from opd.losses.hidden_states import Bridge, distance
from opd.losses.rewards import LogRatio, One, Reward
from opd.losses.shapes import OverVocabulary, PerPosition
from opd.losses.surrogates import Reinforce
from opd.losses.target_distribution import Against, Extrapolated, Teacher, models
from opd.losses.token_weights import TruncatedImportance

SAMPLED = frozenset({"ids", "student_logp", "teacher_logp"})  # columns that depend on the sampled token


@dataclass(frozen=True)
class Positions:
    """The next-token distributions of all models: of a chunk in the head pass, or of a whole small model in tests."""

    ids: Int[Tensor, "*N"]  # the token that was sampled
    student_logp: OverVocabulary  # differentiable in the student's logits
    teacher_logp: OverVocabulary
    reference_logp: OverVocabulary | None = None  # set if a term compares with the reference model

    def sampled(self, x: OverVocabulary) -> PerPosition:
        """Return x at the sampled token, [*N]."""
        return x.gather(-1, self.ids[..., None])[..., 0]

    def of(self, against: Against) -> OverVocabulary:
        """Return the log-probs [*N V] with which a term compares the student."""
        return against(**{name: getattr(self, name) for name in models(against)})


@dataclass(frozen=True)
class Target:
    """Per-token inputs of a term's loss: weight, advantage, and log-probs for importance ratios."""

    weight: PerPosition
    advantage: PerPosition | None  # None: the head pass computes it
    old: PerPosition | None  # log p in the ratio's denominator: at measurement, or of the sampler
    others: Int[Tensor, "*N k"] | None = None  # additional sampled tokens, for `Several`
    others_old: Float[Tensor, "*N k"] | None = None  # `old` of the additional tokens

    def __getitem__(self, index: slice | Tensor) -> "Target":
        return map_tensors(lambda column: column[index], self)


@dataclass(frozen=True)
class PolicyGradient:
    """A policy-gradient term, which raises the log-probs of rewarded tokens: loss = -w sg[A] log p(y)."""

    reward: Reward = LogRatio()
    baseline: Baseline | None = None
    estimator: Estimator = Sampled()
    transforms: tuple[Column, ...] = ()
    surrogate: Column = Reinforce()
    weights: tuple[Column, ...] = ()
    coef: float = 1.0
    against: Against = Teacher()

    def __post_init__(self) -> None:
        # a ratio to the sampling distribution applies to these tokens, too
        drawn = isinstance(self.estimator, Several | Stratified)
        ratio = drawn and reads(self.surrogate) <= {"sampler_logp"}
        if self.estimator != Sampled() and (self.transforms or not (ratio or self.surrogate == Reinforce())):
            raise ValueError(
                f"{self.estimator} scores many tokens of a position; the transforms {self.transforms} and the "
                f"surrogate {self.surrogate} act on the sampled token alone: use Sampled(), or neither"
            )
        if drawn and (sampled_weights := [w for w in self.weights if reads(w) & SAMPLED]):
            raise ValueError(
                f"{sampled_weights} would weigh all the tokens that {self.estimator} looks at by the response's own"
            )
        if self.baseline is not None and any(isinstance(x, Discount | MeanFuture) for x in self.transforms):
            raise ValueError(
                f"{self.baseline} under Discount or MeanFuture: the baselines of later tokens depend on this one, "
                "which biases its gradient: use DiscountExpected, or no baseline"
            )
        sampled_weights = [w for w in self.weights if reads(w) & SAMPLED and not isinstance(w, TruncatedImportance)]
        if self.baseline is not None and sampled_weights:
            raise ValueError(
                f"{self.baseline} beside {sampled_weights}: a weight that looks at the sampled token is part of its "
                "reward, and the baseline of another reward biases the gradient: use no baseline, or put the weight in "
                "the reward"
            )
        if self.reward != LogRatio() and any(isinstance(x, DiscountExpected) for x in self.transforms):
            raise ValueError(
                f"{self.reward} under DiscountExpected: -KL is the mean of log ratios alone: use Discount, or LogRatio"
            )

    def column_leaves(self) -> tuple[Column, ...]:
        """Return the leaves that read [B, T] columns."""
        return (*self.transforms, self.surrogate, *self.weights)

    def local(self) -> bool:
        """Return True if the head pass can score this term without a measuring pass."""
        return not self.transforms and reads(self.surrogate) <= ROLLOUT_COLUMNS

    def corrected(self) -> bool:
        """Return True if the loss stays valid on tokens that the current student did not generate.

        That holds if it has a ratio to the sampling distribution, samples nothing, or is a likelihood of data.  A
        reward from a judge or from a teacher's texts is not a likelihood.
        """
        read = frozenset().union(*map(reads, self.column_leaves()))
        likelihood = not (self.needs() or self.transforms or read & ANSWER_COLUMNS)
        return "sampler_logp" in read or self.estimator == Full() or likelihood

    def needs(self) -> frozenset[str]:
        """Return what a teacher must provide: log q of the sampled token, its whole distribution, or nothing."""
        if (self.reward, self.baseline, self.estimator) == (One(), None, Sampled()):
            return frozenset()
        sampled_only = self.baseline is None and self.estimator == Sampled() and self.against == Teacher()
        return frozenset({"teacher_logp" if sampled_only else "vocabulary"})

    def bounded(self) -> bool:
        """Return True if the loss is finite on a sampled token to which the teacher gives probability 0."""
        by_teacher = any("teacher_logp" in reads(leaf) for leaf in self.column_leaves())
        return not by_teacher and bool(self._scored(_excluded(), torch.zeros(1, dtype=torch.long)).isfinite().all())

    def drawn(self) -> bool:
        """Return True if log q of the sampled tokens is sufficient."""
        return (self.baseline, self.estimator, self.against) == (None, Several(), Teacher())

    def support(self) -> Support | None:
        """Return the top-k support whose log q is sufficient beside the sampled token's, or None."""
        k = max((x.k for x in (self.baseline, self.estimator) if isinstance(x, TopKValue | Stratified)), default=0)
        has_support = isinstance(self.baseline, TopKValue | None) and isinstance(self.estimator, Sampled | Stratified)
        return Support(k, "student") if k and has_support and self.against == Teacher() else None

    @torch.no_grad()
    def score(self, positions: Positions) -> PerPosition | None:
        """Return reward minus baseline at the sampled token, [*N]; None if the estimator uses more than that token."""
        return self._scored(positions, positions.ids[..., None])[..., 0] if self.estimator == Sampled() else None

    @torch.no_grad()
    def _scored(self, positions: Positions, ids: Int[Tensor, "*N m"]) -> Float[Tensor, "*N m"]:
        target_logp = positions.of(self.against)
        value = self.reward(positions.student_logp.gather(-1, ids), target_logp.gather(-1, ids))
        if self.baseline is None:
            return value
        return value - self.baseline(self.reward, positions.student_logp, target_logp, None)[..., None]

    def sampled_loss(self, new: PerPosition, score: PerPosition | None, target: Target) -> PerPosition:
        """Return the unweighted loss [*N] of each token under `Sampled`; a target's advantage replaces `score`."""
        advantage = score if target.advantage is None else target.advantage
        old = {} if target.old is None else dict.fromkeys(reads(self.surrogate), target.old)
        return self.surrogate(new, advantage, **old)

    def loss(self, positions: Positions, target: Target) -> PerPosition:
        """Return the unweighted loss [*N] of each token."""
        if isinstance(self.estimator, Sampled):
            score = self.score(positions) if target.advantage is None else None
            return self.sampled_loss(positions.sampled(positions.student_logp), score, target)
        if isinstance(self.estimator, Several):
            return self._several_loss(positions, target)
        with torch.no_grad():
            logp, target_logp = positions.student_logp, positions.of(self.against)
            p, exact = logp.exp(), self.estimator.exact(logp)
            f = self.reward(logp, target_logp)
            if self.baseline is not None:
                f = f - self.baseline(self.reward, logp, target_logp, exact)[..., None]
            coefficient, tail_score = torch.where(exact & (p > 0), p * f, 0), positions.sampled(f.where(~exact, 0))
        exact_loss = -(coefficient * positions.student_logp.where(coefficient != 0, 0)).sum(-1)  # 0 * -inf is nan
        return exact_loss + self.sampled_loss(positions.sampled(positions.student_logp), tail_score, target)

    def _several_loss(self, positions: Positions, target: Target) -> PerPosition:
        """Return the mean of the surrogate over all tokens sampled at each position, [*N]."""
        assert target.others is not None, "nobody drew more tokens than the response's"
        ids, old = torch.cat((positions.ids[..., None], target.others), -1), {}
        if target.old is not None and target.others_old is not None:
            old = dict.fromkeys(reads(self.surrogate), torch.cat((target.old[..., None], target.others_old), -1))
        return self.surrogate(positions.student_logp.gather(-1, ids), self._scored(positions, ids), **old).mean(-1)


class _Matching:
    """A term that scores no token: only its weights read columns, and it never needs a measuring pass."""

    weights: tuple[Column, ...]

    def column_leaves(self) -> tuple[Column, ...]:
        """Return the leaves that read [B, T] columns."""
        return self.weights

    def local(self) -> bool:
        """Return True: the head pass computes this term without a measuring pass."""
        return True

    def score(self, positions: Positions) -> None:
        """Return None: this term has no reward."""
        return None


@dataclass(frozen=True)
class Match(_Matching):
    """A term that differentiates a divergence between student and teacher."""

    divergence: Divergence = ReverseKL()
    weights: tuple[Column, ...] = ()
    coef: float = 1.0
    against: Against = Teacher()

    def __post_init__(self) -> None:
        if isinstance(self.against, Extrapolated):
            raise ValueError(f"{self.against} is not normalised: a divergence needs Teacher() or Reference()")

    def needs(self) -> frozenset[str]:
        """Return what a teacher must provide: its whole distribution, or nothing if `against` does not read it."""
        return frozenset({"vocabulary"} if "teacher_logp" in models(self.against) else ())

    def support(self) -> Support | None:
        """Return the support whose log q is sufficient, or None.  The mass outside it follows from those log q."""
        return self.divergence.support if isinstance(self.divergence, OnSupport) and self.against == Teacher() else None

    def bounded(self) -> bool:
        """Return True if the loss is finite where the teacher gives probability 0 to a token."""
        return bool(self.loss(_excluded(), Target(torch.ones(()), None, None)).isfinite())

    def loss(self, positions: Positions, target: Target) -> PerPosition:
        """Return the unweighted loss [*N] of each token."""
        return self.divergence(positions.student_logp, positions.of(self.against))


@dataclass(frozen=True)
class MatchHidden(_Matching):
    """A term that matches hidden states without the LM heads: loss = w mean_l ||h_S - sg h_T||^2 / d."""

    layers: tuple[int, ...] = ()  # layers of the student, from 1; empty: all
    bridge: Bridge | None = None  # for a teacher of another width or depth; None: layer l is compared with layer l
    weights: tuple[Column, ...] = ()
    coef: float = 1.0

    def __post_init__(self) -> None:
        if any(layer < 1 for layer in self.layers) or len(set(self.layers)) < len(self.layers):
            raise ValueError(f"layers={self.layers}: different numbers from 1, or none of them for all")

    def needs(self) -> frozenset[str]:
        """Return what a teacher must provide: the hidden states of its layers."""
        return frozenset({"layers"})

    def support(self) -> None:
        """Return None: this term needs no log q."""
        return None

    def bounded(self) -> bool:
        """Return True: this term reads no log q."""
        return True

    def loss(
        self, student: Sequence[Float[Tensor, "N D"]], teacher: Sequence[Float[Tensor, "N D"]]
    ) -> Float[Tensor, " N"]:
        """Return the unweighted loss [N] of each token, from the views of the layers."""
        return reduce(torch.add, map(distance, student, teacher)) / len(student)


def _excluded() -> Positions:
    """Return a position with two tokens: the student is undecided, and the teacher excludes the sampled one."""
    even = torch.full((2,), 0.5).log()
    return Positions(torch.tensor(0), even, torch.tensor([-torch.inf, 0.0]), even)


Term = PolicyGradient | Match | MatchHidden
