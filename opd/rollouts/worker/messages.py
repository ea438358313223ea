"""Messages between a trainer and its worker process, and the path of the weight snapshots that they refer to."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from opd.config.train import Train
from opd.core.sampling import Prompt
from opd.core.types import Rollout
from opd.data.prompts import Rendered
from opd.head.vocabulary import Vocabulary
from opd.methods.rollout_policies.base import RolloutPolicy

NEWEST = -1  # version of a job that uses the newest weights when it starts


@dataclass(frozen=True)
class Opening:
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
    """A request to generate this process's share of a draw (a rollout batch)."""

    draw: int
    prompts: list[Rendered]
    policy: RolloutPolicy
    first: int  # batch index of the first rollout
    alone: bool  # also compute the student's cross entropy of each response without its prompt
    version: int = NEWEST  # version (training steps) of the weights to generate with


@dataclass(frozen=True)
class Ready:
    """Reports that the worker's model is loaded."""


@dataclass(frozen=True)
class Done:
    """Reports that a draw is generated, and returns its rollouts."""

    draw: int
    rollouts: list[Rollout]  # without their prompts
    seconds: float  # wall-clock seconds of the generation
    computed: float  # CPU seconds of the worker process in that time


@dataclass(frozen=True)
class Failed:
    """Reports that the worker cannot continue, and why."""

    why: str


def snapshot(folder: Path, version: int) -> Path:
    """Return the path of the weights of a version."""
    return folder / f"step-{version:06d}.safetensors"
