"""What an engine is: a sample, and the protocols that engines and teachers' generators follow."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from peft import PeftModel
from transformers import PreTrainedModel

from opd.core.sampling import Sampling
from opd.core.types import Others


@dataclass(frozen=True)
class Sample:
    """A generated response."""

    ids: tuple[int, ...]
    logp: tuple[float, ...]  # nats, under the sampled distribution
    stopped: bool
    notes: Mapping[str, float | tuple[float, ...]] = field(default_factory=dict)  # one number, or one per token
    others: Others | None = None


@runtime_checkable
class Writer(Protocol):
    """A generator of responses: an engine or a server."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        seed: int,
        step: int,
        index: Sequence[int],
    ) -> list[Sample]:
        """Generate a response for each prompt.

        The noise of a response depends only on (seed, step, its entry of `index`).
        """


@runtime_checkable
class Engine(Writer, Protocol):
    """An engine that samples from the student.

    It shares the student's weights, or receives them before it generates.
    """

    @property
    def model(self) -> PreTrainedModel | PeftModel:
        """The student model."""

    @property
    def rows(self) -> int:
        """Responses generated at the same time."""

    @property
    def vocabulary(self) -> int:
        """Vocabulary size: ids 0 .. vocabulary - 1 may be sampled."""

    @property
    def stop(self) -> tuple[int, ...]:
        """Ids that end a response."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        seed: int,
        step: int,
        index: Sequence[int],
        prefixes: Sequence[Sequence[int]] = (),
    ) -> list[Sample]:
        """Generate a response for each prompt, as the continuation of its prefix."""

    def follow(self) -> None:
        """Note that an optimizer step changed the student's weights."""

    def close(self) -> None:
        """Release the engine's resources."""
