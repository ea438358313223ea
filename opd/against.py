"""What the student is compared with: pointwise leaves `(teacher_logp, reference_logp) -> log-probs`, which name the
models they read."""

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Teacher:
    """The teacher itself."""

    def __call__(self, teacher_logp: Float[Tensor, "*N V"]) -> Float[Tensor, "*N V"]:
        return teacher_logp


@dataclass(frozen=True)
class Reference:
    """A frozen third model: the student as it was, or the teacher before its own training."""

    def __call__(self, reference_logp: Float[Tensor, "*N V"]) -> Float[Tensor, "*N V"]:
        return reference_logp


@dataclass(frozen=True)
class Extrapolated:
    """strength log q + (1 - strength) log b, not normalised: beyond the teacher, away from the reference b.

    Its log ratio is the reward of G-OPD, arXiv:2602.12125: strength (log q - log b) - (log p - log b).
    """

    strength: float = 1.25

    def __call__(
        self, teacher_logp: Float[Tensor, "*N V"], reference_logp: Float[Tensor, "*N V"]
    ) -> Float[Tensor, "*N V"]:
        return reference_logp + self.strength * (teacher_logp - reference_logp)


Against = Callable[..., Tensor]


def models(against: Against) -> frozenset[str]:
    """The distributions it reads, by their name in `Positions`."""
    return frozenset(signature(against).parameters)
