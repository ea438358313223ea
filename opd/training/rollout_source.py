"""The source of rollouts for the steps of a run: call `RolloutSource.open(...)`, then `take(step, ...)` at each step.

The student's process or a worker process generates them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from accelerate.utils import gather_object

from opd.core.errors import Refusal
from opd.core.sampling import Sampling
from opd.core.types import Rollout
from opd.data.prompts import Rendered
from opd.data.tasks.task import Task
from opd.methods.rollout_policies.base import NOTHING, Memory, RolloutPolicy
from opd.models.load import backbone
from opd.models.sharding import whole
from opd.rollouts import buffer
from opd.rollouts.buffer import Batches, InProcessBuffer, RolloutBuffer, share
from opd.rollouts.collector import RolloutRequest
from opd.rollouts.engines.hf import HFEngine
from opd.rollouts.engines.vllm_server import VLLMServer
from opd.rollouts.extra_samples import with_others
from opd.teachers.local import LocalTeacher
from opd.training.background_buffers import server_buffer, worker_buffer
from opd.training.forward_backward import Passes
from opd.training.session import Session


@dataclass
class RolloutSource:
    """The prompts and rollouts of each step of a run."""

    session: Session
    source: RolloutBuffer | None = None  # buffer of training rollouts; None before `open`

    def open(self, step: int, memory: Memory, saved: Batches, say: Callable[[str], object]) -> RolloutBuffer:
        """Start to generate rollouts after `step`, here or in a worker; those of a checkpoint, `saved`, come first."""
        config, task, batches = self.session.config, self.session.prompts.task, self._restored(saved)
        engine = self.session.collector.student
        request = lambda number: self._batch_request(number, NOTHING)
        if (config.staleness or config.worker) and isinstance(engine, VLLMServer):
            self.source = server_buffer(self.session, engine, request, batches)
        elif config.staleness or config.worker:
            self.source = worker_buffer(self.session, request, batches, say)
        else:
            generate = lambda number, memory: self._generate(self._batch_request(number, memory), task)
            self.source = InProcessBuffer(self.session.method.rollouts, generate, config.steps, batches)
        self.source.advance(step, memory)
        return self.source

    def close(self) -> None:
        """Stop the rollout buffer, the engine and the teachers."""
        if self.source is not None:
            self.source.close()
            self.source = None
        self.session.collector.student.close()
        for teacher in self.session.teachers.values():
            teacher.close()

    def buffered(self) -> Batches:
        """Return the buffered rollouts of all processes, for a checkpoint.  Every process must call it."""
        parts: list[Batches] = [{}]
        if self.source is not None:
            self.source.settle()
            parts = gather_object([dict(self.source.batches)])
        return {n: [r for part in parts for r in part.get(n, ())] for n in {*chain(*parts)}}

    def take(self, step: int, memory: Memory, passes: Passes) -> list[Rollout]:
        """Return the rollouts that `step` trains on, from all processes, in order."""
        policy, batch = self.session.method.rollouts, self.session.config.batch
        source = self.source or self.open(step - 1, memory, {}, print)
        first = (step - policy.batches(step, memory).start) * batch  # position in the pool's admitted rollouts
        shares: dict[int, list[Rollout]] = {}
        places: list[tuple[int, int]] = []  # batch number and index of each admitted rollout
        for number, rollouts in source.take(step, memory):
            rollouts = self._with_all_samples(rollouts, number, memory)
            shares[number] = self._scored(rollouts, number, memory, passes)
            if number in source.batches:
                source.batches[number] = shares[number]
            places += gather_object([(number, r.index) for r in shares[number] if r.notes.get("admitted", 1)])
            if len(places) >= first + batch:
                break
        candidates = len(shares) * batch
        if not places:
            raise Refusal(
                f"step {step} has nothing to train on: none of the {candidates} rollouts of its pool passes "
                f"{policy.admits}; widen the window or leave the filter out (npd --tau, --no-filtered), or check that "
                "the teacher suits the prompts"
            )
        chosen = [places[(first + i) % len(places)] for i in range(min(batch, len(places)))]
        mine = {(number, r.index): r for number, part in shares.items() for r in part}
        found = dict(gather_object([(place, mine[place]) for place in chosen if place in mine]))
        return self._numbered([(place, found[place]) for place in chosen], step, memory, len(places) / candidates)

    def _numbered(
        self, chosen: Sequence[tuple[tuple[int, int], Rollout]], step: int, memory: Memory, admitted: float
    ) -> list[Rollout]:
        """Return the rollouts of a step, chosen by (batch number, index), with their prompts and places in its batch.

        `admitted` is the share of the candidates that the policy admits.
        """
        policy, out, groups = self.session.method.rollouts, list[Rollout](), dict[tuple[int, int], int]()
        numbers = dict.fromkeys(number for (number, _), _ in chosen)
        prompts = {number: self._prompts(policy.prompt_step(number), memory) for number in numbers}
        for i, ((number, _), r) in enumerate(chosen):
            (r,) = buffer.with_prompts([r], prompts[number], policy.per_prompt)
            notes = {**r.notes, "admitted": admitted} if "admitted" in r.notes else r.notes
            group = groups.setdefault((number, r.group), len(groups))
            out.append(replace(r, index=i, group=group, notes=notes))
        has_staleness = self.session.config.staleness or policy.frozen_sampler
        return buffer.with_staleness(out, step) if has_staleness else out

    def _with_all_samples(self, rollouts: list[Rollout], number: int, memory: Memory) -> list[Rollout]:
        """Return this process's share of a batch with the tokens that the engine did not sample at each position.

        The weights before the step sample them, and no checkpoint holds them.
        """
        session, policy, engine = self.session, self.session.method.rollouts, self.session.collector.student
        if policy.samples == 1 or isinstance(engine, HFEngine):
            return rollouts
        prompted = buffer.with_prompts(rollouts, self._prompts(policy.prompt_step(number), memory), policy.per_prompt)
        with session.accelerator.autocast(), whole(session.student):
            return with_others(prompted, engine, session.config.sampling, policy.samples, (session.config.seed, number))

    def _scored(self, rollouts: list[Rollout], number: int, memory: Memory, passes: Passes) -> list[Rollout]:
        """Return this process's share of a batch with all that the method needs of the teacher before a step.

        A pool's rollouts are scored and admitted when a step takes them for the first time.
        """
        method = self.session.method
        policy, has_alone = method.rollouts, "teacher_alone" in method.rollout_columns()
        enters = method.keeps_scores() or policy.admits is not None
        if enters and all(gather_object(["admitted" in r.notes for r in rollouts])):
            return rollouts
        if not (enters or has_alone):
            return rollouts
        prompts = self._prompts(policy.prompt_step(number), memory)
        prompted = lambda: buffer.with_prompts(rollouts, prompts, policy.per_prompt)
        if has_alone:
            rollouts = passes.with_teacher_alone(rollouts, prompted())
        if enters:
            entered = {r.index: r for r in passes.admitted(gather_object(prompted()), number)}
            kept = [entered[r.index] for r in rollouts]
            rollouts = [
                replace(r, notes=x.notes, teacher_scores=x.teacher_scores) for r, x in zip(rollouts, kept, strict=True)
            ]
        return rollouts

    def collect(
        self,
        prompts: Sequence[Rendered],
        policy: RolloutPolicy,
        sampling: Sampling,
        step: int,
        task: Task,
        first: int = 0,
    ) -> list[Rollout]:
        """Generate and verify rollouts, each process a share; return those of all processes, numbered from `first`."""
        if self.source is not None:
            self.source.free_engine()
        return gather_object(self._generate(self._request(prompts, policy, sampling, step, first=first), task))

    def _batch_request(self, number: int, memory: Memory) -> RolloutRequest:
        """Return the request for this process's share of a batch that is trained on."""
        policy = self.session.method.rollouts
        prompts = self._prompts(policy.prompt_step(number), memory)
        return self._request(prompts, policy, self.session.config.sampling, number, memory=memory)

    def _request(
        self,
        prompts: Sequence[Rendered],
        policy: RolloutPolicy,
        sampling: Sampling,
        step: int,
        *,
        first: int = 0,
        memory: Memory = NOTHING,
    ) -> RolloutRequest:
        """Return the request for this process's share of the prompts."""
        accelerator = self.session.accelerator
        part = share(len(prompts), accelerator.process_index, accelerator.num_processes)
        return RolloutRequest(
            prompts=prompts[part],
            policy=policy,
            sampling=sampling,
            seed=self.session.config.seed,
            step=step,
            first=first + part.start * policy.per_prompt,
            total=self.session.config.steps,
            memory=dict(memory),
            unprompted="student_alone" in self.session.method.rollout_columns(),
        )

    def _generate(self, request: RolloutRequest, task: Task) -> list[Rollout]:
        """Generate and verify the rollouts of a request in this process, while the others generate theirs."""
        collector = self.session.collector

        def generate() -> list[Rollout]:
            with self.session.accelerator.autocast(), whole(*self._generating(request)):
                return collector.collect(request, task.verify)

        return collector.student.run(generate)

    def _generating(self, request: RolloutRequest) -> list[torch.nn.Module]:
        """Return the modules here that generate or read along: their processes take different numbers of steps."""
        session, modules = self.session, list[torch.nn.Module]()
        if isinstance(session.collector.student, HFEngine) or request.unprompted:
            modules.append(session.student)
        if not request.policy.on_policy:
            modules += [backbone(t.model) for t in session.teachers.values() if isinstance(t, LocalTeacher)]
        return modules

    def _prompts(self, step: int, memory: Memory) -> list[Rendered]:
        """Return the prompts of a step, to which the annotator may add notes."""
        count = self.session.config.batch // self.session.method.rollouts.per_prompt
        return self.session.annotator.prompts(step, count, memory)

    def _restored(self, saved: Batches) -> Batches:
        """Return this process's share of a checkpoint's batches; a batch that lacks any part is generated again.

        All processes agree on that, because they generate together where servers get the weights from all of them.
        """
        accelerator, per_prompt = self.session.accelerator, self.session.method.rollouts.per_prompt
        batch = self.session.config.batch
        part = share(batch // per_prompt, accelerator.process_index, accelerator.num_processes)
        wanted = range(part.start * per_prompt, part.stop * per_prompt)
        complete = {number: rollouts for number, rollouts in saved.items() if len(rollouts) == batch}
        return {number: [r for r in rollouts if r.index in wanted] for number, rollouts in complete.items()}
