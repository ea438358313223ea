"""The base class of all teachers.

`provides` names what a teacher can compute.  The other methods do nothing unless a subclass needs them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from opd.core.types import Rollout


@dataclass(frozen=True)
class TeacherState:
    """The state of a teacher in a checkpoint; empty for a teacher that never changes."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)  # weights that change during the run
    server_weights: str = ""  # an id of the weights behind a server


class BaseTeacher:
    """A model that scores tokens or generates text."""

    provides: frozenset[str]

    def ahead(self, rollouts: Sequence[Rollout], masks: Sequence[Sequence[bool]]) -> None:
        """Announce the batch of the next `hidden` call.  Server teachers send their requests early."""

    def follow(self) -> None:
        """Update the teacher after an optimizer step of the student."""

    def traffic(self) -> dict[str, float]:
        """Return the network traffic since the last call, for perf.jsonl."""
        return {}

    def state(self) -> TeacherState:
        """Return what a checkpoint keeps of the teacher."""
        return TeacherState()

    def restore(self, state: TeacherState) -> None:
        """Continue from the state of a checkpoint.  Raises Refusal if the teacher has changed since then."""

    def close(self) -> None:
        """Release resources at the end of the run."""
