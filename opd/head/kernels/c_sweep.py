"""The sweep over rows in C, compiled at run time: one pass instead of ten in torch, with sums that are no less exact.

Without a compiler, or if the logits are not fp32 on a CPU, `torch_sweep.py` runs instead.
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

from opd.head.closed_forms import Sums

MIN_COLUMNS = 2048  # for fewer columns, the half second of compilation costs more than it saves
FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", "-shared", "-fPIC"]
NATIVE: tuple[list[str], ...] = (
    ["-march=native", "-mprefer-vector-width=512"],
    ["-march=native"],
    [],
)  # flags that a compiler may not know, tried in this order


@cache
def built(source: str = "sweep.c") -> ctypes.CDLL | None:
    """Compile a C file of this folder and load it; None without a C compiler."""
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "built.so")
        for native in NATIVE:
            command = [os.environ.get("CC", "cc"), *FLAGS, *native, str(Path(__file__).parent / source), "-o", out]
            try:
                if subprocess.run([*command, "-lm"], capture_output=True).returncode == 0:
                    return ctypes.CDLL(out)  # stays loaded after its file is deleted
            except OSError:
                return None
    return None


@cache
def _sweep() -> Callable[..., None] | None:
    library = built()
    if library is None:
        return None
    library.sweep.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 3
    library.sweep.restype = None
    return library.sweep


def over_threads(rows: int, run_rows: Callable[[int, int], object]) -> None:
    """Call `run_rows(first, last)` on contiguous parts of the rows, one part per torch thread."""
    threads = min(torch.get_num_threads(), max(1, rows))
    ends = [rows * k // threads for k in range(threads + 1)]
    if threads == 1:
        run_rows(0, rows)
    else:
        list(_pool(threads).map(run_rows, ends[:-1], ends[1:]))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


def runs(student: Tensor, teacher: Tensor) -> bool:
    """Return True if `sweep_` supports these logits and is faster than torch."""
    return (
        student.shape[-1] >= MIN_COLUMNS
        and all(x.device.type == "cpu" and x.dtype == torch.float32 and x.is_contiguous() for x in (student, teacher))
        and _sweep() is not None
    )


def sweep_(student: Float[Tensor, "n V"], teacher: Float[Tensor, "n V"], ids: Int[Tensor, " n"], out: Sums) -> None:
    """Fill the sums and turn the student's logits into e, on torch's threads; the teacher's logits are only read."""
    sweep = _sweep()
    assert sweep is not None and student.is_contiguous() and teacher.is_contiguous()
    (n, width), ids = student.shape, ids.long().contiguous()
    assert int(ids.min() if n else 0) >= 0 and int(ids.max() if n else 0) < width
    sums = student.new_empty(7, n)

    def part(first: int, last: int) -> None:
        addresses = [x[first:last].data_ptr() for x in (student, teacher, ids)]
        sweep(*addresses, sums[:, first:].data_ptr(), last - first, width, n)

    over_threads(n, part)
    for column, values in zip((out.e, out.eu, out.euv, out.f, out.fv, out.u, out.v), sums, strict=True):
        column.copy_(values)
