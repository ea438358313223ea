"""Reading of run folders, `read(folder) -> Log`, and grouping of runs that differ only by seed, `group_runs(logs)`."""

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from opd.core.errors import Refusal
from opd.core.intervals import interval
from opd.methods import METHODS
from opd.training.run_files import NUMBER, REMEDY, Row, read_columns, read_object, read_rows
from opd.training.run_folder import flat

INCIDENTAL = frozenset({"seed", "data.seed", "out", "resume", "quiet", "keep", "trackers"})  # ignored in grouping
STEP_NAME = re.compile(r"step-(\d+)")  # the stem of a file that is written once at a step
EVALUATION = {"prompt": (str,), "outcome": NUMBER, "length": NUMBER}


@dataclass(frozen=True)
class Log:
    """The logs of one run folder."""

    folder: Path
    config: Mapping[str, object]  # flat: data.source, sampling.temperature, ...
    environment: Mapping[str, object]
    steps: tuple[Row, ...]  # of training
    evaluations: tuple[Row, ...]
    perf: tuple[Row, ...]
    prompts: Mapping[int, Mapping[str, Row]]  # step -> name of a held-out prompt -> its outcome, KL, length

    def columns(self, step: int, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Load the named columns of a step as far as they were saved; other columns, some large, are not read."""
        return read_columns(self.folder / "rollouts" / f"step-{step:06d}.safetensors", names)

    def series(self, name: str) -> dict[int, float]:
        """Return a number by step, from any of the three logs."""
        perf = (r for r in self.perf if "evaluate_s" not in r)  # the speed of evaluations is another
        return {r["step"]: r[name] for r in (*self.steps, *self.evaluations, *perf) if r.get(name) is not None}


def read(folder: Path) -> Log:
    """Read a run folder.  Raise Refusal if the folder is not a run, is damaged, or has no finished step."""
    if missing := [name for name in ("config.json", "metrics.jsonl") if not (folder / name).is_file()]:
        raise Refusal(f"RUN {folder}: there is no {missing[0]} in it; name the --out folder of an `opd train`")
    rows = lines(folder / "metrics.jsonl")
    if not rows:
        raise Refusal(f"RUN {folder}: no step is finished yet; wait for the first line of its metrics.jsonl")
    steps = tuple(r for r in rows if "loss" in r)
    for expected, row in enumerate(steps, 1):
        if row["step"] != expected:
            raise Refusal(f"{folder / 'metrics.jsonl'}: step {row['step']} in the place of step {expected}; {REMEDY}")
    environment = folder / "environment.json"
    evals = at_steps(folder / "evals", ".jsonl")
    return Log(
        folder=folder,
        config=dict(flat(read_object(folder / "config.json", {"method": (str,)}))),
        environment=read_object(environment, {}) if os.path.lexists(environment) else {},
        steps=steps,
        evaluations=tuple(r for r in rows if "loss" not in r),
        perf=tuple(lines(folder / "perf.jsonl", "seconds")),
        prompts={
            step: {r["prompt"]: r for r in read_rows(p, EVALUATION, (*NUMBER, bool), growing=False)}
            for step, p in evals.items()
        },
    )


def at_steps(folder: Path, suffix: str) -> dict[int, Path]:
    """Return the files of a folder with names such as `step-000100.jsonl`, by their steps."""
    names = ((STEP_NAME.fullmatch(path.stem), path) for path in sorted(folder.glob(f"step-*{suffix}")))
    return {int(name[1]): path for name, path in names if name}


def saved(run: Path) -> dict[int, Path]:
    """Return the paths of a run's saved rollouts by step, without the file suffix."""
    return {step: path.with_suffix("") for step, path in at_steps(run / "rollouts", ".safetensors").items()}


def saved_at(run: Path, step: int, *needed: str) -> tuple[int, Path]:
    """Return the step (0: the newest) and path of saved rollouts; refuse a run without them or `needed` files."""
    paths = saved(run)
    if not paths or not all((run / name).is_file() for name in needed):
        raise Refusal(f"RUN {run}: no saved rollouts in it; name the --out folder of an `opd train`")
    step = step or list(paths)[-1]
    if step not in paths:
        raise Refusal(f"--step {step}: rollouts were saved at {', '.join(map(str, paths))}; --rollouts-every sets that")
    return step, paths[step]


def lines(path: Path, *required: str) -> list[Row]:
    """Return the complete lines of a log, whose values are numbers; a log that no step has written yet is empty."""
    fields = dict.fromkeys(required, NUMBER) | {"step": (int,)}
    return read_rows(path, fields, NUMBER, growing=True) if os.path.lexists(path) else []


@dataclass(frozen=True)
class Series:
    """A number over the steps: the mean over runs, a lower and an upper bound, and the values of each run."""

    x: tuple[int, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    runs: tuple[Mapping[int, float], ...]


@dataclass(frozen=True)
class RunGroup:
    """Runs of one configuration that differ only by seed."""

    name: str
    runs: tuple[Log, ...]

    def setting(self, name: str) -> object:
        """Return a setting, which all runs share."""
        return self.runs[0].config.get(name, "")

    def names(self) -> list[str]:
        """Return the names of all logged numbers, in the order of the logs."""
        rows = [r for run in self.runs for r in (*run.steps, *run.evaluations, *run.perf)]
        return [n for n in dict.fromkeys(k for r in rows for k in r) if n != "step"]

    def series(self, name: str) -> Series:
        """Return a number over the steps with its band: 95 % intervals for evaluations, else the range over seeds."""
        runs = [run.series(name) for run in self.runs]
        steps = sorted(set().union(*runs))
        values = [[run[s] for run in runs if s in run] for s in steps]
        mean = tuple(sum(v) / len(v) for v in values)
        bands = [self._band(name, s, v) for s, v in zip(steps, values, strict=True)]
        return Series(tuple(steps), mean, tuple(b[0] for b in bands), tuple(b[1] for b in bands), tuple(runs))

    def _band(self, name: str, step: int, values: Sequence[float]) -> tuple[float, float]:
        if name == "eval_accuracy":
            shares = self.held_out("outcome", step)
            if shares is not None:
                prompt_interval = interval(shares.mean(0).tolist())
                return min(prompt_interval.low, *values), max(prompt_interval.high, *values)
            bounds = [
                run.series(end)[step]
                for run in self.runs
                for end in ("eval_low", "eval_high")
                if step in run.series(end)
            ]
            return min(*bounds, *values), max(*bounds, *values)
        if name == "eval_reverse_kl":  # runs share prompts: averaging runs does not reduce this error
            errors = [run.series("eval_reverse_kl_se").get(step, 0.0) for run in self.runs]
            centre, half_width = sum(values) / len(values), 1.96 * sum(errors) / len(errors)
            return min(centre - half_width, *values), max(centre + half_width, *values)
        return min(values), max(values)

    def held_out(self, name: str, step: int, among: Sequence[str] = ()) -> np.ndarray | None:
        """Return a number [runs, prompts] of the held-out prompts (or `among`) at a step; None if a prompt lacks it."""
        tables_by_run = [run.prompts.get(step) for run in self.runs]
        tables = [t for t in tables_by_run if t]
        shared = list(among) or self.shared(step)
        if (
            len(tables) < len(tables_by_run)
            or not shared
            or any(name not in t.get(p, ()) for t in tables for p in shared)
        ):
            return None
        return np.array([[float(t[p][name]) for p in shared] for t in tables])

    def shared(self, step: int) -> list[str]:
        """Return the held-out prompts that every run evaluated at a step."""
        tables = [run.prompts.get(step, {}) for run in self.runs]
        return [p for p in tables[0] if all(p in t for t in tables)]

    def last(self) -> int:
        """Return the newest step at which every run saved an evaluation by prompt; 0 if none exists."""
        return max(set.intersection(*(set(run.prompts) for run in self.runs)), default=0)


def group_runs(logs: Sequence[Log]) -> list[RunGroup]:
    """Group runs of equal settings, and give the groups names that differ."""
    logs_by_settings: dict[str, list[Log]] = {}
    for log in logs:
        key = {k: v for k, v in log.config.items() if k not in INCIDENTAL}
        logs_by_settings.setdefault(json.dumps(key, sort_keys=True), []).append(log)
    groups = [RunGroup(method_name(str(runs[0].config["method"])), tuple(runs)) for runs in logs_by_settings.values()]
    rules: tuple[Callable[[RunGroup], str], ...] = (
        lambda g: g.name or folders(g),
        lambda g: ", ".join(filter(None, (g.name, differing(g, [o for o in groups if o.name == g.name])))),
        lambda g: f"{g.name} ({folders(g)})",
    )
    named = groups
    for name in rules:
        used_names = [g.name for g in named]
        named = [RunGroup(name(g), g.runs) if not g.name or used_names.count(g.name) > 1 else g for g in named]
        groups = named
    return named


def method_name(method: str) -> str:
    """Return the name of the listed method whose repr is `method`, up to numbers; "" if no method matches."""
    shape = lambda text: re.sub(r"-?\d+(\.\d+)?(e-?\d+)?", "#", text)
    exact_names = [name for name, factory in METHODS.items() if repr(factory()) == method]
    similar_names = [name for name, factory in METHODS.items() if shape(repr(factory())) == shape(method)]
    return next(iter((*exact_names, *similar_names)), "")


def folders(group: RunGroup) -> str:
    """Return the common prefix of the group's folder names, without a trailing seed."""
    names = [run.folder.resolve().name for run in group.runs]
    common = names[0]
    while not all(n.startswith(common) for n in names):
        common = common[:-1]
    return re.sub(r"[-_.]*(seed)?[-_.]*\d*$", "", common) or names[0]


def differing(group: RunGroup, others: Sequence[RunGroup]) -> str:
    """Return up to three short settings in which a group differs from others."""
    values = {k: {json.dumps(o.setting(k)) for o in others} for k in group.runs[0].config if k not in INCIDENTAL}
    settings = [f"{k.rpartition('.')[2]}={group.setting(k)}" for k, v in values.items() if len(v) > 1 and k != "method"]
    return ", ".join([x for x in settings if len(x) <= 40][:3])
