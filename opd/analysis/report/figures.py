"""Data of the report page: `payload(groups)` returns curves, tables, comparisons, KL by position, time by phase."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from statistics import median_low
from typing import Any, NamedTuple

from opd.core.intervals import Paired, paired
from opd.core.types import pad
from opd.training.alarms import alarms
from opd.training.run_log import INCIDENTAL, Log, RunGroup, saved

PICTURE_MARK = "opd report"  # in the metadata of each picture


class Curve(NamedTuple):
    """A chart of a logged number."""

    title: str
    unit: str = ""  # shares are logged as fractions and shown in %
    explanation: str = ""  # one line under the title


CURVES: Mapping[str, Curve] = {
    "eval_accuracy": Curve("Held-out accuracy", "%", "right answers to prompts that are not trained on"),
    "eval_reverse_kl": Curve("Held-out reverse KL", "nats per token", "distance to the teacher on those; 0: one model"),
    "reverse_kl": Curve(
        "Reverse KL on rollouts", "nats per token", "the same on each training batch: falls, and is noisy"
    ),
    "outcome": Curve("Outcome of rollouts", "%", "right answers of the training batch"),
    "student_entropy": Curve("Student entropy", "nats", "how unsure the student is; near 0: it has one answer"),
    "teacher_entropy": Curve("Teacher entropy", "nats", "how unsure the teacher is on the student's text"),
    "length": Curve("Response length", "tokens", "a steady climb to the limit is a fault"),
    "stopped": Curve("Ended by themselves", "%", "the rest was cut at --max-new-tokens"),
    "advantage_std": Curve(
        "Advantage, standard deviation", "nats", "how far the tokens' rewards spread: the noise of a step"
    ),
    "grad_norm": Curve("Gradient norm before clipping", "", "clipped to --max-grad-norm where it is above"),
    "tokens_per_s": Curve("Throughput", "trained tokens / s", "sampling, scoring and update together"),
    "peak_mb": Curve("Peak memory", "MB", "of the process, or of the GPU"),
}
# numbers shown elsewhere on the page
NOT_CHARTED = frozenset({"eval_low", "eval_high", "eval_reverse_kl_se", "refused", "seconds"})


def payload(groups: Sequence[RunGroup]) -> dict[str, object]:
    """Return all data that the page draws, ready for json."""
    names = list(dict.fromkeys([*CURVES, *(n for g in groups for n in g.names())]))
    charted = [n for n in names if n in CURVES or (n not in NOT_CHARTED and not n.endswith("_s"))]
    configs = [{k: text(v) for k, v in g.runs[0].config.items()} for g in groups]
    machines = [run.environment for g in groups for run in g.runs]
    differ, same = differing_settings(configs)
    moved, _ = differing_settings([{k: text(v) for k, v in m.items()} for m in machines])
    return {
        "groups": [summary(g) for g in groups],
        "curves": [curve(groups, n) for n in charted if any(g.series(n).x for g in groups)],
        "gains": comparisons(training_effects, groups),
        "between": comparisons(group_differences, groups),
        "positions": [p for g in groups for p in positions(g)],
        "phases": [{"name": g.name, "seconds": phases(g)} for g in groups],
        "alarms": [{"run": label(g, run), **asdict(a)} for g in groups for run in g.runs for a in alarms(run)],
        "differ": [[name, *(c.get(name, "") for c in configs)] for name in differ],
        "same": [[name, configs[0].get(name, "")] for name in same],
        "environment": {
            "runs": [label(g, run) for g in groups for run in g.runs],
            "rows": [[k, k in moved, *(text(m.get(k, "")) for m in machines)] for k in machines[0]],
        },
    }


def text(value: object) -> str:
    """Format a setting: a string unchanged, other values as json."""
    return value if isinstance(value, str) else json.dumps(value)


def label(group: RunGroup, run: Log) -> str:
    """Return the label of a run: the group's name, with the seed if the group has several runs."""
    return group.name if len(group.runs) == 1 else f"{group.name}, seed {run.config.get('seed')}"


