"""Sampling with transformers: batched decoding with a KV cache that drops finished rows; a teacher may read along."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from opd.divergences import kl
from opd.models import base
from opd.noise import uniform
from opd.rollouts import StopOnAgreement, blend
from opd.types import Sampling
from opd.vocabulary import Head, Vocabulary


@dataclass(frozen=True)
class Sample:
    """One sampled response."""

    ids: tuple[int, ...]
    logp: tuple[float, ...]  # nats, under what was sampled from
    stopped: bool
    notes: Mapping[str, float | tuple[float, ...]] = field(default_factory=dict)  # one number, or one a token


@dataclass(frozen=True)
class Blended:
    """Sample from the mixture with the teacher that stays within KL `eps` (nats) of the student."""

    eps: float


@dataclass(frozen=True)
class Watched:
    """Sample from the student; stop a response once the teacher has agreed with it for a while."""

    rule: StopOnAgreement
    threshold: float  # nats
    vocabulary: Vocabulary  # how the two distributions are compared, as in the loss


@dataclass(frozen=True)
class Beside:
    """The teacher that reads along while the student writes, after its own prompts."""

    model: PreTrainedModel | PeftModel
    prompts: Sequence[Sequence[int]]
    does: Blended | Watched


@dataclass(frozen=True)
class HFEngine:
    """Samples from a transformers model in this process; weights need no sync, they are the student's own."""

    model: PreTrainedModel | PeftModel
    vocabulary: int  # ids that may be sampled
    stop: tuple[int, ...]  # any of them ends a response
    rows: int = 64  # decoded at once
    compact: float = 0.9  # drop finished rows once no more than this share is alive

    def follow(self) -> None:
        """The student made a step: these are its weights."""

    def close(self) -> None:
        """Nothing is held."""

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        seed: int,
        step: int,
        index: Sequence[int],
        prefixes: Sequence[Sequence[int]] = (),
        beside: Beside | None = None,
    ) -> list[Sample]:
        """One response per prompt; token t of rollout `index[i]` draws from the counter (seed, step, index[i], t).

        A response goes on from its prefix, whose tokens count as its first and are not repeated in what comes back.
        """
        out: list[Sample] = []
        prefixes = prefixes or ((),) * len(prompts)
        for start in range(0, len(prompts), self.rows):
            cut = slice(start, start + self.rows)
            near = beside and replace(beside, prompts=beside.prompts[cut])
            out += self._decode(prompts[cut], prefixes[cut], sampling, seed, step, np.asarray(index[cut]), near)
        return out

    def _decode(
        self,
        prompts: Sequence[Sequence[int]],
        prefixes: Sequence[Sequence[int]],
        sampling: Sampling,
        seed: int,
        step: int,
        index: np.ndarray,
        beside: Beside | None,
    ) -> list[Sample]:
        device, n = self.model.device, len(prompts)
        streams = [_Stream.of(self.model, [(*p, *x) for p, x in zip(prompts, prefixes, strict=True)])]
        if beside is not None:
            read = zip(beside.prompts, prefixes, strict=True)
            streams.append(_Stream.of(beside.model, [(*p, *x) for p, x in read]))
        watch = beside.does if beside is not None and isinstance(beside.does, Watched) else None
        heard = None if watch is None else watch.rule.begin(n)
        stop = torch.tensor(self.stop, device=device)
        written = np.array([len(x) for x in prefixes])
        alive = np.arange(n)  # row of the caches -> prompt
        tokens: list[list[int]] = [[] for _ in prompts]
        logps: list[list[float]] = [[] for _ in prompts]
        notes: dict[str, list[list[float]]] = {}
        ended = np.zeros(n, dtype=bool)
        done = written >= sampling.max_new_tokens
        for t in range(sampling.max_new_tokens - int(written.min())):
            noise = torch.from_numpy(uniform(seed, step, index[alive], written[alive] + t)).to(device)
            logits, asked = streams[0].logits[:, : self.vocabulary].float(), sampling
            said: dict[str, Tensor] = {}
            other = streams[1].logits[:, : self.vocabulary].float().to(device) if beside is not None else None
            if other is not None and beside is not None and isinstance(beside.does, Blended):
                logits, said = _blended(logits, other, sampling.temperature, beside.does.eps, stop)
                asked = replace(sampling, temperature=1.0)
            drawn, logp = draw(logits, asked, noise, stop)
            going = ~done[alive]
            for name, values in said.items():
                _append(notes.setdefault(name, [[] for _ in prompts]), alive, values.tolist(), going)
            _append(tokens, alive, drawn.tolist(), going)
            _append(logps, alive, logp.tolist(), going)
            ends = torch.isin(drawn, stop).cpu().numpy()
            ended[alive] |= ends & going
            if watch is not None and other is not None and heard is not None:
                token_kl, active = np.zeros(n), np.zeros(n, dtype=bool)
                p, q = (watch.vocabulary.logp(x, AS_IS) for x in (logits, other))
                token_kl[alive], active[alive] = kl(p, q).double().cpu().numpy(), going & ~ends
                heard = watch.rule.hear(heard, token_kl, active, t + 1, watch.threshold)
                done |= heard.low >= watch.rule.patience
            done |= ended | (written + t + 1 >= sampling.max_new_tokens)
            keep = ~done[alive]
            if not keep.any():
                break
            if keep.sum() <= self.compact * len(keep):
                kept = torch.from_numpy(keep.nonzero()[0])
                streams = [stream.select(kept) for stream in streams]
                alive, drawn = alive[keep], drawn[kept.to(device)]
            streams = [stream.read(drawn) for stream in streams]
        rows: list[dict[str, float | tuple[float, ...]]]
        rows = [{name: tuple(values[i]) for name, values in notes.items()} for i in range(n)]
        if watch is not None and heard is not None:
            for i, agreed in enumerate(heard.low >= watch.rule.patience):
                stays = watch.rule.kept(len(tokens[i])) if agreed else len(tokens[i])
                rows[i] = {"least": float(heard.least[i]), "cut": float(len(tokens[i]) - stays)}
                tokens[i], logps[i] = tokens[i][:stays], logps[i][:stays]
        parts = zip(tokens, logps, ended, rows, strict=True)
        return [Sample(tuple(ids), tuple(logp), bool(stopped), note) for ids, logp, stopped, note in parts]


