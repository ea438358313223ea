"""The base class of all teachers.

`provides` names what a teacher can compute.  The other methods do nothing unless a subclass needs them.
"""

from collections.abc import Sequence
from pathlib import Path

from opd.core.types import Rollout


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

    def save(self, folder: Path) -> None:
        """Add the teacher's state to a checkpoint, if it has any."""

    def restore(self, folder: Path) -> None:
        """Load what `save` stored.  Raises Refusal if the teacher has changed since then."""

    def close(self) -> None:
        """Release resources at the end of the run."""
