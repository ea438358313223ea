"""A worker process that writes rollouts while the student trains, as its trainer sees it.

The trainer leaves snapshots of the trained weights in a folder and sends jobs down a pipe; finished draws come back up
another, in their order, and none is dropped.  A draw is sent once weights young enough are there, so that no more than
`staleness` + 1 of them are ever under way or waiting.  A worker that dies is started again and its draw written again,
with the same weights; one that loses its trainer removes the snapshots and ends (`opd/worker.py`).
"""

import contextlib
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from torch import Tensor

from opd import models
from opd.collect import Rendered
from opd.config import Train
from opd.draws import forget, outdate, share
from opd.method import Method
from opd.rollouts import Memory, Rollouts, Snapshot, draw_of, opened, prompts_of
from opd.runs import disk
from opd.session import Session
from opd.types import Prompt, Refusal, Rollout
from opd.vocabulary import Vocabulary

DEATHS = 3  # in a row, without a draw between them, that end a run
WHOLE = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)  # each process has all weights
NEWEST = -1  # the version of a job that has not begun


@dataclass(frozen=True)
class Opening:
    """What a worker is told first."""

    config: Train
    folder: Path  # of the snapshots
    size: int  # ids that may be sampled
    stop: tuple[int, ...]
    vocabulary: Vocabulary
    teachers: tuple[str, ...]  # the names that prompts are routed by
    device: str
    threads: int
    verify: Callable[[str, Prompt], float]


@dataclass(frozen=True)
class Job:
    """A draw to write: this process's share of it."""

    draw: int
    prompts: list[Rendered]
    who: Rollouts
    first: int  # batch index of the first rollout
    alone: bool  # also say what the writer thinks of each response without its prompt
    version: int = NEWEST  # of the weights


@dataclass(frozen=True)
class Ready:
    """The worker's model is loaded."""


@dataclass(frozen=True)
class Done:
    """A draw is written."""

    draw: int
    rollouts: list[Rollout]  # without their prompts
    seconds: float  # that it took
    computed: float  # seconds of the worker's processor in it


@dataclass(frozen=True)
class Failed:
    """The worker cannot go on."""

    why: str


def snapshot(folder: Path, version: int) -> Path:
    """Where the weights of a version are."""
    return folder / f"step-{version:06d}.safetensors"


