"""The rollouts of a run's steps, whoever writes them: `Writing.open(...)`, then `taken(step, ...)` step by step."""

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
from opd.session import Session
from opd.tasks.task import Task
from opd.types import Rollout, Sampling


@dataclass
class Writing:
    """The prompts of a step, and the rollouts to them."""

    config: Train
    method: Method
    session: Session
    source: Source | None = None  # of rollouts to train on

    def open(self, step: int, memory: Memory, state: Path | None, say: Callable[[str], object]) -> Source:
        """Begin to draw rollouts for the steps after `step`: here, or in a worker process where one is asked for."""
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
        """End what draws rollouts."""
        if self.source is not None:
            self.source.close()
            self.source = None
        self.session.collector.student.close()
        for teacher in self.session.teachers.values():
            teacher.close()

    def save(self, folder: Path) -> None:
        """The draws that a run which resumes takes up; all processes call it, the main one writes."""
        kept: list[dict[int, list[Rollout]]] = [{}]
        if self.source is not None:
            self.source.settle()
            kept = gather_object([dict(self.source.kept)])
        if self.session.accelerator.is_main_process:
            draws.save({d: [r for part in kept for r in part.get(d, ())] for d in {*chain(*kept)}}, folder)

    def taken(self, step: int, memory: Memory, passes: Passes) -> list[Rollout]:
        """The rollouts that `step` trains on, of all processes, in order."""
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
        """This process's share of the prompts, sampled and verified; then everyone's, in order, from number `first`."""
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
        """This process's share alone."""
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
        """The prompts of a step, with the notes of earlier attempts at the same questions where there are any."""
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
