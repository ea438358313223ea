"""The sweep over chunks of tokens: logits, sums, loss and gradient while a chunk is in memory."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from opd.core.types import MEASURED
from opd.head.backend import fuses
from opd.head.closed_forms import Form, ThroughSome, closed_form, score, scored, scored_by_sums
from opd.head.inputs import TOLD, Given, Heard, Hidden
from opd.head.kernels import c_sweep as native
from opd.head.kernels.torch_sweep import sweep_, sweep_student_
from opd.head.matmul import matmul_dtype, mm, wide
from opd.head.outputs import Columns
from opd.head.sums import Sums
from opd.head.vocabulary import Vocabulary
from opd.losses.divergences import kl
from opd.losses.terms import Positions, Target, Term
from opd.methods.method import Method

CACHE = 1 << 19  # bytes of [r, V] in a block of the closed forms on a CPU: its passes find it in the L2 cache
FROZEN = 2  # the logits of frozen models are there for one in so many tokens of a chunk: their product is but one
GRAPH = 1 << 21  # the same under autograd, whose nodes cost more than the misses
DEVICE = 1 << 28  # the same on an accelerator
_ROOM: dict[tuple[str, torch.dtype, int], Tensor] = {}  # of `_kept`; nothing in it outlives a pass


def blocks(n: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that cover n."""
    return (slice(start, min(start + size, n)) for start in range(0, n, max(1, size)))


def shifted(part: slice, by: int) -> slice:
    """The same slice, counted from elsewhere."""
    return slice(part.start + by, part.stop + by)


@dataclass(frozen=True)
class _Side:
    """W h of one model, a chunk at a time in one buffer."""

    hidden: Hidden
    weight: Float[Tensor, "V H"]  # of the common ids, in the dtype of the products
    logits: Float[Tensor, "n V"]

    @classmethod
    def of(cls, hidden: Hidden, low: torch.dtype, vocabulary: Vocabulary) -> "_Side":
        """The head in `low`."""
        weight = hidden.head.weight.detach()[: vocabulary.size].to(low)
        return cls(hidden, weight, weight.new_empty(0, vocabulary.size, dtype=vocabulary.tile(low, weight.device)))

    def room(self, n: int, name: str) -> "_Side":
        """The same with a buffer for n tokens."""
        return replace(self, logits=_kept(name, n, self.logits))

    def fill(self, rows: slice) -> Float[Tensor, "n V"]:
        """W h of some tokens."""
        states = self.hidden.states.detach()[rows].to(self.weight.dtype)
        return mm(states, self.weight.T, self.logits[: len(states)])


