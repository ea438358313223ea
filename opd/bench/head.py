"""The head pass beside a naive one and the peers: `python -m opd.bench.head --help`.

One process runs every arm in turn, round after round, on the same tensors; ratios are medians over rounds, so that the
noise of a shared machine hits all arms alike.  Peak memory is measured in a fresh process for each arm.
"""

import json
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

from opd.bench.case import Case, Shape
from opd.bench.peers import ALWAYS, ARMS, Floor, naive


def main(shape: Shape) -> None:
    """Measure, print a table, perhaps write json."""
    torch.set_num_threads(shape.threads)
    if shape.peak_of:
        print(peak(shape))
        return
    if unknown := set(shape.arms) - set(ARMS):
        raise ValueError(f"--arms {' '.join(sorted(unknown))}: unknown; there are {', '.join(ARMS)}")
    case = Case.of(shape)
    arms, refused = runnable(case, shape)
    seconds = timed(arms, case, shape)
    rows: dict[str, dict[str, Any]] = {name: {"seconds": seconds[name]} for name in arms}
    for name in arms:
        if shape.memory and name != "floor":
            rows[name]["peak_bytes"] = fresh_peak(name, shape)
        if shape.error_tokens and name != "floor":
            rows[name]["error"] = errors(name, case, shape)
    report(rows, refused, shape)


def runnable(case: Case, shape: Shape) -> tuple[list[str], dict[str, str]]:
    """The arms that run, tried on one token's worth of work, and why the others do not."""
    fine, refused = [], {}
    tiny = case.some(4, case.states.dtype)
    for name in shape.arms or ARMS:
        try:
            Floor()(tiny, shape) if name == "floor" else ARMS[name](tiny, shape)
        except (ImportError, RuntimeError, TypeError) as error:
            refused[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        else:
            fine.append(name)
    return fine, refused


def timed(arms: list[str], case: Case, shape: Shape) -> dict[str, list[float]]:
    """Seconds of forward and backward, round by round."""
    clock = {"wall": time.perf_counter, "cpu": time.process_time}[shape.clock]
    out: dict[str, list[float]] = {name: [] for name in arms}
    for turn in track(range(shape.rounds + 1), "rounds", transient=True, console=Console(stderr=True)):
        for name in arms:
            _wait(shape)
            start = clock()
            ARMS[name](case, shape)
            _wait(shape)
            if turn:
                out[name].append(clock() - start)
            case.take_gradients()
    return out


def errors(name: str, case: Case, shape: Shape) -> dict[str, float]:
    """Relative distance of loss and gradients from float64 on the same inputs."""
    exact = case.some(shape.error_tokens, torch.float64)
    asked = replace(shape, objective=ALWAYS.get(name, shape.objective))
    wanted = [naive(exact, asked), *exact.take_gradients()]
    mine = case.some(shape.error_tokens, case.states.dtype)
    found = [ARMS[name](mine, shape), *mine.take_gradients()]
    distance = lambda x, y: float((x.double() - y).norm() / y.norm())
    return dict(zip(("loss", "states", "weight"), map(distance, found, wanted), strict=False))


def peak(shape: Shape) -> int:
    """Extra bytes at the widest moment of one arm's forward and backward, in this process."""
    case = Case.of(shape)
    if shape.device == "cpu":
        before = _status("VmRSS")
        ARMS[shape.peak_of](case, shape)
        return _status("VmHWM") - before
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ARMS[shape.peak_of](case, shape)
    return torch.cuda.max_memory_allocated() - before


def fresh_peak(name: str, shape: Shape) -> int:
    """`peak` in a process of its own."""
    same = ("tokens", "vocabulary", "student", "teacher", "chunk", "objective", "threads", "dtype", "device")
    flags = [flag for field in same for flag in (f"--{field}", str(getattr(shape, field)))]
    command = [sys.executable, "-m", "opd.bench.head", *flags, *(["--frozen"] if shape.frozen else [])]
    return int(subprocess.run([*command, "--peak-of", name], capture_output=True, text=True, check=True).stdout)


def report(rows: dict, refused: dict[str, str], shape: Shape) -> None:
    """The table on the terminal; the numbers, versions and arguments as json."""
    table = Table(title=f"head pass, N={shape.tokens} V={shape.vocabulary} H={shape.student}/{shape.teacher}")
    for column in ("arm", "seconds", "of floor", "ours faster by", "peak MB", "of naive's", "error: loss, dh, dW"):
        table.add_column(column, justify="left" if column == "arm" else "right", no_wrap=True)
    for name, row in rows.items():
        table.add_row(
            name,
            f"{statistics.median(row['seconds']):.3f}",
            _ratio(row, rows.get("floor")),
            _ratio(row, rows.get("ours")),
            f"{row['peak_bytes'] / 2**20:.0f}" if "peak_bytes" in row else "",
            f"1 / {rows['naive']['peak_bytes'] / row['peak_bytes']:.1f}"
            if "peak_bytes" in row and "naive" in rows
            else "",
            " ".join(f"{x:.0e}" for x in row.get("error", {}).values()),
        )
    console = Console(width=max(130, Console().width), markup=False, highlight=False)
    console.print(table)
    for name, reason in refused.items():
        console.print(f"{name} cannot run here: {reason}")
    versions = {name: _version(name) for name in ("opd", "torch", "trl", "liger-kernel", "triton")}
    console.print(f"medians [min, max] of {shape.rounds} alternating rounds; {shape}; {versions}")
    if shape.json is not None:
        whole = {
            "shape": vars(shape) | {"json": str(shape.json)},
            "versions": versions,
            "rows": rows,
            "refused": refused,
        }
        shape.json.write_text(json.dumps(whole, indent=1))


def _ratio(row: dict, base: dict | None) -> str:
    if base is None:
        return ""
    each = [a / b for a, b in zip(row["seconds"], base["seconds"], strict=True)]
    return f"{statistics.median(each):.2f} [{min(each):.2f}, {max(each):.2f}]"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def _status(field: str) -> int:
    """A line of /proc/self/status, in bytes; ru_maxrss would start from the parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) << 10


def _wait(shape: Shape) -> None:
    if shape.device != "cpu":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(tyro.cli(Shape, description=__doc__))
