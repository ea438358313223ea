"""The base class of all teachers, and the check of what a method needs against what a teacher provides: `require`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from opd.core.errors import Refusal
from opd.core.types import Rollout
from opd.methods import METHODS
from opd.methods.method import Method


@dataclass(frozen=True)
class TeacherState:
    """The state of a teacher in a checkpoint; empty for a teacher that never changes."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)  # weights that change during the run
    server_weights: str = ""  # an id of the weights behind a server


class BaseTeacher:
    """A model that scores tokens or generates text.  Methods do nothing unless a subclass needs them."""

    provides: frozenset[str]  # what it can compute, in the terms of `Method.needs`

    def ahead(self, rollouts: Sequence[Rollout], masks: Sequence[Sequence[bool]]) -> None:
        """Announce the batch of the next `hidden` call.  Server teachers send their requests early."""

    def follow(self) -> None:
        """Update the teacher after an optimizer step of the student."""

    def traffic(self) -> dict[str, float]:
        """Return the counters of requests and bytes since the last call, for perf.jsonl."""
        return {}

    def state(self) -> TeacherState:
        """Return what a checkpoint keeps of the teacher."""
        return TeacherState()

    def restore(self, state: TeacherState) -> None:
        """Continue from the state of a checkpoint.  Raises Refusal if the teacher has changed since then."""

    def close(self) -> None:
        """Release resources at the end of the run."""


def require(
    method: Method,
    provides: frozenset[str],
    *,
    flag: str,
    model: object,
    gives: str,
    remedy: str,
    needs: Callable[[Method], frozenset[str]] = Method.needs,
) -> None:
    """Refuse a teacher that does not provide what a method needs.

    `flag` (without dashes) and `model` name the teacher, and `gives` says in words what it returns.  `remedy` is what
    the user can do, beside taking a method for which it is enough.  `needs` finds a method's needs of such a teacher.
    """
    missing = needs(method) - provides
    if missing:
        methods = [name for name, factory in METHODS.items() if needs(factory()) <= provides]
        raise Refusal(
            f"--{flag} {model}: it gives {gives}, and the method needs more of the teacher "
            f"({', '.join(sorted(missing))}): {remedy}, or use one of {', '.join(methods)}"
        )
