"""The doctor: `doctor(Train) -> findings` for `opd doctor` and Python, `examine_run(Trainer)` for `opd train`.

A check is a function that yields findings about a session, or about a run after its rehearsal on a few rollouts.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from opd.config import checks
from opd.config.plan import resolved
from opd.config.train import Train
from opd.core.errors import Refusal
from opd.methods.method import Method
from opd.training.build import open_session
from opd.training.doctor import duration, fit, pair, settings, teacher
from opd.training.doctor.findings import Finding, error, errors
from opd.training.doctor.rehearsal import RehearsedRun, rehearse_run
from opd.training.progress import loading
from opd.training.run_folder import Run
from opd.training.session import Session
from opd.training.trainer import Trainer

T = TypeVar("T")
Checks = Mapping[str, Callable[[T], Iterator[Finding]]]  # by the name that their findings get

BEFORE: Checks[Session] = {
    "tokens": pair.vocabulary,
    "turn end": pair.turn_end,
    "bos": pair.first_token,
    "prompt": pair.templates,
    "rendered": pair.rendered,
    "round trip": pair.round_trip,
    "precision": pair.precision,
    "server": pair.server,
    "settings": settings.risky_settings,
    "method": settings.compatible,
    "routes": settings.routes,
    "learning rate": settings.learning_rate,
    "length": settings.lengths,
    "verifier": settings.verifier,
    "head pass": settings.head_pass_backend,
    "memory": fit.memory,
}
AFTER: Checks[RehearsedRun] = {
    "distance": teacher.distance,
    "uniform": teacher.uniform,
    "teacher prompt": teacher.prompt_template,
    "stops": settings.response_ends,
    "repetition": settings.repeats,
    "sampler": settings.sampler,
    "time": duration.duration,
}


def doctor(config: Train) -> list[Finding]:
    """Return the findings of all checks before the first step; a `Refusal` to open the run is one of level error."""
    try:
        plan = resolved(config)
        checks.check(plan)
        with loading(*plan.names(), quiet=config.quiet):
            return examine_run(Trainer(open_session(plan), Run(Path(config.out))))
    except Refusal as refusal:
        return [error(check="opening", what=str(refusal))]


def estimate_memory(config: Train, target: str, prompt_tokens: int) -> fit.MemoryEstimate:
    """Return the memory of a run on the GPUs of `target`, such as 8x80, from the configurations of its models."""
    plan = resolved(config)
    checks.check(plan)
    return fit.estimated(plan, target, prompt_tokens)


def examine_run(trainer: Trainer) -> list[Finding]:
    """Run the checks that need no rollouts, then the checks on a few rollouts, and return the findings.

    The second part is skipped if the first part finds an error.  If the method takes only text from its teacher, the
    second part only checks that the rollouts fit the method's question.
    Call it on every process.  It trains nothing and writes no files.
    """
    session = trainer.session
    findings = _findings(BEFORE, session)
    if errors(findings):
        return findings
    if trainer.method.asks is not None:  # a text-only teacher scores no tokens
        return findings + _findings({"question": settings.question}, trainer)
    plan = replace(session.plan, method=Method())
    rehearsed = rehearse_run(session, replace(trainer, session=replace(session, plan=plan, lenses=None)))
    findings += _findings({"finite": teacher.finite}, rehearsed)
    return findings if errors(findings) else findings + _findings(AFTER, rehearsed)  # no means over nan or inf


def static_findings(session: Session) -> list[Finding]:
    """Return the findings that need neither rollouts nor a forward: risky settings, routes, vocabularies."""
    return _findings({name: BEFORE[name] for name in ("settings", "routes", "tokens")}, session)


def _findings(named_checks: Checks[T], subject: T) -> list[Finding]:
    return [replace(f, check=f.check or name) for name, check in named_checks.items() for f in check(subject)]
