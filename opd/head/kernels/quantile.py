"""Sampling by inverse CDF over the vocabulary, in float64: `(logits, noise, temperature)`.

The C version is compiled at run time.  It makes two passes over a row in the cache and needs no tensor of [B, V].  The
torch version is used without a compiler, or if the logits are not fp32 on a CPU.  Both sum exp(z / T) in float64, so
they sample the same token.
"""

import ctypes
from collections.abc import Callable
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from opd.head.kernels.c_sweep import MIN_COLUMNS, built, over_threads

BLOCK = 1024  # must equal BLOCK in quantile.c


@cache
def _compiled() -> Callable[..., None] | None:
    library = built("quantile.c")
    if library is None:
        return None
    integer, double, pointer = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p
    library.draw.argtypes = [pointer, integer, integer, integer, integer, double, pointer, pointer, pointer, pointer]
    library.draw.restype = None
    return library.draw


def quantile(
    logits: Float[Tensor, "B V"], noise: Float[Tensor, "B k"], temperature: float = 1.0
) -> tuple[Int[Tensor, "B k"], Float[Tensor, " B"]]:
    """Return the sampled ids [B, k], and log sum exp(z / T) [B] in float64.

    An id is the first whose cumulative softmax(z / T) exceeds its noise in [0, 1).  A logit of -inf is never sampled.
    """
    fits = logits.device.type == "cpu" and logits.dtype == torch.float32 and logits.shape[-1] >= MIN_COLUMNS
    if fits and logits.stride(-1) == 1 and _compiled() is not None:
        return _in_c(logits, noise, temperature)
    return in_torch(logits, noise, temperature)


def in_torch(
    logits: Float[Tensor, "B V"], noise: Float[Tensor, "B k"], temperature: float
) -> tuple[Int[Tensor, "B k"], Float[Tensor, " B"]]:
    """Compute `quantile` in torch, as the reference for the C version."""
    z = logits.double()
    largest = z.amax(-1, keepdim=True)
    e = ((z - largest) / temperature).exp()
    cdf = e.cumsum(-1)
    total = cdf[:, -1:]
    ids = torch.searchsorted(cdf, noise.double() * total, right=True)
    # The last id of positive probability bounds the result: rounding may put the quantile beyond the end.
    last = logits.shape[-1] - 1 - (e > 0).flip(-1).byte().argmax(-1, keepdim=True)
    return torch.minimum(ids, last), (largest / temperature + total.log())[:, 0]


def _in_c(logits: Tensor, noise: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    draw = _compiled()
    assert draw is not None
    (rows, width), noise = logits.shape, noise.double().contiguous()
    ids, lse = torch.empty(noise.shape, dtype=torch.long), torch.empty(rows, dtype=torch.float64)
    sums = torch.empty(rows, -(-width // BLOCK), dtype=torch.float64)

    def part(first: int, last: int) -> None:
        addresses = [x[first:last].data_ptr() for x in (logits, noise, sums, ids, lse)]
        draw(addresses[0], logits.stride(0), last - first, width, noise.shape[1], temperature, *addresses[1:])

    over_threads(rows, part)
    return ids, lse
