"""Tensors of a checkpoint's training state: optimizer state and what a run carries from step to step."""

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from opd.core.tensors import save_tensors


def save_optimizer(state: Mapping[str, Mapping[str, Tensor]], path: Path) -> None:
    """Save optimizer state, by parameter name, as safetensors."""
    save_tensors({f"{name}/{key}": x for name, row in state.items() for key, x in row.items()}, path)


def load_optimizer(path: Path) -> dict[str, dict[str, Tensor]]:
    """Load the optimizer state that `save_optimizer` wrote."""
    out: dict[str, dict[str, Tensor]] = {}
    for key, x in load_file(path).items():
        name, field = key.rsplit("/", 1)
        out.setdefault(name, {})[field] = x
    return out


def save_memory(memory: Mapping[str, Tensor], folder: Path) -> None:
    """Save the run's memory between steps; write no file if it is empty."""
    if memory:
        save_tensors(memory, folder / "memory.safetensors")


def load_memory(folder: Path) -> dict[str, Tensor]:
    """Load the memory that `save_memory` wrote; return an empty dict if the file is missing."""
    path = folder / "memory.safetensors"
    return load_file(path) if path.is_file() else {}
