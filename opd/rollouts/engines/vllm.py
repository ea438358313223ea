"""Rollout generation with vLLM in this process, with the interface of `HFEngine`; the weights are sent to it.

Token ids go in and out, and nothing is detokenized.  A request is one prompt with its adjacent rollouts.  vLLM gives
the j-th of them the seed plus j.  The seed of a rollout is the seed of the step plus its index.  So it does not depend
on how rollouts are grouped into requests.  Log-probs are those of the sampled distribution (`processed_logprobs`).
`WeightSyncedEngine` is shared with `vllm_server.py`, which sends the same requests to a vLLM server.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from peft import PeftModel
from transformers import PreTrainedModel

from opd.config.engine import Speaker
from opd.core.errors import Refusal, one_line
from opd.core.rng import uniform
from opd.core.sampling import Sampling
from opd.models.context import context_of
from opd.models.load import base, head
from opd.models.source import ModelSource
from opd.rollouts.engines.base import Engine, GenerateRequest, Sample, T
from opd.rollouts.weight_sync.vllm_plugin import BACKEND, register, weights

SEEDS = -4  # a key that no rollout has: its noise gives the first seed of a step


@dataclass(frozen=True)
class VLLMRequest:
    """A request for `n` rollouts of a prompt, which have the places `first`, `first` + 1, ... in the batch."""

    ids: tuple[int, ...]
    room: int  # tokens that may be generated
    first: int
    n: int
    seed: int
    group: int = 0  # the number of the prompt in the batch


def grouped(request: GenerateRequest) -> list[VLLMRequest]:
    """Group rollouts into requests to vLLM: adjacent rollouts of one prompt and prefix share a request."""
    first_seed = int(uniform(request.seed, request.step, SEEDS) * 2**52)
    out: list[VLLMRequest] = []
    rows = zip(request.prompts, request.prefix_of_each(), request.index, request.group_of_each(), strict=True)
    for i, (prompt, prefix, index, group) in enumerate(rows):
        ids, room = (*prompt, *prefix), request.sampling.max_new_tokens - len(prefix)
        last = out[-1] if out else None
        same = last and (last.ids, last.room, last.group) == (ids, room, group)
        if last and same and first_seed + index == last.seed + last.n:
            out[-1] = replace(last, n=last.n + 1)
        else:
            out.append(VLLMRequest(ids, room, i, 1, first_seed + index, group))
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


class WeightsLost(Refusal):
    """An answer of weights that this run did not send: the server was restarted, or has the weights of another run."""


class WeightSyncedEngine(Engine):
    """The common part of both vLLM engines: it sends requests, restores their order, and sends changed weights.

    All processes send weights together, because each may hold only a shard.  Requests are sent by each on its own.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, vocabulary: int, stop: tuple[int, ...], rows: int) -> None:
        self.model, self.vocabulary, self.stop, self.rows = model, vocabulary, stop, rows
        self.stale, self.seconds = True, 0.0  # seconds: time spent on sending weights so far
        self.losses = 0  # processes that met other weights the last time
        self.allowed = range(vocabulary) if vocabulary < len(head(model).weight) else None

    def follow(self) -> None:
        """Mark the engine's weights as stale after an optimizer step."""
        self.stale = True

    def sync(self) -> None:
        """Send the weights to the engine if they have changed.  Every process must call it."""
        if self.stale:
            start = time.perf_counter()
            self._send()
            self.stale, self.seconds = False, self.seconds + time.perf_counter() - start

    def run(self, work: Callable[[], T]) -> T:
        """Return `work()` under the current weights, repeated in all processes if one of them met other weights.

        A Refusal in one process is raised in all of them.
        """
        while True:
            self.sync()
            failure: Refusal | None = None
            try:
                result = work()
            except Refusal as error:
                failure = error
            if self.succeeded(failure):
                return result
            self.stale = True

    def succeeded(self, failure: Refusal | None) -> bool:
        """Return whether the work of all processes succeeded, or False if weights were lost and it must be repeated.

        Every process must call it.  It raises a Refusal of any process in all of them, and WeightsLost if weights that
        were just sent are lost again.
        """
        failures: list[Refusal] = [x for x in gather_object([failure]) if x is not None]
        fatal = [x for x in failures if self.losses or not isinstance(x, WeightsLost)]
        if fatal:
            raise fatal[0]
        self.losses = len(failures)
        return not failures

    def generate(self, request: GenerateRequest) -> list[Sample]:
        """Generate one response per prompt, after its prefix.  Each rollout `index[i]` has a different seed.

        Raises WeightsLost if this run did not send the weights behind an answer; call it inside `run`.
        """
        request.check_plain()
        samples = {i: Sample((), (), False) for i in range(len(request.prompts))}
        requests = [x for x in grouped(request) if x.room > 0]
        answers: list[list[Sample]] = []
        if requests:
            answers = self._sample_all(requests, request.sampling)
        for x, answer in zip(requests, answers, strict=True):
            copies = answer * x.n if len(answer) < x.n else answer  # greedy: one sample serves all rollouts
            samples |= zip(range(x.first, x.first + x.n), copies, strict=True)
        return [samples[i] for i in range(len(request.prompts))]

    def _send(self) -> None:
        raise NotImplementedError

    def _sample_all(self, requests: Sequence[VLLMRequest], sampling: Sampling) -> list[list[Sample]]:
        raise NotImplementedError


