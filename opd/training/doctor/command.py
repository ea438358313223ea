"""Entry point of the doctor: `doctor(Train) -> findings`, for `opd doctor` and for Python."""

from pathlib import Path

from opd.config import checks
from opd.config.plan import resolved
from opd.config.train import Train
from opd.core.errors import Refusal
from opd.training.build import open_session
from opd.training.doctor.examine import examine_run
from opd.training.doctor.findings import Finding, Level
from opd.training.progress import loading
from opd.training.run_folder import Run
from opd.training.trainer import Trainer


def doctor(config: Train) -> list[Finding]:
    """Run all checks that are possible before the first step and return the findings.

    A `Refusal` raised while the run is opened becomes a finding of level error.
    """
    try:
        plan = resolved(config)
        checks.check(plan)
        with loading(*plan.names(), quiet=config.quiet):
            return examine_run(Trainer(open_session(plan), Run(Path(config.out))))
    except Refusal as refusal:
        return [Finding(check="opening", level=Level.ERROR, what=str(refusal))]
