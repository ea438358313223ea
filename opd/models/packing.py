"""Packing: the rows of a micro-batch stand behind one another in one row without padding, and each attends to itself.

transformers gives an `attention_mask` of four dimensions to the attention of every layer unchanged.  That of a packed
row holds the lengths of its rows, as int32 in main memory, and `attention` splits queries and keys by them.  No mask
over the whole row is built.
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from opd.models.batching import Rows
from opd.models.load import backbone

PACKED = "opd_packed"  # name of `attention` in transformers
HAS_VARLEN = torch.__version__ >= "2.13"  # torch.nn.attention.varlen has windows and grouped queries


@dataclass(frozen=True)
class PackedRow:
    """Rows behind one another, as inputs of a model."""

    ids: Int[Tensor, "1 N"]
    positions: Int[Tensor, "1 N"]  # start from 0 in each row
    lengths: Int[Tensor, "1 1 1 B"]
    trained: Bool[Tensor, "1 N"]

    @classmethod
    def of(cls, rows: Rows) -> "PackedRow":
        """Pack padded rows."""
        lengths, device = torch.tensor(rows.lengths, dtype=torch.int32), rows.ids.device
        row, column = (torch.arange(rows.trained.shape[1]) < lengths[:, None]).nonzero(as_tuple=True)
        ids, positions = rows.ids[row.to(device), column.to(device)], column.to(device)
        return cls(ids[None], positions[None], lengths.view(1, 1, 1, -1), rows.trained[row, column][None])


def attention(
    module: torch.nn.Module,
    query: Float[Tensor, "B H N D"],
    key: Float[Tensor, "B K M D"],
    value: Float[Tensor, "B K M E"],
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Float[Tensor, "B N H E"], None]:
    """Attend within each row of a packed row; without lengths in `attention_mask`, as transformers' sdpa."""
    if attention_mask is None or attention_mask.dtype != torch.int32:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    lengths, window = attention_mask.flatten().tolist(), options.get("sliding_window")
    if query.is_cuda and query.itemsize == 2 and HAS_VARLEN and query.shape[-1] == value.shape[-1]:
        return varlen(query, key, value, lengths, options.get("scaling"), window), None
    parts = zip(*(x.split(lengths, 2) for x in (query, key, value)), lengths, strict=True)
    attended = [sdpa_attention_forward(module, q, k, v, _band(n, window, q.device), **options) for q, k, v, n in parts]
    return torch.cat([x for x, _ in attended], 1), None


def _band(length: int, window: int | None, device: torch.device) -> Bool[Tensor, "1 1 N N"] | None:
    """Return the mask of causal attention to the last `window` tokens, or None if that is all tokens before."""
    if window is None or length <= window:
        return None
    at = torch.arange(length, device=device)
    back = at[:, None] - at
    return ((back >= 0) & (back < window))[None, None]


def varlen(
    query: Float[Tensor, "1 H N D"],
    key: Float[Tensor, "1 K N D"],
    value: Float[Tensor, "1 K N D"],
    lengths: list[int],
    scale: float | None,
    window: int | None,
) -> Float[Tensor, "1 N H D"]:
    """Attend within each row by torch's flash kernel for rows of different lengths."""
    from torch.nn.attention.varlen import varlen_attn

    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=query.device)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    last = -1 if window is None else window - 1
    longest = max(lengths)
    out = varlen_attn(q, k, v, ends, ends, longest, longest, scale=scale, window_size=(last, 0), enable_gqa=True)
    return cast(Tensor, out)[None]


def is_packing(model: PreTrainedModel | PeftModel) -> bool:
    """Return whether the model's rows are packed."""
    return bool(backbone(model).config._attn_implementation == PACKED)


ALL_ATTENTION_FUNCTIONS.register(PACKED, attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(PACKED, sdpa_mask)
