"""Estimators: `exact` marks the tokens [*N V] of a position that are summed instead of sampled; None marks no token."""

from dataclasses import dataclass

import torch

from opd.losses.baselines import top
from opd.losses.shapes import Marked, OverVocabulary


@dataclass(frozen=True)
class Sampled:
    """The REINFORCE estimator -A(y) log p(y), which uses only the sampled token."""

    def exact(self, student_logp: OverVocabulary) -> Marked | None:
        return None


@dataclass(frozen=True)
class Stratified:
    """Exact on the student's top k, sampled elsewhere; its expectation is that of `Sampled` (k = 0), `Full` (all)."""

    k: int = 16

    def __post_init__(self) -> None:
        if self.k < 0:
            raise ValueError(f"k={self.k}: the stratified estimator needs k >= 0 (0 is `opd`)")

    def exact(self, student_logp: OverVocabulary) -> Marked:
        none = torch.zeros_like(student_logp, dtype=torch.bool)
        return none.scatter(-1, top(self.k, student_logp), True) if self.k else none


@dataclass(frozen=True)
class Full:
    """The exact estimator -sum_v p_v A_v log p_v over the whole vocabulary, with p_v A_v detached."""

    def exact(self, student_logp: OverVocabulary) -> Marked:
        return torch.ones_like(student_logp, dtype=torch.bool)


@dataclass(frozen=True)
class Several:
    """-mean_i A(a_i) log p(a_i) over m tokens sampled at each position.  AsyncOPD, arXiv:2606.24143.

    It is `Sampled` with 1/m of the variance at a context.  m is `OnPolicy.samples`; the response continues with a_1.
    """

    def exact(self, student_logp: OverVocabulary) -> Marked | None:
        return None


Estimator = Sampled | Several | Stratified | Full
