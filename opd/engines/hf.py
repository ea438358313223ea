"""Sampling with transformers: batched decoding with a KV cache that drops finished rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from opd.models import base
from opd.noise import uniform
from opd.types import Sampling


@dataclass(frozen=True)
class Sample:
    """One sampled response."""

    ids: tuple[int, ...]
    logp: tuple[float, ...]  # nats, under what was sampled from
    stopped: bool


@dataclass(frozen=True)
class HFEngine:
    """Samples from a transformers model in this process; weights need no sync, they are the student's own."""

    model: PreTrainedModel | PeftModel
    vocabulary: int  # ids that may be sampled
    stop: tuple[int, ...]  # any of them ends a response
    rows: int = 64  # decoded at once
    compact: float = 0.75  # drop finished rows once no more than this share is alive

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, seed: int, step: int, index: Sequence[int]
    ) -> list[Sample]:
        """One response per prompt; token t of rollout `index[i]` draws from the counter (seed, step, index[i], t)."""
        out: list[Sample] = []
        for start in range(0, len(prompts), self.rows):
            cut = slice(start, start + self.rows)
            out += self._decode(prompts[cut], sampling, seed, step, np.asarray(index[cut]))
        return out

    def _decode(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int, step: int, index: np.ndarray
    ) -> list[Sample]:
        device = self.model.device
        distinct = list(dict.fromkeys(map(tuple, prompts)))
        place = {prompt: i for i, prompt in enumerate(distinct)}
        ids, real = _left_pad(distinct, device)
        position = (real.long().cumsum(1) - 1).clamp(min=0)
        cache = DynamicCache(config=base(self.model).config)
        logits = self._forward(ids, real, position, cache)
        # Rollouts of one prompt share its prefill.
        spread = torch.tensor([place[tuple(prompt)] for prompt in prompts], device=device)
        if len(distinct) < len(prompts):
            cache.batch_select_indices(spread)
        logits, real, last = logits[spread], real[spread], position[spread, -1:]
        stop = torch.tensor(self.stop, device=device)
        alive = np.arange(len(prompts))  # row of the cache -> prompt
        tokens: list[list[int]] = [[] for _ in prompts]
        logps: list[list[float]] = [[] for _ in prompts]
        done = np.zeros(len(prompts), dtype=bool)
        for t in range(sampling.max_new_tokens):
            noise = torch.from_numpy(uniform(seed, step, index[alive], t)).to(device)
            drawn, logp = draw(logits[:, : self.vocabulary].float(), sampling, noise, stop)
            for row, token, value in zip(alive, drawn.tolist(), logp.tolist(), strict=True):
                if not done[row]:
                    tokens[row].append(token)
                    logps[row].append(value)
                    done[row] = token in self.stop
            keep = ~done[alive]
            if not keep.any() or t + 1 == sampling.max_new_tokens:
                break
            if keep.sum() <= self.compact * len(keep):
                kept = torch.from_numpy(keep.nonzero()[0]).to(device)
                cache.batch_select_indices(kept)
                alive, drawn, real, last = alive[keep], drawn[kept], real[kept], last[kept]
            real = torch.cat((real, real.new_ones(len(real), 1)), 1)
            last = last + 1
            logits = self._forward(drawn[:, None], real, last, cache)
        return [Sample(tuple(i), tuple(p), bool(d)) for i, p, d in zip(tokens, logps, done, strict=True)]

    def _forward(
        self, ids: Int[Tensor, "B L"], real: Bool[Tensor, "B K"], position: Int[Tensor, "B L"], cache: DynamicCache
    ) -> Float[Tensor, "B V"]:
        out = base(self.model)(
            input_ids=ids,
            attention_mask=real.long(),
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1]


def draw(
    logits: Float[Tensor, "B V"], sampling: Sampling, noise: Float[Tensor, " B"], stop: Int[Tensor, " S"]
) -> tuple[Int[Tensor, " B"], Float[Tensor, " B"]]:
    """The token at quantile `noise` of the (tempered, truncated) distribution, and its log-prob.

    A stop token's log-prob is that of the whole stop class: any member ends the response.
    """
    if sampling.temperature == 0:
        ids = logits.argmax(-1)
        return ids, torch.zeros_like(logits[:, 0])
    logp = truncate((logits / sampling.temperature).log_softmax(-1), sampling)
    cdf = logp.double().exp().cumsum(-1)
    ids = torch.searchsorted(cdf, noise[:, None] * cdf[:, -1:], right=True)[:, 0]
    # The last id of positive probability, where rounding puts the quantile beyond the end.
    ids = torch.minimum(ids, (logp > -torch.inf).long().cumsum(-1).argmax(-1))
    ended = torch.isin(ids, stop)
    own, whole = logp.gather(-1, ids[:, None])[:, 0], logp[:, stop].logsumexp(-1)
    return ids, torch.where(ended, whole, own)


def truncate(logp: Float[Tensor, "B V"], sampling: Sampling) -> Float[Tensor, "B V"]:
    """Top-k, then nucleus (the fewest tokens that reach top_p), renormalised."""
    if sampling.top_k and sampling.top_k < logp.shape[-1]:
        kth = logp.topk(sampling.top_k, -1).values[:, -1:]
        logp = logp.masked_fill(logp < kth, -torch.inf).log_softmax(-1)
    if sampling.top_p < 1:
        ordered, at = logp.sort(-1, descending=True)
        before = ordered.exp().cumsum(-1) - ordered.exp()
        cut = torch.zeros_like(logp, dtype=torch.bool).scatter(-1, at, before >= sampling.top_p)
        logp = logp.masked_fill(cut, -torch.inf).log_softmax(-1)
    return logp


def _left_pad(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Int[Tensor, "B L"], Bool[Tensor, "B L"]]:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    return ids, torch.arange(width, device=device) >= width - lengths[:, None]
