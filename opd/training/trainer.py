"""A training step: collect rollouts, measure, prepare targets on the whole batch, forward and backward, optimizer step.

The measuring pass computes the columns that a method reads over the whole batch, without gradients.  Methods whose
terms are all token-local (`Method.local()`) skip it.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from opd.config.train import Train
from opd.core.intervals import interval
from opd.core.rng import NoiseStep
from opd.core.sampling import Sampling
from opd.core.tensors import full
from opd.core.types import Batch, Rollout
from opd.data.prompts import Rendered
from opd.data.tasks.task import Task
from opd.data.tokenizers import token_texts
from opd.losses.hidden_states import Bridge
from opd.methods.method import Method
from opd.methods.rollout_policies.base import Memory
from opd.methods.rollout_policies.on_policy import OnPolicy
from opd.models import adapters
from opd.models.batching import micro_batches
from opd.models.sharding import whole, whole_weights
from opd.rollouts.batch import collate
from opd.rollouts.engines.vllm import WeightSyncedEngine
from opd.teachers.judges.annotator import TrainingStep
from opd.teachers.local import LocalTeacher
from opd.training import checkpoint, metrics
from opd.training import hidden_bridge as bridge
from opd.training.checkpoint import TrainingState
from opd.training.forward_backward import Passes, width
from opd.training.guards import Guards, check_teacher
from opd.training.rollout_source import RolloutSource
from opd.training.run_folder import Run
from opd.training.session import Session
from opd.training.timing import Clock

LOOKED_AT = 16  # at steps that save no rollouts, 1 in LOOKED_AT rollouts is measured for top-token agreement


@dataclass
class Trainer:
    """Runs the training steps, evaluations and checkpoints of a run."""

    session: Session
    run: Run
    on_metrics: Callable[[dict[str, float]], object] = lambda row: None  # gets each line of metrics.jsonl
    guards: Guards = field(init=False)
    passes: Passes = field(init=False)
    rollout_source: RolloutSource = field(init=False)

    def __post_init__(self) -> None:
        self.guards = Guards(self.session, self.run.folder)
        self.passes = Passes(self.session)
        self.rollout_source = RolloutSource(self.session)

    @property
    def config(self) -> Train:
        return self.session.config

    @property
    def method(self) -> Method:
        return self.session.method

    def save(self, step: int, memory: Memory, folder: Path) -> None:
        """Write a checkpoint.  Every process must call it; the main process writes all but the shards of the others."""
        session, config = self.session, self.config
        main = session.accelerator.is_main_process
        teachers = [t.state() for t in session.teachers.values()] if main or session.is_sharded else []
        rollouts = self.rollout_source.buffered()
        optimizer: checkpoint.OptimizerState = {}
        if session.is_sharded:
            shards, without_state = checkpoint.sharded_state(session.student, session.optimizer, teachers)
            self.guards.check_saved(step, shards["model"], shards["optimizer"])
            session.accelerator.wait_for_everyone()  # the main process has made the folder
            checkpoint.save_shards(shards, folder)
        else:
            optimizer, without_state = checkpoint.optimizer_state(session.student, session.optimizer)
        exports = not session.is_sharded or config.export == "every" or (config.export, step) == ("last", config.steps)
        weights = whole_weights(session.plain(), main=main) if exports else {}
        if main:
            if not session.is_sharded:
                self.guards.check_saved(step, weights, optimizer)
            if exports:
                adapters.save(session.plain().model, folder, {n.removeprefix("model."): x for n, x in weights.items()})
            session.collector.tokenizer.save_pretrained(folder)
            projections = {} if session.lenses is None else bridge.tensors(session.lenses)
            state = TrainingState(
                step=step,
                optimizer=optimizer,
                without_state=without_state,
                memory=memory,
                rollouts=rollouts,
                bridge=projections,
                teachers=teachers,
                refused=bool(self.guards.refused),
                sharded=session.is_sharded,
            )
            checkpoint.save(state, folder, self.run.folder)

    def restore(self, state: TrainingState, folder: Path) -> None:
        """Set optimizer and teachers to the state of the checkpoint in `folder`.

        The weights are already loaded, unless the checkpoint has shards.
        """
        student, optimizer = self.session.student, self.session.optimizer
        if state.sharded:
            return checkpoint.restore_shards(student, optimizer, [*self.session.teachers.values()], state, folder)
        checkpoint.restore_optimizer(student, optimizer, state, folder)
        for teacher, saved in zip(self.session.teachers.values(), state.teachers, strict=True):
            teacher.restore(saved)

    def set_bridge(self, settings: Bridge, saved: Mapping[str, Tensor]) -> None:
        """Set the bridge of all later passes: that of a checkpoint, or one fitted on rollouts if `saved` is empty."""
        config, session = self.config, self.session
        teacher, device = session.teachers[""], session.accelerator.device
        assert session.lenses is not None and isinstance(teacher, LocalTeacher)
        if saved:
            lenses = bridge.restored(session.lenses, saved)
        else:
            prompts, task = session.prompts.batch(1, settings.rollouts), session.prompts.task
            rollouts = self.rollout_source.collect(prompts, OnPolicy(), config.sampling, NoiseStep.BRIDGE, task)
            batch = self._collate(rollouts, NoiseStep.BRIDGE)
            micro = micro_batches({i: width(r) for i, r in enumerate(rollouts)}, config.micro_batch_tokens)
            student = session.plain()
            with whole(session.student):
                lenses, cosine = bridge.fit_bridge(
                    settings, session.lenses, student, teacher, batch, rollouts, micro=micro, seed=config.seed
                )
            self._log("metrics", 0, {"bridge_cosine": cosine})
            (lenses,) = broadcast_object_list([lenses.to(torch.device("cpu"), torch.device("cpu"))])
        self.session = replace(session, lenses=lenses.to(device, teacher.model.device))
        self.passes = replace(self.passes, session=self.session)
        self.rollout_source.session = self.session

    def step(self, step: int, memory: Memory) -> tuple[dict[str, float], Memory]:
        """Run a training step: sample, score, update.  Return its metrics and the memory for the next step."""
        config, session, policy = self.config, self.session, self.method.rollouts
        clock = Clock()
        has_worker, engine = bool(config.staleness or config.worker), session.collector.student
        sync_seconds = engine.seconds if isinstance(engine, WeightSyncedEngine) else 0.0
        with clock("wait" if has_worker else "rollout"):
            rollouts = self.rollout_source.take(step, memory, self.passes)
            if session.plan.context == "peer":
                texts = [session.collector.text(r.ids) for r in rollouts]
                rollouts = session.prompts.with_peers(rollouts, texts)
            rollouts += session.annotator.extra_rollouts(memory, len(rollouts))
            batch = self._collate(rollouts, step)
        if isinstance(engine, WeightSyncedEngine) and not has_worker:  # else the weights are sent in "snapshot"
            clock.split("rollout", "weights", engine.seconds - sync_seconds)
        self.passes.cached_outputs.clear()
        if not self.method.local():
            with clock("measure"):
                batch, _ = self.passes.run(batch, rollouts, None)
        mask, lengths = batch.mask, torch.tensor([len(r.ids) for r in rollouts])
        batch, memory = policy.after_scoring(batch, step, memory, lengths)
        if batch.mask is not mask:
            self.passes.cached_outputs.clear()  # the cached teacher outputs belong to the mask before the cut
        batch, memory = session.annotator.annotate(batch, rollouts, memory, self._training_step(step, clock))
        numbers: dict[str, float] = {}
        alternatives: dict[str, Tensor] = {}
        updates = min(policy.updates, len(rollouts))  # a pool may have fewer rollouts than a batch
        share = min(config.batch, len(rollouts)) // updates
        saves = step in (1, config.steps) or step % config.rollouts_every == 0
        for update in range(updates):
            last = update + 1 == updates  # the last update also trains on the annotator's extra rollouts
            part = slice(update * share, len(rollouts) if last else (update + 1) * share)
            if last and (saves or (session.shows_heads() and batch.teacher_top is None)):
                sample = part if saves else slice(part.start, part.start + max(1, share // LOOKED_AT))
                with clock("save" if saves else "look"):
                    alternatives = self.passes.alternatives(batch[sample], rollouts[sample])
            with clock("update"):
                measured, numbers = self._update(batch[part], rollouts[part], (step - 1) * policy.updates + update + 1)
        if alternatives:
            ids, student, teacher = (alternatives[f"alternatives_{x}"] for x in ("ids", "student_logp", "teacher_logp"))
            numbers |= metrics.top_k_overlap(ids, student, teacher, batch.mask[sample])
        buffer = self.rollout_source.source
        assert buffer is not None
        with clock("snapshot") if has_worker else contextlib.nullcontext():
            buffer.advance(step, memory)
        self._log("metrics", step, numbers)
        traffic = gather_object([teacher.traffic() for teacher in session.teachers.values()])
        row = clock.row(numbers["tokens"], float(lengths.sum())) | buffer.numbers() | session.annotator.traffic()
        self._log("perf", step, row | {k: sum(x.get(k, 0.0) for x in traffic) for x in traffic for k in x})
        if session.accelerator.is_main_process and saves:
            texts = [session.collector.text(r.ids) for r in rollouts[part]]
            shown_ids = {*batch.ids[part].flatten().tolist(), *alternatives["alternatives_ids"].flatten().tolist()}
            tokens = token_texts(session.collector.tokenizer, shown_ids)
            targets = self.method.prepare(batch[part])
            self.run.save_rollouts(step, rollouts[part], texts, measured, targets, alternatives, tokens)
        return numbers, memory

    def _collate(self, rollouts: Sequence[Rollout], step: int) -> Batch:
        config = self.config
        return collate(rollouts, stop_token=config.stop_token, truncated=config.truncated, seed=config.seed, step=step)

    def _training_step(self, step: int, clock: Clock) -> TrainingStep:
        """Return what the annotator may use of this step: to generate with the student, and to measure."""
        config, task = self.config, self.session.prompts.task

        def generate(prompts: Sequence[Rendered], samples: int, temperature: float, first: int) -> list[Rollout]:
            sampling = replace(config.sampling, temperature=temperature)
            return self.rollout_source.collect(prompts, OnPolicy(samples), sampling, step, task, first=first)

        return TrainingStep(step, generate, lambda rollouts: self.measure(rollouts, step), clock)

    def _update(self, batch: Batch, rollouts: Sequence[Rollout], update: int) -> tuple[Batch, dict[str, float]]:
        """Make an optimizer step and return the measured batch and metrics.

        A step with a non-finite gradient is skipped and recorded as `refused` = 1.  Raises Refusal after several such
        steps in a row, and after several steps without a token to train on.
        """
        config, session = self.config, self.session
        targets = self.method.prepare(batch)
        batch, loss = self.passes.run(batch, rollouts, targets)
        check_teacher(batch, self.method, session.collector.tokenizer)
        if (update - 1) % self.method.rollouts.updates == 0:  # the engine still has the student's current weights
            self.guards.check_engine(batch)
        gradients = session.student.parameters()
        norm = full(torch.as_tensor(session.accelerator.clip_grad_norm_(gradients, config.max_grad_norm)))
        lr = config.learning_rate(update, config.steps * self.method.rollouts.updates)
        finite = bool(norm.isfinite())
        if finite:
            for group in session.optimizer.param_groups:
                group["lr"] = lr
            session.optimizer.step()
            session.collector.student.follow()
            for teacher in session.teachers.values():
                teacher.follow()
        session.optimizer.zero_grad()
        self.guards.check_update(targets, batch, finite=finite)
        numbers = {"loss": loss, "grad_norm": float(norm), "grad_clipped": min(float(norm), config.max_grad_norm)}
        numbers |= {"lr": lr, "refused": float(not finite)}
        count = sum(r.index < config.batch for r in rollouts)
        generated, extra = batch[:count], batch[count:]  # the annotator's extra rollouts have separate metrics
        numbers |= metrics.summary(generated) | metrics.rollout_metrics(generated)
        numbers |= metrics.weight_metrics(targets, batch.mask)
        numbers |= metrics.advantages(generated, [target[:count] for target in targets])
        numbers |= session.annotator.metrics(generated, extra)
        numbers |= metrics.by_task(generated, [r.prompt for r in rollouts[:count]])
        return batch, numbers | metrics.by_teacher(generated, session.teachers, [r.teacher for r in rollouts[:count]])

    def evaluate(self, step: int) -> dict[str, float]:
        """Return and log metrics on the held-out prompts: accuracy, and the reverse KL in nats per token."""
        config, session = self.config, self.session
        assert session.held_out is not None
        sampling = Sampling(temperature=config.eval_temperature, max_new_tokens=config.sampling.max_new_tokens)
        clock, task = Clock(), session.held_out.task
        self.passes.cached_outputs.clear()
        with clock("evaluate"):
            prompts = session.held_out.first(config.eval_limit)
            rollouts, batch = self.generate_and_measure(prompts, sampling, NoiseStep.EVALUATION, task)
        if session.accelerator.is_main_process:
            self.run.save_evaluation(step, rollouts, batch)
        numbers = metrics.evaluation_metrics(batch)
        if task.scored:
            accuracy = interval([r.outcome for r in rollouts])
            numbers |= {"eval_accuracy": accuracy.value, "eval_low": accuracy.low, "eval_high": accuracy.high}
        self._log("metrics", step, numbers)
        self._log("perf", step, clock.row(float(batch.mask.sum())))
        return numbers

    def generate_and_measure(
        self, prompts: Sequence[Rendered], sampling: Sampling, step: int, task: Task
    ) -> tuple[list[Rollout], Batch]:
        """Generate rollouts with the student and measure all their columns, without training."""
        rollouts = self.rollout_source.collect(prompts, OnPolicy(), sampling, step, task)
        return rollouts, self.measure(rollouts, step)

    def measure(self, rollouts: Sequence[Rollout], step: int) -> Batch:
        """Measure all columns of finished rollouts.  No token is masked."""
        batch = collate(rollouts, stop_token="train", truncated="train", seed=self.config.seed, step=step)
        return self.passes.run(batch, rollouts, None)[0]

    def _log(self, name: str, step: int, row: dict[str, float]) -> None:
        if self.session.accelerator.is_main_process:
            self.run.log(name, {"step": step, **row})
            if name == "metrics":
                self.on_metrics({"step": step, **row})
        self.session.accelerator.log(row, step=step)
