"""The worker process: it generates rollouts while the trainer trains the student.

The trainer starts it as `python -m opd.rollouts.worker.process PIPE`.  The worker has a copy of the student.  Jobs and
finished rollouts go through the pipe, as `messages.py` defines them; weights come only through safetensors files.  The
worker ends with its trainer: a thread detects that the pipe is closed, removes the snapshots and exits at once, even in
the middle of a rollout.
"""

import contextlib
import os
import queue
import shutil
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import PreTrainedModel

from opd.core.errors import Refusal
from opd.models import load as models
from opd.models import lora
from opd.models.source import locate
from opd.rollouts.buffer import without_prompts
from opd.rollouts.collector import Collector
from opd.rollouts.engines.hf import HFEngine
from opd.rollouts.worker.messages import NEWEST, Done, Job, Ready, WorkerFailure, WorkerSetup, snapshot

POLL = 1.0  # seconds between checks that the parent lives, because another process may hold the pipe open


@dataclass
class WorkerModel:
    """The worker's copy of the student, which generates rollouts, and the version of its weights."""

    setup: WorkerSetup
    model: PreTrainedModel | PeftModel
    collector: Collector
    version: int = NEWEST

    @classmethod
    def of(cls, setup: WorkerSetup) -> "WorkerModel":
        """Load the student in the same way as the trainer does."""
        torch.set_num_threads(setup.threads)
        config = setup.config
        source = locate(config.student, field="student", trust_remote_code=config.trust_remote_code)
        device = models.device(setup.device, field="worker-device")
        model = lora.trainable(config, source, None, device)
        engine = HFEngine(model, setup.size, setup.stop, config.decode_rows, setup.vocabulary.stop)
        text = models.tokenizer(source, field="student")
        collector = Collector(
            engine,
            dict.fromkeys(setup.teachers, engine),
            text,
            setup.vocabulary,
            think_end=config.data.think_end,
        )
        return cls(setup, model, collector)

    def generate(self, job: Job) -> Done:
        """Generate a batch with the weights that the job names."""
        start, cpu_start = time.perf_counter(), time.process_time()
        if job.version != self.version:
            self._load(job.version)
        kind = self.model.device.type
        with torch.autocast(kind, torch.bfloat16, enabled=self.setup.config.precision == "bf16"):
            rollouts = without_prompts(self.collector.collect(job.request, self.setup.verify), self.version)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        return Done(job.batch_number, rollouts, seconds, cpu_seconds)

    @torch.no_grad()
    def _load(self, version: int) -> None:
        """Load the trained parameters of a snapshot; all other parameters never change."""
        new = load_file(snapshot(self.setup.folder, version))
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        assert new.keys() == trained.keys(), "the trainer's student is another model"
        for name, p in trained.items():
            p.copy_(new[name])
        self.version = version


def main() -> None:
    """Generate rollouts for the trainer until it ends."""
    for name in (signal.SIGINT, signal.SIGTERM):  # the trainer handles these signals, and the worker ends with it
        signal.signal(name, signal.SIG_IGN)
    pipe, parent = Connection(int(sys.argv[1])), os.getppid()
    with contextlib.suppress(EOFError, OSError):
        try:
            setup: WorkerSetup = pipe.recv()
            jobs: queue.Queue[Job] = queue.Queue()
            threading.Thread(target=_listen, args=(pipe, jobs, setup.folder, parent), daemon=True).start()
            model = WorkerModel.of(setup)
            pipe.send(Ready())
            while True:
                pipe.send(model.generate(jobs.get()))
        except Refusal as error:
            pipe.send(WorkerFailure(f"worker process: {error}"))
        except BrokenPipeError:
            raise
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            where, message = f"{Path(last.filename).name}:{last.lineno}", " ".join(str(error).split())
            pipe.send(WorkerFailure(f"the worker process failed: {type(error).__name__}: {message} ({where})"))


def _listen(pipe: Connection, jobs: "queue.Queue[Job]", folder: Path, parent: int) -> None:
    """Queue the jobs that arrive.  When the trainer ends, kill this process and all that a verifier started."""
    while True:
        try:
            if pipe.poll(POLL):
                jobs.put(pipe.recv())
            elif os.getppid() != parent:
                raise EOFError
        except (EOFError, OSError):
            shutil.rmtree(folder, ignore_errors=True)
            if os.getpgrp() == os.getpid():
                os.killpg(0, signal.SIGKILL)
            os._exit(0)


if __name__ == "__main__":
    main()
