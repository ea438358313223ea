"""Requests to vLLM and the samples in its answers."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from peft import PeftModel
from transformers import PreTrainedModel

from opd.core.rng import uniform
from opd.core.sampling import Sampling
from opd.models.load import head
from opd.rollouts.engines.base import Sample

SEEDS = -4  # a key that no rollout has: its noise gives the first seed of a step


@dataclass(frozen=True)
class Request:
    """A prompt and its `n` rollouts, which have the places `first`, `first` + 1, ... in the batch."""

    ids: tuple[int, ...]
    room: int  # tokens that may be generated
    first: int
    n: int
    seed: int


def requests(
    prompts: Sequence[Sequence[int]],
    prefixes: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    seed: int,
    step: int,
    index: Sequence[int],
) -> list[Request]:
    """Group rollouts into requests: adjacent rollouts of one prompt and prefix share a request."""
    begin, out = int(uniform(seed, step, SEEDS) * 2**52), list[Request]()
    for i, (prompt, prefix) in enumerate(zip(prompts, prefixes or ((),) * len(prompts), strict=True)):
        ids, room = (*prompt, *prefix), sampling.max_new_tokens - len(prefix)
        last = out[-1] if out else None
        if last and (last.ids, last.room) == (ids, room) and begin + index[i] == last.seed + last.n:
            out[-1] = replace(last, n=last.n + 1)
        else:
            out.append(Request(ids, room, i, 1, begin + index[i]))
    return out


def parameters(
    asked: Request, sampling: Sampling, stop: tuple[int, ...], allowed: Sequence[int] | None
) -> dict[str, Any]:
    """Return vLLM's `SamplingParams` by name.  With several stop ids, their log-probs are requested at each token."""
    out: dict[str, Any] = {
        "n": 1 if sampling.temperature == 0 else asked.n,  # greedy: all rollouts are equal
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "seed": asked.seed,
        "max_tokens": asked.room,
        "stop_token_ids": list(stop),
        "ignore_eos": True,  # the run sets the stop ids, not the model
        "detokenize": False,
        "logprobs": 0,
    }
    if len(stop) > 1:
        out |= {"logprobs": len(stop), "logprob_token_ids": list(stop)}
    return out if allowed is None else out | {"allowed_token_ids": list(allowed)}


def sample(
    ids: Sequence[int],
    logp: Sequence[float],
    last: Mapping[int, float],
    sampling: Sampling,
    stop: tuple[int, ...],
    merged: tuple[int, ...] | None = None,
) -> Sample:
    """Convert a response of vLLM into a `Sample`, as `HFEngine` returns it.

    The log-prob of one of the `merged` ids (None: the stop ids) is the log-prob of all of them.  `last` holds the
    log-probs of the stop ids at the last token, if the run has several stop ids.
    """
    stopped = ids[-1] in stop
    if sampling.temperature == 0:
        return Sample(tuple(ids), (0.0,) * len(ids), stopped)
    one = stop if merged is None else merged
    if ids[-1] in one and len(one) > 1:
        logp = (*logp[:-1], float(np.logaddexp.reduce([last[i] for i in one])))
    return Sample(tuple(ids), tuple(logp), stopped)


class Sent:
    """The common part of both vLLM engines: it sends requests, restores their order, and sends changed weights."""

    merged: tuple[int, ...] | None = None  # as in `HFEngine`

    def __init__(self, model: PreTrainedModel | PeftModel, vocabulary: int, stop: tuple[int, ...], rows: int) -> None:
        self.model, self.vocabulary, self.stop, self.rows = model, vocabulary, stop, rows
        self.stale, self.seconds = True, 0.0  # seconds: time spent on sending weights so far
        self.allowed = range(vocabulary) if vocabulary < len(head(model).weight) else None

    def follow(self) -> None:
        """Mark the engine's weights as stale after an optimizer step."""
        self.stale = True

    def sync(self) -> None:
        """Send the weights to the engine if they have changed."""
        if self.stale:
            start = time.perf_counter()
            self._send()
            self.stale, self.seconds = False, self.seconds + time.perf_counter() - start

    def close(self) -> None:
        """Release resources."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        seed: int,
        step: int,
        index: Sequence[int],
        prefixes: Sequence[Sequence[int]] = (),
    ) -> list[Sample]:
        """Generate one response per prompt, after its prefix.  Each rollout `index[i]` has a different seed."""
        asked = requests(prompts, prefixes, sampling, seed=seed, step=step, index=index)
        out: dict[int, Sample] = {i: Sample((), (), False) for i in range(len(prompts))}
        some = [x for x in asked if x.room > 0]
        for x, found in zip(some, self._draw(some, sampling) if some else [], strict=True):
            found = found * x.n if len(found) < x.n else found  # greedy: one sample serves all rollouts
            out |= zip(range(x.first, x.first + x.n), found, strict=True)
        return [out[i] for i in range(len(prompts))]

    def _send(self) -> None:
        raise NotImplementedError

    def _draw(self, asked: Sequence[Request], sampling: Sampling) -> list[list[Sample]]:
        raise NotImplementedError


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
