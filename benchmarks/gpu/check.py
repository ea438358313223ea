"""The table of all checks of a machine's GPUs: `measured(GPUCheck()) -> Result`.

Each check is a function of this package that runs in a process of its own with a time limit, so that a crash
or a hang is a row of the table and the others still run.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field, fields, replace
from typing import Literal

import psutil
import torch

from benchmarks.result import Result
from opd.core.errors import Refusal

Status = Literal["ok", "failed", "not run"]
TOTAL_SECONDS = 600  # of all checks together
FEWEST_SECONDS = 10  # a check that has less left does not start
LONGEST = 64  # characters of an explanation in the table; the lines below it have all of them
RESULT = "benchmarks.gpu: "  # begins the line of a check's process that holds its rows


@dataclass(frozen=True)
class GPUCheck:
    """Settings of `python -m benchmarks gpu`."""

    cpu: bool = False
    """Run the same checks on the CPU at a tiny size, without judging times."""
    only: tuple[str, ...] = ()
    """Checks to run: device, step, kernels, head, shard, ranks, engine.  Empty runs all."""


@dataclass(frozen=True)
class CheckRow:
    """A row of the table."""

    check: str
    number: str = ""
    limit: str = ""
    status: Status = "ok"
    what: str = ""  # what the number is; why a check failed as a whole, or did not run

    @classmethod
    def judged(cls, check: str, number: str, limit: str, what: str, *, fine: bool) -> "CheckRow":
        """Return a row that is ok if `fine`, else failed."""
        return cls(check, number, limit, "ok" if fine else "failed", what)


class NotRun(Exception):
    """A check cannot run on this machine; the message says why."""


@dataclass(frozen=True)
class Check:
    """A function `(cpu) -> rows`, named as module:function, and its time limit."""

    function: str
    seconds: int
    cpu_variables: Mapping[str, str] = field(default_factory=dict)  # of the environment, with --cpu


CHECKS = {
    "device": Check("benchmarks.gpu.step:device", 60),
    "step": Check("benchmarks.gpu.step:step", 150),
    "kernels": Check("benchmarks.gpu.head:kernels", 90, {"TRITON_INTERPRET": "1"}),
    "head": Check("benchmarks.gpu.head:head_pass_ratios", 90),
    "shard": Check("benchmarks.gpu.processes:shard", 60),
    "ranks": Check("benchmarks.gpu.processes:ranks", 120),
    "engine": Check("benchmarks.gpu.processes:engine", 240),
}


def measured(settings: GPUCheck) -> Result:
    """Run the checks and return the table.  Raises Refusal without a CUDA device, and for an unknown check."""
    if unknown := set(settings.only) - CHECKS.keys():
        raise Refusal(f"--only {' '.join(sorted(unknown))}: no such check; there are {', '.join(CHECKS)}")
    if not settings.cpu and not torch.cuda.is_available():
        raise Refusal("no CUDA device: torch sees no GPU here; `scripts/gpu_check.sh --cpu` runs tiny sizes on the CPU")
    end, rows = time.monotonic() + TOTAL_SECONDS, list[CheckRow]()
    for name in settings.only or CHECKS:
        rows += run_check(name, min(CHECKS[name].seconds, end - time.monotonic()), cpu=settings.cpu)
    notes = tuple(f"{row.status}: {row.check}: {row.what}" for row in rows if row.status != "ok")
    shown = [replace(row, what=row.what[:LONGEST]) for row in rows]
    header = tuple(column.name for column in fields(CheckRow))
    return Result("opd on this machine", header, tuple(map(astuple, shown)), notes, {"rows": rows})


def exit_code(result: Result) -> int:
    """Return 1 if a check failed, else 0."""
    return int(any(row.status == "failed" for row in result.numbers["rows"]))


def run_check(name: str, seconds: float, *, cpu: bool) -> Sequence[CheckRow]:
    """Run a check in a process of its own and return its rows; a crash and a hang are a failed row."""
    if seconds < FEWEST_SECONDS:
        return [CheckRow(name, status="not run", what=f"the {TOTAL_SECONDS} s of all checks are over; --only {name}")]
    print(f"{name} ...", file=sys.stderr, flush=True)
    check = CHECKS[name]
    command = [sys.executable, "-m", "benchmarks.gpu", check.function, *(["cpu"] if cpu else [])]
    environment = {**os.environ, **(check.cpu_variables if cpu else {})}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        end_tree(process)
        return [CheckRow(name, status="failed", what=f"did not end within {seconds:.0f} s")]
    lines = output.rstrip().splitlines()
    if process.returncode or not lines or not lines[-1].startswith(RESULT):
        print(output, file=sys.stderr)
        why = f"exit code {process.returncode}: {lines[-1] if lines else 'no output'}"
        return [CheckRow(name, status="failed", what=why)]
    return [CheckRow(**values) for values in json.loads(lines[-1].removeprefix(RESULT))]


def end_tree(process: subprocess.Popen) -> None:
    """Kill a process and all that it started, also in other process groups."""
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        family = [*parent.children(recursive=True), parent]
        for member in family:
            member.kill()
        psutil.wait_procs(family, timeout=10)
