"""The cache of rows that are decoded together: new prompts are spliced in, finished rows leave.

All rows end in the last column of the keys and values.  Columns to the left of a row's first token are masked.
Convolution and recurrent states have no columns, so that padding would stay in them: prompts of such a model are
prefilled in groups of equal length, without padding.
"""

import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from opd.models.load import backbone, base

Ids = tuple[int, ...]
Rows = Int[Tensor, " _"]  # indices of rows, in order; a row may occur more than once


class SpareLayer(DynamicLayer):
    """A KV-cache layer with spare columns on the right, so that appending a token copies nothing."""

    keys: Tensor
    values: Tensor
    places: tuple[Tensor, Tensor]  # buffers whose first columns are `keys` and `values`

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values, and return views of all filled columns."""
        new = key_states, value_states
        if not self.is_initialized:
            self.lazy_initialization(*new)
            self.hold((key_states[:, :, :0], value_states[:, :, :0]), 0)
        used, width = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        if width > self.places[0].shape[2]:
            moved = _buffers((self.keys, self.values), len(self.keys), width)
            for place, x in zip(moved, (self.keys, self.values), strict=True):
                place[:, :, :used] = x
            self.hold(moved, used)
        for place, x in zip(self.places, new, strict=True):
            place[:, :, used:width] = x
        self.hold(self.places, width)
        return self.keys, self.values

    def hold(self, places: tuple[Tensor, Tensor], width: int) -> None:
        """Use buffers whose first `width` columns are filled."""
        self.places = places
        self.keys, self.values = (place[:, :, :width] for place in places)


# Layers of transformers that hold keys and values by column, states by row, both, or nothing.
SPLICING = frozenset(
    {
        "SpareLayer",
        "DynamicSlidingWindowLayer",
        "LinearAttentionLayer",
        "LinearAttentionAndFullAttentionLayer",
        "LinearAttentionAndSlidingWindowAttentionLayer",
        "DummyLayer",
    }
)


def _buffers(like: tuple[Tensor, Tensor], rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Allocate buffers [rows, heads, room, D] for `width` columns and a quarter more, at least 32 more."""
    room = width + max(32, width // 4)
    keys, values = (x.new_empty(rows, x.shape[1], room, x.shape[3]) for x in like)
    return keys, values


@dataclass
class Cache:
    """The cache of some rows."""

    cache: Any  # a DynamicCache; None until the first forward of a model that makes a cache of its own kind
    length: Int[Tensor, " B"]  # tokens of each row
    width: int  # columns: the number of tokens of the longest row

    @classmethod
    def of(cls, model: PreTrainedModel | PeftModel) -> "Cache":
        """Return an empty cache for a model."""
        plain: Any = base(model)
        dynamic = None
        if plain._supports_default_dynamic_cache():
            dynamic = DynamicCache(config=plain.config)
            dynamic.layers = [SpareLayer() if type(layer) is DynamicLayer else layer for layer in dynamic.layers]
        return cls(dynamic, torch.zeros(0, dtype=torch.long, device=model.device), 0)

    def splices(self) -> bool:
        """Return whether rows of two such caches can be joined."""
        return self.cache is not None and all(type(layer).__name__ in SPLICING for layer in self.cache.layers)

    def has_states(self) -> bool:
        """Return whether some layer holds convolution or recurrent states."""
        return any(hasattr(layer, "conv_states") for layer in self.cache.layers)

    def has_columns(self) -> bool:
        """Return whether some layer may hold keys and values."""
        return self.cache is None or any(hasattr(layer, "keys") for layer in self.cache.layers)

    def join_(self, parts: Sequence[tuple["Cache", Rows]]) -> None:
        """Replace this cache's rows by the chosen rows of all parts, in order.  This cache may be one of the parts."""
        length = torch.cat([part.length[rows] for part, rows in parts])
        width = int(length.max()) if len(length) else 0
        for i, layer in enumerate(self.cache.layers):
            layer_parts = [(part.cache.layers[i], rows) for part, rows in parts]
            if hasattr(layer, "keys"):
                _join_columns_(layer, layer_parts, width)
            if hasattr(layer, "conv_states"):
                _join_states_(layer, layer_parts)
        self.length, self.width = length, width


def _join_columns_(layer: Any, parts: Sequence[tuple[Any, Rows]], width: int) -> None:
    """Fill a layer with the last `width` columns of the chosen rows.  Narrower rows get zeros on their left."""
    held = [
        None if source.keys is None or source.values is None else (source.keys, source.values) for source, _ in parts
    ]
    like = next((x for x in held if x is not None), None)
    if like is None or not width:
        layer.reset()  # no token is cached yet, or the layer is never written: it shares another layer's keys
        return
    is_sliding = isinstance(layer, DynamicSlidingWindowLayer)
    stored = min(width, layer.sliding_window - 1) if is_sliding else width
    places, start = _buffers(like, sum(len(rows) for _, rows in parts), stored), 0
    for source, (_, rows) in zip(held, parts, strict=True):
        end, columns = start + len(rows), 0 if source is None else min(stored, source[0].shape[2])
        for i, place in enumerate(places):
            place[start:end, :, : stored - columns] = 0
            if source is not None:
                place[start:end, :, stored - columns : stored] = source[i][rows, :, source[i].shape[2] - columns :]
        start = end
    if not layer.is_initialized:
        layer.lazy_initialization(*places)
    if isinstance(layer, SpareLayer):
        layer.hold(places, width)
    else:
        layer.keys, layer.values = (place[:, :, :stored] for place in places)
    if is_sliding:
        layer.cumulative_length = width


def _join_states_(layer: Any, parts: Sequence[tuple[Any, Rows]]) -> None:
    """Fill a layer with the states of the chosen rows.  Rows without a token get zeros, where every state begins."""
    for name in ("conv_states", "recurrent_states"):
        states, initialized = getattr(layer, name), getattr(layer, f"is_{name}_initialized")
        for k in states:
            held = [(getattr(source, name)[k], rows) for source, rows in parts]
            like = next((state for state, _ in held if state is not None), None)
            initialized[k] = like is not None
            if like is not None:
                zeros = lambda rows, like=like: like.new_zeros(len(rows), *like.shape[1:])
                states[k] = torch.cat([zeros(rows) if state is None else state[rows] for state, rows in held])
    for k in layer.has_previous_state:
        layer.has_previous_state[k] = any(source.has_previous_state[k] for source, _ in parts)
        layer.conv_kernel_size[k] = next((n for source, _ in parts if (n := source.conv_kernel_size[k])), None)
    layer.dtype, layer.device = next(((s.dtype, s.device) for s, _ in parts if s.device is not None), (None, None))


@cache
def _cache_argument(forward: Callable) -> str:
    """Return the name of the argument by which a model's forward takes its cache."""
    return "cache_params" if "cache_params" in inspect.signature(forward).parameters else "past_key_values"


@dataclass
class Stream:
    """The rows that a model decodes together."""

    model: PreTrainedModel | PeftModel
    rows: Cache
    last: Int[Tensor, " B"]  # last token of each row, not in the cache yet
    shelf: tuple[list[Ids], Cache]  # prefilled prompts that later rows will use, and their cache

    @classmethod
    def of(cls, model: PreTrainedModel | PeftModel) -> "Stream":
        """Return a stream without rows."""
        return cls(model, Cache.of(model), torch.zeros(0, dtype=torch.long, device=model.device), ([], Cache.of(model)))

    def change(self, rows: Rows, new: Sequence[Ids], soon: Collection[Ids]) -> None:
        """Keep some rows and add prompts.  A new prompt that is also in `soon` is prefilled once for all its rows."""
        rows = rows.to(self.model.device)
        self.last = torch.cat((self.last[rows], self.last.new_tensor([p[-1] for p in new])))
        if self.rows.splices() and not new:
            self.rows.join_([(self.rows, rows)])
        elif self.rows.splices():
            names, read = self._known(new)
            self.rows.join_([(self.rows, rows), (read, self._at(names, new))])
            later, shelved = [p for p in names if p in soon], Cache.of(self.model)
            shelved.join_([(read, self._at(names, later))])
            self.shelf = later, shelved
        else:
            assert not len(rows) and len({len(p) for p in new}) == 1, "this cache takes equally long rows at once"
            self.rows = self._prefilled(new)

    def read(self) -> Float[Tensor, "B V"]:
        """Read the last token of each row, and return the logits of the next token."""
        rows, device = self.rows, self.model.device
        real = torch.arange(rows.width + 1, device=device) >= rows.width - rows.length[:, None]
        out = self._forward(base(self.model), rows, self.last[:, None], real, rows.length[:, None], logits_to_keep=1)
        rows.length, rows.width = rows.length + 1, rows.width + 1
        return out.logits[:, -1]

    def _known(self, prompts: Sequence[Ids]) -> tuple[list[Ids], Cache]:
        """Return prompts, each once, and their cache: from the shelf, or prefilled now."""
        names, shelved = self.shelf
        missing = [p for p in dict.fromkeys(prompts) if p not in names]
        if not missing:
            return names, shelved
        read = self._prefilled(missing)
        if not names:
            return missing, read
        joined = Cache.of(self.model)
        joined.join_([(shelved, self._at(names, names)), (read, self._at(missing, missing))])
        return names + missing, joined

    def _prefilled(self, prompts: Sequence[Ids]) -> Cache:
        """Return the cache after all but the last token of each prompt."""
        if len({len(p) for p in prompts}) > 1 and Cache.of(self.model).has_states():
            ordered = sorted(prompts, key=len)
            groups = [self._prefilled(list(group)) for _, group in groupby(ordered, len)]
            joined = Cache.of(self.model)
            joined.join_([(group, torch.arange(len(group.length), device=self.model.device)) for group in groups])
            joined.join_([(joined, self._at(ordered, prompts))])
            return joined
        out, device, width = Cache.of(self.model), self.model.device, max(map(len, prompts)) - 1
        out.length, out.width = torch.tensor([len(p) - 1 for p in prompts], device=device), width
        if width:
            ids = torch.tensor([[0] * (width + 1 - len(p)) + list(p[:-1]) for p in prompts], device=device)
            column = torch.arange(width, device=device) - (width - out.length[:, None])
            self._forward(backbone(self.model), out, ids, column >= 0, column.clamp(min=0))
        return out

    def _forward(
        self,
        module: PreTrainedModel,
        rows: Cache,
        ids: Int[Tensor, "B L"],
        real: Bool[Tensor, "B W"],
        positions: Int[Tensor, "B L"],
        **options: Any,
    ) -> Any:
        """Run a cached forward of the model or its backbone; `real` marks the columns that hold a token of the row."""
        name = _cache_argument(type(module).forward)
        if rows.has_columns():
            options["attention_mask"] = real.long()
        out = module(input_ids=ids, position_ids=positions, use_cache=True, **{name: rows.cache}, **options)
        if rows.cache is None:
            rows.cache = getattr(out, name)
        return out

    def _at(self, names: Sequence[Ids], prompts: Sequence[Ids]) -> Rows:
        place = {name: i for i, name in enumerate(names)}
        return torch.tensor([place[p] for p in prompts], dtype=torch.long, device=self.model.device)
