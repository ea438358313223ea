"""A worker process that writes rollouts while the student trains, as its trainer sees it.

The trainer leaves snapshots of the trained weights in a folder and sends jobs down a pipe; finished draws come back, in
their order, and none is dropped.  A draw is sent once weights young enough are there, so that no more than
`staleness` + 1 of them are ever under way or waiting.  A worker that dies is started again and its draw written again,
with the same weights; one that loses its trainer removes the snapshots and ends (`opd/worker.py`).
"""

import contextlib
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import torch
from accelerate.utils import DistributedType
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor

from opd import adapters, models
from opd.config import Train
from opd.disk import disk
from opd.draws import forget, outdate, share
from opd.jobs import NEWEST, Done, Failed, Job, Opening, Ready, snapshot
from opd.method import Method
from opd.rollouts import Memory, Rollouts, Snapshot, draw_of, opened, prompts_of
from opd.session import Session
from opd.types import Refusal, Rollout

DEATHS = 3  # in a row, without a draw between them, that end a run
WHOLE = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)  # each process has all weights
LOOK = 1.0  # seconds between looks for the worker, should a process of its own hold the pipe open


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
        threads: int,
        kept: dict[int, list[Rollout]],
        say: Callable[[str], object] = lambda line: None,
    ) -> None:
        self.opening, self.who, self.weights, self.job = opening, who, weights, job
        self.staleness, self.total, self.kept, self.say = staleness, total, kept, say
        self.threads = threads  # of this process without a worker
        self.pinned = exact or isinstance(who, Snapshot)  # a draw's weights are those it was allowed by
        self.changed = threading.Condition()
        self.waiting: deque[Job] = deque()
        self.running: Job | None = None
        self.useless: Job | None = None  # what is written, where a newer snapshot is due
        self.idle = self.closed = False
        self.newest, self.failure, self.deaths, self.restarts = NEWEST, "", 0, 0
        self.busy, self.computed, self.since, self.depth = 0.0, 0.0, time.perf_counter(), 0
        for old in opening.folder.parent.glob(f"{opening.folder.name.rpartition('-')[0]}-*"):
            shutil.rmtree(old, ignore_errors=True)  # of a trainer that was killed together with its worker
        opening.folder.mkdir(parents=True)
        self.process: subprocess.Popen | None = None
        self.pipe: Connection | None = None  # once the worker can take jobs
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
                _kill(self.process)
        self.thread.join()
        shutil.rmtree(self.opening.folder, ignore_errors=True)
        torch.set_num_threads(self.threads)

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
        if not (self.idle and self.waiting and self.pipe is not None):
            return
        job = self.waiting.popleft()
        self.running = job if job.version != NEWEST else replace(job, version=self.newest)
        self.idle = False
        with contextlib.suppress(OSError):  # it died: whoever listens to it sees that
            self.pipe.send(self.running)

    def _serve(self) -> None:
        """Keep a worker running, in a thread of the trainer; what goes wrong in here ends the run, not the thread."""
        try:
            while self._attend():
                pass
        except Exception as error:
            with self.changed:
                self.failure = f"the worker process: {type(error).__name__}: {' '.join(str(error).split())}"
                self.changed.notify_all()

    def _attend(self) -> bool:
        """Start a worker and listen to it until it ends; whether another one is due."""
        with self.changed:
            if self.closed:
                return False
            process, pipe = _start()
            self.process = process
        try:
            with pipe, contextlib.suppress(EOFError, OSError):
                pipe.send(self.opening)
                while True:
                    if pipe.poll(LOOK):
                        self._hear(pipe.recv(), pipe)
                    elif process.poll() is not None:
                        break
        finally:
            _kill(process)
            code, self.process = process.wait(), None
        with self.changed:
            self.idle, self.pipe = False, None
            if self.running is not None and self.running is not self.useless:
                self.waiting.appendleft(self.running)
            self.running = None
            if self.closed or self.failure:
                return False
            self.deaths += 1
            self.restarts += 1
            if self.deaths == DEATHS:
                self.failure = (
                    f"the worker process ended {DEATHS} times in a row before its draw was written (exit status "
                    f"{code}; -9 may be the system, out of memory): lower --decode-rows, name another "
                    "--worker-device, or take --staleness 0; what was saved is whole: --resume goes on from there"
                )
                self.changed.notify_all()
                return False
        self.say(f"the worker process ended (exit status {code}) and is started again; no rollout is lost")
        return True

    def _hear(self, message: Ready | Done | Failed, pipe: Connection) -> None:
        with self.changed:
            match message:
                case Ready():
                    self.pipe = pipe
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


def _start() -> tuple[subprocess.Popen, Connection]:
    """A worker that was told nothing yet, and the pipe to it.

    It finds modules where the trainer does, and prints where the trainer's errors go.  A terminal's signals are not for
    it: it and what it starts are a group of their own.
    """
    ours, theirs = Pipe()
    path = os.pathsep.join(os.path.abspath(p) for p in sys.path)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "opd.worker", str(theirs.fileno())],
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            stdout=2,
            pass_fds=(theirs.fileno(),),
            process_group=0,
        )
    return process, ours


def _kill(process: subprocess.Popen) -> None:
    """End a worker with what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
