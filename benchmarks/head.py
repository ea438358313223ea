"""Benchmark of the head pass against a naive version and other libraries: `python -m benchmarks.head --help`.

A process runs all arms in turn, round after round, on the same tensors.  Ratios are medians over rounds, so that noise
of a shared machine affects all arms equally.  Peak memory is measured in a fresh process for each arm.
"""

import json
import statistics
import subprocess
import sys
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import tyro

from benchmarks.case import Case, Shape
from benchmarks.peers import ALWAYS, ARMS, MatmulFloor, naive
from benchmarks.result import Result, in_turn, peak, ratio, versions
from opd.head.backend import backend_name


def main(shape: Shape) -> None:
    """Measure all arms, print the table, and write json if `shape.json` is set."""
    if shape.peak_of:
        torch.set_num_threads(shape.threads)
        print(extra_memory(shape))
        return
    table = measured(shape)
    table.show()
    if shape.json is not None:
        shape.json.write_text(json.dumps(table.numbers, indent=1))


def measured(shape: Shape) -> Result:
    """Measure time, memory and error of every arm.  Raises ValueError for an unknown arm."""
    torch.set_num_threads(shape.threads)
    if unknown := set(shape.arms) - set(ARMS):
        raise ValueError(f"--arms {' '.join(sorted(unknown))}: unknown; there are {', '.join(ARMS)}")
    case = Case.of(shape)
    arms, refused = runnable(case, shape)
    seconds = in_turn(
        {name: partial(ARMS[name], case, shape) for name in arms},
        rounds=shape.rounds,
        clock=shape.clock,
        gpu=shape.device == "cuda",
        clean_up=case.take_gradients,
    )
    rows: dict[str, dict[str, Any]] = {name: {"seconds": seconds[name]} for name in arms}
    for name in arms:
        if shape.memory and name != "floor":
            rows[name]["peak_bytes"] = peak_in_new_process(name, shape)
        if shape.error_tokens and name != "floor":
            rows[name]["error"] = errors(name, case, shape)
    return result(rows, refused, shape)


def runnable(case: Case, shape: Shape) -> tuple[list[str], dict[str, str]]:
    """Return the arms that run here, tried on four tokens, and the reasons why the others do not."""
    fine, refused = [], {}
    tiny = case.first_tokens(4, case.states.dtype)
    for name in shape.arms or ARMS:
        try:
            MatmulFloor()(tiny, shape) if name == "floor" else ARMS[name](tiny, shape)
        except (ImportError, RuntimeError, TypeError) as error:
            refused[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        else:
            fine.append(name)
    return fine, refused


def errors(name: str, case: Case, shape: Shape) -> dict[str, float]:
    """Return the relative error of loss and gradients compared with float64 on the same inputs."""
    exact = case.first_tokens(shape.error_tokens, torch.float64)
    naive_shape = replace(shape, objective=ALWAYS.get(name, shape.objective))
    expected = [naive(exact, naive_shape), *exact.take_gradients()]
    float_case = case.first_tokens(shape.error_tokens, case.states.dtype)
    outputs = [ARMS[name](float_case, shape), *float_case.take_gradients()]
    distance = lambda x, y: float((x.double() - y).norm() / y.norm())
    return dict(zip(("loss", "states", "weight"), map(distance, outputs, expected), strict=False))


def extra_memory(shape: Shape) -> int:
    """Return the peak extra memory of an arm's forward and backward in this process, in bytes."""
    case = Case.of(shape)
    if shape.device == "cpu":
        return peak(lambda: ARMS[shape.peak_of](case, shape))
    torch.cuda.reset_peak_memory_stats()
    allocated = torch.cuda.memory_allocated()
    ARMS[shape.peak_of](case, shape)
    return torch.cuda.max_memory_allocated() - allocated


def peak_in_new_process(name: str, shape: Shape) -> int:
    """Run `extra_memory` in a new process and return its result, in bytes."""
    same = ("tokens", "vocabulary", "student", "teacher", "chunk", "objective", "threads", "dtype", "device")
    flags = [flag for field in same for flag in (f"--{field}", str(getattr(shape, field)))]
    command = [sys.executable, "-m", "benchmarks.head", *flags, *(["--frozen"] if shape.frozen else [])]
    command += ["--rounded"] if shape.rounded else []
    return int(subprocess.run([*command, "--peak-of", name], capture_output=True, text=True, check=True).stdout)


def result(rows: dict, refused: dict[str, str], shape: Shape) -> Result:
    """Return the table with the versions and arguments."""
    header = ("arm", "seconds", "of floor", "ours faster by", "peak MB", "of naive's", "error: loss, dh, dW")
    table = []
    for name, row in rows.items():
        naive_peak = rows.get("naive", {}).get("peak_bytes")
        ours = rows.get("ours")
        table.append(
            (
                name,
                f"{statistics.median(row['seconds']):.3g}",
                ratio(row["seconds"], rows["floor"]["seconds"]) if "floor" in rows else "",
                ratio(row["seconds"], ours["seconds"]) if ours else "",
                f"{row['peak_bytes'] / 2**20:.0f}" if "peak_bytes" in row else "",
                f"1 / {naive_peak / row['peak_bytes']:.1f}" if naive_peak and "peak_bytes" in row else "",
                " ".join(f"{x:.0e}" for x in row.get("error", {}).values()),
            )
        )
    packages = versions("opd", "torch", "trl", "liger-kernel", "triton")
    head = "frozen head" if shape.frozen else "trained head"
    about = f"{head}, {shape.objective}, N={shape.tokens} V={shape.vocabulary} H={shape.student}/{shape.teacher}"
    notes = [f"{name} cannot run here: {reason}" for name, reason in refused.items()]
    clock = "events of the GPU" if shape.device == "cuda" else f"{shape.clock} clock"
    backend = backend_name(torch.device(shape.device))
    notes.append(
        f"medians [min, max] of {shape.rounds} alternating rounds, {clock}; {backend} sweeps; {shape}; {packages}"
    )
    numbers = {"shape": vars(shape) | {"json": str(shape.json)}, "versions": packages, "rows": rows, "refused": refused}
    return Result(f"head pass, {about}, chunk {shape.chunk}", header, tuple(table), tuple(notes), numbers)


if __name__ == "__main__":
    main(tyro.cli(Shape, description=__doc__))
