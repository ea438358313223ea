"""The parts of the benchmark by name, and all of them with sizes for two CPU cores."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

from benchmarks.result import Clock, Result
from opd.core.disk import OutputFile, has_mark

MARK = "python -m benchmarks"  # stands in every file of the folder
FILES = ("bench.md", "bench.json", "bench.png")


@dataclass(frozen=True)
class All:
    """Settings of `python -m benchmarks all`: the output folder and the number of rounds."""

    out: Path = Path("outputs/bench")
    """Folder of bench.md, bench.json and bench.png."""
    overwrite: bool = False
    """Replace files of these names that an earlier benchmark did not write."""
    clock: Clock = "wall"
    """Clock.  cpu counts only this process's processor time, for shared machines; use it with 1 thread."""
    head_rounds: int = 15
    """Alternating rounds of the head pass."""
    step_rounds: int = 6
    """Alternating training steps."""
    rollout_rounds: int = 3
    """Alternating rounds of rollouts."""


@dataclass(frozen=True)
class BenchmarkPart:
    """One part of the benchmark; its module is imported when it is used, because it brings what it is compared with."""

    module: str
    kind: str  # its settings, a class of the module
    about: str

    def settings(self) -> Any:
        """Return the class of its settings."""
        return vars(import_module(self.module))[self.kind]


PARTS: dict[str, BenchmarkPart] = {
    "head": BenchmarkPart("benchmarks.head", "Shape", "The head pass beside naive torch and the peers."),
    "step": BenchmarkPart("benchmarks.step", "Step", "A training step, rollouts included, beside TRL's."),
    "rollouts": BenchmarkPart("benchmarks.rollouts", "Ragged", "Ragged rollouts beside model.generate."),
    "async": BenchmarkPart(
        "benchmarks.overlap",
        "Overlap",
        "Rollouts in a worker process beside rollouts in turns: speed, and what is learnt.",
    ),
    "packing": BenchmarkPart(
        "benchmarks.packing", "Packing", "Rows of like length beside packed ones, over a pool of rollouts."
    ),
    "growth": BenchmarkPart("benchmarks.growth", "Growth", "Time and memory against N, V, k, batch, length."),
    "architectures": BenchmarkPart(
        "benchmarks.architectures",
        "Architectures",
        "Two steps of every architecture of transformers beside a plain forward.",
    ),
    "gpu": BenchmarkPart(
        "benchmarks.gpu.check", "GPUCheck", "Checks of opd on the GPUs of this machine, in less than ten minutes."
    ),
    "all": BenchmarkPart(
        "benchmarks.command", "All", "Every part but architectures and gpu; its tables, numbers and plot in a folder."
    ),
}


def run_part(settings: object) -> int:
    """Run the part whose settings these are, and show its table; return the exit code."""
    from benchmarks import architectures, growth, head, overlap, packing, rollouts, step
    from benchmarks.gpu import check

    match settings:
        case head.Shape():
            head.main(settings)
        case step.Step():
            step.measured(settings).show()
        case rollouts.Ragged():
            rollouts.measured(settings).show()
        case overlap.Overlap():
            for result in overlap.measured(settings):
                result.show()
        case packing.Packing():
            packing.measured(settings).show()
        case growth.Growth():
            growth.measured(settings).show()
        case architectures.Architectures():
            return architectures.sweep(settings)
        case check.GPUCheck():
            result = check.measured(settings)
            result.show()
            return check.exit_code(result)
        case All():
            run_all(settings)
    return 0


def run_all(settings: All) -> None:
    """Run the parts, show each table as it is there, write the folder."""
    from benchmarks import growth, head, rollouts, step
    from benchmarks.case import Shape

    files = {
        name: OutputFile(path=settings.out / name, ours=has_mark(MARK), overwrite=settings.overwrite) for name in FILES
    }
    for file in files.values():
        file.check()
    fast_arms, rounds = ("floor", "ours", "naive"), settings.head_rounds
    shapes = [
        Shape(rounds=rounds, clock=settings.clock),
        Shape(chunk=256, rounds=rounds, clock=settings.clock, memory=False, arms=fast_arms),
        Shape(frozen=True, rounds=rounds, clock=settings.clock, memory=False, arms=fast_arms),
        # These measure peak memory, and show that it does not grow with N.
        Shape(tokens=4096, rounds=1, clock=settings.clock, error_tokens=0, arms=("ours", "naive")),
        Shape(chunk=256, tokens=4096, rounds=1, clock=settings.clock, error_tokens=0, arms=("ours", "naive")),
    ]
    parts: list[Callable[[], Result]] = [lambda shape=shape: head.measured(shape) for shape in shapes]  # type: ignore[misc]
    parts += [
        lambda: step.measured(step.Step(rounds=settings.step_rounds, clock=settings.clock)),
        lambda: rollouts.measured(rollouts.Ragged(rounds=settings.rollout_rounds, clock=settings.clock)),
        lambda: growth.measured(growth.Growth(clock=settings.clock)),
    ]
    results: list[Result] = []
    for part in parts:
        results.append(part())
        results[-1].show()
        files["bench.md"].write("\n".join([f"<!-- {MARK} -->", *(result.markdown() for result in results)]))
        numbers = {"generator": MARK, **{result.title: result.numbers for result in results}}
        files["bench.json"].write(json.dumps(numbers, indent=1, default=str))
    with files["bench.png"].open() as picture:
        plot(results[0], results[-1], picture)
    print(settings.out)


def plot(arms: Result, grown: Result, file: BinaryIO) -> None:
    """Draw the head pass of every arm beside the floor, and the curves, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
    rows = arms.numbers["rows"]
    median = lambda values: sorted(values)[len(values) // 2]
    base = median(rows["floor"]["seconds"])
    names = list(rows)[::-1]
    axes[0, 0].barh(names, [median(rows[name]["seconds"]) / base for name in names], color="#4477aa")
    axes[0, 0].axvline(1, color="black", lw=0.8)
    axes[0, 0].set(title=f"head pass, N={arms.numbers['shape']['tokens']}", xlabel="time over the matmuls alone")
    points = grown.numbers["points"]

    def curve(axis: Any, names: Sequence[str], key: Callable[[dict], float], label: str) -> None:
        for name in names:
            curve_points = [p for p in points if p["curve"] == name]
            axis.plot([p["x"] for p in curve_points], [key(p) for p in curve_points], "o-", label=name)
        axis.set(xlabel=names[0].split(", ")[0], ylabel=label)
        axis.set_ylim(0, 1.1 * axis.get_ylim()[1])
        axis.grid(alpha=0.25)
        axis.legend(frameon=False)

    seconds = lambda p: median(p["seconds"])
    curve(axes[0, 1], ("N, head pass", "N, naive"), seconds, "seconds")
    curve(axes[0, 2], ("N, head pass", "N, naive"), lambda p: p["peak_bytes"] / 2**20, "peak extra memory, MB")
    curve(axes[1, 0], ("V, head pass",), seconds, "seconds")
    curve(axes[1, 1], ("k, vopd-topk",), seconds, "seconds")
    curve(axes[1, 2], ("batch, update", "length, update"), seconds, "seconds")
    axes[1, 2].set(xlabel="responses, or tokens of each")
    figure.savefig(file, format="png", dpi=110, metadata={"Software": MARK})
    plt.close(figure)
