"""Per-token sums over the vocabulary that closed-form losses and their gradients are made of."""

from dataclasses import dataclass, fields

from jaxtyping import Float
from torch import Tensor


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
    d: Float[Tensor, " n"]  # the divergence that `ThroughSome` leaves

    @classmethod
    def empty(cls, n: int, like: Tensor) -> "Sums":
        """To be filled."""
        return cls(*like.new_empty(len(fields(cls)), n))

    def __getitem__(self, at: slice) -> "Sums":
        """Those of some tokens, in the same memory."""
        return Sums(*(getattr(self, f.name)[at] for f in fields(self)))

    def split(self, size: int) -> list["Sums"]:
        """Those of `size` tokens each, in the same memory."""
        return [self[at] for at in (slice(i, i + size) for i in range(0, len(self.e), size))]

    def student(self) -> dict[str, Float[Tensor, " n"]]:
        """The columns of the student alone, by name."""
        log_e = self.e.log()
        return {"student_logp": self.u - log_e, "student_entropy": log_e - self.eu / self.e}

    def columns(self) -> dict[str, Float[Tensor, " n"]]:
        """The measured columns, by name."""
        log_f = self.f.log()
        return self.student() | {
            "teacher_logp": self.v - log_f,
            "teacher_entropy": log_f - self.fv / self.f,
            "reverse_kl": self.euv / self.e - (self.e / self.f).log(),
        }
