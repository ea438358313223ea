"""Inputs of the head pass: hidden states, or the log-probs of a server."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opd.core.tensors import map_tensors
from opd.head.vocabulary import Head
from opd.losses.hidden_states import Lens

MIN_MASS = 1e-7  # smallest mass outside the scored tokens; a smaller value is rounding error of their sum
# columns available if the teacher is `TeacherLogps`
COLUMNS_WITHOUT_HEAD = frozenset({"student_logp", "student_entropy", "teacher_logp"})


@dataclass(frozen=True)
class Hidden:
    """The final hidden states of one model at the trained tokens, and its LM head."""

    states: Float[Tensor, "N H"]  # state n predicts token n
    head: Head
    views: tuple[Float[Tensor, "N D"], ...] = ()  # of the layers that a method matches, through the model's lens

    def __getitem__(self, tokens: Bool[Tensor, " N"]) -> "Hidden":
        marked = tokens.to(self.states.device)
        return replace(self, states=self.states[marked], views=tuple(x[marked] for x in self.views))


@dataclass(frozen=True)
class TeacherLogps:
    """Log-probs of the sampled tokens from a teacher without an LM head, such as a server.

    They are normalised over the teacher's vocabulary and stop class.  `ids` names further tokens whose log-probs are
    known; an id may occur twice.
    """

    logp: Float[Tensor, " N"]  # log q(y), nats
    ids: Int[Tensor, "N k"] | None = None
    others: Float[Tensor, "N k"] | None = None  # log q of `ids`, nats
    top: int = 0  # number of the teacher's most probable tokens among `ids`

    def __getitem__(self, tokens: Bool[Tensor, " N"]) -> "TeacherLogps":
        marked = tokens.to(self.logp.device)
        return map_tensors(lambda column: column[marked], self)

    def over(self, ids: Int[Tensor, " N"], like: Float[Tensor, "N V"], rows: slice) -> Float[Tensor, "N V"]:
        """Return log q [N, V] of some rows.  Without `others` all unknown entries are nan, and no leaf may read them.

        With `others`, the remaining mass is spread evenly over the unknown tokens, none of them above the last of the
        teacher's top k.  The bucket of the remaining tokens then has its true mass, up to 1e-7 (rounding of a sum near
        1), unless the k-th probability times the number of unknown tokens is smaller.
        """
        y, logp_y = ids[:, None], self.logp[rows, None].to(like)
        if self.ids is None or self.others is None:
            return torch.full_like(like, torch.nan).scatter(-1, y, logp_y)
        ids, logp = torch.cat((self.ids[rows], y), -1), torch.cat((self.others[rows].to(like), logp_y), -1)
        is_known = torch.zeros_like(like, dtype=torch.bool).scatter(-1, ids, True)
        q = torch.zeros_like(like).scatter(-1, ids, logp)
        mass = q.double().exp().where(is_known, 0).sum(-1, keepdim=True)
        fill = (1 - mass).clamp(min=MIN_MASS).log() - (~is_known).double().sum(-1, keepdim=True).clamp(min=1).log()
        if self.top:
            fill = fill.minimum(q.where(is_known, -torch.inf).topk(self.top, -1).values[:, -1:].double())
        return q.where(is_known, fill.to(q))


@dataclass(frozen=True)
class FrozenOutputs:
    """The outputs of the frozen models for the trained tokens."""

    teacher: Hidden | TeacherLogps | None  # None: a text-only teacher, which scores nothing
    reference: Hidden | None = None  # set if a term compares with it
    lens: Lens | None = None  # maps the student's layers to views comparable with the teacher's

    def __getitem__(self, tokens: Bool[Tensor, " N"]) -> "FrozenOutputs":
        marked = lambda outputs: None if outputs is None else outputs[tokens]
        return FrozenOutputs(marked(self.teacher), marked(self.reference), self.lens)

    def nbytes(self) -> int:
        """Return the size of the hidden states and views, in bytes."""
        hidden_outputs = [x for x in (self.teacher, self.reference) if isinstance(x, Hidden)]
        return sum(x.nbytes for hidden in hidden_outputs for x in (hidden.states, *hidden.views))
