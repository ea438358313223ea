"""Rollout generation with transformers: batched decoding that refills rows as responses end.

A teacher may decode beside the student.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from opd.core.rng import uniform
from opd.core.types import Others
from opd.methods.rollout_policies.base import DecodeHook
from opd.rollouts.engines.base import Engine, GenerateRequest, Sample
from opd.rollouts.engines.json_schema import constrained
from opd.rollouts.engines.kv_cache import Stream
from opd.rollouts.engines.sampling import draw


@dataclass(frozen=True)
class HFEngine(Engine):
    """An engine that samples from a transformers model in this process.

    It needs no weight sync, because it uses the student's weights.
    """

    model: PreTrainedModel | PeftModel
    vocabulary: int
    stop: tuple[int, ...]
    rows: int = 64
    merged: tuple[int, ...] | None = None
    compact: float = 0.9  # finished rows are replaced by waiting prompts once at most this share of the rows is alive

    @torch.no_grad()
    def generate(self, request: GenerateRequest) -> list[Sample]:
        """Generate one response per prompt.  Token t of rollout `index[i]` uses the noise of (seed, step, index[i], t).

        When a response ends, the next waiting prompt takes its row.
        """
        sampling, teacher, grammars = request.sampling, request.teacher, request.grammars
        n, device, key = len(request.prompts), self.model.device, np.array(request.index, dtype=np.int64)
        prefixes = request.prefix_of_each()
        readers = [(self.model, request.prompts), *([] if teacher is None else [(teacher.model, teacher.prompts)])]
        texts = [[(*p, *x) for p, x in zip(prompts, prefixes, strict=True)] for _, prompts in readers]
        streams = [Stream.of(model) for model, _ in readers]
        refills = all(stream.rows.splices() for stream in streams)
        hook = DecodeHook() if teacher is None else teacher.hook.begin(n)
        stop = torch.tensor(self.stop, device=device)
        merged = stop if self.merged is None else torch.tensor(self.merged, dtype=torch.long, device=device)
        prefix_tokens, sampled = np.array([len(x) for x in prefixes], dtype=np.int64), np.zeros(n, dtype=np.int64)
        done, stopped = prefix_tokens >= sampling.max_new_tokens, np.zeros(n, dtype=bool)
        waiting, alive = (~done).nonzero()[0], np.zeros(0, dtype=np.int64)  # alive[row] = prompt
        responses = _Responses.empty(n)
        while len(waiting) or not done.all():
            keep = ~done[alive]
            if keep.sum() <= (self.compact if refills else 0) * len(keep):
                rows, room = torch.from_numpy(keep.nonzero()[0]), self.rows - int(keep.sum())
                if not refills:
                    waiting, room = _equally_long_first(waiting, texts, room)
                new, waiting = np.split(waiting, [room])
                for stream, text in zip(streams, texts, strict=True):
                    stream.change(rows, [text[i] for i in new], {text[i] for i in waiting[: self.rows]})
                alive = np.concatenate((alive[keep], new))
            noise = _noise(request, key[alive], prefix_tokens[alive] + sampled[alive])
            logits, *teacher_logits = (stream.read()[:, : self.vocabulary].float().to(device) for stream in streams)
            token_sampling, token_notes = sampling, dict[str, Tensor]()
            if grammars:
                logits = constrained(logits, [grammars[i] for i in alive.tolist()])
            if teacher is not None:
                logits, token_sampling, token_notes = hook.mix(logits, teacher_logits[0], sampling, stop)
            ids, logp = draw(logits, token_sampling, torch.from_numpy(noise).to(device), merged)
            active, tokens = ~done[alive], ids[:, 0]
            responses.append(alive, active, ids, logp, token_notes)
            if grammars:
                for i, token in zip(alive[active].tolist(), tokens.cpu().numpy()[active].tolist(), strict=True):
                    grammars[i].advance(token)
            sampled[alive] += active
            stops = torch.isin(tokens, stop).cpu().numpy()
            stopped[alive] |= stops & active
            if teacher is not None:
                hook = hook.observe(logits, teacher_logits[0], alive, active & ~stops, sampled)
                done |= hook.ended()
            done |= stopped | (prefix_tokens + sampled >= sampling.max_new_tokens)
            for stream in streams:
                stream.last = tokens.to(stream.last.device)
        return [responses.sample(i, bool(stopped[i]), hook, request.samples > 1) for i in range(n)]


def _equally_long_first(
    waiting: Int[np.ndarray, " N"], texts: Sequence[Sequence[Sequence[int]]], room: int
) -> tuple[Int[np.ndarray, " N"], int]:
    """Return the waiting prompts, those as long as the first of them before the others, and how many may start.

    A cache that does not splice takes all its rows at once, without padding, and keeps them until the last one ends.
    """
    lengths = np.array([[len(text[i]) for text in texts] for i in waiting]).reshape(len(waiting), -1)
    is_other = (lengths != lengths[:1]).any(1)
    return waiting[is_other.argsort(kind="stable")], min(room, int((~is_other).sum()))


def _noise(
    request: GenerateRequest, rollout: Int[np.ndarray, " B"], token: Int[np.ndarray, " B"]
) -> Float[np.ndarray, "B m"]:
    """Return the noise [B, samples]: column 0 for the response's token, the others for the extra samples.

    The extra samples have keys of six numbers, because keys of five numbers are used for coins.
    """
    seed, step = request.seed, request.step
    first = np.asarray(uniform(seed, step, rollout, token))[:, None]
    extra = uniform(seed, step, rollout[:, None], token[:, None], 2, np.arange(1, request.samples))
    return np.concatenate((first, extra), 1)


@dataclass(frozen=True)
class _Responses:
    """Responses that are being generated, one entry per prompt in each list."""

    tokens: list[list[int]]
    logps: list[list[float]]
    notes: list[dict[str, list[float]]]  # one number per token
    others: list[Others]

    @classmethod
    def empty(cls, count: int) -> "_Responses":
        """Return `count` responses without tokens."""
        empty = range(count)
        return cls([[] for _ in empty], [[] for _ in empty], [{} for _ in empty], [Others.none() for _ in empty])

    def append(
        self,
        rows: Int[np.ndarray, " B"],
        active: Bool[np.ndarray, " B"],
        ids: Int[Tensor, "B k"],
        logp: Float[Tensor, "B k"],
        notes: dict[str, Float[Tensor, " B"]],
    ) -> None:
        """Append a token to the active ones of the responses `rows`."""
        tokens, token_logp = ids[:, 0].tolist(), logp[:, 0].tolist()
        values = {name: x.tolist() for name, x in notes.items()}
        for k in active.nonzero()[0]:
            i = rows[k]
            self.tokens[i].append(tokens[k])
            self.logps[i].append(token_logp[k])
            for name, x in values.items():
                self.notes[i].setdefault(name, []).append(x[k])
        if ids.shape[1] > 1:
            extra_ids, extra_logp = (x[:, 1:].cpu().numpy()[active] for x in (ids, logp))
            for i, x, y in zip(rows[active], extra_ids, extra_logp, strict=True):
                self.others[i].ids.extend(x)
                self.others[i].logp.extend(y)

    def sample(self, i: int, stopped: bool, hook: DecodeHook, has_others: bool) -> Sample:
        """Return a finished response, without the tokens that the hook removes."""
        length, notes = hook.finish(i, len(self.tokens[i]))
        ids, logp = tuple(self.tokens[i][:length]), tuple(self.logps[i][:length])
        token_notes = {name: tuple(x) for name, x in self.notes[i].items()}
        return Sample(ids, logp, stopped, {**token_notes, **notes}, self.others[i] if has_others else None)
