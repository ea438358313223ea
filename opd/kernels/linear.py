"""fp32 products through oneDNN where torch's BLAS is slower: on AMD's processors, for which MKL has no AVX-512.

torch itself keeps oneDNN for lower precisions.  A core of Zen 5 makes 210 Gflop/s of fp32 there and 100 in MKL, and a
skinny product (decoding) need not copy the weight first.  Elsewhere, and for small products, all is torch's.
"""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

LEAST = 1 << 21  # multiplications below which making the call costs more than it saves


@cache
def faster() -> bool:
    """Whether oneDNN is there and the processor AMD's."""
    cpu = Path("/proc/cpuinfo")
    amd = cpu.is_file() and "AuthenticAMD" in cpu.read_text()
    return amd and torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()


def pays(a: Float[Tensor, "*n k"], b: Float[Tensor, "m k"]) -> bool:
    """Whether a b^T is a product to send there."""
    return (
        a.numel() * len(b) >= LEAST
        and a.dtype == b.dtype == torch.float32
        and a.device.type == b.device.type == "cpu"
        and faster()
    )


def product(a: Float[Tensor, "*n k"], b: Float[Tensor, "m k"], bias: Float[Tensor, " m"] | None = None) -> Tensor:
    """a b^T + bias, without a gradient; any strides."""
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


class _Product(torch.autograd.Function):
    """`product` with its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (x, weight), (gradient,) = ctx.saved_tensors, gradients
        flat = gradient.reshape(-1, len(weight))
        needs, own, other, bias = ctx.needs_input_grad, None, None, None
        if needs[0]:
            own = product(flat, weight.T).view(x.shape)
        if needs[1]:
            other = product(flat.T, x.reshape(-1, weight.shape[1]).T)
        if needs[2]:
            bias = flat.sum(0)
        return own, other, bias


class Linear(nn.Linear):
    """The layer it was, with faster products where there are any."""

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        plain = type(weight) is nn.Parameter and not torch.compiler.is_compiling()  # no shard of one, no tracer
        if not (plain and pays(input, weight)) or torch.is_autocast_enabled("cpu"):
            return linear(input, weight, bias)
        if torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad):
            return _Product.apply(input, weight, bias)
        return product(input, weight, bias)


def quicken(model: nn.Module) -> None:
    """Turn the plain linear layers of a model into these, in place, where that is faster."""
    if faster():
        for layer in model.modules():
            if type(layer) is nn.Linear:
                layer.__class__ = Linear
