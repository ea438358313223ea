"""Rollout generation with transformers: batched decoding that refills rows as responses end.

A teacher may decode beside the student.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from opd.core.rng import uniform
from opd.core.sampling import Sampling
from opd.core.types import Others
from opd.methods.rollout_policies.base import DecodeHook
from opd.rollouts.engines.base import Sample
from opd.rollouts.engines.json_schema import Form, within
from opd.rollouts.engines.kv_cache import Stream
from opd.rollouts.engines.sampling import draw


@dataclass(frozen=True)
class TeacherDecoding:
    """A teacher that decodes beside the student, after the teacher's prompts, and what it is used for."""

    model: PreTrainedModel | PeftModel
    prompts: Sequence[Sequence[int]]
    hook: DecodeHook


@dataclass(frozen=True)
class HFEngine:
    """An engine that samples from a transformers model in this process.

    It needs no weight sync, because it uses the student's weights.
    """

    model: PreTrainedModel | PeftModel
    vocabulary: int  # ids that may be sampled
    stop: tuple[int, ...]  # any of them ends a response
    rows: int = 64  # responses decoded at once
    merged: tuple[int, ...] | None = None  # ids that count as one token, with their total probability; None: `stop`
    compact: float = 0.9  # finished rows are replaced by waiting prompts once at most this share of the rows is alive

    def follow(self) -> None:
        """Do nothing after an optimizer step: the engine already has the new weights."""

    def close(self) -> None:
        """Do nothing: the engine holds no resources."""

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
        teacher: TeacherDecoding | None = None,
        samples: int = 1,
        forms: Sequence[Form] = (),
    ) -> list[Sample]:
        """Generate one response per prompt.  Token t of rollout `index[i]` uses the noise of (seed, step, index[i], t).

        A response continues its prefix.  The prefix counts as its first tokens and is not returned.  When a response
        ends, the next waiting prompt takes its row.  At each position `samples` tokens are drawn; the first of them is
        the response's token.  With `forms`, one per prompt, a response keeps to its form until the length limit.
        """
        n, device, key = len(prompts), self.model.device, np.array(index, dtype=np.int64)
        prefixes = prefixes or ((),) * n
        readers = [(self.model, prompts), *([] if teacher is None else [(teacher.model, teacher.prompts)])]
        texts = [[(*p, *x) for p, x in zip(some, prefixes, strict=True)] for _, some in readers]
        streams = [Stream.of(model) for model, _ in readers]
        refills = all(stream.rows.splices() for stream in streams)
        hook = DecodeHook() if teacher is None else teacher.hook.begin(n)
        stop = torch.tensor(self.stop, device=device)
        one = stop if self.merged is None else torch.tensor(self.merged, dtype=torch.long, device=device)
        written, sampled = np.array([len(x) for x in prefixes], dtype=np.int64), np.zeros(n, dtype=np.int64)
        done, ended = written >= sampling.max_new_tokens, np.zeros(n, dtype=bool)
        waiting, alive = (~done).nonzero()[0], np.zeros(0, dtype=np.int64)  # alive[row] = prompt
        tokens: list[list[int]] = [[] for _ in prompts]
        logps: list[list[float]] = [[] for _ in prompts]
        notes: dict[str, list[list[float]]] = {}
        others = [Others.none() for _ in prompts]
        while len(waiting) or not done.all():
            keep = ~done[alive]
            if keep.sum() <= self.compact * len(keep):
                kept, room = torch.from_numpy(keep.nonzero()[0]), self.rows - keep.sum()
                new, waiting = np.split(waiting, [room if refills or not keep.any() else 0])
                for stream, text in zip(streams, texts, strict=True):
                    stream.change(kept, [text[i] for i in new], {text[i] for i in waiting[: self.rows]})
                alive = np.concatenate((alive[keep], new))
            noise = _noise(seed, step, key[alive], written[alive] + sampled[alive], samples)
            logits, *teacher_logits = (stream.read()[:, : self.vocabulary].float().to(device) for stream in streams)
            token_sampling, token_notes = sampling, dict[str, Tensor]()
            if forms:
                logits = within(logits, [forms[i] for i in alive.tolist()])
            if teacher is not None:
                logits, token_sampling, token_notes = hook.mix(logits, teacher_logits[0], sampling, stop)
            drawn, logp = draw(logits, token_sampling, torch.from_numpy(noise).to(device), one)
            going = ~done[alive]
            for name, values in token_notes.items():
                _append(notes.setdefault(name, [[] for _ in prompts]), alive, values.tolist(), going)
            _append(tokens, alive, drawn[:, 0].tolist(), going)
            _append(logps, alive, logp[:, 0].tolist(), going)
            if samples > 1:
                for i, ids, values in zip(
                    alive[going], *(x[:, 1:].cpu().numpy()[going] for x in (drawn, logp)), strict=True
                ):
                    others[i].ids.extend(ids)
                    others[i].logp.extend(values)
            drawn = drawn[:, 0]
            for i, token, more in zip(alive.tolist(), drawn.tolist(), going, strict=True) if forms else ():
                if more:
                    forms[i].take(token)
            sampled[alive] += going
            ends = torch.isin(drawn, stop).cpu().numpy()
            ended[alive] |= ends & going
            if teacher is not None:
                hook = hook.observe(logits, teacher_logits[0], alive, going & ~ends, sampled)
                done |= hook.ended()
            done |= ended | (written + sampled >= sampling.max_new_tokens)
            for stream in streams:
                stream.last = drawn.to(stream.last.device)
        rows: list[dict[str, float | tuple[float, ...]]]
        rows = [{name: tuple(values[i]) for name, values in notes.items()} for i in range(n)]
        for i in range(n):
            length, response_notes = hook.finish(i, len(tokens[i]))
            tokens[i], logps[i], rows[i] = tokens[i][:length], logps[i][:length], {**rows[i], **response_notes}
        parts = zip(tokens, logps, ended, rows, others if samples > 1 else [None] * n, strict=True)
        return [Sample(tuple(ids), tuple(logp), bool(stopped), note, more) for ids, logp, stopped, note, more in parts]


def _noise(
    seed: int, step: int, rollout: Int[np.ndarray, " B"], token: Int[np.ndarray, " B"], samples: int
) -> Float[np.ndarray, "B m"]:
    """Return the noise [B, samples]: column 0 for the response's token, the others for the extra samples.

    The extra samples have keys of six numbers, because keys of five numbers are used for coins.
    """
    own = np.asarray(uniform(seed, step, rollout, token))[:, None]
    beside = uniform(seed, step, rollout[:, None], token[:, None], 2, np.arange(1, samples))
    return np.concatenate((own, beside), 1)


def _append(lists: list[list], rows: np.ndarray, values: list, going: np.ndarray) -> None:
    for row, value, more in zip(rows, values, going, strict=True):
        if more:
            lists[row].append(value)
