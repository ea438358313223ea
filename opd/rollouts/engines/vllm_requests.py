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
from opd.rollouts.engines.base import Engine, GenerateRequest, Sample

SEEDS = -4  # a key that no rollout has: its noise gives the first seed of a step


@dataclass(frozen=True)
class VLLMRequest:
    """A request for `n` rollouts of a prompt, which have the places `first`, `first` + 1, ... in the batch."""

    ids: tuple[int, ...]
    room: int  # tokens that may be generated
    first: int
    n: int
    seed: int


def grouped(request: GenerateRequest) -> list[VLLMRequest]:
    """Group rollouts into requests to vLLM: adjacent rollouts of one prompt and prefix share a request."""
    first_seed = int(uniform(request.seed, request.step, SEEDS) * 2**52)
    out: list[VLLMRequest] = []
    pairs = zip(request.prompts, request.prefix_of_each(), request.index, strict=True)
    for i, (prompt, prefix, index) in enumerate(pairs):
        ids, room = (*prompt, *prefix), request.sampling.max_new_tokens - len(prefix)
        last = out[-1] if out else None
        if last and (last.ids, last.room) == (ids, room) and first_seed + index == last.seed + last.n:
            out[-1] = replace(last, n=last.n + 1)
        else:
            out.append(VLLMRequest(ids, room, i, 1, first_seed + index))
    return out


def parameters(
    request: VLLMRequest, sampling: Sampling, stop: tuple[int, ...], allowed: Sequence[int] | None
) -> dict[str, Any]:
    """Return vLLM's `SamplingParams` by name.  With several stop ids, their log-probs are requested at each token."""
    out: dict[str, Any] = {
        "n": 1 if sampling.temperature == 0 else request.n,  # greedy: all rollouts are equal
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "seed": request.seed,
        "max_tokens": request.room,
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
    members = stop if merged is None else merged
    if ids[-1] in members and len(members) > 1:
        logp = (*logp[:-1], float(np.logaddexp.reduce([last[i] for i in members])))
    return Sample(tuple(ids), tuple(logp), stopped)


class WeightSyncedEngine(Engine):
    """The common part of both vLLM engines: it sends requests, restores their order, and sends changed weights."""

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

    def generate(self, request: GenerateRequest) -> list[Sample]:
        """Generate one response per prompt, after its prefix.  Each rollout `index[i]` has a different seed."""
        request.check_plain()
        samples = {i: Sample((), (), False) for i in range(len(request.prompts))}
        requests = [x for x in grouped(request) if x.room > 0]
        answers = self._sample_all(requests, request.sampling) if requests else []
        for x, answer in zip(requests, answers, strict=True):
            copies = answer * x.n if len(answer) < x.n else answer  # greedy: one sample serves all rollouts
            samples |= zip(range(x.first, x.first + x.n), copies, strict=True)
        return [samples[i] for i in range(len(request.prompts))]

    def _send(self) -> None:
        raise NotImplementedError

    def _sample_all(self, requests: Sequence[VLLMRequest], sampling: Sampling) -> list[list[Sample]]:
        raise NotImplementedError


def one_line(error: Exception) -> str:
    """Return an error's message in one line of at most 300 characters."""
    return " ".join(str(error).split())[:300]