class VLLMEngine(WeightSyncedEngine):
    """An engine that runs vLLM in this process, and in each of several.  Weights are passed by reference."""

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        source: ModelSource,
        vocabulary: int,
        stop: tuple[int, ...],
        config: Speaker,
        *,
        dtype: torch.dtype,
        rows: int,
        processes: int = 1,
    ) -> None:
        super().__init__(model, vocabulary, stop, rows)
        self.processes = processes
        # The engine core runs in this process, so that tensors are passed by reference.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # the trainer uses the cores, too
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        try:
            from vllm import LLM, SamplingParams
        except ImportError as error:
            raise Refusal(
                "--engine vllm: vLLM is not installed; pip install 'opd[vllm]', or take --engine hf"
            ) from error
        register()
        self.parameters, self.sleeps = SamplingParams, config.engine_sleep
        context = context_of(base(model).config.get_text_config())  # vLLM's longrope factors are those of this length
        try:
            self.llm = LLM(
                source.base_source().folder,  # the weights are sent before it samples
                trust_remote_code=source.trust_remote_code,
                dtype=str(dtype).removeprefix("torch."),
                max_model_len=context.tokens if context.reason else -1,  # else as long as the memory allows
                kv_cache_memory_bytes=int(config.engine_kv_gb * 2**30),
                max_num_seqs=rows,
                logprobs_mode="processed_logprobs",
                max_logprobs=max(20, len(stop)),
                enable_prefix_caching=True,
                enable_sleep_mode=config.engine_sleep,
                enforce_eager=not torch.cuda.is_available(),
                # On a CPU, vLLM crashes on a seeded request with chunked prefill.
                enable_chunked_prefill=None if torch.cuda.is_available() else False,
                weight_transfer_config={"backend": BACKEND},
                # Beside torchrun: on the GPU of this rank, in the process group that Accelerate has opened.
                distributed_executor_backend="external_launcher" if processes > 1 else None,
            )
        except (ValueError, RuntimeError, OSError) as error:  # no such architecture, no memory
            raise Refusal(f"--engine vllm: it does not open {source}: {one_line(error, 300)}") from error
        self.llm.init_weight_transfer_engine({"init_info": {}})

    def _send(self) -> None:
        if self.sleeps:
            self.llm.wake_up(["weights"])
        self.llm.start_weight_update()
        for named in weights(self.model):
            self.llm.update_weights({"update_info": {"weights": [named]}})
        self.llm.finish_weight_update()
        if self.sleeps:
            self.llm.wake_up(["kv_cache"])
        self.llm.reset_prefix_cache()  # its keys belong to the old weights

    def run(self, work: Callable[[], T]) -> T:
        """Return `work()` under the current weights, then free the GPU memory of the engine if it sleeps."""
        try:
            return super().run(work)
        finally:
            if self.sleeps:
                self.llm.sleep(2)
                self.stale = True  # sleep level 2 discards the weights

    def close(self) -> None:
        """Shut the engine down.  Another engine may be opened in this process, if it is the only one."""
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self.llm.llm_engine.engine_core.shutdown()
        if self.processes == 1:  # it also destroys the process group, which the trainers still use
            cleanup_dist_env_and_memory()

    def _sample_all(self, requests: Sequence[VLLMRequest], sampling: Sampling) -> list[list[Sample]]:
        prompts = [{"prompt_token_ids": list(x.ids)} for x in requests]
        settings = [
            self.parameters(**parameters(x, sampling, self.stop, self.allowed), flat_logprobs=True) for x in requests
        ]
        try:
            answers = self.llm.generate(prompts, settings, use_tqdm=False)
        except ValueError as error:  # a prompt does not fit into the KV cache
            raise Refusal(f"--engine vllm: {one_line(error, 300)}: raise --engine-kv-gb") from error
        return [
            [self._sample(output, sampling) for output in sorted(x.outputs, key=lambda o: o.index)] for x in answers
        ]

    def _sample(self, output: Any, sampling: Sampling) -> Sample:
        flat = output.logprobs
        logp = [flat.logprobs[start] for start in flat.start_indices]  # the sampled token is the first of each position
        last_token = slice(flat.start_indices[-1], flat.end_indices[-1])
        last = dict(zip(flat.token_ids[last_token], flat.logprobs[last_token], strict=True))
        return sample(output.token_ids, logp, last, sampling, self.stop, self.merged)
