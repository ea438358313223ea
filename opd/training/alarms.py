"""Signs of failed training that raise no error: `alarms(log) -> alarms`, each with its evidence and a remedy.

Trends compare the first fifth of the steps with the last fifth.  A run of fewer than ten steps has no trends.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from opd.core.intervals import paired
from opd.training.run_log import Log

FEWEST = 10  # smallest number of steps for a trend


@dataclass(frozen=True)
class Alarm:
    """A problem of a run: its name, the number that shows it, and a remedy."""

    name: str
    text: str
    remedy: str


def alarms(log: Log) -> list[Alarm]:
    """Return all alarms of a run, the most serious first."""
    rules = (
        refused,
        agreement_trap,
        length_explosion,
        truncated,
        unstaged,
        entropy_collapse,
        repeating,
        sampler_gap,
        stale,
        diverging,
    )
    return [alarm for rule in rules for alarm in rule(log)]


def trend(log: Log, name: str) -> tuple[float, float]:
    """Return the means of a metric over the first and the last fifth of the steps.

    They are nan in a short run, so that no comparison with them is true.
    """
    values = list(log.series(name).values())
    if len(values) < FEWEST:
        return math.nan, math.nan
    fifth = len(values) // 5
    return float(np.mean(values[:fifth])), float(np.mean(values[-fifth:]))


def late(log: Log, name: str) -> float:
    """Return the mean of a metric over the last fifth of the steps, of a short run too; nan without values."""
    values = list(log.series(name).values())
    return float(np.mean(values[-max(1, len(values) // 5) :])) if values else math.nan


def refused(log: Log) -> Iterator[Alarm]:
    """Report steps that were skipped because a gradient was not finite."""
    steps = [step for step, value in log.series("refused").items() if value]
    if steps:
        yield Alarm(
            "refused steps",
            f"{len(steps)} steps had gradients that are not finite, the first was step {steps[0]}",
            "lower --lr; with bf16 try --precision fp32 for a few steps to see whether it is rounding",
        )


def agreement_trap(log: Log) -> Iterator[Alarm]:
    """Report a held-out KL that falls while held-out accuracy falls significantly, too.  KAT, arXiv:2606.09471.

    The student then agrees with the teacher on text that solves no problem.
    """
    kl, tables = log.series("eval_reverse_kl"), {s: t for s, t in log.prompts.items() if t}
    if len(tables) < 2 or not all(s in kl for s in tables):
        return
    mean = {s: np.mean([r["outcome"] for r in t.values()]) for s, t in tables.items()}
    best, last = max(mean, key=lambda s: (mean[s], -s)), max(tables)
    common_prompts = [p for p in tables[best] if p in tables[last]]
    if best == last or not common_prompts or kl[last] >= kl[best]:
        return
    a, b = (np.array([[tables[s][p]["outcome"] for p in common_prompts]]) for s in (last, best))
    change = paired(a, b)
    if change.high < 0:
        yield Alarm(
            "agreement trap",
            f"held-out KL fell from {kl[best]:.3f} to {kl[last]:.3f} after step {best}, and accuracy fell with it by "
            f"{-100 * change.value:.1f} points (95 %: {-100 * change.high:.1f} to {-100 * change.low:.1f})",
            f"keep the checkpoint of step {best}; `opd inspect` sorted by trap shows where agreement is cheap",
        )


def length_explosion(log: Log) -> Iterator[Alarm]:
    """Report responses that grew by more than 60 %."""
    first, last = trend(log, "length")
    if last > 1.6 * first:
        yield Alarm(
            "length explosion",
            f"responses grew from {first:.0f} to {last:.0f} tokens",
            "read the longest in `opd inspect`; --truncated drop, --reduction sequence or a lower --lr",
        )


def truncated(log: Log) -> Iterator[Alarm]:
    """Report more than 10 % of responses that end at the length limit, over the last fifth of the steps."""
    stopped = late(log, "stopped")
    if stopped < 0.9:
        limit = log.config.get("sampling.max_new_tokens", "?")
        yield Alarm(
            "truncated generations",
            f"{1 - stopped:.0%} of the last rollouts were cut at --max-new-tokens {limit}",
            "raise --max-new-tokens, or --truncated drop; if none ends at all, the stop token is wrong",
        )


def unstaged(log: Log) -> Iterator[Alarm]:
    """Report that a judge of stages gets rollouts of which none has a stage before the answer."""
    if late(log, "unstaged") == 1:
        yield Alarm(
            "no stages",
            "100% of the last rollouts have no stage before the answer, so only scores of answers train the student",
            "let --system tell it to write the --tags, as --preset paper does, or name the tags that it writes",
        )


def entropy_collapse(log: Log) -> Iterator[Alarm]:
    """Report a student entropy that fell below half of its start and below half of the teacher's."""
    (first, last), (_, teacher) = trend(log, "student_entropy"), trend(log, "teacher_entropy")
    if last < 0.5 * first and last < 0.5 * teacher:
        yield Alarm(
            "entropy collapse",
            f"student entropy fell from {first:.3f} to {last:.3f} nats, half the teacher's {teacher:.3f} or less",
            "add a forward KL (eopd, --also gkd-forward:0.1), or lower --lr",
        )


def repeating(log: Log) -> Iterator[Alarm]:
    """Report a rising share of repeated 4-grams within responses."""
    first, last = trend(log, "repetition")
    if last > 0.2 and last > first + 0.1:
        yield Alarm(
            "repetition",
            f"{last:.0%} of the 4-grams of a response stood in it before, {first:.0%} at first",
            "read the rollouts with the longest trap in `opd inspect`; a lower --lr, or --truncated drop",
        )


def sampler_gap(log: Log) -> Iterator[Alarm]:
    """Report log-probs of sampler and trainer that differ by more than 0.3 nats on a token.

    Both compute the same number in a plain on-policy run, so a difference is an error in the sampler or the trainer.
    """
    plain = {"sampling.temperature": 1.0, "sampling.top_p": 1.0, "sampling.top_k": 0, "loss_temperature": 1.0}
    method = str(log.config.get("method"))
    if {k: log.config.get(k) for k in plain} != plain or ("rollouts=" in method and "OnPolicy" not in method):
        return  # with these settings the two differ by design
    gap = max(log.series("sampler_gap").items(), key=lambda x: x[1], default=(0, 0.0))
    if gap[1] > 0.3:
        yield Alarm(
            "sampler gap",
            f"sampler and trainer differ by {gap[1]:.2f} nats on a token of step {gap[0]}",
            "compare at --precision fp32: if the gap stays, the engine's weights or template are not the student's",
        )


def stale(log: Log) -> Iterator[Alarm]:
    """Report a KL above 0.1 nats a token to the weights behind the rollouts; NPD's limit, arXiv:2605.05940."""
    _, last = trend(log, "drift")
    if last > 0.1:
        yield Alarm(
            "stale rollouts",
            f"KL of the student to the weights that wrote its rollouts is {last:.3f} nats a token",
            "a smaller --staleness or --lr; async-opd corrects the tokens, and nothing corrects the contexts",
        )


def diverging(log: Log) -> Iterator[Alarm]:
    """Report a reverse KL, which training minimises, that rises by more than 10 %."""
    first, last = trend(log, "reverse_kl")
    if last > 1.1 * first:
        yield Alarm(
            "KL rises",
            f"reverse KL on the student's own rollouts rose from {first:.3f} to {last:.3f} nats per token",
            "lower --lr or add --warmup; a batch of 32 or more rollouts makes steps quieter",
        )