class Background:
    """`Source` of draws that a worker process writes."""

    def __init__(
        self,
        opening: Opening,
        who: Rollouts,
        *,
        weights: Callable[[], Mapping[str, Tensor]],
        job: Callable[[int], Job],
        staleness: int,
        exact: bool,
        total: int,
        kept: dict[int, list[Rollout]],
        say: Callable[[str], object] = lambda line: None,
    ) -> None:
        self.opening, self.who, self.weights, self.job = opening, who, weights, job
        self.staleness, self.total, self.kept, self.say = staleness, total, kept, say
        self.pinned = exact or isinstance(who, Snapshot)  # a draw's weights are those it was allowed by
        self.changed = threading.Condition()
        self.waiting: deque[Job] = deque()
        self.running: Job | None = None
        self.useless: Job | None = None  # what is written, where a newer snapshot is due
        self.idle = self.closed = False
        self.newest, self.failure, self.deaths, self.restarts = NEWEST, "", 0, 0
        self.busy, self.computed, self.since, self.depth = 0.0, 0.0, time.perf_counter(), 0
        shutil.rmtree(opening.folder, ignore_errors=True)  # of a run whose trainer and worker were killed together
        opening.folder.mkdir(parents=True)
        self.process: subprocess.Popen | None = None
        self.outbox: Connection | None = None
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def advance(self, step: int, memory: Memory) -> None:
        """Leave the weights after `step` steps where the worker finds them, and queue the draws that they allow."""
        steps = range(step + 1, min(step + 1 + self.staleness, self.total) + 1)
        allowed = [d for s in steps for d in opened(self.who, s, memory) if d <= self.total]
        with self.changed:
            if isinstance(self.who, Snapshot) and step < self.total:
                first = self.who.outdated(step + 1, memory)
                outdate(self.who, self.kept, step + 1, memory)
                self.waiting = deque(job for job in self.waiting if job.draw >= first)
                if self.running is not None and self.running.draw < first:
                    self.useless = self.running
            known = {*self.kept, *(job.draw for job in self._under_way() if job is not self.useless)}
            useful = bool(self.waiting) and not self.pinned
        new = [d for d in dict.fromkeys(allowed) if d not in known]
        if not new and not useful:
            return
        self._save(step)
        jobs = [self.job(d) for d in new]
        with self.changed:
            self.waiting.extend(replace(job, version=step) if self.pinned else job for job in jobs)
            self._clean()
            self._send()

    def take(self, step: int, memory: Memory) -> list[Rollout]:
        """What `step` trains on, waiting for it."""
        asked = draw_of(self.who, step, memory)
        with self.changed:
            self.depth = len(self.kept)
            lost = asked not in self.kept and all(job.draw != asked for job in self._under_way())
        if lost:  # a checkpoint of another number of processes may lack it
            self._save(step - 1)
            job = self.job(asked)
            with self.changed:
                self.waiting.appendleft(replace(job, version=step - 1))
                self._send()
        self._wait(lambda: asked in self.kept)
        with self.changed:
            found = self.kept[asked]
            forget(self.who, self.kept, step, memory)
        return found

    def settle(self) -> None:
        """Wait for the draws whose weights no checkpoint has."""
        if self.pinned:
            self.rest()

    def rest(self) -> None:
        """Wait until all draws that are allowed are written."""
        self._wait(lambda: not self.waiting and self.running is None)

    def numbers(self) -> dict[str, float]:
        """Draws ready at the last `take`, restarts; the worker's busy share of the time since the last call, and its
        processor seconds: a draw counts when it is done, so a share may be above 1.
        """
        with self.changed:
            now = time.perf_counter()
            out = {
                "queue_depth": float(self.depth),
                "worker_busy": self.busy / (now - self.since),
                "worker_cpu_s": self.computed,
                "worker_restarts": float(self.restarts),
            }
            self.busy, self.computed, self.since = 0.0, 0.0, now
        return out

    def close(self) -> None:
        """End the worker and remove its snapshots."""
        with self.changed:
            self.closed = True
            if self.process is not None:
                self.process.kill()
        self.thread.join()
        shutil.rmtree(self.opening.folder, ignore_errors=True)

    def _wait(self, done: Callable[[], bool]) -> None:
        with self.changed:
            while not done():
                if self.failure:
                    raise Refusal(self.failure)
                self.changed.wait(1.0)  # a limit, so that Ctrl-C is heard

    def _under_way(self) -> Iterator[Job]:
        yield from self.waiting
        if self.running is not None:
            yield self.running

    def _save(self, version: int) -> None:
        """The weights of now, whole under their name or not there."""
        if version == self.newest:
            return
        path = snapshot(self.opening.folder, version)
        with disk(f"writing {path}"):
            save_file({k: x.detach().cpu().contiguous() for k, x in self.weights().items()}, path.with_suffix(".part"))
            with self.changed:  # together, or `_clean` would not know it
                os.replace(path.with_suffix(".part"), path)
                self.newest = version

    def _clean(self) -> None:
        """Remove the snapshots that nothing under way is to be written with."""
        needed = {self.newest, *(job.version for job in self._under_way())}
        keep = {snapshot(self.opening.folder, v).name for v in needed}
        for path in self.opening.folder.glob("step-*.safetensors"):
            if path.name not in keep:
                path.unlink()

    def _send(self) -> None:
        """Give an idle worker the next draw."""
        if not (self.idle and self.waiting and self.outbox is not None):
            return
        job = self.waiting.popleft()
        self.running = job if job.version != NEWEST else replace(job, version=self.newest)
        self.idle = False
        with contextlib.suppress(OSError):  # it died: whoever listens to it sees that
            self.outbox.send(self.running)

    def _serve(self) -> None:
        """Keep a worker running and listen to it, in a thread of the trainer."""
        while True:
            with self.changed:
                if self.closed:
                    return
                process = self.process = _start()
            assert process.stdin is not None and process.stdout is not None
            inbox = Connection(os.dup(process.stdout.fileno()), writable=False)
            outbox = Connection(os.dup(process.stdin.fileno()), readable=False)
            with process.stdin, process.stdout, inbox, outbox:
                with contextlib.suppress(EOFError, OSError):
                    outbox.send(self.opening)
                    while True:
                        self._hear(inbox.recv(), outbox)
                process.kill()
            code = process.wait()
            with self.changed:
                self.idle, self.outbox = False, None
                if self.running is not None and self.running is not self.useless:
                    self.waiting.appendleft(self.running)
                self.running = None
                if self.closed or self.failure:
                    return
                self.deaths += 1
                self.restarts += 1
                if self.deaths == DEATHS:
                    self.failure = (
                        f"the worker process ended {DEATHS} times in a row before its draw was written (exit status "
                        f"{code}; -9 may be the system, out of memory): lower --decode-rows, name another "
                        "--worker-device, or take --staleness 0; what was saved is whole: --resume goes on from there"
                    )
                    self.changed.notify_all()
                    return
            self.say(f"the worker process ended (exit status {code}) and is started again; no rollout is lost")

    def _hear(self, message: Ready | Done | Failed, outbox: Connection) -> None:
        with self.changed:
            match message:
                case Ready():
                    self.outbox = outbox
                case Done(draw, rollouts, seconds, computed):
                    self.busy, self.computed = self.busy + seconds, self.computed + computed
                    self.deaths, job = 0, self.running
                    assert job is not None and job.draw == draw
                    self.running = None
                    if job is not self.useless:
                        self.kept[draw] = rollouts
                    self._clean()
                case Failed(why):
                    self.failure = why
                    self.changed.notify_all()
                    raise EOFError
            self.idle = True
            self._send()
            self.changed.notify_all()


def hired(
    config: Train,
    session: Session,
    who: Rollouts,
    kept: dict[int, list[Rollout]],
    say: Callable[[str], object],
    *,
    alone: bool,
) -> Background:
    """A worker for this process of a run."""
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
    if accelerator.device.type == "cpu" and device == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // 2))  # each its own cores
    opening = Opening(
        config=replace(config, method=Method()),  # a method of the user's own need not be there
        folder=config.out / f".worker-{accelerator.process_index}",
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
        kept=kept,
        say=say,
    )


def _start() -> subprocess.Popen:
    """A worker that was told nothing yet; what it prints goes where the trainer's errors go."""
    return subprocess.Popen([sys.executable, "-m", "opd.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
