"""What every teacher has: `provides` says what may be asked of it; the rest does nothing, where a kind has no need."""

from collections.abc import Sequence
from pathlib import Path

from opd.types import Rollout

STUDENTS = frozenset({"student_logp", "student_entropy"})  # columns that need no teacher


class Teacher:
    """Who scores tokens or writes texts."""

    provides: frozenset[str]

    def ahead(self, rollouts: Sequence[Rollout], masks: Sequence[Sequence[bool]]) -> None:
        """What `hidden` will be asked next, for those that gain by knowing it early."""

    def follow(self) -> None:
        """The student made a step."""

    def traffic(self) -> dict[str, float]:
        """What went over a wire since the last call, for perf.jsonl."""
        return {}

    def save(self, folder: Path) -> None:
        """Add to a checkpoint what it cannot be opened again from."""

    def restore(self, folder: Path) -> None:
        """Take up what `save` wrote, or refuse to go on with another."""

    def close(self) -> None:
        """The run ends: nothing more is asked."""
