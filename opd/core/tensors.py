"""Tensors inside values, `map_tensors(function, value)`, and in safetensors files, `save_tensors(tensors, path)`."""

import os
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from opd.core.disk import follow_umask

T = TypeVar("T")


def map_tensors(function: Callable[[Tensor], Tensor], value: T) -> T:
    """Return a value with `function` applied to every tensor in it: in dataclasses, tuples and mappings."""
    result: Any = value
    if isinstance(value, Tensor):
        result = function(value)
    elif isinstance(value, tuple):
        result = tuple(map_tensors(function, x) for x in value)
    elif isinstance(value, Mapping):
        result = {name: map_tensors(function, x) for name, x in value.items()}
    elif is_dataclass(value) and not isinstance(value, type):
        result = replace(value, **{f.name: map_tensors(function, getattr(value, f.name)) for f in fields(value)})
    return result


def all_finite(x: Tensor) -> bool:
    """Return whether a tensor has only finite numbers, without a second tensor of its size."""
    return not x.is_floating_point() or not x.numel() or bool(torch.stack(x.aminmax()).isfinite().all())


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors to a safetensors file, which appears under its name only once it is complete."""
    part = path.with_name(f"{path.name}.part")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, part)
    follow_umask(part)
    os.replace(part, path)
