"""Rollout generation with a vLLM server, given by its address.  Weights are sent by vLLM's routes."""

import contextlib
import json
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from opd.config.engine import Speaker
from opd.config.servers import Remote
from opd.core.disk import disk
from opd.core.errors import Refusal, one_line
from opd.core.sampling import Sampling
from opd.core.tensors import save_tensors
from opd.models.remote.client import Client, Malformed, read_json
from opd.rollouts.engines.base import GenerateRequest, Sample
from opd.rollouts.engines.vllm import VLLMRequest, WeightSyncedEngine, grouped, parameters, sample
from opd.rollouts.weight_sync.vllm_plugin import weights

START = "VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --enable-scale-out --weight-transfer-config"
LEAST = -9998.0  # nats: vLLM sends -9999 for -inf


class VLLMServer(WeightSyncedEngine):
    """An engine that uses a vLLM server, started by the command `START`.

    Every response names the weights that generated it.  If the server was restarted or has the weights of another
    client, it gets the student's weights again.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        vocabulary: int,
        stop: tuple[int, ...],
        config: Speaker,
        retries: int,
        *,
        folder: Path,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(model, vocabulary, stop, config.engine_concurrency)
        self.config, self.folder, self.dtype = config, folder, dtype
        remote = Remote(
            teacher_token_env=config.engine_token_env,
            teacher_timeout=config.engine_timeout,
            teacher_concurrency=config.engine_concurrency,
            teacher_retries=retries,
        )
        self.client = Client(config.engine, remote, field="engine")
        backend = json.dumps({"backend": config.engine_transfer})
        self.start = f"{START} '{backend}'"
        if not self.client.has_path("/get_world_size"):
            raise Refusal(f"--engine {self.client.url}: it takes no weights: start it as {self.start}")
        cards = self.client.get("/v1/models", read_json(lambda answer: [card["id"] for card in answer["data"]]))
        self.name, self.version = self.client.model or cards[0], ""
        self.link: Callable[[], None] | None = None
        # A trainer killed during a transfer leaves an open update and a pause.  Without an update vLLM refuses.
        with contextlib.suppress(Refusal):
            self._post("/finish_weight_update", {})
        self._post("/resume", {}, tries=2)  # vLLM drops the connection after such a refusal

    def processed(self) -> bool:
        """Return whether log-probs are of the sampled distribution: at temperature 0.01 they are then near 0."""
        return all(sum(x.logp) > -0.5 for x in self._probe(Sampling(temperature=0.01, max_new_tokens=8)) or ())

    def _probe(self, sampling: Sampling) -> list[Sample] | None:
        """Return a short response to an arbitrary prompt, or None if other weights generated it."""
        (request,) = grouped(GenerateRequest([[1, 1]], sampling, seed=0, step=0, index=[0]))
        return self._ask(request, sampling)

    def _send(self) -> None:
        self.client.has_path("/health")  # waits for a server that is starting
        if self.link is not None and self._probe(Sampling(max_new_tokens=1)) is None:
            self.link = None  # the server was restarted
        self.version = f"opd-{secrets.token_hex(8)}"
        if self.link is None:
            try:
                self.link = self._opened()
            except (Refusal, OSError, RuntimeError) as error:
                raise Refusal(f"{error}; does it take weights? Started as {self.start} it does") from error
        self._post("/pause?mode=wait", {})
        try:
            self.link()
        except (OSError, RuntimeError) as error:  # raised by vLLM's client and its backends
            reason = f"{type(error).__name__}: {one_line(error)}"
            raise Refusal(f"--engine {self.client.url}: the weights did not get there: {reason}") from error
        self._post("/update_weight_version", {"new_version": self.version})
        self._post("/reset_prefix_cache", {})  # its keys belong to the old weights
        self._post("/resume", {})

    def _opened(self) -> Callable[[], None]:
        """Return the function that sends the weights, for the backend that the server was started with."""
        if self.config.engine_transfer == "opd":
            self._post("/init_weight_transfer_engine", {"init_info": {}})
            return self._by_file
        try:
            from opd.rollouts.weight_sync.sender import ipc, nccl
        except ImportError as error:
            raise Refusal(
                f"--engine-transfer {self.config.engine_transfer}: vLLM has to be installed here, too; pip install "
                "'opd[vllm]', or take --engine-transfer opd"
            ) from error
        if self.config.engine_transfer == "ipc":
            return ipc(self.client.url, self._weights)
        workers = self.client.get("/get_world_size", read_json(lambda answer: int(answer["world_size"])))
        return nccl(self.client.url, self._weights, workers)

    def _weights(self) -> dict[str, torch.Tensor]:
        """Return the student's weights in the dtype of the engine."""
        return {name: x.to(self.dtype) for name, x in weights(self.model).items()}

    def _by_file(self) -> None:
        """Write the weights to a file, and let the server load it."""
        path = (self.folder / "engine" / "weights.safetensors").absolute()
        # The server may run as another user, so the file's mode follows the umask.
        try:
            with disk(f"writing {path}"):
                path.parent.mkdir(parents=True, exist_ok=True)
                save_tensors(self._weights(), path)
            self._post("/start_weight_update", {})
            self._post("/update_weights", {"update_info": {"files": [str(path)]}})
            self._post("/finish_weight_update", {})
        finally:
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # the folder was never created
                path.parent.rmdir()

    def _post(self, path: str, body: object, tries: int = 1) -> None:
        """Call a route for weights.  By default it is not retried, because most of these calls must not run twice."""
        self.client.post(path, body, lambda response: None, tries=tries)

    def _sample_all(self, requests: Sequence[VLLMRequest], sampling: Sampling) -> list[list[Sample]]:
        with ThreadPoolExecutor(self.config.engine_concurrency, "engine") as pool:
            for _ in range(2):
                answers = list(pool.map(lambda x: self._ask(x, sampling), requests))
                if None not in answers:
                    return [x for x in answers if x is not None]
                # The server was restarted, or another client sent it weights.  Send ours, then repeat the batch.
                self.link, self.stale = None, True
                self.sync()
        raise Refusal(
            f"--engine {self.client.url}: it has weights of somebody else, though it was just sent this student's: one "
            "run to a server"
        )

    def _ask(self, request: VLLMRequest, sampling: Sampling) -> list[Sample] | None:
        """Return the rollouts of a request, or None if older or other weights generated any part of them."""
        body = {
            "model": self.name,
            "token_ids": list(request.ids),
            "sampling_params": parameters(request, sampling, self.stop, self.allowed),
        }

        def read(answer: dict) -> list[Sample] | None:
            choices = sorted(answer["choices"], key=lambda c: c["index"])
            if self.version and any(x["version"] != self.version for c in choices for x in c["weight_versions"] or ()):
                return None
            return [self._sample(choice, sampling) for choice in choices]

        return self.client.post("/inference/v1/generate", body, read_json(read))

    def _sample(self, choice: dict, sampling: Sampling) -> Sample:
        ids, tokens = choice["token_ids"], choice["logprobs"]["content"]
        if not ids or [x["token_id"] for x in tokens] != ids or max(ids) >= self.vocabulary:
            raise Malformed(f"{len(ids)} tokens with {len(tokens)} log-probs, or an id beyond {self.vocabulary}")
        last = {x["token_id"]: x["logprob"] for x in tokens[-1]["top_logprobs"]}
        logp = [x["logprob"] if x["logprob"] > LEAST else -np.inf for x in tokens]
        return sample(ids, logp, last, sampling, self.stop, self.merged)
