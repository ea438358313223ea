"""Checks of a model's weight files before they load: each is here, is complete, and holds floats."""

import json
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from opd.core.errors import first_line
from opd.data import hub
from opd.data.hub import Missing
from opd.models.source import ModelSource

FLOATS = ("F64", "F32", "F16", "BF16")  # names of dtypes in a safetensors file


def require(source: ModelSource) -> None:
    """Fetch the missing weight files of a model, and check their headers.

    Raises Missing if its weights are not complete safetensors files, or are quantised and config.json does not say how.
    """
    folder = Path(source.folder)
    names = _names(folder, "model" if source.base is None else "adapter_model")
    absent = [name for name in names if not (folder / name).is_file()]
    present = [path.name for path in folder.iterdir()]
    if absent and source.repository is not None and not any(name.endswith(hub.PICKLES) for name in present):
        hub.fetch(source.repository, absent)
    elif absent:
        raise Missing(hub.no_safetensors(absent[0], present))
    settings = {} if source.base is not None else json.loads((folder / "config.json").read_text())
    is_quantized = any(settings.get(key) for key in ("quantization_config", "compression_config"))
    for name in names:
        integers = _tensors_without_floats(folder / name)
        if integers and not is_quantized:
            tensor, dtype = integers[0]
            raise Missing(
                f"{name} holds {len(integers)} weights that are no floats, such as {tensor} ({dtype}), and config.json "
                "has no quantization_config that says how to read them; name the model before its quantisation"
            )


def _names(folder: Path, stem: str) -> list[str]:
    """Return the names of a model's weight files: those of its index, if it has one."""
    index = folder / f"{stem}.safetensors.index.json"
    if not index.is_file():
        return [f"{stem}.safetensors"]
    try:
        names: Iterable[str] = set(map(str, json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Missing(f"its {index.name} is no index of weights ({first_line(error)}); download it again") from error
    return sorted(names)


def _tensors_without_floats(file: Path) -> list[tuple[str, str]]:
    """Return the names and dtypes of weights that are no floats; buffers, such as masks, may be integers."""
    try:
        with safe_open(file, "pt") as tensors:
            dtypes = {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        reason = first_line(error)
        raise Missing(f"{file.name} is not a complete safetensors file ({reason}); download it again") from error
    is_weight = lambda name: name.endswith("weight") or ".lora_" in name
    return [(name, dtype) for name, dtype in dtypes.items() if dtype not in FLOATS and is_weight(name)]
