"""Shared parts of the benchmarks: timing of arms in turn, ratios, and result tables."""

import ctypes
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

Clock = Literal["wall", "cpu"]
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}  # "cpu" excludes time of other processes


@dataclass(frozen=True)
class Timed:
    """Settings for timing."""

    threads: int = 1
    """Number of torch threads."""
    clock: Clock = "wall"
    """Clock.  cpu counts only this process's processor time, for shared machines; use it with 1 thread."""


@dataclass(frozen=True)
class Result:
    """The table of a benchmark, the notes below it, and the raw numbers."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    numbers: dict[str, Any] = field(default_factory=dict)  # raw values for json

    def show(self) -> None:
        """Print the table and the notes on the terminal."""
        table = Table(title=self.title)
        for i, column in enumerate(self.header):
            table.add_column(column, justify="right" if i else "left", no_wrap=True)
        for row in self.rows:
            table.add_row(*row)
        console = Console(width=max(130, Console().width), markup=False, highlight=False)
        console.print(table)
        for note in self.notes:
            console.print(note)

    def markdown(self) -> str:
        """Return the table and the notes as Markdown."""
        line = lambda cells: f"| {' | '.join(cells)} |"
        rule = "|".join(("---", *("---:",) * (len(self.header) - 1)))
        table = [line(self.header), f"|{rule}|", *map(line, self.rows)]
        return "\n".join((f"### {self.title}", "", *table, "", *(f"{note}  " for note in self.notes), ""))


def in_turn(
    arms: dict[str, Callable[[], object]],
    *,
    rounds: int,
    clock: Clock,
    gpu: bool = False,
    clean_up: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Run the arms in turn and return the seconds of each arm by round, after a warm-up round.

    `clean_up` runs after each arm and is not timed.
    """
    out = {name: list[float]() for name in arms}
    for turn in track(range(rounds + 1), "rounds", transient=True, console=Console(stderr=True)):
        for name, run in arms.items():
            seconds = by_events(run) if gpu else by_clock(run, clock)
            if turn:
                out[name].append(seconds)
            clean_up()
    return out


def by_clock(run: Callable[[], object], clock: Clock) -> float:
    """Return the seconds of a call."""
    start = CLOCKS[clock]()
    run()
    return CLOCKS[clock]() - start


def by_events(run: Callable[[], object]) -> float:
    """Return the seconds of a call on a GPU, between two CUDA events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Format values as `median [min, max]`."""
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return f"{statistics.median(values):.{digits}f} [{low}, {high}]"


def ratio(over: Sequence[float], under: Sequence[float]) -> str:
    """Format the ratios of two arms by round, as `median [min, max]`."""
    return spread([a / b for a, b in zip(over, under, strict=True)])


def versions(*names: str) -> dict[str, str]:
    """Return the versions of installed packages; "absent" for packages that are not installed."""
    return {name: _version(name) for name in names}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def status(name: str) -> int:
    """Return a memory value of /proc/self/status in bytes.

    `ru_maxrss` is not used, because it starts from the parent's value.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) << 10


def peak(run: Callable[[], object]) -> int:
    """Return the peak extra main memory of a call, in bytes.  Linux with glibc only."""
    ctypes.CDLL(None).malloc_trim(0)  # memory that was freed before must not serve the call
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak
    resident = status("VmRSS")
    run()
    return status("VmHWM") - resident
