"""How much the teacher likes one token: elementwise functions `(student_logp, teacher_logp) -> reward`, no gradient.

Fields are hyper-parameters.  Any shape: the head pass evaluates a reward on the sampled token, and on the whole
vocabulary where a baseline or an estimator asks for it.
"""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

Reward = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class LogRatio:
    """log q - log p, one sample of -KL(student || teacher).  vOPD, arXiv:2605.07865, Eq. 3."""

    def __call__(self, student_logp: Float[Tensor, "*A"], teacher_logp: Float[Tensor, "*A"]) -> Float[Tensor, "*A"]:
        return teacher_logp - student_logp


@dataclass(frozen=True)
class Power:
    """q^alpha - p^alpha, in [-1, 1]: per probability, not per ratio.  PowerOPD, arXiv:2606.17199, Eq. 4.

    Divided by alpha it tends to `LogRatio` as alpha -> 0.
    """

    alpha: float = 5.0

    def __post_init__(self) -> None:
        if not self.alpha > 0:
            raise ValueError(f"alpha={self.alpha}: the power reward needs alpha > 0 (alpha -> 0 is `opd`)")

    def __call__(self, student_logp: Float[Tensor, "*A"], teacher_logp: Float[Tensor, "*A"]) -> Float[Tensor, "*A"]:
        return (self.alpha * teacher_logp).exp() - (self.alpha * student_logp).exp()


@dataclass(frozen=True)
class Clip:
    """A reward bounded to [low, high].  Post-hoc baseline of arXiv:2606.17199, Table 1."""

    low: float = -1.0
    high: float = 1.0
    of: Reward = LogRatio()

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"low={self.low}, high={self.high}: a clip needs low < high")

    def __call__(self, student_logp: Float[Tensor, "*A"], teacher_logp: Float[Tensor, "*A"]) -> Float[Tensor, "*A"]:
        return self.of(student_logp, teacher_logp).clamp(self.low, self.high)


@dataclass(frozen=True)
class Tanh:
    """tanh(reward / scale).  Post-hoc baseline of arXiv:2606.17199, Table 1; scale 5 is the authors' code."""

    scale: float = 5.0
    of: Reward = LogRatio()

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise ValueError(f"scale={self.scale}: tanh needs scale > 0")

    def __call__(self, student_logp: Float[Tensor, "*A"], teacher_logp: Float[Tensor, "*A"]) -> Float[Tensor, "*A"]:
        return (self.of(student_logp, teacher_logp) / self.scale).tanh()
