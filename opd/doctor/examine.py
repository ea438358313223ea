"""All checks in their order: `examine(Probe, ...) -> findings`."""

from collections.abc import Callable

from opd.collect import Rendered
from opd.doctor import cost, pair, settings, teacher
from opd.doctor.findings import Finding, errors
from opd.doctor.probe import Probe, Rehearsal, rehearsed
from opd.types import Batch, Rollout


def before(probe: Probe) -> list[Finding]:
    """What can be seen without rollouts."""
    return [f for part in (pair, settings, cost) for check in part.BEFORE for f in check(probe)]


def examine(
    probe: Probe, rehearse: Callable[[list[Rendered]], Rehearsal], measure: Callable[[list[Rollout]], Batch]
) -> list[Finding]:
    """What can be seen without rollouts; then, where a run could start at all, what some rollouts show."""
    found = before(probe)
    if errors(found):
        return found
    looked = rehearsed(probe, rehearse, measure)
    after = list(teacher.finite(looked))
    if not errors(after):  # means over numbers that are none say nothing
        after += [f for part in (teacher, settings, cost) for check in part.AFTER for f in check(looked)]
    return found + after
