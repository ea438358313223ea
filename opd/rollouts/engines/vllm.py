"""Rollout generation with vLLM in this process, with the interface of `HFEngine`; the weights are sent to it.

Token ids go in and out, and nothing is detokenized.  A request is one prompt with its adjacent rollouts.  vLLM gives
the j-th of them the seed plus j.  The seed of a rollout is the seed of the step plus its index.  So it does not depend
on how rollouts are grouped into requests.  Log-probs are those of the sampled distribution (`processed_logprobs`).
`WeightSyncedEngine` is shared with `vllm_server.py`, which sends the same requests to a vLLM server.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from opd.config.engine import Speaker
from opd.core.errors import Refusal
from opd.core.sampling import Sampling
from opd.models.load import ModelSource
from opd.rollouts.engines.base import Sample
from opd.rollouts.engines.vllm_requests import VLLMRequest, WeightSyncedEngine, one_line, parameters, sample
from opd.rollouts.weight_sync.vllm_plugin import BACKEND, register, weights


class VLLMEngine(WeightSyncedEngine):
    """An engine that runs vLLM in this process.  Weights are passed by reference."""

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
    ) -> None:
        super().__init__(model, vocabulary, stop, rows)
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
        try:
            self.llm = LLM(
                source.base_source().folder,  # the weights are sent before it samples
                trust_remote_code=source.trust_remote_code,
                dtype=str(dtype).removeprefix("torch."),
                max_model_len=-1,  # as long as the memory allows
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
            )
        except (ValueError, RuntimeError, OSError) as error:  # no such architecture, no memory
            raise Refusal(f"--engine vllm: it does not open {source}: {one_line(error)}") from error
        self.llm.init_weight_transfer_engine({"init_info": {}})

    def _send(self) -> None:
        if self.sleeps:
            self.llm.wake_up(["weights"])
        self.llm.start_weight_update()
        self.llm.update_weights({"update_info": {"weights": list(weights(self.model).items())}})
        self.llm.finish_weight_update()
        if self.sleeps:
            self.llm.wake_up(["kv_cache"])
        self.llm.reset_prefix_cache()  # its keys belong to the old weights

    def close(self) -> None:
        """Shut the engine down.  Another engine may be opened in this process."""
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self.llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()

    def _sample_all(self, requests: Sequence[VLLMRequest], sampling: Sampling) -> list[list[Sample]]:
        self.sync()
        prompts = [{"prompt_token_ids": list(x.ids)} for x in requests]
        settings = [
            self.parameters(**parameters(x, sampling, self.stop, self.allowed), flat_logprobs=True) for x in requests
        ]
        try:
            answers = self.llm.generate(prompts, settings, use_tqdm=False)
        except ValueError as error:  # a prompt does not fit into the KV cache
            raise Refusal(f"--engine vllm: {one_line(error)}: raise --engine-kv-gb") from error
        if self.sleeps:
            self.llm.sleep(2)
            self.stale = True  # sleep level 2 discards the weights
        return [
            [self._sample(output, sampling) for output in sorted(x.outputs, key=lambda o: o.index)] for x in answers
        ]

    def _sample(self, output: Any, sampling: Sampling) -> Sample:
        flat = output.logprobs
        logp = [flat.logprobs[start] for start in flat.start_indices]  # the sampled token is the first of each position
        last_token = slice(flat.start_indices[-1], flat.end_indices[-1])
        last = dict(zip(flat.token_ids[last_token], flat.logprobs[last_token], strict=True))
        return sample(output.token_ids, logp, last, sampling, self.stop, self.merged)
