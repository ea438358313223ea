"""The source of rollouts for the steps of a run: call `Writing.open(...)`, then `taken(step, ...)` at each step.

The student's process or a worker process generates them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from accelerate.utils import gather_object

from opd import draws, episode
from opd.background import hired
from opd.collect import Rendered
from opd.config import Train
from opd.draws import Here, Source
from opd.method import Method
from opd.passes import Passes
from opd.questions import Stages
from opd.rollouts import NOTHING, Memory, Rollouts, Snapshot, draw_of, prompts_of
from opd.sampling import Sampling
from opd.session import Session
from opd.tasks.task import Task
from opd.types import Rollout


@dataclass
class Writing:
    """The prompts and rollouts of each step of a run."""

    config: Train
    method: Method
    session: Session
    source: Source | None = None  # buffer of training rollouts; None before `open`

    def open(self, step: int, memory: Memory, state: Path | None, say: Callable[[str], object]) -> Source:
        """Start to generate rollouts for the steps after `step`, in a worker process if the configuration wants it.

        `state` is the training-state folder of a checkpoint, whose saved rollouts are used first.
        """
        config, session, who = self.config, self.session, self.method.rollouts
        kept = self._restored(state) if state is not None else {}
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

    def save(self, folder: Path) -> None:
        """Save the buffered rollouts that a resumed run continues with.

        Every process must call it; only the main process writes.
        """
        kept: list[dict[int, list[Rollout]]] = [{}]
        if self.source is not None:
            self.source.settle()
            kept = gather_object([dict(self.source.kept)])
        if self.session.accelerator.is_main_process:
            draws.save({d: [r for part in kept for r in part.get(d, ())] for d in {*chain(*kept)}}, folder)

    def taken(self, step: int, memory: Memory, passes: Passes) -> list[Rollout]:
        """Return the rollouts that `step` trains on, from all processes, in order."""
        who = self.method.rollouts
        source = self.source or self.open(step - 1, memory, None, print)
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

    def _restored(self, state: Path) -> dict[int, list[Rollout]]:
        """Load this process's share of a checkpoint's draws; a draw that lacks a part of it is generated again."""
        accelerator, who = self.session.accelerator, self.method.rollouts
        per_prompt = who.per_prompt
        mine = draws.share(self.config.batch // per_prompt, accelerator.process_index, accelerator.num_processes)
        wanted, out = range(mine.start * per_prompt, mine.stop * per_prompt), {}
        for draw, drawn in draws.load(state).items():
            own = [r for r in drawn if r.index in wanted]
            if len(own) == len(wanted):
                out[draw] = own
        return out
