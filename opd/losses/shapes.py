"""Types of the tensors that leaves read and return; `opd.core.types` explains the letters."""

from jaxtyping import Bool, Float
from torch import Tensor

PerToken = Float[Tensor, "B T"]
Mask = Bool[Tensor, "B T"]
PerRollout = Float[Tensor, " B"]
Marked = Bool[Tensor, "*N V"]
Elementwise = Float[Tensor, "*A"]
OverVocabulary = Float[Tensor, "*N V"]
PerPosition = Float[Tensor, "*N"]
