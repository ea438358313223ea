"""Tensors inside values, `map_tensors(function, value)`, and in files, `save_tensors` and `load_tensors`."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from opd.core.disk import follow_umask

T = TypeVar("T")
DIGESTS = "sha256"  # key of the digests in the metadata of a file: one, because safetensors writes keys in any order


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


def placed(device: torch.device | str) -> torch.device:
    """Return a device as the tensors on it name it: "cpu" for "cpu:0", "cuda:0" for "cuda"."""
    return torch.empty(0, device=device).device


def full(x: Tensor) -> Tensor:
    """Return a tensor as it is on one device: that of all processes if it is sharded, by a collective operation."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def local(x: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds."""
    return x.to_local() if isinstance(x, DTensor) else x


def all_finite(x: Tensor) -> bool:
    """Return whether a tensor, or this process's part of it, has only finite numbers; needs no second tensor."""
    x = local(x)
    return not x.is_floating_point() or not x.numel() or bool(torch.stack(x.aminmax()).isfinite().all())


def save_tensors(tensors: Mapping[str, Tensor], path: Path, *, sealed: bool = False) -> None:
    """Write tensors to a safetensors file, which appears under its name only once it is complete.

    A `sealed` file holds the digest of each tensor, which `load_tensors` compares.
    """
    part = path.with_name(f".part-{path.name}")
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {DIGESTS: json.dumps({name: _digest(x) for name, x in plain.items()})} if sealed else None
    shutil.rmtree(part, ignore_errors=True)  # a killed writer's
    part.mkdir()
    try:  # in a folder, because save_file itself writes to a file with a random name beside its target
        save_file(plain, part / path.name, metadata)
        follow_umask(part / path.name)
        os.replace(part / path.name, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def load_tensors(path: Path, names: Sequence[str] = ()) -> dict[str, Tensor]:
    """Load the named tensors that a safetensors file has, or all; others, some large, are not read.

    Raises ValueError if a tensor of a sealed file is missing or differs from its digest.
    """
    with safe_open(path, "pt") as file:
        saved = set(file.keys())
        seals = json.loads((file.metadata() or {}).get(DIGESTS, "{}"))
        tensors = {name: file.get_tensor(name) for name in (names or sorted(saved)) if name in saved}
    for name in (set(names) or saved | seals.keys()) & (saved | seals.keys()) if seals else ():
        if name not in tensors or _digest(tensors[name]) != seals.get(name):
            raise ValueError(f"{name} is not what was written")
    return tensors


def _digest(x: Tensor) -> str:
    """Return a hash of a tensor's type, shape and bytes."""
    content = x.reshape(-1).view(torch.uint8).numpy()
    digest = hashlib.sha256(f"{x.dtype} {list(x.shape)}".encode())
    digest.update(content.data)
    return digest.hexdigest()
