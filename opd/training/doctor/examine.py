"""Runs all checks of the doctor in order: `examined(Loop) -> findings`."""

from dataclasses import replace

from accelerate.utils import gather_object

from opd.methods.method import Method
from opd.training.doctor import cost, pair, settings, teacher
from opd.training.doctor.findings import Finding, errors
from opd.training.doctor.probe import Probe, rehearsed
from opd.training.trainer import Loop


def examined(loop: Loop) -> list[Finding]:
    """Run the checks that need no rollouts, then the checks on a few rollouts, and return the findings.

    The second part is skipped if the first part finds an error, or if the method takes only text from its teacher.
    Call it on every process.  It trains nothing and writes no files.
    """
    session = loop.session
    free = min(gather_object([cost.free(session.accelerator.device)]))
    probe = Probe(session, free)
    found = [f for part in (pair, settings, cost) for check in part.BEFORE for f in check(probe)]
    if errors(found) or loop.method.asks is not None:  # a text-only teacher scores no tokens
        return found
    looked = rehearsed(
        probe, replace(loop, session=replace(session, plan=replace(session.plan, method=Method()), lenses=None))
    )
    after = list(teacher.finite(looked))
    if not errors(after):  # means over nan or inf are meaningless
        after += [f for part in (teacher, settings, cost) for check in part.AFTER for f in check(looked)]
    return found + after


def noted(loop: Loop) -> list[Finding]:
    """Return the findings that need neither rollouts nor a forward: risky settings and vocabulary differences."""
    probe = Probe(loop.session, 0)
    return [*settings.told(probe), *pair.vocabulary(probe)]
