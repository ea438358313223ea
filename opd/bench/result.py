"""What the parts of the benchmark share: arms in turn on one clock, ratios, a table with its numbers."""

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
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}  # the second leaves out what others of the machine took


@dataclass(frozen=True)
class Timed:
    """How a part is timed."""

    threads: int = 1
    """Of torch."""
    clock: Clock = "wall"
    """cpu: seconds this process computed, without what others of a shared machine took; for one thread."""


@dataclass(frozen=True)
class Result:
    """One part's table, what it says below, and the numbers behind it."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    numbers: dict[str, Any] = field(default_factory=dict)  # json

    def show(self) -> None:
        """On the terminal."""
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
        """For a document."""
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
    after: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of each arm, round by round, after one round to warm up; `after` each, off the clock."""
    out = {name: list[float]() for name in arms}
    for turn in track(range(rounds + 1), "rounds", transient=True, console=Console(stderr=True)):
        for name, run in arms.items():
            seconds = by_events(run) if gpu else by_clock(run, clock)
            if turn:
                out[name].append(seconds)
            after()
    return out


def by_clock(run: Callable[[], object], clock: Clock) -> float:
    """Seconds of a call."""
    start = CLOCKS[clock]()
    run()
    return CLOCKS[clock]() - start


def by_events(run: Callable[[], object]) -> float:
    """Seconds between two events of a GPU's queue."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median [least, most]."""
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return f"{statistics.median(values):.{digits}f} [{low}, {high}]"


def ratio(over: Sequence[float], under: Sequence[float]) -> str:
    """Of two arms, round by round."""
    return spread([a / b for a, b in zip(over, under, strict=True)])


def versions(*names: str) -> dict[str, str]:
    """Of installed packages."""
    return {name: _version(name) for name in names}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def status(name: str) -> int:
    """A line of /proc/self/status, in bytes; ru_maxrss would start from the parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) << 10


def peak(run: Callable[[], object]) -> int:
    """Extra bytes of main memory at the widest moment of a call.  Linux."""
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    before = status("VmRSS")
    run()
    return status("VmHWM") - before
