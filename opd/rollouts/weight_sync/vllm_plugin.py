"""Weight transfer to vLLM, by vLLM's four calls: init, start, update, finish.

vLLM has backends for GPUs (nccl, ipc).  This module adds the backend `opd`, for any device.  It passes tensors by
reference to an engine in the same process, or safetensors files to a server that shares a folder.  vLLM finds it by
this package's entry point `vllm.general_plugins`, in servers too.  Start those with `--weight-transfer-config`.
"""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as Adapted
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from opd.core.tensors import full
from opd.models.load import base

BACKEND = "opd"


def register() -> None:
    """Register the backend with vLLM.  vLLM calls this in each of its processes."""
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    with contextlib.suppress(ValueError):  # it is registered already
        WeightTransferEngineFactory.register_engine(BACKEND, "opd.rollouts.weight_sync.receiver", "Receiver")


@dataclass
class Opened:
    """The init message of the backend, which is empty."""


@dataclass
class Update:
    """New weights under their checkpoint names: as tensors, or as files that hold them."""

    weights: list[tuple[str, Tensor]] = field(default_factory=list)
    files: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.weights
        for file in self.files:
            yield from load_file(file).items()


@torch.no_grad()
def weights(model: PreTrainedModel | PeftModel) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight under its checkpoint name.  Adapters are merged into copies; a tied weight occurs once.

    A sharded weight is gathered as it is reached, so that all processes must iterate together, and the model is never
    whole in the memory of one.  Weights are yielded layer by layer, because a checkpoint may split or join those of a
    layer (experts, for example).
    """
    plain = base(model)
    for _, layer in groupby(_merged(model), lambda named: _layer(named[0])):
        yield from revert_weight_conversion(plain, {name: full(x) for name, x in layer}).items()


def _layer(name: str) -> str:
    """Return the name of a parameter up to the number of its layer; empty outside numbered layers."""
    match = re.match(r".*?\.\d+(?=\.)", name)
    return match[0] if match else ""


def _merged(model: PreTrainedModel | PeftModel) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters of the model below adapters, which are added to copies of the weights."""
    plain = base(model)
    adapted = {name: m for name, m in plain.named_modules() if isinstance(m, Adapted)}
    for name, p in plain.named_parameters():
        layer_name, _, parameter = name.rpartition(".base_layer.")
        if layer_name:
            layer, value = adapted[layer_name], p.detach()
            if parameter == "weight":
                deltas = [layer.get_delta_weight(adapter).float() for adapter in layer.active_adapters]
                value = sum(deltas, start=value.float()).to(p.dtype)
            yield f"{layer_name}.{parameter}", value
        elif not any(name.startswith(f"{inside}.") for inside in adapted):
            yield name, p.detach()
