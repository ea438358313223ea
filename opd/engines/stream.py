"""A model in the middle of reading some rows, which come and go: prompts are spliced in, finished rows leave.

All rows end in the last column of the KV cache; what lies left of a row is masked.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from opd.models import base

Ids = tuple[int, ...]
Rows = Int[Tensor, " b"]


class Roomy(DynamicLayer):
    """Keys and values with room on their right: a token is written there, and nothing before it is copied."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        """Append; the views of all columns."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.hold(key_states[:, :, :0], value_states[:, :, :0], 0)
        used, width = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        if width > self.places[0].shape[2]:
            moved = [_room(x, len(x), width) for x in (self.keys, self.values)]
            for place, x in zip(moved, (self.keys, self.values), strict=True):
                place[:, :, :used] = x
            self.hold(*moved, used)
        for place, x in zip(self.places, (key_states, value_states), strict=True):
            place[:, :, used:width] = x
        self.hold(*self.places, width)
        return self.keys, self.values

    def hold(self, keys: Float[Tensor, "B heads room D"], values: Float[Tensor, "B heads room D"], width: int) -> None:
        """Have places of which the first `width` columns are written."""
        self.places = keys, values
        self.keys, self.values = keys[:, :, :width], values[:, :, :width]


def _room(like: Float[Tensor, "b heads k D"], rows: int, width: int) -> Float[Tensor, "B heads room D"]:
    """Nothing yet, for so many columns and a quarter more."""
    return like.new_empty(rows, like.shape[1], width + max(32, width // 4), like.shape[3])


@dataclass
class Cache:
    """What a model remembers of some rows."""

    cache: DynamicCache
    length: Int[Tensor, " B"]  # tokens of each row
    width: int  # columns, as many as the longest row has tokens

    @classmethod
    def of(cls, model: PreTrainedModel | PeftModel) -> "Cache":
        """Nothing yet."""
        cache = DynamicCache(config=base(model).config)
        cache.layers = [Roomy() if type(layer) is DynamicLayer else layer for layer in cache.layers]
        return cls(cache, torch.zeros(0, dtype=torch.long, device=model.device), 0)

    def splices(self) -> bool:
        """Whether rows of two such caches can be put together: keys and values by column, and nothing else."""
        return all(type(layer) in (Roomy, DynamicSlidingWindowLayer) for layer in self.cache.layers)

    def join_(self, parts: Sequence[tuple["Cache", Rows]]) -> None:
        """Hold the chosen rows of all parts, one below the other, instead; this cache may be one of the parts."""
        length = torch.cat([part.length[rows] for part, rows in parts])
        width = int(length.max()) if len(length) else 0
        for i, layer in enumerate(self.cache.layers):
            _join_(layer, [(part.cache.layers[i], rows) for part, rows in parts], width)
        self.length, self.width = length, width

    def drop_(self, kept: Rows) -> None:
        """Some rows of a cache that does not splice."""
        self.cache.batch_select_indices(kept)
        self.length = self.length[kept]


def _join_(layer: Roomy | DynamicSlidingWindowLayer, parts: Sequence[tuple[DynamicLayer, Rows]], width: int) -> None:
    """The last `width` columns of the chosen rows become the layer's; narrower rows have zeros before them."""
    like = next((x for x, _ in parts if x.is_initialized), None)
    if like is None or not width:
        layer.reset()  # nothing comes before the next token; or never written: its keys are another layer's
        return
    sliding = isinstance(layer, DynamicSlidingWindowLayer)
    stored = min(width, layer.sliding_window - 1) if sliding else width
    rows = sum(len(at) for _, at in parts)
    keys, values = (_room(x, rows, stored) for x in (like.keys, like.values))
    start = 0
    for source, at in parts:
        end, columns = start + len(at), min(stored, source.keys.shape[2]) if source.is_initialized else 0
        for place, x in ((keys, source.keys), (values, source.values)):
            place[start:end, :, : stored - columns] = 0
            if columns:
                place[start:end, :, stored - columns : stored] = x[at, :, x.shape[2] - columns :]
        start = end
    if not layer.is_initialized:
        layer.lazy_initialization(keys, values)
    if sliding:
        layer.keys, layer.values, layer.cumulative_length = keys[:, :, :stored], values[:, :, :stored], width
    else:
        layer.hold(keys, values, width)


@dataclass
class Stream:
    """The rows that a model reads side by side; the last token of each is yet to be read."""

    model: PreTrainedModel | PeftModel
    rows: Cache
    shelf: tuple[list[Ids], Cache]  # prompts that were read once for rows yet to come

    @classmethod
    def of(cls, model: PreTrainedModel | PeftModel) -> "Stream":
        """Without rows."""
        return cls(model, Cache.of(model), ([], Cache.of(model)))

    def change(self, kept: Rows, new: Sequence[Ids], soon: Iterable[Ids]) -> None:
        """Keep some rows and add prompts, all but their last token; one that is among `soon` is read once for all."""
        kept = kept.to(self.model.device)
        if len(kept) and not self.rows.splices():
            assert not new, "a cache that cannot take rows is asked for some"
            self.rows.drop_(kept)
            return
        if not new:
            self.rows.join_([(self.rows, kept)])
            return
        known, shelved = self.shelf
        missing = [p for p in dict.fromkeys(new) if p not in known]
        read = self._read(missing)
        names = [*known, *missing]
        if known and missing:
            both = Cache.of(self.model)
            both.join_([(shelved, self._at(known, known)), (read, self._at(missing, missing))])
            read = both
        elif known:
            read = shelved
        if len(kept):
            self.rows.join_([(self.rows, kept), (read, self._at(names, new))])
        elif len(set(new)) < len(new) or self.rows.splices()
        ...
