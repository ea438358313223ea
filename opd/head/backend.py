"""Selection of the implementation that computes the closed forms: Triton, C or torch, the first that is available."""

import os
import shutil
from functools import cache
from importlib.util import find_spec

import torch


def uses_triton(device: torch.device) -> bool:
    """Return True if the Triton kernels run: on a GPU, or in Triton's interpreter (tests only)."""
    return (device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1") and _triton()


def backend_name(device: torch.device) -> str:
    """Return the name of the implementation, for display.  C supports fp32 logits only."""
    if uses_triton(device):
        return "triton"
    compiler = device.type == "cpu" and shutil.which(os.environ.get("CC", "cc"))
    return "C" if compiler else "torch"


@cache
def _triton() -> bool:
    return find_spec("triton") is not None
