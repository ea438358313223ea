"""The sweep over rows in C, compiled where it runs: one pass where torch makes ten, with sums that are no less exact.

Where there is no compiler, or the logits are not fp32 on a CPU, `rows.py` does the same in torch.
"""

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from opd.head.sums import Sums

LEAST = 2048  # columns below which the compiler's half a second is not earned back
FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", "-shared", "-fPIC"]
NATIVE: tuple[list[str], ...] = (
    ["-march=native", "-mprefer-vector-width=512"],
    ["-march=native"],
    [],
)  # what a compiler may know


@cache
def built(source: str = "sweep.c") -> ctypes.CDLL | None:
    """The compiled functions of a file beside this one; None without a C compiler."""
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "built.so")
        for native in NATIVE:
            command = [os.environ.get("CC", "cc"), *FLAGS, *native, str(Path(__file__).parent / source), "-o", out]
            try:
                if subprocess.run([*command, "-lm"], capture_output=True).returncode == 0:
                    return ctypes.CDLL(out)  # stays open without its file
            except OSError:
                return None
    return None


@cache
def _sweep() -> Callable[..., None] | None:
    found = built()
    if found is None:
        return None
    found.sweep.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 3
    found.sweep.restype = None
    return found.sweep


def over_threads(rows: int, part: Callable[[int, int], object]) -> None:
    """`part(first, last)` of the rows, shared out over torch's threads."""
    threads = min(torch.get_num_threads(), max(1, rows))
    ends = [rows * k // threads for k in range(threads + 1)]
    if threads == 1:
        part(0, rows)
    else:
        list(_pool(threads).map(part, ends[:-1], ends[1:]))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


def runs(student: Tensor, teacher: Tensor) -> bool:
    """Whether `sweep_` takes these logits, and pays."""
    return (
        student.shape[-1] >= LEAST
        and all(x.device.type == "cpu" and x.dtype == torch.float32 and x.is_contiguous() for x in (student, teacher))
        and _sweep() is not None
    )


def sweep_(student: Float[Tensor, "n V"], teacher: Float[Tensor, "n V"], ids: Int[Tensor, " n"], out: Sums) -> None:
    """Fill the sums; the student's logits become e, the teacher's stay.  Rows are shared out over torch's threads."""
    sweep = _sweep()
    assert sweep is not None and student.is_contiguous() and teacher.is_contiguous()
    (n, width), ids = student.shape, ids.long().contiguous()
    assert int(ids.min() if n else 0) >= 0 and int(ids.max() if n else 0) < width
    sums = student.new_empty(7, n)

    def part(first: int, last: int) -> None:
        at = [x[first:last].data_ptr() for x in (student, teacher, ids)]
        sweep(*at, sums[:, first:].data_ptr(), last - first, width, n)

    over_threads(n, part)
    for whole, row in zip((out.e, out.eu, out.euv, out.f, out.fv, out.u, out.v), sums, strict=True):
        whole.copy_(row)
