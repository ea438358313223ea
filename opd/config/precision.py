"""Defaults that depend on the machine: precision, device and memory for logits.

torch is imported by the functions, not by the module: it takes longer than all else that reading flags needs.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Precision = Literal["fp32", "bf16"]


def dtype_of(precision: Precision) -> "torch.dtype":
    """Return the dtype of a precision."""
    import torch

    return torch.bfloat16 if precision == "bf16" else torch.float32


_ASSUMED: ContextVar[bool] = ContextVar("assumed GPU", default=False)


@contextlib.contextmanager
def assumed_gpu() -> Iterator[None]:
    """Take the defaults of a machine with a GPU in the block, for a run that is only planned here."""
    token = _ASSUMED.set(True)
    try:
        yield
    finally:
        _ASSUMED.reset(token)


def has_gpu() -> bool:
    """Return whether torch can compute on an NVIDIA or AMD GPU here, or is assumed to."""
    import torch

    return _ASSUMED.get() or torch.cuda.is_available()


def default_precision() -> Precision:
    """Return bf16 on a GPU, fp32 on a CPU: few CPUs compute bf16 faster."""
    return "bf16" if has_gpu() else "fp32"


def default_device() -> str:
    """Return cuda if there is a GPU, else cpu."""
    return "cuda" if has_gpu() else "cpu"


def default_chunk_mb() -> int:
    """Return 3072 on a GPU, 256 on a CPU: the memory for logits, in MB.

    It holds the logits of some thousand tokens on a GPU and of some hundred on a CPU.  More memory gains no speed.
    """
    return 3072 if has_gpu() else 256
