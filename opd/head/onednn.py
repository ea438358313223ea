"""fp32 matmuls through oneDNN on AMD processors, where torch's BLAS is slower because MKL does not use AVX-512.

torch uses oneDNN only for lower precisions.  A Zen 5 core reaches 210 Gflop/s of fp32 with it and 100 with MKL, and a
skinny product (decoding) need not copy the weight first.  Other processors and small products use torch.
"""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

MIN_MULTIPLICATIONS = 1 << 21  # multiplications; for smaller products the call costs more than it saves


@cache
def is_faster() -> bool:
    """Return True if the processor is from AMD and torch has oneDNN and MKL."""
    cpu = Path("/proc/cpuinfo")
    amd = cpu.is_file() and "AuthenticAMD" in cpu.read_text()
    return amd and torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()


def is_worthwhile(a: Float[Tensor, "*n k"], b: Float[Tensor, "m k"]) -> bool:
    """Return True if oneDNN should compute a b^T: a large fp32 product on a CPU where it is faster."""
    return (
        a.numel() * len(b) >= MIN_MULTIPLICATIONS
        and a.dtype == b.dtype == torch.float32
        and a.device.type == b.device.type == "cpu"
        and is_faster()
    )


def product(a: Float[Tensor, "*n k"], b: Float[Tensor, "m k"], bias: Float[Tensor, " m"] | None = None) -> Tensor:
    """Return a b^T + bias, computed by oneDNN without a gradient; any strides."""
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


class _Product(torch.autograd.Function):
    """An autograd function for `product`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (x, weight), (gradient,) = ctx.saved_tensors, gradients
        (needs_x, needs_weight, needs_bias), flat = ctx.needs_input_grad, gradient.reshape(-1, len(weight))
        d_x = product(flat, weight.T).view(x.shape) if needs_x else None
        d_weight = product(flat.T, x.reshape(-1, weight.shape[1]).T) if needs_weight else None
        return d_x, d_weight, flat.sum(0) if needs_bias else None


class Linear(nn.Linear):
    """A linear layer with the same parameters that uses oneDNN where it is faster."""

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        # not a sharded parameter, not under a tracer
        plain = type(weight) is nn.Parameter and not torch.compiler.is_compiling()
        if not (plain and is_worthwhile(input, weight)) or torch.is_autocast_enabled("cpu"):
            return linear(input, weight, bias)
        if torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad):
            return _Product.apply(input, weight, bias)
        return product(input, weight, bias)


def use_onednn(model: nn.Module) -> None:
    """Convert the plain linear layers of a model to `Linear`, in place, if oneDNN is faster."""
    if is_faster():
        for layer in model.modules():
            if type(layer) is nn.Linear:
                layer.__class__ = Linear
