"""Micro-batched forward (and backward) passes of a rollout batch through the student, its teachers and the LM head."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from accelerate.utils import gather_object
from jaxtyping import Int
from torch import Tensor

from opd.config.train import Train
from opd.core.types import Batch, Rollout
from opd.head.inputs import FrozenOutputs, Hidden, TeacherLogps
from opd.head.outputs import Alternatives, HeadColumns
from opd.losses.terms import Target
from opd.methods.method import Method
from opd.models.batching import micro_batches, rows
from opd.models.forward import cross_entropies, unprompted
from opd.rollouts.batch import assemble, masks
from opd.teachers.remote import LogpTeacher
from opd.training.session import Session

KEPT = 2 << 30  # bytes: limit of the teacher outputs cached between the measuring and the training pass
LIKELIEST = 5  # top-k tokens of each model that are saved with rollouts


@dataclass(frozen=True)
class Passes:
    """Forward and backward passes over this process's share of a batch."""

    session: Session
    heard: dict[tuple[int, ...], FrozenOutputs] = field(default_factory=dict)  # cache, by rollout indices

    @property
    def config(self) -> Train:
        """Return the settings of the run."""
        return self.session.config

    @property
    def method(self) -> Method:
        """Return the method of the run."""
        return self.session.method

    def micro(self, batch: Batch, rollouts: Sequence[Rollout]) -> list[list[int]]:
        """Return this process's share of the rows (every n-th row), split into micro-batches.

        Rows without a trained token are left out.
        """
        accelerator, micro = self.session.accelerator, []
        trained = batch.mask.any(1).tolist()
        mine = [i for i in range(accelerator.process_index, len(rollouts), accelerator.num_processes) if trained[i]]
        for name in self.session.teachers:  # all rows of a micro-batch have the same teacher
            widths = {i: width(rollouts[i]) for i in mine if rollouts[i].teacher == name}
            micro += micro_batches(widths, self.config.micro_batch_tokens)
        # All processes must run the same number of micro-batches, because DDP and FSDP synchronize in forward.  Empty
        # micro-batches fill the gap.
        return micro + [[]] * (max(1, *gather_object([len(micro)])) - len(micro))

    @torch.no_grad()
    def alternatives(self, batch: Batch, rollouts: Sequence[Rollout]) -> dict[str, Tensor]:
        """Return the top tokens of both models at each position, [B, T, A] with A up to 2 LIKELIEST.

        Call it before the update, so that they match the batch's columns.
        """
        session, parts = self.session, []
        for at in self.micro(batch, rollouts):
            rolls, cut = [rollouts[i] for i in at], batch[torch.tensor(at, dtype=torch.long)]
            trained = masks(cut, rolls)
            inputs = rows(rolls, trained, teacher=False, device=session.accelerator.device)
            heard = self._heard(rolls, trained)
            _, found = session.student(inputs, heard, self.method, None, session.vocabulary, likeliest=LIKELIEST)
            parts.append((at, found.cpu()))
        out: dict[str, Tensor] = {}
        for at, found in gather_object(parts):
            here = torch.tensor(at, dtype=torch.long)
            for name, flat in vars(found).items():
                new = torch.zeros(*batch.mask.shape, flat.shape[-1], dtype=flat.dtype)
                whole = out.setdefault(f"alternatives_{name}", new)
                whole[here] = torch.zeros_like(whole[here]).masked_scatter(batch.mask[here][..., None], flat)
        return out

    def over(
        self, batch: Batch, rollouts: Sequence[Rollout], targets: tuple[Target, ...] | None
    ) -> tuple[Batch, float]:
        """Run the trained rows through student and teacher in micro-batches, with a backward pass if targets are given.

        Each process takes every n-th row.  Returns the batch with the columns that all processes measured, and the
        loss.  If this student already measured the batch, rows whose weights are all 0 are skipped.
        """
        session, accelerator = self.session, self.session.accelerator
        alone, weighed = self._advised(targets), self._weighed(targets)
        micro = [(whole, [i for i in whole if weighed is None or weighed[i]]) for whole in self.micro(batch, rollouts)]
        parts: list[tuple[list[int], HeadColumns, Tensor]] = []
        for k, (whole, at) in enumerate(micro):
            rolls, cut = [rollouts[i] for i in at], batch[torch.tensor(at, dtype=torch.long)]
            trained = masks(cut, rolls)
            inputs = rows(rolls, trained, teacher=False, device=accelerator.device)
            flat = targets and tuple(
                t[torch.tensor(at, dtype=torch.long)][cut.mask].to(accelerator.device) for t in targets
            )
            heard = FrozenOutputs(None) if alone else self._heard_of(batch, rollouts, whole, at)
            if k + 1 < len(micro) and not alone:
                self._ahead(batch, rollouts, *micro[k + 1])
            last = accelerator.no_sync(session.student) if k + 1 < len(micro) else contextlib.nullcontext()
            with torch.set_grad_enabled(targets is not None), last:
                loss, columns = session.student(inputs, heard, alone or self.method, flat, session.vocabulary)
                if targets is not None:
                    # DDP averages gradients over processes, but the loss is already divided by whole-batch
                    # denominators: multiply by the number of processes to undo the average.
                    accelerator.backward(loss * accelerator.num_processes)
            parts.append((at, columns, loss.detach()))  # no .cpu() here: it would synchronize and stall the pipeline
        everyone = gather_object([(at, columns.cpu(), float(value)) for at, columns, value in parts])
        seen = assemble(batch, [(at, c) for at, c, _ in everyone])
        return replace(seen, scores=batch.scores) if alone else seen, sum(value for _, _, value in everyone)

    def _advised(self, targets: tuple[Target, ...] | None) -> Method | None:
        """Return the method reduced to its precomputed advantages, or None.

        If the batch was already scored with the current weights, the second pass needs no teacher forward.
        """
        known = targets is not None and all(t.advantage is not None for t in targets)
        return self.method.advised() if known and self._measured() else None

    def _measured(self) -> bool:
        """Return whether the batch was measured with the same weights that now train on it."""
        return not self.method.local() and self.method.rollouts.updates == 1

    def _weighed(self, targets: tuple[Target, ...] | None) -> list[bool] | None:
        """Return for each row whether it has a nonzero weight, or None if all rows must run.

        Rows of weight 0 can be skipped only in the second pass: their columns are already measured.
        """
        if targets is None or not self._measured():
            return None
        return torch.stack([t.weight != 0 for t in targets]).any(0).any(1).tolist()

    def _ahead(self, batch: Batch, rollouts: Sequence[Rollout], whole: Sequence[int], at: Sequence[int]) -> None:
        """Prefetch the next micro-batch's scores from a teacher server while the student runs the current batch."""
        rolls, cut = [rollouts[i] for i in at], batch[torch.tensor(at, dtype=torch.long)]
        if not rolls or tuple(rollouts[i].index for i in whole) in self.heard:
            return
        teacher = self.session.teachers[rolls[0].teacher]
        # A teacher that scores tokens chosen by the student cannot start before the student's forward pass.
        if not (isinstance(teacher, LogpTeacher) and (teacher.likeliest or teacher.drawn)):
            teacher.ahead(rolls, masks(cut, rolls))

    def _heard_of(
        self, batch: Batch, rollouts: Sequence[Rollout], whole: Sequence[int], at: Sequence[int]
    ) -> FrozenOutputs:
        """Return the frozen models' outputs for the rows `at` of the micro-batch `whole`.

        If the outputs of the whole micro-batch are cached, the rows are selected from them.
        """
        key = tuple(rollouts[i].index for i in whole)
        if len(at) < len(whole) and key in self.heard:
            mask, chosen = batch.mask[torch.tensor(whole)], set(at)
            return self.heard[key][torch.tensor([i in chosen for i in whole])[:, None].expand_as(mask)[mask]]
        rolls = [rollouts[i] for i in at]
        return self._heard(rolls, masks(batch[torch.tensor(at, dtype=torch.long)], rolls))

    def _heard(self, rollouts: Sequence[Rollout], trained: Sequence[Sequence[bool]]) -> FrozenOutputs:
        """Return the outputs of teacher and reference, cached for methods that run a measuring and a training pass."""
        session, key = self.session, tuple(r.index for r in rollouts)
        if key in self.heard:
            return self.heard[key]
        own, other = (None, None) if session.lenses is None else (session.lenses.student, session.lenses.teacher)
        scores = session.teachers[rollouts[0].teacher if rollouts else ""]
        teacher: Hidden | TeacherLogps | None
        if isinstance(scores, LogpTeacher) and scores.likeliest:
            teacher = scores.hidden(rollouts, trained, ids=self._likeliest(rollouts, trained, scores.likeliest))
        elif isinstance(scores, LogpTeacher) and all(r.others is not None for r in rollouts):
            teacher = scores.hidden(rollouts, trained, ids=session.vocabulary.canonical(_drawn(rollouts, trained)))
        else:
            teacher = scores.hidden(rollouts, trained, other)
        reference = None if session.reference is None else session.reference.hidden(rollouts, trained)
        heard = FrozenOutputs(teacher, reference, own)
        if not self.method.local() and heard.nbytes() + sum(h.nbytes() for h in self.heard.values()) <= KEPT:
            self.heard[key] = heard
        return heard

    @torch.no_grad()
    def _likeliest(self, rollouts: Sequence[Rollout], trained: Sequence[Sequence[bool]], k: int) -> Int[Tensor, "N k"]:
        """Return the student's top-k tokens, for a teacher server that scores only requested tokens."""
        session = self.session
        inputs = rows(rollouts, trained, teacher=False, device=session.accelerator.device)
        _, found = session.student(inputs, FrozenOutputs(None), self.method, None, session.vocabulary, likeliest=k)
        assert isinstance(found, Alternatives)
        return found.ids

    def alone(self, drawn: Sequence[Rollout], dressed: Sequence[Rollout]) -> list[Rollout]:
        """Add the note `teacher_alone` to each rollout: the teacher's cross entropy of the response without its prompt.

        Rollouts that already have the note are not scored again.

        Args:
            drawn: the rollouts without prompts, which are returned with the note.
            dressed: the same rollouts with their prompts.
        """
        found: dict[int, float] = {}
        for name in self.session.teachers:
            widths = {
                i: len(r.ids) for i, r in enumerate(dressed) if r.teacher == name and "teacher_alone" not in r.notes
            }
            for at in micro_batches(widths, self.config.micro_batch_tokens):
                rolls = [dressed[i] for i in at]
                heard = self.session.teachers[name].hidden(*unprompted(rolls))
                assert heard is not None, "a method that reads log q has a teacher that scores"
                found |= dict(zip(at, cross_entropies(heard, rolls, self.session.vocabulary), strict=True))
        return [
            replace(r, notes={**r.notes, "teacher_alone": found[i]}) if i in found else r for i, r in enumerate(drawn)
        ]


def _drawn(rollouts: Sequence[Rollout], trained: Sequence[Sequence[bool]]) -> Int[Tensor, "N k"]:
    """Return the additional tokens sampled at each trained position, [N, k]; N trained tokens."""
    pairs = [(r, mask, r.others.ids) for r, mask in zip(rollouts, trained, strict=True) if r.others is not None]
    rows = [torch.tensor(ids, dtype=torch.long).view(len(r.ids), -1)[torch.tensor(mask)] for r, mask, ids in pairs]
    return torch.cat(rows) if rows else torch.empty(0, 0, dtype=torch.long)


def width(rollout: Rollout) -> int:
    """Return the rollout's length in tokens: the longer of the two prompts (student's, teacher's) plus the response."""
    return max(len(rollout.prompt_ids), len(rollout.teacher_prompt_ids)) + len(rollout.ids)
