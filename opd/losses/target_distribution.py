"""The distribution with which a term compares the student: `(teacher_logp, reference_logp) -> log-probs`, pointwise.

A leaf names the models that it reads as its parameters.
"""

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature

from torch import Tensor

from opd.losses.shapes import OverVocabulary


@dataclass(frozen=True)
class Teacher:
    """The teacher's distribution."""

    def __call__(self, teacher_logp: OverVocabulary) -> OverVocabulary:
        return teacher_logp


@dataclass(frozen=True)
class Reference:
    """The distribution of a frozen third model: the initial student, or the teacher before its training."""

    def __call__(self, reference_logp: OverVocabulary) -> OverVocabulary:
        return reference_logp


@dataclass(frozen=True)
class Extrapolated:
    """strength log q + (1 - strength) log b, not normalised: beyond the teacher, away from the reference b.

    Its log ratio to the student is the reward of G-OPD, arXiv:2602.12125: strength (log q - log b) - (log p - log b).
    """

    strength: float = 1.25

    def __call__(self, teacher_logp: OverVocabulary, reference_logp: OverVocabulary) -> OverVocabulary:
        return reference_logp + self.strength * (teacher_logp - reference_logp)


Against = Callable[..., Tensor]


def models(against: Against) -> frozenset[str]:
    """Return the names, in `Positions`, of the distributions that `against` reads."""
    return frozenset(signature(against).parameters)
