"""Per-token sums over the vocabulary, from which closed-form losses and their gradients are computed."""

from dataclasses import dataclass, fields

from jaxtyping import Float
from torch import Tensor

from opd.core.tensors import map_tensors


@dataclass(frozen=True)
class Sums:
    """Sums over the vocabulary, not normalised, and both shifted logits of the sampled token."""

    e: Float[Tensor, " n"]
    eu: Float[Tensor, " n"]
    euv: Float[Tensor, " n"]  # of e (u - v)
    f: Float[Tensor, " n"]
    fv: Float[Tensor, " n"]
    u: Float[Tensor, " n"]
    v: Float[Tensor, " n"]
    d: Float[Tensor, " n"]  # the divergence that `ThroughSupport` computes

    @classmethod
    def empty(cls, n: int, like: Tensor) -> "Sums":
        """Return uninitialised sums of n tokens."""
        return cls(*like.new_empty(len(fields(cls)), n))

    def __getitem__(self, tokens: slice) -> "Sums":
        """Return a view of the sums of some tokens."""
        return map_tensors(lambda sums: sums[tokens], self)

    def split(self, size: int) -> list["Sums"]:
        """Return views of the sums, of `size` tokens each."""
        return [self[tokens] for tokens in (slice(i, i + size) for i in range(0, len(self.e), size))]

    def student(self) -> dict[str, Float[Tensor, " n"]]:
        """Return the columns of the student only, by name."""
        log_e = self.e.log()
        return {"student_logp": self.u - log_e, "student_entropy": log_e - self.eu / self.e}

    def columns(self) -> dict[str, Float[Tensor, " n"]]:
        """Return the measured columns, by name."""
        log_f = self.f.log()
        return self.student() | {
            "teacher_logp": self.v - log_f,
            "teacher_entropy": log_f - self.fv / self.f,
            "reverse_kl": self.euv / self.e - (self.e / self.f).log(),
        }
