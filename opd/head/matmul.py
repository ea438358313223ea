"""Matrix products whose result may have a wider dtype than their factors: `(a, b, out) -> out`."""

import torch
from jaxtyping import Float
from torch import Tensor

from opd.head.onednn import is_worthwhile, product

# Rows and columns per oneDNN product.  oneDNN cannot write to a given tensor, so each block's result is copied.
BLOCK = 1024


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype for statistics and for sums over tokens: at least fp32."""
    return torch.promote_types(dtype, torch.float32)


def matmul_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype to which autocast would cast x for a product."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def mm(a: Float[Tensor, "i k"], b: Float[Tensor, "k j"], out: Float[Tensor, "i j"]) -> Float[Tensor, "i j"]:
    """Compute out = a @ b; if `out` is wider than a, unrounded on CUDA, else rounded once to a's dtype."""
    if out.dtype == a.dtype and is_worthwhile(a, b.T):
        for rows, x in zip(out.split(BLOCK), a.split(BLOCK), strict=True):
            for part, columns in zip(rows.split(BLOCK, 1), b.split(BLOCK, 1), strict=True):
                part.copy_(product(x, columns.T))
        return out
    if out.dtype == a.dtype:
        return torch.mm(a, b, out=out)
    if _accumulates(a, out):
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return out.copy_(a @ b)


def addmm(a: Float[Tensor, "i k"], b: Float[Tensor, "k j"], out: Float[Tensor, "i j"]) -> Float[Tensor, "i j"]:
    """Compute out += a @ b with the rounding of `mm`: to round the product of every chunk would bias their sum."""
    if out.dtype == a.dtype and is_worthwhile(a, b.T):
        for part, rows in zip(out.split(BLOCK), a.split(BLOCK), strict=True):
            part.add_(product(rows, b.T))
        return out
    if out.dtype == a.dtype:
        return out.addmm_(a, b)
    if _accumulates(a, out):
        return torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    return out.add_(a @ b)


def _accumulates(a: Tensor, out: Tensor) -> bool:
    return a.is_cuda and a.dtype in (torch.float16, torch.bfloat16) and out.dtype == torch.float32
