"""Results of the head pass: columns of the trained tokens, and the most probable tokens of both models."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields

from jaxtyping import Float, Int
from torch import Tensor

from opd.core.types import MEASURED
from opd.head.closed_forms import scored
from opd.methods.method import Method


@dataclass(frozen=True)
class HeadColumns:
    """Per-token results of a head pass, flat and detached; None for columns that were not computed."""

    student_logp: Float[Tensor, " N"] | None = None
    student_entropy: Float[Tensor, " N"] | None = None
    teacher_logp: Float[Tensor, " N"] | None = None
    teacher_entropy: Float[Tensor, " N"] | None = None
    reverse_kl: Float[Tensor, " N"] | None = None
    hidden_distance: Float[Tensor, " N"] | None = None
    hidden_cosine: Float[Tensor, " N"] | None = None
    scores: tuple[Float[Tensor, " N"] | None, ...] = ()  # reward - baseline at the sampled token, per term

    @classmethod
    def empty(cls, method: Method, n: int, like: Tensor, names: Iterable[str] = MEASURED) -> "HeadColumns":
        """Return uninitialised columns in one allocation: small tensors that outlive a chunk keep memory from reuse."""
        scores = tuple(like.new_empty(n) if scored(term) else None for term in method.terms)
        names = sorted(names)
        return cls(**dict(zip(names, like.new_empty(len(names), n), strict=True)), scores=scores)

    def fill(self, rows: slice, part: "HeadColumns") -> None:
        values = dict(part.named())
        for name, column in self.named():
            column[rows] = values[name]

    def named(self) -> Iterator[tuple[str, Float[Tensor, " N"]]]:
        """Yield (name, column) for each column that is present; scores are named scores.0, scores.1, ..."""
        for f in fields(self):
            if f.name != "scores" and getattr(self, f.name) is not None:
                yield f.name, getattr(self, f.name)
        yield from ((f"scores.{i}", s) for i, s in enumerate(self.scores) if s is not None)


@dataclass(frozen=True)
class Alternatives:
    """The most probable tokens of each position, for reports: the student's, then the teacher's, A in all."""

    ids: Int[Tensor, "N A"]
    student_logp: Float[Tensor, "N A"]
    teacher_logp: Float[Tensor, "N A"]  # nan if the teacher has no LM head
