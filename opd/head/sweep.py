"""The sweep over chunks of tokens: logits, sums, loss and gradient while a chunk is in memory."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from opd.core.types import MEASURED, STUDENT_COLUMNS
from opd.head.backend import uses_triton
from opd.head.closed_forms import (
    Form,
    Sums,
    ThroughSupport,
    closed_form,
    needs_vocabulary,
    score,
    scored,
    weighted_loss,
)
from opd.head.inputs import COLUMNS_WITHOUT_HEAD, FrozenOutputs, Hidden, TeacherLogps
from opd.head.kernels import c_sweep as native
from opd.head.kernels.torch_sweep import sweep_, sweep_student_
from opd.head.matmul import matmul_dtype, mm, wide
from opd.head.outputs import HeadColumns
from opd.head.vocabulary import Vocabulary
from opd.losses.divergences import kl
from opd.losses.terms import Positions, Target
from opd.methods.method import Method

CACHE = 1 << 19  # bytes of [r, V] in a block of the closed forms on a CPU, so that its passes stay in the L2 cache
GRAPH_CACHE = 1 << 21  # bytes of a block under autograd, whose nodes cost more than the cache misses
DEVICE = 1 << 28  # bytes of a block on an accelerator
FROZEN_PARTS = 2  # frozen models' logits are computed for 1/FROZEN_PARTS of a chunk at a time: one product reads them
_BUFFERS: dict[tuple[str, torch.dtype, int], Tensor] = {}  # of `_reused_buffer`; no pass keeps a reference


def blocks(n: int, size: int) -> Iterator[slice]:
    """Return slices of at most `size` that cover n."""
    return (slice(start, min(start + size, n)) for start in range(0, n, max(1, size)))


def shifted(part: slice, offset: int) -> slice:
    """Return the slice moved by an offset."""
    return slice(part.start + offset, part.stop + offset)


@dataclass(frozen=True)
class ModelLogits:
    """The products W h of a model, a chunk at a time in a buffer."""

    hidden: Hidden
    weight: Float[Tensor, "V H"]  # of the common ids, in the dtype of the products
    logits: Float[Tensor, "n V"]

    @classmethod
    def from_hidden(cls, hidden: Hidden, low: torch.dtype, vocabulary: Vocabulary) -> "ModelLogits":
        """Return the model with its head in the dtype `low` and an empty buffer."""
        weight = hidden.head.weight.detach()[: vocabulary.size].to(low)
        return cls(hidden, weight, weight.new_empty(0, vocabulary.size, dtype=vocabulary.tile(low, weight.device)))

    def with_buffer(self, n: int, name: str) -> "ModelLogits":
        return replace(self, logits=_reused_buffer(name, n, self.logits))

    def fill(self, rows: slice) -> Float[Tensor, "n V"]:
        """Compute W h of some tokens in the buffer."""
        states = self.hidden.states.detach()[rows].to(self.weight.dtype)
        return mm(states, self.weight.T, self.logits[: len(states)])


class Sweep:
    """The buffers of a head pass, and the two ways to process a chunk; both write d loss / d (W h) to `gradient`."""

    def __init__(
        self, method: Method, student: Hidden, frozen: FrozenOutputs, ids: Int[Tensor, " N"], vocabulary: Vocabulary
    ) -> None:
        """Allocate buffers for chunks as long as the budget allows; the ids are canonical."""
        self.method, self.ids, self.vocabulary = method, ids, vocabulary
        low, size = matmul_dtype(student.states), vocabulary.size
        logits_of = partial(ModelLogits.from_hidden, vocabulary=vocabulary)
        self.student, teacher = logits_of(student, low), frozen.teacher
        self.teacher, self.reference = (
            logits_of(x, x.states.dtype) if isinstance(x, Hidden) else None for x in (teacher, frozen.reference)
        )
        frozen_bytes = sum(x.logits.itemsize for x in (self.teacher, self.reference) if x is not None)
        token_bytes = self.student.logits.itemsize + frozen_bytes / FROZEN_PARTS
        n = vocabulary.chunk(len(ids), round(size * token_bytes))
        frozen_rows = -(-n // FROZEN_PARTS)
        self.student = self.student.with_buffer(n, "student")
        self.teacher = self.teacher and self.teacher.with_buffer(frozen_rows, "teacher")
        self.reference = self.reference and self.reference.with_buffer(frozen_rows, "reference")
        logits = self.student.logits
        looks_again = isinstance(closed_form(method), ThroughSupport) or any(map(needs_vocabulary, method.terms))
        # whether the Triton kernels run
        self.fused = not looks_again and uses_triton(logits.device) and wide(low) == torch.float32
        # the gradient shares the student's rows, except in torch with differing dtypes
        if logits.dtype == low:
            self.gradient = logits
        elif self.fused and low.itemsize < logits.itemsize:
            self.gradient = logits.view(low)[:, :size]
        else:
            self.gradient = logits.new_empty(logits.shape, dtype=low)
        block_rows = min(n, rows_per_block(CACHE, logits.new_empty(0, size, dtype=wide(low))))
        self.scratch = logits.new_empty(3, 0 if self.fused else block_rows, size, dtype=wide(low))
        # log-probs of a teacher without an LM head
        self.teacher_logps = teacher if isinstance(teacher, TeacherLogps) else None
        names = MEASURED if self.teacher_logps is None else COLUMNS_WITHOUT_HEAD
        if teacher is None:
            self.teacher_logps = TeacherLogps(self.scratch.new_full((len(ids),), torch.nan))  # no leaf may look there
            names = STUDENT_COLUMNS
        self.columns = HeadColumns.empty(method, len(ids), self.scratch, names)  # of all tokens, filled by chunks
        # whether `closed_forms` can compute the logits from W h; fp16 cannot hold a gradient times the sum of e
        has_softcap = student.head.softcap or (self.teacher is not None and self.teacher.hidden.head.softcap)
        without_ids = self.teacher_logps is None or self.teacher_logps.ids is None
        self.linear = (self.fused or (low != torch.float16 and not has_softcap)) and without_ids

    def chunks(self) -> Iterator[slice]:
        return blocks(len(self.ids), len(self.gradient))

    def frozen_parts(self, rows: slice) -> Iterator[tuple[slice, Tensor | None, Tensor | None]]:
        """Yield parts of a chunk as (tokens counted from its first, teacher logits, reference logits)."""
        frozen_rows = [len(side.logits) for side in (self.teacher, self.reference) if side is not None]
        for part in blocks(rows.stop - rows.start, min(frozen_rows, default=rows.stop - rows.start)):
            tokens = shifted(part, rows.start)
            teacher, reference = (
                None if side is None else side.fill(tokens) for side in (self.teacher, self.reference)
            )
            yield part, teacher, reference

    def closed_forms(self, rows: slice, form: Form | None) -> tuple[HeadColumns, Sums, Float[Tensor, " n"]]:
        """Compute a chunk by sums.  Returns the columns, the sums, and the factor that `gradient` still lacks."""
        z, ids, v = self.student.fill(rows), self.ids[rows], self.vocabulary
        sums = Sums.empty(len(z), self.scratch)
        looked_up: dict[int, list[Tensor]] = {i: [] for i, x in enumerate(self.method.terms) if needs_vocabulary(x)}
        plain = not looked_up and (form is None or not form.shifted)
        for part, t, reference in self.frozen_parts(rows):
            part_sums = sums[part]
            if self.fused:
                self._fused(z[part], t, ids[part], self.gradient[part], part_sums, form)
            elif t is not None and plain and native.runs(z[part], t):
                self._native(z[part], t, ids[part], part_sums, form)
            else:
                self._blockwise(z[part], t, reference, ids[part], self.gradient[part], part_sums, looked_up, form)
        if self.teacher_logps is None:
            values = sums.columns()
        else:
            values = sums.student() | {"teacher_logp": self.teacher_logps.logp[rows].to(self.scratch)}
        scores = tuple(
            (torch.cat(looked_up[i]) if i in looked_up else score(x, values)) if scored(x) else None
            for i, x in enumerate(self.method.terms)
        )
        columns = HeadColumns(**values, scores=scores)
        self.columns.fill(rows, columns)
        unscaled = torch.ones_like(sums.e) if self.fused else sums.e
        return columns, sums, self.student.hidden.head.scale / v.temperature_of(self.student.hidden.head) / unscaled

    def _fused(self, z: Tensor, t: Tensor | None, ids: Tensor, gradient: Tensor, sums: Sums, form: Form | None) -> None:
        """Sweep some rows in Triton."""
        from opd.head.kernels import triton_sweep as fused  # Triton may not be installed

        heads = self.student.hidden.head, None if self.teacher is None else self.teacher.hidden.head
        fused.sweep_(z, t, ids, sums, heads=heads, vocabulary=self.vocabulary, form=form, gradient=gradient)

    def _native(self, z: Tensor, t: Tensor, ids: Tensor, sums: Sums, form: Form | None) -> None:
        """Sweep a chunk in C."""
        assert self.teacher is not None
        stop_shares = self.vocabulary.logits_(z, self.student.hidden.head)
        self.vocabulary.logits_(t, self.teacher.hidden.head)
        native.sweep_(z, t, ids, sums)
        if form is not None:
            form.gradient_(z, z, t, ids, sums)  # the form reads only e
            self.vocabulary.spread_(z, stop_shares)

    def _blockwise(
        self,
        z: Tensor,
        t: Tensor | None,
        reference_logits: Tensor | None,
        ids: Tensor,
        gradient: Tensor,
        sums: Sums,
        scores_by_term: dict[int, list[Tensor]],
        form: Form | None,
    ) -> None:
        """Sweep a chunk in torch, in blocks of rows that stay in the cache."""
        v, r = self.vocabulary, self.scratch.shape[1]
        split = lambda x: [None] * len(z.split(r)) if x is None else x.split(r)
        inputs = map(split, (sums, z, t, reference_logits, ids, gradient))
        for part, student, teacher, reference, sampled_ids, slope in zip(*inputs, strict=True):
            scratch = self.scratch[:, : len(sampled_ids)]
            student = _widened(student, scratch[2])
            shares = v.logits_(student, self.student.hidden.head)
            if self.teacher is None:
                shifted = (sweep_student_(student, sampled_ids, part, scratch[0]), scratch[1])
            else:
                teacher = _widened(teacher, scratch[1])
                v.logits_(teacher, self.teacher.hidden.head)
                shifted = sweep_(student, teacher, sampled_ids, part, scratch[:2])
            if form is not None:
                form.gradient_(student, *shifted, sampled_ids, part)
                v.spread_(student, shares)
                if slope.data_ptr() != student.data_ptr():
                    slope.copy_(student)
            if scores_by_term:
                logp = [x.sub_(mass.log()[:, None]) for x, mass in zip(shifted, (part.e, part.f), strict=True)]
                positions = Positions(sampled_ids, logp[0], logp[1], self._reference_logp(reference))
                for i, term_scores in scores_by_term.items():
                    value = self.method.terms[i].score(positions)
                    assert value is not None
                    term_scores.append(value)

    def differentiate(self, rows: slice, targets: tuple[Target, ...]) -> tuple[Float[Tensor, ""], Float[Tensor, "n 1"]]:
        """Return the summed loss of a chunk, and the factor that each row of `gradient` still lacks."""
        form = closed_form(self.method) if self.linear else None
        if form is None or (isinstance(form, ThroughSupport) and self.teacher is None):
            loss = self.autograd(rows, targets)
            return loss, loss.new_ones(rows.stop - rows.start, 1)
        columns, sums, factor = self.closed_forms(rows, form)
        with torch.enable_grad():
            loss_input = (dict(columns.named()) | {"d": sums.d})[form.column].detach().requires_grad_()
            loss = weighted_loss(self.method.terms, loss_input, columns.scores, targets).sum()
        (slope,) = torch.autograd.grad(loss, loss_input)
        return loss.detach(), (form.sign * slope * factor)[:, None]

    def _reference_logp(self, raw: Float[Tensor, "r V"] | None) -> Float[Tensor, "r V"] | None:
        """Return the reference's log-probs of a block, or None without a reference."""
        if raw is None or self.reference is None:
            return None
        return self.vocabulary.logp(raw.to(self.scratch.dtype), self.reference.hidden.head)

    def autograd(self, rows: slice, targets: tuple[Target, ...] | None) -> Float[Tensor, ""]:
        """Compute a chunk by autograd and return the summed loss; without targets, only the columns are computed."""
        z, v, loss = self.student.fill(rows), self.vocabulary, self.scratch.new_zeros(())
        for part, t, reference_logits in self.frozen_parts(rows):
            for block in blocks(part.stop - part.start, rows_per_block(GRAPH_CACHE, self.scratch)):
                chunk_rows = shifted(block, part.start)
                tokens = shifted(chunk_rows, rows.start)
                raw = z[chunk_rows].to(self.scratch.dtype).requires_grad_(targets is not None)
                if self.teacher_logps is not None:
                    q = self.teacher_logps.over(self.ids[tokens], raw.detach(), tokens)
                else:
                    assert t is not None and self.teacher is not None
                    q = v.logp(t[block].to(self.scratch.dtype), self.teacher.hidden.head)
                with torch.set_grad_enabled(targets is not None):
                    reference = None if reference_logits is None else self._reference_logp(reference_logits[block])
                    positions = Positions(self.ids[tokens], v.logp(raw, self.student.hidden.head), q, reference)
                    if targets is not None:
                        value = self.method.loss(positions, tuple(target[chunk_rows] for target in targets)).sum()
                        self.gradient[chunk_rows] = torch.autograd.grad(value, raw)[0]
                        loss += value.detach()
                self.columns.fill(tokens, _columns(self.method, positions, with_teacher=self.teacher_logps is None))
        return loss


