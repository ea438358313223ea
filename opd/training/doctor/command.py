"""Entry point of the doctor: `doctor(Train) -> findings`, for `opd doctor` and for Python."""

from dataclasses import replace
from pathlib import Path

from opd.config import checks
from opd.config.train import Train
from opd.core.errors import Refusal
from opd.training.build import open_session
from opd.training.doctor.examine import examine_run
from opd.training.doctor.findings import Finding, Level
from opd.training.progress import loading
from opd.training.run_folder import Run
from opd.training.trainer import Loop


def doctor(config: Train) -> list[Finding]:
    """Run all checks that are possible before the first step and return the findings.

    A `Refusal` raised while the run is opened becomes a finding of level error.
    """
    try:
        checks.check(config)
        method = checks.resolved(config)
        config = replace(config, data=replace(config.data, source=config.prompts, seed=config.seed))
        with loading(config.student, *config.routes().values(), quiet=config.quiet):
            session = open_session(config, method, None)
            return examine_run(Loop(config, method, session, Run(Path(config.out))))
    except Refusal as refusal:
        return [Finding(check="opening", level=Level.ERROR, what=str(refusal))]
