"""Activations: the bytes that a forward pass keeps for its backward pass, measured on an outline of the model."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from transformers.modeling_layers import GradientCheckpointingLayer

from opd.models.load import Model, backbone
from opd.models.outline import fake_tensors

SHORT, LONG = 16, 48  # tokens; lengths of the two rows whose difference gives the bytes per token


@dataclass(frozen=True)
class Activations:
    """The bytes of a model's forward pass."""

    token: float  # kept for the backward pass, for each token
    inputs: float  # of that, what enters the layers: all that gradient checkpointing keeps
    copies: int  # of the weights, in the compute dtype


@lru_cache(maxsize=16)
def activations(outline: Model, autocast: torch.dtype) -> Activations:
    """Measure the activations of an outline; `autocast` is the dtype of its products, fp32 for that of its weights.

    Of a stack of equal layers, only two are measured.
    """
    model = copy.deepcopy(outline)  # peft changes the parameters of experts in a forward pass
    stack = _equal_layers(backbone(model))
    count = len(stack)
    del stack[2:]
    sizes = _sizes(model, autocast)
    if count > 2:
        del stack[1:]
        sizes = [one + (count - 1) * (two - one) for one, two in zip(_sizes(model, autocast), sizes, strict=True)]
    short, short_inputs, long, long_inputs = sizes
    token, inputs = ((x / (LONG - SHORT)) for x in (long - short, long_inputs - short_inputs))
    return Activations(token, inputs, max(0, int(short - SHORT * token)))


def _equal_layers(body: nn.Module) -> nn.ModuleList:
    """Return the list of a model's layers if all have the same parts and parameters, else an empty one."""
    lists = [m for m in body.modules() if isinstance(m, nn.ModuleList) and len(m)]
    stacks = [m for m in lists if all(isinstance(layer, GradientCheckpointingLayer) for layer in m)]
    parameters = lambda layer: [(name, p.shape, p.dtype, p.requires_grad) for name, p in layer.named_parameters()]
    if len(stacks) != 1 or len({f"{layer} {parameters(layer)}" for layer in stacks[0]}) > 1:
        return nn.ModuleList()
    return stacks[0]


def _sizes(model: Model, autocast: torch.dtype) -> list[int]:
    """Return the results of `saved_bytes` for the short row and for the long one."""
    with fake_tensors(backbone(model)) as tensors:
        return [size for tokens in (SHORT, LONG) for size in saved_bytes(model, tokens, autocast, tensors)]


@lru_cache(maxsize=16)
def computing(outline: Model, dtype: torch.dtype) -> Model:
    """Return an outline whose weights have the compute dtype, as sharded layers have while they are gathered."""
    model = copy.deepcopy(outline)
    nn.Module.to(model, dtype=dtype)
    return model


def saved_bytes(
    model: Model, tokens: int, autocast: torch.dtype, tensors: Mapping[str, Tensor] = MappingProxyType({})
) -> tuple[int, int]:
    """Return the bytes that a forward pass over one row saves, and the bytes of the inputs of its layers.

    `tensors` replaces the parameters and buffers of the model's backbone, by name.
    """
    body, saved, inputs = backbone(model), dict[int, torch.UntypedStorage](), list[int]()
    own = dict(body.named_parameters()) | dict(tensors)
    weights = {p.untyped_storage()._cdata for p in own.values()}  # fake tensors have no data_ptr

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in weights:
            saved[storage._cdata] = storage
        return x

    def enter(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs.append(args[0].nbytes)

    layers = [m for m in body.modules() if isinstance(m, GradientCheckpointingLayer)]
    handles = [layer.register_forward_pre_hook(enter) for layer in layers]
    device = next(iter(own.values())).device
    ids = torch.ones(1, tokens, dtype=torch.long, device=device)
    try:
        with (
            torch.enable_grad(),
            torch.autocast(device.type, autocast, enabled=autocast != torch.float32),
            saved_tensors_hooks(pack, lambda x: x),
        ):
            out = functional_call(body, dict(tensors), kwargs={"input_ids": ids, "use_cache": False})
    finally:
        for handle in handles:
            handle.remove()
    assert out.last_hidden_state.requires_grad
    return sum(storage.nbytes() for storage in saved.values()), sum(inputs)
