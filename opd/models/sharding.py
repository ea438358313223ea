"""Sharding of a run's models over its processes, by torch's FSDP2: each process holds 1/N of every layer.

A layer's weights are gathered for its forward and its backward pass.  Gathering is a collective operation: every
process must run the same sharded modules in the same order, or all of them wait for ever.
"""

import contextlib
from collections.abc import Iterator

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from opd.core.errors import Refusal
from opd.core.tensors import full
from opd.models.load import backbone, base


def shard_student(student: nn.Module, model: PreTrainedModel | PeftModel, dtype: torch.dtype) -> None:
    """Shard a student: each layer by itself, and embeddings, last norm and LM head with the module `student`.

    The weights may be in main memory: `fully_shard` moves one layer at a time to the device of this process, shards it
    there, and frees the whole.  They keep their dtype (fp32 where they are trained) and gradients are reduced in fp32;
    layers compute in `dtype`.  Build the optimizer afterwards, because the parameters are replaced.
    """
    policy = MixedPrecisionPolicy()
    if dtype != torch.float32:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in sharded_layers(model):
        fully_shard(layer, mp_policy=policy)
    # The backward pass of the head follows its forward pass at once: the root's weights stay gathered in between.
    fully_shard(student, mp_policy=policy, reshard_after_forward=False)


def shard_frozen(model: PreTrainedModel | PeftModel, device: torch.device) -> None:
    """Shard the layers of a model that only scores, and move the remainder to the device of the shards.

    Its embeddings and its LM head stay whole, because the head is read outside the model's forward pass.
    """
    body, layers = backbone(model), sharded_layers(model)
    inside = {id(p) for layer in layers for p in layer.parameters()}
    for layer in layers:
        fully_shard(layer)
    fully_shard(body, ignored_params={p for p in body.parameters() if id(p) not in inside})
    for tensor in (*model.parameters(), *model.buffers()):
        if not isinstance(tensor, DTensor):
            tensor.data = tensor.to(device)


def sharded_layers(model: PreTrainedModel | PeftModel) -> list[nn.Module]:
    """Return the layers of a model.  Raises Refusal if it has none, or if processes could train different parts of one.

    The gradients of a layer are reduced together.  Experts that are modules of their own have none if no token reaches
    them, and then the processes would not agree on what to reduce.
    """
    layers: list[nn.Module] = [m for m in base(model).modules() if isinstance(m, GradientCheckpointingLayer)]
    kind = type(base(model)).__name__
    if not layers:
        raise Refusal(f"--shard: {kind} has no layers that transformers marks as such; leave it out")
    lists = [name for layer in layers for name, m in layer.named_modules() if isinstance(m, nn.ModuleList)]
    if any(name.rpartition(".")[2] == "experts" for name in lists):
        raise Refusal(f"--shard: the experts of {kind} are modules of their own, which FSDP2 does not shard; omit it")
    return layers


def is_sharded(module: nn.Module) -> bool:
    """Return whether a module is the root of sharded layers."""
    return isinstance(module, FSDPModule)


def gather_root(root: nn.Module) -> None:
    """Gather what a student holds outside its layers, for a forward pass of its layers outside its own.

    Its next backward pass frees it again.  A collective operation.
    """
    assert isinstance(root, FSDPModule)
    _initialize(root)
    root.unshard()


@contextlib.contextmanager
def whole(*modules: nn.Module) -> Iterator[None]:
    """Keep all weights of sharded modules on every process, for work in which processes take different steps.

    A collective operation at its start.  Modules that are not sharded are left alone.
    """
    parts: list[tuple[FSDPModule, bool]] = []
    for root in modules:
        if isinstance(root, FSDPModule):
            _initialize(root)
            parts += [(part, part is root) for part in root.modules() if isinstance(part, FSDPModule)]
    for part, is_root in parts:
        part.unshard()
        if not is_root:
            part.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for part, is_root in parts:
            part.reshard()
            if not is_root:
                part.set_reshard_after_forward(True, recurse=False)


def _initialize(root: FSDPModule) -> None:
    """Make a module the root of its layers; torch does so at the root's first forward pass, which is too late here."""
    root._get_fsdp_state()._lazy_init()


def whole_weights(model: nn.Module, *, main: bool) -> dict[str, Tensor]:
    """Return the state dict of a model with whole tensors, on the main process only.  A collective operation."""
    weights: dict[str, Tensor] = {}
    for name, x in model.state_dict().items():
        tensor = full(x)
        if main:
            weights[name] = tensor if tensor is x else tensor.cpu()
    return weights