@dataclass(frozen=True)
class _Sweep:
    """The buffers of one pass, and the two ways to sweep a chunk; both leave d loss / d (W h) in `gradient`."""

    method: Method
    vocabulary: Vocabulary
    ids: Int[Tensor, " N"]  # canonical
    student: _Side
    teacher: _Side | None  # None where its log q(y) is given
    given: Given | None  # what is known of it where there is no teacher to sweep
    reference: _Side | None
    gradient: Float[Tensor, "n V"]  # in the student's own rows but where torch sweeps and their dtypes differ
    scratch: Float[Tensor, "3 r V"]  # of a block where torch sweeps
    columns: Columns  # of all tokens, filled chunk by chunk
    fused: bool  # whether Triton sweeps
    linear: bool  # whether `closed` knows the way from W h to the logits

    @classmethod
    def of(cls, method: Method, student: Hidden, heard: Heard, ids: Tensor, vocabulary: Vocabulary) -> "_Sweep":
        """Buffers for chunks as long as the budget allows."""
        low = matmul_dtype(student.states)
        own = _Side.of(student, low, vocabulary)
        other, third = (
            _Side.of(x, x.states.dtype, vocabulary) if isinstance(x, Hidden) else None
            for x in (heard.teacher, heard.reference)
        )
        frozen = [side for side in (other, third) if side is not None]
        token_bytes = own.logits.itemsize + sum(side.logits.itemsize for side in frozen) / FROZEN
        n = vocabulary.chunk(len(ids), round(vocabulary.size * token_bytes))
        own, part = own.room(n, "student"), -(-n // FROZEN)
        other, third = other and other.room(part, "teacher"), third and third.room(part, "reference")
        logits = own.logits
        swept = not isinstance(closed_form(method), ThroughSome) and not any(map(_looks, method.terms))
        fused = swept and fuses(logits.device) and wide(low) == torch.float32
        gradient = logits
        if logits.dtype != low:
            inside = fused and low.itemsize < logits.itemsize
            gradient = logits.view(low)[:, : vocabulary.size] if inside else logits.new_empty(logits.shape, dtype=low)
        r = min(n, _rows(CACHE, logits.new_empty(0, vocabulary.size, dtype=wide(low))))
        scratch = logits.new_empty(3, 0 if fused else r, vocabulary.size, dtype=wide(low))
        # fp16 has no number for a gradient times the sum of e.
        curved = student.head.softcap or (other is not None and other.hidden.head.softcap)
        given = heard.teacher if isinstance(heard.teacher, Given) else None
        if heard.teacher is None:
            given = Given(scratch.new_full((len(ids),), torch.nan))  # no leaf may look there
        columns = Columns.empty(method, len(ids), scratch, MEASURED if given is None else TOLD)
        linear = (fused or (low != torch.float16 and not curved)) and (given is None or given.ids is None)
        return cls(method, vocabulary, ids, own, other, given, third, gradient, scratch, columns, fused, linear)

    def chunks(self) -> Iterator[slice]:
        """The tokens of each chunk."""
        return blocks(len(self.ids), len(self.gradient))

    def parts(self, rows: slice) -> Iterator[tuple[slice, Tensor | None, Tensor | None]]:
        """The tokens of a chunk, counted from its first, with the logits of teacher and reference, where there are."""
        room = [len(side.logits) for side in (self.teacher, self.reference) if side is not None]
        for part in blocks(rows.stop - rows.start, min(room, default=rows.stop - rows.start)):
            at = shifted(part, rows.start)
            t, third = (None if side is None else side.fill(at) for side in (self.teacher, self.reference))
            yield part, t, third

    def closed(self, rows: slice, form: Form | None) -> tuple[Columns, Sums, Float[Tensor, " n"]]:
        """By sums: the columns, and the factor that the gradient left by the form still lacks."""
        z, ids, v = self.student.fill(rows), self.ids[rows], self.vocabulary
        sums = Sums.empty(len(z), self.scratch)
        looked: dict[int, list[Tensor]] = {i: [] for i, x in enumerate(self.method.terms) if _looks(x)}
        plain = not looked and (form is None or not form.shifted)
        for part, t, third in self.parts(rows):
            own = sums[part]
            if self.fused:
                self._fused(z[part], t, ids[part], self.gradient[part], own, form)
            elif t is not None and plain and native.runs(z[part], t):
                self._native(z[part], t, ids[part], own, form)
            else:
                self._blockwise(z[part], t, third, ids[part], self.gradient[part], own, looked, form)
        if self.given is None:
            seen = sums.columns()
        else:
            seen = sums.student() | {"teacher_logp": self.given.logp[rows].to(self.scratch)}
        scores = tuple(
            (torch.cat(looked[i]) if i in looked else score(x, seen)) if scored(x) else None
            for i, x in enumerate(self.method.terms)
        )
        columns = Columns(**seen, scores=scores)
        self.columns.fill(rows, columns)
        whole = torch.ones_like(sums.e) if self.fused else sums.e
        return columns, sums, self.student.hidden.head.scale / v.temperature / whole

    def _fused(self, z: Tensor, t: Tensor | None, ids: Tensor, gradient: Tensor, sums: Sums, form: Form | None) -> None:
        """Some rows at once, in Triton."""
        from opd.head.kernels import triton_sweep as fused  # where there is Triton

        heads = self.student.hidden.head, None if self.teacher is None else self.teacher.hidden.head
        fused.sweep_(z, t, ids, sums, heads=heads, vocabulary=self.vocabulary, form=form, gradient=gradient)

    def _native(self, z: Tensor, t: Tensor, ids: Tensor, sums: Sums, form: Form | None) -> None:
        """A chunk at once, in C."""
        assert self.teacher is not None
        shares = self.vocabulary.logits_(z, self.student.hidden.head)
        self.vocabulary.logits_(t, self.teacher.hidden.head)
        native.sweep_(z, t, ids, sums)
        if form is not None:
            form.gradient_(z, z, t, ids, sums)  # it looks at e alone
            self.vocabulary.spread_(z, shares)

    def _blockwise(
        self,
        z: Tensor,
        t: Tensor | None,
        third: Tensor | None,
        ids: Tensor,
        gradient: Tensor,
        sums: Sums,
        looked: dict[int, list[Tensor]],
        form: Form | None,
    ) -> None:
        """A chunk in blocks of rows that stay in the cache, in torch."""
        v, r = self.vocabulary, self.scratch.shape[1]
        cut = lambda x: [None] * len(z.split(r)) if x is None else x.split(r)
        split = (sums.split(r), z.split(r), cut(t), cut(third), ids.split(r), gradient.split(r))
        for part, student, teacher, reference, drawn, slope in zip(*split, strict=True):
            room = self.scratch[:, : len(drawn)]
            student = _widened(student, room[2])
            shares = v.logits_(student, self.student.hidden.head)
            if self.teacher is None:
                shifted = (sweep_student_(student, drawn, part, room[0]), room[1])
            else:
                teacher = _widened(teacher, room[1])
                v.logits_(teacher, self.teacher.hidden.head)
                shifted = sweep_(student, teacher, drawn, part, room[:2])
            if form is not None:
                form.gradient_(student, *shifted, drawn, part)
                v.spread_(student, shares)
                if slope.data_ptr() != student.data_ptr():
                    slope.copy_(student)
            if looked:
                logp = [x.sub_(mass.log()[:, None]) for x, mass in zip(shifted, (part.e, part.f), strict=True)]
                at = Positions(drawn, logp[0], logp[1], self._third(reference))
                for i, found in looked.items():
                    value = self.method.terms[i].score(at)
                    assert value is not None
                    found.append(value)

    def differentiate(self, rows: slice, targets: tuple[Target, ...]) -> tuple[Float[Tensor, ""], Float[Tensor, "n 1"]]:
        """Choose between the two ways; the summed loss, and what each row of `gradient` is still to be scaled by."""
        form = closed_form(self.method) if self.linear else None
        if form is None or (isinstance(form, ThroughSome) and self.teacher is None):
            loss = self.autograd(rows, targets)
            return loss, loss.new_ones(rows.stop - rows.start, 1)
        columns, sums, lacking = self.closed(rows, form)
        with torch.enable_grad():
            seen = (dict(columns.named()) | {"d": sums.d})[form.column].detach().requires_grad_()
            loss = form.loss(self.method.terms, seen, columns.scores, targets).sum()
        (slope,) = torch.autograd.grad(loss, seen)
        return loss.detach(), (form.sign * slope * lacking)[:, None]

    def _third(self, raw: Float[Tensor, "r V"] | None) -> Float[Tensor, "r V"] | None:
        """The reference's log-probs of a block, where there is one."""
        if raw is None or self.reference is None:
            return None
        return self.vocabulary.logp(raw.to(self.scratch.dtype), self.reference.hidden.head)

    def autograd(self, rows: slice, targets: tuple[Target, ...] | None) -> Float[Tensor, ""]:
        """By the definitions: the summed loss; without targets the columns alone."""
        z, v, loss = self.student.fill(rows), self.vocabulary, self.scratch.new_zeros(())
        for part, t, third in self.parts(rows):
            for block in blocks(part.stop - part.start, _rows(GRAPH, self.scratch)):
                here, at = shifted(block, part.start), shifted(block, part.start + rows.start)  # of the chunk, of all
                raw = z[here].to(self.scratch.dtype).requires_grad_(targets is not None)
                if self.given is not None:
                    q = self.given.over(self.ids[at], raw.detach(), at)
                else:
                    assert t is not None and self.teacher is not None
                    q = v.logp(t[block].to(self.scratch.dtype), self.teacher.hidden.head)
                with torch.set_grad_enabled(targets is not None):
                    reference = None if third is None else self._third(third[block])
                    seen = Positions(self.ids[at], v.logp(raw, self.student.hidden.head), q, reference)
                    if targets is not None:
                        value = self.method.loss(seen, tuple(target[here] for target in targets)).sum()
                        self.gradient[here] = torch.autograd.grad(value, raw)[0]
                        loss += value.detach()
                self.columns.fill(at, _columns(self.method, seen, whole=self.given is None))
        return loss


def _kept(name: str, n: int, like: Float[Tensor, "0 V"]) -> Float[Tensor, "n V"]:
    """Room for logits, the same in every pass on a CPU: fresh pages cost more there than the sweep that fills them."""
    if like.device.type != "cpu":
        return like.new_empty(n, like.shape[1])  # the allocator keeps it
    key, size = (name, like.dtype, threading.get_ident()), n * like.shape[1]
    if key not in _ROOM or len(_ROOM[key]) < size:
        _ROOM.pop(key, None)  # before its successor is there
        _ROOM[key] = like.new_empty(size)
    return _ROOM[key][:size].view(n, like.shape[1])


def _rows(budget: int, like: Float[Tensor, "*r V"]) -> int:
    """Rows of a block."""
    return max(1, (budget if like.device.type == "cpu" else DEVICE) // (like.shape[-1] * like.itemsize))


def _looks(term: Term) -> bool:
    """Whether the score of a term needs another look at the vocabulary."""
    return scored(term) and not scored_by_sums(term)


def _widened(x: Float[Tensor, "r V"], room: Float[Tensor, "r V"]) -> Float[Tensor, "r V"]:
    """x itself where it has the dtype of the scratch, else its copy there."""
    return x if x.dtype == room.dtype else room.copy_(x)


def _columns(method: Method, at: Positions, *, whole: bool) -> Columns:
    p, q = at.student_logp.detach(), at.teacher_logp
    at = replace(at, student_logp=p)
    if not whole:
        own = at.sampled(p), -(p.exp() * p).sum(-1)
        return Columns(*own, at.sampled(q), scores=tuple(term.score(at) for term in method.terms))
    return Columns(
        student_logp=at.sampled(p),
        student_entropy=-(p.exp() * p).sum(-1),
        teacher_logp=at.sampled(q),
        teacher_entropy=-(q.exp() * q).sum(-1),
        reverse_kl=kl(p, q),
        scores=tuple(term.score(at) for term in method.terms),
    )