AS_IS = Head(torch.empty(0, 0))  # the model has applied its own


@dataclass(frozen=True)
class _Stream:
    """A model in the middle of reading some rows."""

    model: PreTrainedModel | PeftModel
    cache: DynamicCache
    real: Bool[Tensor, "B K"]  # not padding
    last: Int[Tensor, "B 1"]  # position of the last token
    logits: Float[Tensor, "B V"]  # of the next token

    @classmethod
    def of(cls, model: PreTrainedModel | PeftModel, prompts: Sequence[Sequence[int]]) -> "_Stream":
        """After the prompts; rollouts of one prompt share its prefill."""
        distinct = list(dict.fromkeys(map(tuple, prompts)))
        place = {prompt: i for i, prompt in enumerate(distinct)}
        ids, real = _left_pad(distinct, model.device)
        position = (real.long().cumsum(1) - 1).clamp(min=0)
        cache = DynamicCache(config=base(model).config)
        logits = _forward(model, ids, real, position, cache)
        spread = torch.tensor([place[tuple(prompt)] for prompt in prompts], device=model.device)
        if len(distinct) < len(prompts):
            cache.batch_select_indices(spread)
        return cls(model, cache, real[spread], position[spread, -1:], logits[spread])

    def select(self, rows: Int[Tensor, " b"]) -> "_Stream":
        """Some rows; the cache is cut in place."""
        rows = rows.to(self.model.device)
        self.cache.batch_select_indices(rows)
        return replace(self, real=self.real[rows], last=self.last[rows], logits=self.logits[rows])

    def read(self, ids: Int[Tensor, " B"]) -> "_Stream":
        """One token more of each row; the cache grows in place."""
        real, last = torch.cat((self.real, self.real.new_ones(len(self.real), 1)), 1), self.last + 1
        logits = _forward(self.model, ids[:, None].to(self.model.device), real, last, self.cache)
        return replace(self, real=real, last=last, logits=logits)


def _forward(
    model: PreTrainedModel | PeftModel,
    ids: Int[Tensor, "B L"],
    real: Bool[Tensor, "B K"],
    position: Int[Tensor, "B L"],
    cache: DynamicCache,
) -> Float[Tensor, "B V"]:
    out = base(model)(
        input_ids=ids,
        attention_mask=real.long(),
        position_ids=position,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return out.logits[:, -1]


def _append(lists: list[list], rows: np.ndarray, values: list, going: np.ndarray) -> None:
    for row, value, more in zip(rows, values, going, strict=True):
        if more:
            lists[row].append(value)


def _blended(
    student: Float[Tensor, "B V"],
    teacher: Float[Tensor, "B V"],
    temperature: float,
    eps: float,
    stop: Int[Tensor, " S"],
) -> tuple[Float[Tensor, "B V"], dict[str, Float[Tensor, " B"]]]:
    """log mu, and the numbers of the mixture; the stop class is one token, the member the student likes best."""
    p, q = ((x / temperature).log_softmax(-1) for x in (student, teacher))
    if len(stop) > 1:
        own = stop[p[:, stop].argmax(-1)][:, None]
        whole = [x[:, stop].logsumexp(-1, keepdim=True) for x in (p, q)]
        p, q = (x.index_fill(-1, stop, -torch.inf).scatter(-1, own, w) for x, w in zip((p, q), whole, strict=True))
    mixed, beta, distance = blend(p, q, eps)
    return mixed, {"beta": beta, "behavior_kl": distance}


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
