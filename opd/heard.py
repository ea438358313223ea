"""Inputs and outputs of the head pass: hidden states or a server's log-probs as input, per-token columns as output."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opd.kernels.logits import Head
from opd.kernels.rows import scored
from opd.method import Method
from opd.representation import Lens
from opd.types import MEASURED

LEAST = 1e-7  # smallest mass outside the scored tokens; a smaller value is rounding error of their sum
TOLD = frozenset({"student_logp", "student_entropy", "teacher_logp"})  # columns available if the teacher is `Given`


@dataclass(frozen=True)
class Hidden:
    """The final hidden states of one model at the trained tokens, and its LM head."""

    states: Float[Tensor, "N H"]  # state n predicts token n
    head: Head
    views: tuple[Float[Tensor, "N D"], ...] = ()  # of the layers that a method matches, through the model's lens

    def __getitem__(self, tokens: Bool[Tensor, " N"]) -> "Hidden":
        """Return the hidden states at the marked tokens."""
        at = tokens.to(self.states.device)
        return replace(self, states=self.states[at], views=tuple(x[at] for x in self.views))


@dataclass(frozen=True)
class Given:
    """Log-probs of the sampled tokens from a teacher without an LM head, such as a server.

    They are normalised over the teacher's vocabulary and stop class.  `ids` names further tokens whose log-probs are
    known; an id may occur twice.
    """

    logp: Float[Tensor, " N"]  # log q(y), nats
    ids: Int[Tensor, "N k"] | None = None
    others: Float[Tensor, "N k"] | None = None  # log q of `ids`, nats
    top: int = 0  # number of the teacher's most probable tokens among `ids`

    def __getitem__(self, tokens: Bool[Tensor, " N"]) -> "Given":
        """Return the log-probs at the marked tokens."""
        at = tokens.to(self.logp.device)
        ids, others = (None if x is None else x[at] for x in (self.ids, self.others))
        return replace(self, logp=self.logp[at], ids=ids, others=others)

    def over(self, ids: Int[Tensor, " N"], like: Float[Tensor, "N V"], rows: slice) -> Float[Tensor, "N V"]:
        """Return log q [N, V] of some rows.  Without `others` all unknown entries are nan, and no leaf may read them.

        With `others`, the remaining mass is spread evenly over the unknown tokens, none of them above the last of the
        teacher's top k.  The bucket of the remaining tokens then has its true mass, up to 1e-7 (rounding of a sum near
        1), unless the k-th probability times the number of unknown tokens is smaller.
        """
        own, mine = ids[:, None], self.logp[rows, None].to(like)
        if self.ids is None or self.others is None:
            return torch.full_like(like, torch.nan).scatter(-1, own, mine)
        ids, logp = torch.cat((self.ids[rows], own), -1), torch.cat((self.others[rows].to(like), mine), -1)
        known = torch.zeros_like(like, dtype=torch.bool).scatter(-1, ids, True)
        q = torch.zeros_like(like).scatter(-1, ids, logp)
        mass = q.double().exp().where(known, 0).sum(-1, keepdim=True)
        rest = (1 - mass).clamp(min=LEAST).log() - (~known).double().sum(-1, keepdim=True).clamp(min=1).log()
        if self.top:
            rest = rest.minimum(q.where(known, -torch.inf).topk(self.top, -1).values[:, -1:].double())
        return q.where(known, rest.to(q))


@dataclass(frozen=True)
class Heard:
    """The outputs of the frozen models for the trained tokens."""

    teacher: Hidden | Given | None  # None: a text-only teacher, which scores nothing
    reference: Hidden | None = None  # set if a term compares with it
    lens: Lens | None = None  # maps the student's layers to views comparable with the teacher's

    def __getitem__(self, tokens: Bool[Tensor, " N"]) -> "Heard":
        """Return the outputs at the marked tokens."""
        teacher = None if self.teacher is None else self.teacher[tokens]
        return Heard(teacher, None if self.reference is None else self.reference[tokens], self.lens)

    def nbytes(self) -> int:
        """Return the size of the hidden states and views, in bytes."""
        kept = [x for x in (self.teacher, self.reference) if isinstance(x, Hidden)]
        return sum(x.nbytes for side in kept for x in (side.states, *side.views))

    def said(self, columns: "Columns") -> "Columns":
        """Return the columns, without `teacher_logp` if no teacher scored the tokens."""
        return columns if self.teacher is not None else replace(columns, teacher_logp=None)


@dataclass(frozen=True)
class Columns:
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
    def empty(cls, method: Method, n: int, like: Tensor, names: Iterable[str] = MEASURED) -> "Columns":
        """Return uninitialised columns for n tokens.

        They share one allocation, because small tensors that outlive a chunk would keep freed memory below them from
        reuse.
        """
        scores = tuple(like.new_empty(n) if scored(term) else None for term in method.terms)
        names = sorted(names)
        return cls(**dict(zip(names, like.new_empty(len(names), n), strict=True)), scores=scores)

    def fill(self, rows: slice, part: "Columns") -> None:
        """Copy the numbers of `part` into the given rows."""
        for (_, whole), (_, x) in zip(self.named(), part.named(), strict=True):
            whole[rows] = x

    def named(self) -> Iterator[tuple[str, Float[Tensor, " N"]]]:
        """Yield (name, column) for each column that is present; scores are named scores.0, scores.1, ..."""
        for f in fields(self):
            if f.name != "scores" and getattr(self, f.name) is not None:
                yield f.name, getattr(self, f.name)
        yield from ((f"scores.{i}", s) for i, s in enumerate(self.scores) if s is not None)

    def cpu(self) -> "Columns":
        """Return the columns in main memory."""
        whole = {name: x.cpu() for name, x in self.named()}
        scores = tuple(whole.pop(f"scores.{i}", None) for i in range(len(self.scores)))
        return Columns(**whole, scores=scores)


@dataclass(frozen=True)
class Alternatives:
    """The most probable tokens at each position: the student's, then the teacher's, A in all.

    They are shown to readers of reports; no loss uses them.
    """

    ids: Int[Tensor, "N A"]
    student_logp: Float[Tensor, "N A"]
    teacher_logp: Float[Tensor, "N A"]  # nan if the teacher has no LM head

    def cpu(self) -> "Alternatives":
        """Return the alternatives in main memory."""
        return Alternatives(self.ids.cpu(), self.student_logp.cpu(), self.teacher_logp.cpu())