def _reused_buffer(name: str, rows: int, like: Float[Tensor, "0 V"]) -> Float[Tensor, "n V"]:
    """Return a buffer for logits.  On a CPU all passes share it: new pages cost more than the sweep that fills them."""
    if like.device.type != "cpu":
        return like.new_empty(rows, like.shape[1])  # the allocator keeps it
    key, size = (name, like.dtype, threading.get_ident()), rows * like.shape[1]
    if key not in _BUFFERS or len(_BUFFERS[key]) < size:
        _BUFFERS.pop(key, None)  # freed before the larger buffer is allocated
        _BUFFERS[key] = like.new_empty(size)
    return _BUFFERS[key][:size].view(rows, like.shape[1])


def rows_per_block(budget: int, like: Float[Tensor, "*r V"]) -> int:
    """Return the number of rows in a block."""
    return max(1, (budget if like.device.type == "cpu" else DEVICE) // (like.shape[-1] * like.itemsize))


def _widened(x: Float[Tensor, "r V"], scratch: Float[Tensor, "r V"]) -> Float[Tensor, "r V"]:
    """Return x if it has the dtype of the scratch, else its copy in the scratch."""
    return x if x.dtype == scratch.dtype else scratch.copy_(x)


def _columns(method: Method, positions: Positions, *, with_teacher: bool) -> HeadColumns:
    p, q = positions.student_logp.detach(), positions.teacher_logp
    positions = replace(positions, student_logp=p)
    return HeadColumns(
        student_logp=positions.sampled(p),
        student_entropy=-(p.exp() * p).sum(-1),
        teacher_logp=positions.sampled(q),
        teacher_entropy=-(q.exp() * q).sum(-1) if with_teacher else None,
        reverse_kl=kl(p, q) if with_teacher else None,
        scores=tuple(term.score(positions) for term in method.terms),
    )
