"""Estimate of a run's time: seconds per step, total, and tokens per second."""

import math
from collections.abc import Iterator

from opd.training.doctor.findings import Finding, ok
from opd.training.doctor.rehearsal import RehearsedRun


def duration(run: RehearsedRun) -> Iterator[Finding]:
    """Estimate seconds per step, total time and tokens per second from the rehearsal.

    The result is a range.  The lower time assumes that sampling costs the same for each group of --decode-rows
    rollouts, the upper one that it grows with the number of tokens.
    """
    config, seconds, n = run.session.config, run.phases, len(run.rollouts)
    share = config.batch / n
    groups = math.ceil(config.batch / config.decode_rows) / math.ceil(n / config.decode_rows)
    update = seconds["update"] + (0 if run.session.method.local() else seconds["measure"])
    evals = config.steps // config.eval_every + 2 if config.eval_prompts else 0
    evaluation = evals * config.eval_limit / n * (seconds["measure"] + seconds["rollout"])
    step = [seconds["rollout"] * times + update * share for times in sorted((groups, share))]
    times = [config.steps * s + evaluation for s in step]
    tokens = int(run.batch.mask.sum()) * share
    per_step, total = (range_text(*map(duration_text, x)) for x in (step, times))
    speed = range_text(*(f"{tokens / s:.2g}" if tokens < 10 * s else f"{tokens / s:.0f}" for s in reversed(step)))
    yield ok(
        what=f"a step of {config.batch} rollouts takes about {per_step}, {config.steps} of them {total}, {speed} "
        f"tokens/s (an estimate from {n} rollouts, which took {run.seconds:.1f} s; responses may grow)"
    )


def range_text(low: str, high: str) -> str:
    """Format a range; a single value if both ends print the same."""
    return low if low == high else f"{low} to {high}"


def duration_text(seconds: float) -> str:
    """Format a duration in seconds, minutes or hours."""
    if seconds < 90:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
