"""Who sweeps the closed forms on a device: Triton, C or torch, the first that is there."""

import os
import shutil
from functools import cache
from importlib.util import find_spec

import torch


def fuses(device: torch.device) -> bool:
    """Whether the Triton kernels run: on a GPU; elsewhere only in Triton's interpreter, which is for tests."""
    return (device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1") and _triton()


def sweeper(device: torch.device) -> str:
    """Its name, for readers; C takes fp32 logits alone."""
    if fuses(device):
        return "triton"
    compiler = device.type == "cpu" and shutil.which(os.environ.get("CC", "cc"))
    return "C" if compiler else "torch"


@cache
def _triton() -> bool:
    return find_spec("triton") is not None
