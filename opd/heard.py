"""What goes into the head pass and comes out of it: states, or log-probs that were told; the columns of each token."""

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

LEAST = 1e-7  # mass beside the tokens that a teacher tells of: less is a rounding of theirs
TOLD = frozenset({"student_logp", "student_entropy", "teacher_logp"})  # columns of a teacher that is `Given`


@dataclass(frozen=True)
class Hidden:
    """One model's final hidden states at the trained tokens, and its head."""

    states: Float[Tensor, "N H"]  # state n predicts token n
    head: Head
    views: tuple[Float[Tensor, "N D"], ...] = ()  # of the layers that a method matches, through the model's lens

    def __getitem__(self, tokens: Bool[Tensor, " N"]) -> "Hidden":
        """Of some tokens."""
        at = tokens.to(self.states.device)
        return replace(self, states=self.states[at], views=tuple(x[at] for x in self.views))


@dataclass(frozen=True)
class Given:
    """What a teacher without a head said of the sampled tokens, over its own vocabulary and stop class.

    Of some others too, where `ids` names them; an id may stand there twice.
    """

    logp: Float[Tensor, " N"]  # log q(y), nats
    ids: Int[Tensor, "N k"] | None = None
    others: Float[Tensor, "N k"] | None = None  # their log q
    top: int = 0  # so many of its own most probable tokens are among them

    def __getitem__(self, tokens: Bool[Tensor, " N"]) -> "Given":
        """Of some tokens."""
        at = tokens.to(self.logp.device)
        ids, others = (None if x is None else x[at] for x in (self.ids, self.others))
        return replace(self, logp=self.logp[at], ids=ids, others=others)

    def over(self, ids: Int[Tensor, " N"], like: Float[Tensor, "N V"], rows: slice) -> Float[Tensor, "N V"]:
        """log q of some rows: nan wherever nothing is known, and no leaf may look there.

        With others: the rest of the mass evenly over the tokens that are not known, none of them above the least of the
        teacher's own top.  So a bucket of the rest is what it is, to 1e-7 (a rounding of 1) or k-th times their number.
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
    """What the frozen models say about the trained tokens."""

    teacher: Hidden | Given | None  # None: it writes, and scores nothing
    reference: Hidden | None = None  # where a term is against it
    lens: Lens | None = None  # through which the student's layers meet the teacher's views

    def __getitem__(self, tokens: Bool[Tensor, " N"]) -> "Heard":
        """About some of them."""
        teacher = None if self.teacher is None else self.teacher[tokens]
        return Heard(teacher, None if self.reference is None else self.reference[tokens], self.lens)

    def nbytes(self) -> int:
        """Bytes of the states."""
        kept = [x for x in (self.teacher, self.reference) if isinstance(x, Hidden)]
        return sum(x.nbytes for side in kept for x in (side.states, *side.views))

    def said(self, columns: "Columns") -> "Columns":
        """The columns that somebody told."""
        return columns if self.teacher is not None else replace(columns, teacher_logp=None)


@dataclass(frozen=True)
class Columns:
    """Per-token numbers of a pass, flat, detached; None what it did not look at."""

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
        """To be filled: one place for all, so that no small tensor outlives a chunk and pins freed memory below it."""
        scores = tuple(like.new_empty(n) if scored(term) else None for term in method.terms)
        names = sorted(names)
        return cls(**dict(zip(names, like.new_empty(len(names), n), strict=True)), scores=scores)

    def fill(self, rows: slice, part: "Columns") -> None:
        """Take over the numbers of some tokens."""
        for (_, whole), (_, x) in zip(self.named(), part.named(), strict=True):
            whole[rows] = x

    def named(self) -> Iterator[tuple[str, Float[Tensor, " N"]]]:
        """(name, column) of those there are; the scores as scores.0, scores.1, ..."""
        for f in fields(self):
            if f.name != "scores" and getattr(self, f.name) is not None:
                yield f.name, getattr(self, f.name)
        yield from ((f"scores.{i}", s) for i, s in enumerate(self.scores) if s is not None)

    def cpu(self) -> "Columns":
        """The same numbers in main memory."""
        whole = {name: x.cpu() for name, x in self.named()}
        scores = tuple(whole.pop(f"scores.{i}", None) for i in range(len(self.scores)))
        return Columns(**whole, scores=scores)


@dataclass(frozen=True)
class Alternatives:
    """What else could have been said: the student's likeliest tokens, then the teacher's, A in all.  For readers."""

    ids: Int[Tensor, "N A"]
    student_logp: Float[Tensor, "N A"]
    teacher_logp: Float[Tensor, "N A"]  # nan where the teacher has no head

    def cpu(self) -> "Alternatives":
        """The same in main memory."""
        return Alternatives(self.ids.cpu(), self.student_logp.cpu(), self.teacher_logp.cpu())
