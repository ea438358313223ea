"""All checks in their order: `examined(Loop) -> findings`."""

from dataclasses import replace

from accelerate.utils import gather_object

from opd.doctor import cost, pair, settings, teacher
from opd.doctor.findings import Finding, errors
from opd.doctor.probe import Probe, rehearsed
from opd.method import Method
from opd.steps import Loop


def examined(loop: Loop) -> list[Finding]:
    """What can be seen of an opened run without rollouts; then, where it could start at all, what some rollouts show.

    On every process alike; nothing is trained or written.
    """
    session = loop.session
    free = min(gather_object([cost.free(session.accelerator.device)]))
    probe = Probe(loop.config, loop.method, session, free)
    found = [f for part in (pair, settings, cost) for check in part.BEFORE for f in check(probe)]
    if errors(found) or loop.method.asks is not None:  # nothing scores the tokens of a method that asks for texts
        return found
    looked = rehearsed(probe, replace(loop, method=Method(), session=replace(session, lenses=None)))
    after = list(teacher.finite(looked))
    if not errors(after):  # means over numbers that are none say nothing
        after += [f for part in (teacher, settings, cost) for check in part.AFTER for f in check(looked)]
    return found + after


def noted(loop: Loop) -> list[Finding]:
    """What is known without a look."""
    probe = Probe(loop.config, loop.method, loop.session, 0)
    return [*settings.told(probe), *pair.vocabulary(probe)]
