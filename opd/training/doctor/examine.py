"""Runs all checks of the doctor in order: `examine_run(Trainer) -> findings`."""

from dataclasses import replace

from accelerate.utils import gather_object

from opd.methods.method import Method
from opd.training.doctor import cost, pair, settings, teacher
from opd.training.doctor.findings import Finding, errors
from opd.training.doctor.probe import Probe, rehearse_run
from opd.training.trainer import Trainer


def examine_run(trainer: Trainer) -> list[Finding]:
    """Run the checks that need no rollouts, then the checks on a few rollouts, and return the findings.

    The second part is skipped if the first part finds an error, or if the method takes only text from its teacher.
    Call it on every process.  It trains nothing and writes no files.
    """
    session = trainer.session
    free = min(gather_object([cost.free_bytes(session.accelerator.device)]))
    probe = Probe(session, free)
    findings = [f for part in (pair, settings, cost) for check in part.BEFORE for f in check(probe)]
    if errors(findings) or trainer.method.asks is not None:  # a text-only teacher scores no tokens
        return findings
    plan = replace(session.plan, method=Method())
    rehearsed = rehearse_run(probe, replace(trainer, session=replace(session, plan=plan, lenses=None)))
    late_findings = list(teacher.finite(rehearsed))
    if not errors(late_findings):  # means over nan or inf are meaningless
        late_findings += [f for part in (teacher, settings, cost) for check in part.AFTER for f in check(rehearsed)]
    return findings + late_findings


def static_findings(trainer: Trainer) -> list[Finding]:
    """Return the findings that need neither rollouts nor a forward: risky settings and vocabulary differences."""
    probe = Probe(trainer.session, 0)
    return [*settings.risky_settings(probe), *pair.vocabulary(probe)]
