"""What a method is a sum of: a reward that is sampled, a divergence that is differentiated, states that are matched.

A term says what a teacher must tell (`needs`), and the unweighted loss of each token from both models' distributions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from jaxtyping import Float, Int
from torch import Tensor

from opd.against import Against, Extrapolated, Teacher, models
from opd.divergences import Divergence, OnSupport, ReverseKL, Support
from opd.estimators import Baseline, Estimator, Full, Sampled, Several, Stratified, TopKValue
from opd.representation import Bridge, distance
from opd.rewards import LogRatio, One, Reward
from opd.surrogates import Reinforce
from opd.transforms import Discount, DiscountExpected, MeanFuture
from opd.types import ASKED, GIVEN, Column, reads
from opd.weights import TruncatedImportance

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
