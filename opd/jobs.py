"""What a trainer and its worker process say to each other, and where the weights are that they speak of."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from opd.collect import Rendered
from opd.config import Train
from opd.rollouts import Rollouts
from opd.types import Prompt, Rollout
from opd.vocabulary import Vocabulary

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
