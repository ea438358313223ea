"""The interface of engines: requests to generate responses, sampled responses, and the protocols of engines."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Protocol, TypeVar, runtime_checkable

from peft import PeftModel
from transformers import PreTrainedModel

from opd.core.sampling import Sampling
from opd.core.types import Others
from opd.methods.rollout_policies.base import DecodeHook
from opd.rollouts.engines.json_schema import Grammar

T = TypeVar("T")


@dataclass(frozen=True)
class TeacherDecoding:
    """A teacher that decodes beside the student, after the teacher's prompts, and the hook that uses its logits."""

    model: PreTrainedModel | PeftModel
    prompts: Sequence[Sequence[int]]
    hook: DecodeHook


@dataclass(frozen=True)
class GenerateRequest:
    """A request to generate one response per prompt.

    The noise of a response depends only on (seed, step, its entry of `index`).  A response continues its prefix, which
    counts as its first tokens and is not returned.  Only `HFEngine` generates with `teacher`, `samples` or `grammars`.
    """

    prompts: Sequence[Sequence[int]]
    sampling: Sampling
    _: KW_ONLY
    seed: int
    step: int
    index: Sequence[int]
    groups: Sequence[int] = ()  # the number of each prompt in the batch, over all processes; empty: 0 for all
    prefixes: Sequence[Sequence[int]] = ()  # one per prompt; empty: no prefixes
    teacher: TeacherDecoding | None = None
    samples: int = 1  # tokens sampled at each position; the first of them is the response's token
    grammars: Sequence[Grammar] = ()  # grammars that the responses must match, one per prompt; empty: none

    def prefix_of_each(self) -> Sequence[Sequence[int]]:
        """Return a prefix for each prompt, empty by default."""
        return self.prefixes or ((),) * len(self.prompts)

    def group_of_each(self) -> Sequence[int]:
        """Return the number of each prompt in the batch."""
        return self.groups or (0,) * len(self.prompts)

    def check_plain(self) -> None:
        """Assert that the request is one that every engine can serve."""
        assert self.teacher is None and self.samples == 1 and not self.grammars, "a run refuses it with another engine"


@dataclass(frozen=True)
class Sample:
    """A generated response."""

    ids: tuple[int, ...]
    logp: tuple[float, ...]  # nats, under the sampled distribution
    stopped: bool
    notes: Mapping[str, float | tuple[float, ...]] = field(default_factory=dict)  # one number, or one per token
    others: Others | None = None
    version: int = 0  # steps that the weights were trained, of engines that generate while the student trains


@runtime_checkable
class ResponseGenerator(Protocol):
    """A generator of responses: an engine or a server."""

    def generate(self, request: GenerateRequest) -> list[Sample]:
        """Generate a response for each prompt."""


class Engine:
    """An engine that samples from the student: it shares its weights, or receives them before it generates."""

    model: PreTrainedModel | PeftModel  # the student
    vocabulary: int  # ids 0 .. vocabulary - 1 may be sampled
    stop: tuple[int, ...]  # any of them ends a response
    rows: int  # responses generated at the same time
    merged: tuple[int, ...] | None = None  # ids that count as one token, with their total probability; None: `stop`

    def generate(self, request: GenerateRequest) -> list[Sample]:
        """Generate one response per prompt."""
        raise NotImplementedError

    def run(self, work: Callable[[], T]) -> T:
        """Return `work()`, which calls `generate` with the student's current weights.  Every process must call it."""
        return work()

    def follow(self) -> None:
        """Note that an optimizer step changed the student's weights."""

    def close(self) -> None:
        """Release the engine's resources."""
