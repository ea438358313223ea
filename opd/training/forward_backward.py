"""Micro-batched forward (and backward) passes of a rollout batch through the student, its teachers and the LM head."""

import contextlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from accelerate.utils import gather_object
from jaxtyping import Int
from torch import Tensor

from opd.core.tensors import map_tensors
from opd.core.types import Batch, Others, Rollout, call
from opd.head.inputs import FrozenOutputs, Hidden, TeacherLogps
from opd.head.outputs import Alternatives, HeadColumns
from opd.losses.terms import Target
from opd.methods.method import Method
from opd.models.batching import Rows, rows, shares
from opd.models.forward import cross_entropies, token_logps, unprompted
from opd.rollouts.batch import assemble, collate, masks
from opd.teachers.remote import LogpTeacher
from opd.training.guards import check_teacher
from opd.training.session import Session

CACHE_BYTES = 2 << 30  # bytes: limit of the teacher outputs cached between the measuring and the training pass
LIKELIEST = 5  # top-k tokens of each model that are saved with rollouts


@dataclass(frozen=True)
class Passes:
    """Forward and backward passes over this process's share of a batch, as many tokens as that of any other."""

    session: Session
    cached_outputs: dict[tuple[int, ...], FrozenOutputs] = field(default_factory=dict)  # by the indices of the rollouts

    def micro_batches(self, batch: Batch, rollouts: Sequence[Rollout]) -> list[tuple[str, list[int]]]:
        """Return this process's part of the rows that have a trained token, as micro-batches of one teacher each."""
        return self._shared([i for i, trained in enumerate(batch.mask.any(1).tolist()) if trained], rollouts, width)

    def _shared(
        self, indices: Sequence[int], rollouts: Sequence[Rollout], width: Callable[[Rollout], int]
    ) -> list[tuple[str, list[int]]]:
        """Return this process's part of some of the rollouts, which are those of all processes, as micro-batches.

        All processes have equally many, at least one, and run the same teacher at the same time: DDP and FSDP
        synchronize in forward.  A part may be empty.
        """
        accelerator, config = self.session.accelerator, self.session.config
        loads, out = [0] * accelerator.num_processes, list[tuple[str, list[int]]]()
        for name in self.session.teachers:
            widths = {i: width(rollouts[i]) for i in indices if rollouts[i].teacher == name}
            parts = shares(widths, config.micro_batch_tokens, loads, packed=config.packing)
            out += [(name, part[accelerator.process_index]) for part in parts]
        return out or [(next(iter(self.session.teachers)), [])]

    def _on_all(self, condition: bool) -> bool:
        """Return whether a condition holds: on all processes, if models are sharded and all must run them alike."""
        return all(gather_object([condition])) if self.session.is_sharded else condition

    def alternatives(self, batch: Batch, rollouts: Sequence[Rollout]) -> dict[str, Tensor]:
        """Return both models' top tokens, [B, T, A] with A up to 2 LIKELIEST; call it before the batch's update."""
        parts = []
        for teacher, indices in self.micro_batches(batch, rollouts):
            part = _part(batch, rollouts, teacher, indices)
            outputs = self._outputs_of_rows(batch, rollouts, indices, part)
            parts.append((indices, map_tensors(Tensor.cpu, self._tops(part, outputs, LIKELIEST))))
        columns: dict[str, Tensor] = {}
        for indices, tops in gather_object(parts):
            at = torch.tensor(indices, dtype=torch.long)
            for name, flat in vars(tops).items():
                empty = torch.zeros(*batch.mask.shape, flat.shape[-1], dtype=flat.dtype)
                column = columns.setdefault(f"alternatives_{name}", empty)
                column[at] = torch.zeros_like(column[at]).masked_scatter(batch.mask[at][..., None], flat)
        return columns

    def run(self, batch: Batch, rollouts: Sequence[Rollout], targets: tuple[Target, ...] | None) -> tuple[Batch, float]:
        """Run the trained rows through student and teacher in micro-batches, with a backward pass if targets are given.

        The processes share the rows.  Returns the batch with the columns that all processes measured, and the
        loss.  If this student already measured the batch, rows whose weights are all 0 are skipped.
        """
        session, accelerator = self.session, self.session.accelerator
        reduced, has_weight = self._reduced_method(targets), self._rows_with_weight(targets)
        micro = [
            (teacher, indices, [i for i in indices if has_weight is None or has_weight[i]])
            for teacher, indices in self.micro_batches(batch, rollouts)
        ]
        results: list[tuple[list[int], HeadColumns, Tensor]] = []
        for k, (teacher, indices, weighted) in enumerate(micro):
            part = _part(batch, rollouts, teacher, weighted)
            token_targets = targets and tuple(
                map_tensors(lambda x: x.to(accelerator.device), t[part.at][part.batch.mask]) for t in targets
            )
            outputs = FrozenOutputs(None) if reduced else self._outputs_of_rows(batch, rollouts, indices, part)
            is_last = k + 1 == len(micro)
            if not is_last and not reduced:
                self._prefetch(batch, rollouts, *micro[k + 1])
            # FSDP reduces the gradients of every micro-batch, so that no process holds whole ones.
            reduces = is_last or session.is_sharded
            sync = contextlib.nullcontext() if reduces else accelerator.no_sync(session.student)
            with torch.set_grad_enabled(targets is not None), sync:
                inputs, method = part.inputs(accelerator.device), reduced or session.method
                loss, columns = session.student(inputs, outputs, method, token_targets, session.vocabulary)
                if targets is not None:
                    # DDP averages gradients over processes, but the loss is already divided by whole-batch
                    # denominators: multiply by the number of processes to undo the average.
                    accelerator.backward(loss * accelerator.num_processes)
            results.append((weighted, columns, loss.detach()))  # a copy to the CPU here would stall the pipeline
        gathered = gather_object([(i, map_tensors(Tensor.cpu, columns), float(loss)) for i, columns, loss in results])
        measured = assemble(batch, [(indices, columns) for indices, columns, _ in gathered])
        total = sum(loss for _, _, loss in gathered)
        return (replace(measured, scores=batch.scores) if reduced else measured), total

    def _reduced_method(self, targets: tuple[Target, ...] | None) -> Method | None:
        """Return the method reduced to advantages that these weights measured, without teacher forward, or None."""
        if targets is None or any(t.advantage is None for t in targets) or not self._measured():
            return None
        return self.session.method.advised()

    def _measured(self) -> bool:
        """Return whether the batch was measured with the same weights that now train on it."""
        return not self.session.method.local() and self.session.method.rollouts.updates == 1

    def _rows_with_weight(self, targets: tuple[Target, ...] | None) -> list[bool] | None:
        """Return for each row of a measured batch whether it has a nonzero weight, or None if all rows must run."""
        if targets is None or not self._measured():
            return None
        return torch.stack([t.weight != 0 for t in targets]).any(0).any(1).tolist()

    def _prefetch(
        self, batch: Batch, rollouts: Sequence[Rollout], teacher: str, indices: Sequence[int], weighted: Sequence[int]
    ) -> None:
        """Request the next micro-batch's scores from a teacher server while the student runs the current one."""
        scored = batch.teacher_top is not None or tuple(rollouts[i].index for i in indices) in self.cached_outputs
        if scored or not weighted:
            return
        part, model = _part(batch, rollouts, teacher, weighted), self.session.teachers[teacher]
        # A teacher that scores tokens chosen by the student cannot start before the student's forward pass.
        if not (isinstance(model, LogpTeacher) and (model.likeliest or model.drawn)):
            model.ahead(part.rollouts, part.masks)

    def _outputs_of_rows(
        self, batch: Batch, rollouts: Sequence[Rollout], indices: Sequence[int], part: "_Part"
    ) -> FrozenOutputs:
        """Return the frozen models' outputs for `part`, some rows of `indices`, from their cache if it has them."""
        cache, key = self.cached_outputs, tuple(rollouts[i].index for i in indices)
        own = tuple(r.index for r in part.rollouts)
        if not self._on_all(own in cache or key in cache):
            return self._frozen_outputs(part)
        if own in cache:
            return cache[own]
        at = torch.tensor(indices)
        selected, mask = torch.isin(at, part.at), batch.mask[at]
        return cache[key][selected[:, None].expand_as(mask)[mask]]

    def _frozen_outputs(self, part: "_Part") -> FrozenOutputs:
        """Return the outputs of teacher and reference; cache them for methods with a measuring and a training pass."""
        session, rollouts, trained, cache = self.session, part.rollouts, part.masks, self.cached_outputs
        key, lenses = tuple(r.index for r in rollouts), session.lenses
        teacher = session.teachers[part.teacher]
        output: Hidden | TeacherLogps | None
        if part.batch.teacher_top is not None:
            output = self._kept_scores(part.batch)
        elif isinstance(teacher, LogpTeacher) and teacher.likeliest:
            student_tops = self._tops(part, FrozenOutputs(None), teacher.likeliest)
            output = teacher.hidden(rollouts, trained, ids=student_tops.ids)
        elif isinstance(teacher, LogpTeacher) and part.batch.others is not None:
            drawn = part.batch.others[part.batch.mask]
            output = teacher.hidden(rollouts, trained, ids=session.vocabulary.canonical(drawn))
        else:
            output = teacher.hidden(rollouts, trained, None if lenses is None else lenses.teacher)
        if isinstance(output, Hidden) and (temperature := session.config.teacher_loss_temperature):
            output = replace(output, head=replace(output.head, temperature=temperature))
        reference = None if session.reference is None else session.reference.hidden(rollouts, trained)
        outputs = FrozenOutputs(output, reference, None if lenses is None else lenses.student)
        size = outputs.nbytes() + sum(x.nbytes() for x in cache.values())
        if not session.method.local() and size <= CACHE_BYTES:
            cache[key] = outputs
        return outputs

    def _kept_scores(self, batch: Batch) -> TeacherLogps:
        """Return what the teacher said of the trained tokens when their rollouts entered a pool."""
        assert batch.teacher_logp is not None and batch.teacher_top is not None and batch.teacher_top_logp is not None
        device, k = self.session.accelerator.device, self.session.method.supports().get("teacher", 0)
        logp, ids, others = (
            x[batch.mask].to(device) for x in (batch.teacher_logp, batch.teacher_top, batch.teacher_top_logp)
        )
        return TeacherLogps(logp, ids, others, min(k, self.session.vocabulary.size)) if k else TeacherLogps(logp)

    @torch.no_grad()
    def _tops(self, part: "_Part", outputs: FrozenOutputs, k: int) -> Alternatives:
        """Return the top-k tokens of the student, then those of the teacher if `outputs` has its distributions."""
        session, inputs = self.session, part.inputs(self.session.accelerator.device)
        _, tops = session.student(inputs, outputs, session.method, None, session.vocabulary, likeliest=k)
        assert isinstance(tops, Alternatives)
        return tops

    def with_teacher_alone(self, rollouts: Sequence[Rollout], prompted: Sequence[Rollout]) -> list[Rollout]:
        """Add the note `teacher_alone`: the teacher's cross entropy of the response without its prompt.

        `prompted` are the rollouts with their prompts.  Those that already have the note are not scored again.  Every
        process must call it, with its own rollouts; the processes share the work.
        """
        everyone = gather_object(list(prompted))
        unscored = [i for i, r in enumerate(everyone) if "teacher_alone" not in r.notes]
        scored: list[tuple[int, float]] = []
        for name, indices in self._shared(unscored, everyone, lambda r: len(r.ids)):
            chosen = [everyone[i] for i in indices]
            output = self.session.teachers[name].hidden(*unprompted(chosen))
            assert output is not None, "a method that reads log q has a teacher that scores"
            found = cross_entropies(output, chosen, self.session.vocabulary)
            scored += zip((r.index for r in chosen), found, strict=True)
        values = dict(gather_object(scored))
        return [
            replace(r, notes={**r.notes, "teacher_alone": values[r.index]}) if r.index in values else r
            for r in rollouts
        ]

    def admitted(self, rollouts: Sequence[Rollout], number: int) -> list[Rollout]:
        """Let the teacher score the rollouts of batch `number`, which enters a pool; add what later steps read.

        That is the note `admitted`, 1 for a rollout that steps train on, and `teacher_scores` if the method keeps them.
        Every process must call it, with the rollouts of all processes.
        """
        session, method, config = self.session, self.session.method, self.session.config
        whole = collate(rollouts, stop_token="train", truncated="train", seed=config.seed, step=number)
        k, parts = method.supports().get("teacher", 0), list[tuple[int, Others]]()
        for teacher, indices in self.micro_batches(whole, rollouts):
            part = _part(whole, rollouts, teacher, indices)
            output = session.teachers[teacher].hidden(part.rollouts, part.masks)
            assert output is not None, "a method that reads log q has a teacher that scores"
            ids, logp = token_logps(output, part.batch.ids[part.batch.mask], session.vocabulary, k)
            lengths = [len(r.ids) for r in part.rollouts]
            rows = zip(ids.int().cpu().split(lengths), logp.float().cpu().split(lengths), strict=True)
            parts += zip(indices, [Others(_packed("i", x), _packed("f", y)) for x, y in rows], strict=True)
        scores = dict(gather_object(parts))
        scored = [replace(r, teacher_scores=scores[i]) for i, r in enumerate(rollouts)]
        batch = collate(scored, stop_token=config.stop_token, truncated=config.truncated, seed=config.seed, step=number)
        check_teacher(batch, self.session.method, self.session.collector.tokenizer)
        admits = method.rollouts.admits
        verdicts = [True] * len(scored) if admits is None else call(admits, batch).any(1).tolist()
        if not method.keeps_scores():
            scored = list(rollouts)
        return [
            replace(r, notes={**r.notes, "admitted": float(verdict)})
            for r, verdict in zip(scored, verdicts, strict=True)
        ]


def _packed(kind: str, x: Tensor) -> array:
    """Return a tensor of int32 (`i`) or float32 (`f`) as an array."""
    return array(kind, x.numpy().tobytes())


@dataclass(frozen=True)
class _Part:
    """Some rows of a batch."""

    teacher: str  # the one of all rows
    at: Int[Tensor, " n"]  # their positions in the batch
    rollouts: list[Rollout]
    batch: Batch
    masks: list[list[bool]]  # trained tokens

    def inputs(self, device: torch.device) -> Rows:
        """Return the student's inputs."""
        return rows(self.rollouts, self.masks, teacher=False, device=device)


def _part(batch: Batch, rollouts: Sequence[Rollout], teacher: str, indices: Sequence[int]) -> _Part:
    at = torch.tensor(indices, dtype=torch.long)
    chosen, rows_of_batch = [rollouts[i] for i in indices], batch[at]
    return _Part(teacher, at, chosen, rows_of_batch, masks(rows_of_batch, chosen))


def width(rollout: Rollout) -> int:
    """Return the rollout's length in tokens: the longer of the two prompts (student's, teacher's) plus the response."""
    return max(len(rollout.prompt_ids), len(rollout.teacher_prompt_ids)) + len(rollout.ids)
