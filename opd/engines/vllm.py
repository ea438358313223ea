"""Sampling with vLLM in this process: what `HFEngine` is to a `Collector`, from weights that it is handed.

Token ids go in and out, nothing is detokenized.  A request is one prompt and the rollouts of it that stand side by
side; vLLM gives the j-th of them the seed plus j, so the seed of a rollout is the step's plus its index, however the
rollouts are cut into requests.  Log-probs are those of what was drawn from (`processed_logprobs`).  `Sent` is shared
with `engines/server.py`, which asks a vLLM server the same.
"""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from opd.engines.hf import Sample
from opd.engines.speaker import Speaker
from opd.engines.transfer import BACKEND, register, weights
from opd.models import Source, head
from opd.noise import uniform
from opd.types import Refusal, Sampling

SEEDS = -4  # a token number whose noise no token draws: where a step's seeds begin


@dataclass(frozen=True)
class Request:
    """One prompt, and `n` rollouts of it that stand side by side from `first` on."""

    ids: tuple[int, ...]
    room: int  # tokens that may follow
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
    """Rollouts in as few requests as there are prompts, where those of a prompt stand together."""
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
    """vLLM's `SamplingParams` by name.  Where several ids stop, their log-probs are asked for at each token."""
    out: dict[str, Any] = {
        "n": 1 if sampling.temperature == 0 else asked.n,  # greedy: all the same
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "seed": asked.seed,
        "max_tokens": asked.room,
        "stop_token_ids": list(stop),
        "ignore_eos": True,  # the stop ids are the run's, not the model's
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
    """What came back, as `HFEngine` says it: the log-prob of one of the `merged` ids (None: those that stop) is of all.

    `last` has the log-probs of the stop ids where the response ended, if there are several.
    """
    stopped = ids[-1] in stop
    if sampling.temperature == 0:
        return Sample(tuple(ids), (0.0,) * len(ids), stopped)
    one = stop if merged is None else merged
    if ids[-1] in one and len(one) > 1:
        logp = (*logp[:-1], float(np.logaddexp.reduce([last[i] for i in one])))
    return Sample(tuple(ids), tuple(logp), stopped)


class Sent:
    """What both kinds share: requests out, samples back in their order, weights sent once they have changed."""

    merged: tuple[int, ...] | None = None  # as of `HFEngine`

    def __init__(self, model: PreTrainedModel | PeftModel, vocabulary: int, stop: tuple[int, ...], rows: int) -> None:
        self.model, self.vocabulary, self.stop, self.rows = model, vocabulary, stop, rows
        self.stale, self.seconds = True, 0.0  # that sending weights took so far
        self.allowed = range(vocabulary) if vocabulary < len(head(model).weight) else None

    def follow(self) -> None:
        """The student made a step."""
        self.stale = True

    def sync(self) -> None:
        """Send the weights, if they are others than the engine's."""
        if self.stale:
            start = time.perf_counter()
            self._send()
            self.stale, self.seconds = False, self.seconds + time.perf_counter() - start

    def close(self) -> None:
        """Let go of what is held."""

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
        """One response per prompt, after its prefix; rollout `index[i]` has a seed of its own."""
        asked = requests(prompts, prefixes, sampling, seed=seed, step=step, index=index)
        out: dict[int, Sample] = {i: Sample((), (), False) for i in range(len(prompts))}
        some = [x for x in asked if x.room > 0]
        for x, found in zip(some, self._draw(some, sampling) if some else [], strict=True):
            found = found * x.n if len(found) < x.n else found  # greedy: one for all
            out |= zip(range(x.first, x.first + x.n), found, strict=True)
        return [out[i] for i in range(len(prompts))]

    def _send(self) -> None:
        raise NotImplementedError

    def _draw(self, asked: Sequence[Request], sampling: Sampling) -> list[list[Sample]]:
        raise NotImplementedError


class VLLMEngine(Sent):
    """vLLM in this process: weights are handed over by reference."""

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        source: Source,
        vocabulary: int,
        stop: tuple[int, ...],
        how: Speaker,
        *,
        dtype: torch.dtype,
        rows: int,
    ) -> None:
        super().__init__(model, vocabulary, stop, rows)
        # Without a process of its own, so that tensors are handed over as they are.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # the cores are the trainer's, too
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        try:
            from vllm import LLM, SamplingParams
        except ImportError as error:
            raise Refusal(
                "--engine vllm: vLLM is not installed; pip install 'opd[vllm]', or take --engine hf"
            ) from error
        register()
        self.parameters, self.sleeps = SamplingParams, how.engine_sleep
        try:
            self.llm = LLM(
                source.whole().folder,  # the weights are sent before it samples
                trust_remote_code=source.trust_remote_code,
                dtype=str(dtype).removeprefix("torch."),
                max_model_len=-1,  # as long as the memory allows
                kv_cache_memory_bytes=int(how.engine_kv_gb * 2**30),
                max_num_seqs=rows,
                logprobs_mode="processed_logprobs",
                max_logprobs=max(20, len(stop)),
                enable_prefix_caching=True,
                enable_sleep_mode=how.engine_sleep,
                enforce_eager=not torch.cuda.is_available(),
                # On a CPU it dies of a seeded request whose prompt it would read in parts.
                enable_chunked_prefill=None if torch.cuda.is_available() else False,
                weight_transfer_config={"backend": BACKEND},
            )
        except (ValueError, RuntimeError, OSError) as error:  # no such architecture, no memory
            raise Refusal(f"--engine vllm: it does not open {source}: {_line(error)}") from error
        self.llm.init_weight_transfer_engine({"init_info": {}})

    def _send(self) -> None:
        if self.sleeps:
            self.llm.wake_up(["weights"])
        self.llm.start_weight_update()
        self.llm.update_weights({"update_info": {"weights": list(weights(self.model).items())}})
        self.llm.finish_weight_update()
        if self.sleeps:
            self.llm.wake_up(["kv_cache"])
        self.llm.reset_prefix_cache()  # its keys are of other weights

    def close(self) -> None:
        """End the engine; another may be opened in this process."""
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self.llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()

    def _draw(self, asked: Sequence[Request], sampling: Sampling) -> list[list[Sample]]:
        self.sync()
        how = [self.parameters(**parameters(x, sampling, self.stop, self.allowed), flat_logprobs=True) for x in asked]
        try:
            told = self.llm.generate([{"prompt_token_ids": list(x.ids)} for x in asked], how, use_tqdm=False)
        except ValueError as error:  # a prompt that does not fit its memory
            raise Refusal(f"--engine vllm: {_line(error)}: raise --engine-kv-gb") from error
        if self.sleeps:
            self.llm.sleep(2)
            self.stale = True  # the weights are gone
        return [[self._sample(one, sampling) for one in sorted(x.outputs, key=lambda o: o.index)] for x in told]

    def _sample(self, one: Any, sampling: Sampling) -> Sample:
        flat = one.logprobs
        logp = [flat.logprobs[start] for start in flat.start_indices]  # the drawn one is the first of each
        at = slice(flat.start_indices[-1], flat.end_indices[-1])
        last = dict(zip(flat.token_ids[at], flat.logprobs[at], strict=True))
        return sample(one.token_ids, logp, last, sampling, self.stop, self.merged)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
