"""Writing of safetensors files."""

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from opd.core.disk import umask


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors to a safetensors file, which appears under its name only once it is complete.

    The file gets the mode of the umask; safetensors alone would make it readable by its owner only.
    """
    part = path.with_name(f"{path.name}.part")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, part)
    part.chmod(0o666 & ~umask())
    os.replace(part, path)
