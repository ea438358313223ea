"""Messages between a trainer and its worker process, and the path of the weight snapshots that they refer to."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from opd.config.train import Train
from opd.core.sampling import Prompt
from opd.core.types import Rollout
from opd.head.vocabulary import Vocabulary
from opd.rollouts.collector import RolloutRequest

NEWEST = -1  # version of a job that uses the newest weights when it starts


@dataclass(frozen=True)
class WorkerSetup:
    """The first message to a worker: everything it needs to load the student and to verify responses."""

    config: Train
    folder: Path  # folder of the weight snapshots
    size: int  # vocabulary size: ids 0 .. size - 1 may be sampled
    stop: tuple[int, ...]
    vocabulary: Vocabulary
    teachers: tuple[str, ...]  # route names of the teachers
    device: str
    threads: int
    verify: Callable[[str, Prompt], float]


@dataclass(frozen=True)
class Job:
    """A request to generate this process's share of a rollout batch, and the weights to generate it with."""

    request: RolloutRequest
    version: int = NEWEST  # version of the weights: the number of steps that they were trained

    @property
    def batch_number(self) -> int:
        """Return the number of the batch."""
        return self.request.step


@dataclass(frozen=True)
class Ready:
    """A report that the worker's model is loaded."""


@dataclass(frozen=True)
class Done:
    """A report that a batch is generated, with its rollouts."""

    batch_number: int
    rollouts: list[Rollout]  # without their prompts
    seconds: float  # wall-clock seconds of the generation
    computed: float  # CPU seconds of the worker process in that time


@dataclass(frozen=True)
class WorkerFailure:
    """A report that the worker cannot continue."""

    reason: str


def snapshot(folder: Path, version: int) -> Path:
    """Return the path of the weights of a version."""
    return folder / f"step-{version:06d}.safetensors"