def summary(group: RunGroup) -> dict[str, object]:
    """Return a group's row in the table of results: its settings, cost, first and last evaluation with intervals."""
    speeds = [v for run in group.runs for v in run.series("tokens_per_s").values()]
    out: dict[str, object] = {
        "name": group.name,
        "folders": [str(run.folder) for run in group.runs],
        "seeds": [run.config.get("seed") for run in group.runs],
        "student": group.setting("student"),
        "teacher": group.setting("teacher"),
        "prompts": group.setting("prompts"),
        "method": group.setting("method"),
        "steps": min(max((r["step"] for r in run.steps), default=0) for run in group.runs),
        "asked": group.setting("steps"),
        "seconds": sum(r["seconds"] for run in group.runs for r in run.perf) / len(group.runs),
        "tokens_per_s": median_low(speeds) if speeds else 0.0,
        "tokens": sum(sum(run.series("tokens").values()) for run in group.runs) / len(group.runs),
        "evaluated": len(group.shared(group.last())),
    }
    for name in ("eval_accuracy", "eval_reverse_kl"):
        s = group.series(name)
        if s.x:
            ends = {"first": 0, "last": len(s.x) - 1}
            out[name] = {end: {"value": s.mean[i], "low": s.low[i], "high": s.high[i]} for end, i in ends.items()}
    for name in ("reverse_kl", "length", "stopped"):
        values = group.series(name).mean
        if values:
            fifth = -(-len(values) // 5)  # single batches are noisy
            out[name] = {"first": sum(values[:fifth]) / fifth, "last": sum(values[-fifth:]) / fifth}
    return out


def curve(groups: Sequence[RunGroup], name: str) -> dict[str, Any]:
    """Return one chart: a line for each group that logged the number."""
    title, unit, means = CURVES.get(name, Curve(name.replace("_", " ")))
    factor, lines = 100 if unit == "%" else 1, []
    for i, g in enumerate(groups):
        s = g.series(name)
        if s.x:
            scaled = {end: [v * factor for v in getattr(s, end)] for end in ("mean", "low", "high")}
            runs = [[list(r), [v * factor for v in r.values()]] for r in s.runs] if len(s.runs) > 1 else []
            lines.append({"group": i, "x": s.x, **scaled, "runs": runs})
    return {"name": name, "title": title, "unit": unit, "means": means, "main": name in CURVES, "lines": lines}


def comparisons(
    compare: Callable[[Sequence[RunGroup], str], list[Paired]], groups: Sequence[RunGroup]
) -> list[dict[str, object]]:
    """Return tables of paired differences: of reverse KL, and of accuracy if the prompts have a verifier."""
    out: list[dict[str, object]] = []
    scored = any(g.series("eval_accuracy").x for g in groups)
    kinds = [("outcome", "Accuracy", "points", 100.0)] * scored + [("reverse_kl", "Reverse KL", "nats per token", 1.0)]
    for name, title, unit, factor in kinds:
        scaled = lambda p, factor=factor: {k: getattr(p, k) * factor for k in ("value", "low", "high")}
        rows = [asdict(p) | scaled(p) for p in compare(groups, name)]
        if rows:
            out.append({"title": title, "unit": unit, "rows": rows})
    return out


Evaluation = tuple[RunGroup, int, str]  # an evaluation of a group at a step, and its label


def training_effects(groups: Sequence[RunGroup], name: str) -> list[Paired]:
    """Return the effect of training: the last evaluation of each group minus its evaluation at step 0."""
    trained = [g for g in groups if g.last()]
    return _differences([((g, g.last(), g.name), (g, 0, "before training")) for g in trained], name)


def group_differences(groups: Sequence[RunGroup], name: str) -> list[Paired]:
    """Compare every pair of groups at their last evaluations, on the prompts that both have."""
    return _differences(combinations([(g, g.last(), g.name) for g in groups], 2), name)


def _differences(pairs: Iterable[tuple[Evaluation, Evaluation]], name: str) -> list[Paired]:
    out = []
    for (a, a_step, a_label), (b, b_step, b_label) in pairs:
        second_prompts = set(b.shared(b_step))
        common_prompts = [p for p in a.shared(a_step) if p in second_prompts]
        first, second = a.held_out(name, a_step, common_prompts), b.held_out(name, b_step, common_prompts)
        if common_prompts and first is not None and second is not None:
            out.append(paired(first, second, (a_label, b_label)))
    return out


def differing_settings(tables: Sequence[Mapping[str, object]]) -> tuple[list[str], list[str]]:
    """Return the names whose values differ between tables, and the remaining names."""
    names = [k for k in dict.fromkeys(k for t in tables for k in t) if k not in INCIDENTAL]
    differ = [k for k in names if any(t.get(k) != tables[0].get(k) for t in tables)]
    return differ, [k for k in names if k not in differ]


def positions(group: RunGroup) -> list[dict[str, object]]:
    """Return reverse KL by position in the response, at the first and the last saved step, over all seeds."""
    steps = sorted(set.intersection(*(set(saved(run.folder)) for run in group.runs)))
    out = []
    for step in dict.fromkeys(steps[:1] + steps[-1:]):
        columns_by_run = [run.columns(step, ("reverse_kl", "mask")) for run in group.runs]
        if not all("reverse_kl" in c for c in columns_by_run):
            continue
        kl, mask = (pad([row for c in columns_by_run for row in c[name]], 0) for name in ("reverse_kl", "mask"))
        bin_size = max(1, mask.shape[1] // 32)
        x, mean, error, share, start = [], [], [], [], 0
        for kl_bin, in_bin in zip(kl.float().split(bin_size, 1), mask.split(bin_size, 1), strict=True):
            reaches_bin = in_bin.any(1)
            if int(reaches_bin.sum()) < max(2, 0.1 * len(mask)):
                break  # too few responses are this long for a mean
            row_means = (kl_bin.where(in_bin, 0).sum(1) / in_bin.sum(1))[reaches_bin]
            x.append(start + (in_bin.shape[1] - 1) / 2)
            mean.append(float(row_means.mean()))
            error.append(1.96 * float(row_means.std()) / len(row_means) ** 0.5)
            share.append(float(reaches_bin.float().mean()))
            start += bin_size
        low, high = ([max(0.0, m + s * e) for m, e in zip(mean, error, strict=True)] for s in (-1, 1))
        out.append({"name": group.name, "step": step, "x": x, "mean": mean, "low": low, "high": high, "share": share})
    return out


def phases(group: RunGroup) -> dict[str, float]:
    """Return the mean seconds per step of each phase; evaluations and saves are spread over all steps."""
    rows = [r for run in group.runs for r in run.perf]
    steps = max(1, sum(len(run.steps) for run in group.runs))
    names = dict.fromkeys(k for r in rows for k in r if k.endswith("_s") and k not in ("tokens_per_s", "worker_cpu_s"))
    return {n.removesuffix("_s"): sum(r.get(n, 0.0) for r in rows) / steps for n in names}
