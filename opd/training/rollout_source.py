"""The source of rollouts for the steps of a run: call `Writing.open(...)`, then `taken(step, ...)` at each step.

The student's process or a worker process generates them.
"""

import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from accelerate.utils import gather_object
from peft import PeftModel
from torch import Tensor

from opd.config.train import Train
from opd.core.errors import Refusal
from opd.core.sampling import Sampling
from opd.core.types import Rollout
from opd.data.prompts import Rendered
from opd.data.tasks.task import Task
from opd.methods.method import Method
from opd.methods.questions import Stages
from opd.methods.rollout_policies.base import NOTHING, Memory
from opd.methods.rollout_policies.policies import Rollouts, draw_of, prompts_of
from opd.methods.rollout_policies.snapshot import Snapshot
from opd.models import adapters
from opd.models import load as models
from opd.rollouts import buffer as draws
from opd.rollouts.buffer import Here, Source, share
from opd.rollouts.worker.client import WHOLE, Background
from opd.rollouts.worker.messages import Job, Opening
from opd.teachers.judges import reflections as episode
from opd.training.forward_backward import Passes
from opd.training.session import Session


def hired(
    config: Train,
    session: Session,
    who: Rollouts,
    kept: dict[int, list[Rollout]],
    say: Callable[[str], object],
    *,
    alone: bool,
) -> Background:
    """Start a worker for this process of a run.

    Raises Refusal if the weights are sharded, or if the verifier cannot be pickled.
    """
    accelerator, engine, task = session.accelerator, session.collector.student, session.prompts.task
    if accelerator.distributed_type not in WHOLE:
        raise Refusal(
            f"--staleness {config.staleness}: a worker reads whole weights, and {accelerator.distributed_type} shards "
            "them; train in one process or with DDP, or take --staleness 0"
        )
    try:
        pickle.dumps(task.verify)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise Refusal(
            f"--verifier: {task.verify!r} cannot be sent to the worker process ({error}); name a function of a module"
        ) from error
    device = str(accelerator.device)
    if config.worker_device != "same":
        device = str(models.device(config.worker_device, field="worker-device"))
    threads = torch.get_num_threads()
    if accelerator.device.type == "cpu" and device == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, threads // 2))  # each its own cores
    model = session.plain().model
    # The base that the checkpoints name: --student may be a run folder that has moved on since.
    student = adapters.base_name(model) if isinstance(model, PeftModel) else config.student
    opening = Opening(
        config=replace(config, method=Method(), student=student),  # a method of the user's own need not be there
        folder=config.out / f".worker-{accelerator.process_index}-{os.getpid()}",  # that of another trainer is its own
        size=engine.vocabulary,
        stop=engine.stop,
        vocabulary=session.collector.vocabulary,
        teachers=tuple(session.teachers),
        device=device,
        threads=torch.get_num_threads(),
        verify=task.verify,
    )

    def job(draw: int) -> Job:
        prompts = session.prompts.batch(prompts_of(who, draw), config.batch // who.per_prompt)
        mine = share(len(prompts), accelerator.process_index, accelerator.num_processes)
        return Job(draw, prompts[mine], who, mine.start * who.per_prompt, alone)

    def weights() -> dict[str, Tensor]:
        return {name: p for name, p in session.plain().model.named_parameters() if p.requires_grad}

    return Background(
        opening,
        who,
        weights=weights,
        job=job,
        staleness=config.staleness,
        exact=config.exact_staleness,
        total=config.steps,
        threads=threads,
        kept=kept,
        say=say,
    )


@dataclass
class Writing:
    """The prompts and rollouts of each step of a run."""

    session: Session
    source: Source | None = None  # buffer of training rollouts; None before `open`

    @property
    def config(self) -> Train:
        """Return the settings of the run."""
        return self.session.config

    @property
    def method(self) -> Method:
        """Return the method of the run."""
        return self.session.method

    def open(
        self, step: int, memory: Memory, saved: Mapping[int, Sequence[Rollout]], say: Callable[[str], object]
    ) -> Source:
        """Start to generate rollouts for the steps after `step`, in a worker process if the configuration wants it.

        `saved` are the buffered rollouts of a checkpoint, which are used first.
        """
        config, session, who = self.config, self.session, self.method.rollouts
        kept = self._restored(saved)
        if config.staleness or config.worker:
            self.source = hired(config, session, who, kept, say, alone="student_alone" in self.method.reads())
        else:

            def write(draw: int, memory: Memory) -> list[Rollout]:
                prompts = self._prompts(prompts_of(who, draw), memory)
                return self._mine(prompts, who, config.sampling, draw, session.prompts.task, memory)

            self.source = Here(who, write, config.steps, kept)
        self.source.advance(step, memory)
        return self.source

    def close(self) -> None:
        """Stop the rollout source, the engine and the teachers."""
        if self.source is not None:
            self.source.close()
            self.source = None
        self.session.collector.student.close()
        for teacher in self.session.teachers.values():
            teacher.close()

    def buffered(self) -> dict[int, list[Rollout]]:
        """Return the buffered rollouts of all processes, for a checkpoint.  Every process must call it."""
        parts: list[dict[int, list[Rollout]]] = [{}]
        if self.source is not None:
            self.source.settle()
            parts = gather_object([dict(self.source.kept)])
        return {draw: [r for part in parts for r in part.get(draw, ())] for draw in {*chain(*parts)}}

    def taken(self, step: int, memory: Memory, passes: Passes) -> list[Rollout]:
        """Return the rollouts that `step` trains on, from all processes, in order."""
        who = self.method.rollouts
        source = self.source or self.open(step - 1, memory, {}, print)
        drawn, draw = source.take(step, memory), draw_of(who, step, memory)
        prompts = self._prompts(prompts_of(who, draw), memory)
        if "teacher_alone" in self.method.reads():
            drawn = passes.alone(drawn, draws.dressed(drawn, prompts, who.per_prompt))
            if draw in source.kept:
                source.kept[draw] = drawn
        mine = draws.behind(drawn, step) if self.config.staleness or isinstance(who, Snapshot) else drawn
        return draws.dressed(gather_object(mine), prompts, who.per_prompt)

    def collect(
        self,
        prompts: Sequence[Rendered],
        who: Rollouts,
        sampling: Sampling,
        step: int,
        task: Task,
        memory: Memory = NOTHING,
        first: int = 0,
    ) -> list[Rollout]:
        """Generate and verify rollouts, each process for its share of the prompts; return those of all processes.

        They are in order and numbered from `first`.
        """
        return gather_object(self._mine(prompts, who, sampling, step, task, memory, first))

    def _mine(
        self,
        prompts: Sequence[Rendered],
        who: Rollouts,
        sampling: Sampling,
        step: int,
        task: Task,
        memory: Memory,
        first: int = 0,
    ) -> list[Rollout]:
        """Generate and verify the rollouts of this process's share of the prompts."""
        accelerator = self.session.accelerator
        mine = draws.share(len(prompts), accelerator.process_index, accelerator.num_processes)
        with accelerator.autocast():
            return self.session.collector.collect(
                prompts[mine],
                who,
                sampling,
                task.verify,
                seed=self.config.seed,
                step=step,
                first=first + mine.start * who.per_prompt,
                total=self.config.steps,
                memory=memory,
                alone="student_alone" in self.method.reads(),
            )

    def _prompts(self, number: int, memory: Memory) -> list[Rendered]:
        """Return the prompts of step `number`; a method that reflects adds the notes on earlier attempts to them."""
        session, asks, count = self.session, self.method.asks, self.config.batch // self.method.rollouts.per_prompt
        reflect = asks.reflect if isinstance(asks, Stages) else None
        if reflect is None:
            return session.prompts.batch(number, count)
        found = session.prompts.batch(reflect.batch(number), count)
        return episode.reminded(found, episode.of(memory).notes, reflect, session.prompts)

    def _restored(self, saved: Mapping[int, Sequence[Rollout]]) -> dict[int, list[Rollout]]:
        """Return this process's share of a checkpoint's draws; a draw that lacks a part of it is generated again."""
        accelerator, who = self.session.accelerator, self.method.rollouts
        per_prompt = who.per_prompt
        mine = draws.share(self.config.batch // per_prompt, accelerator.process_index, accelerator.num_processes)
        wanted, out = range(mine.start * per_prompt, mine.stop * per_prompt), {}
        for draw, drawn in saved.items():
            own = [r for r in drawn if r.index in wanted]
            if len(own) == len(wanted):
                out[draw] = own
        return out
