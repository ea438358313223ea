"""A connection to one vLLM server: it sends weights by vLLM's routes, and asks for rollouts."""

import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from opd.config.engine import Speaker
from opd.config.servers import Remote
from opd.core.errors import Refusal, one_line
from opd.models.remote.client import Client, read_json
from opd.rollouts.weight_sync.stream import WeightStream

START = "VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --enable-scale-out --weight-transfer-config"
T = TypeVar("T")


class VLLMConnection:
    """A connection to a vLLM server, started by the command `START`."""

    def __init__(self, url: str, config: Speaker, retries: int) -> None:
        self.config = config
        remote = Remote(
            teacher_token_env=config.engine_token_env,
            teacher_timeout=config.engine_timeout,
            teacher_concurrency=config.engine_concurrency,
            teacher_retries=retries,
        )
        self.client = Client(url, remote, field="engine")
        backend = json.dumps({"backend": config.engine_transfer})
        self.start = f"{START} '{backend}'"
        if not self.client.has_path("/get_world_size"):
            raise Refusal(f"--engine {self.client.url}: it takes no weights: start it as {self.start}")
        cards = self.client.get("/v1/models", read_json(lambda answer: [card["id"] for card in answer["data"]]))
        self.name = self.client.model or cards[0]
        self.link: Callable[[Sequence[Path]], None] | None = None  # sends weights: those in files, or from GPU to GPU

    def reset(self) -> None:
        """End the update and the pause that a trainer leaves behind if it is killed while it sends weights."""
        with contextlib.suppress(Refusal):  # vLLM refuses to end an update if there is none
            self._post("/finish_weight_update", {})
        self._post("/resume", {}, tries=2)  # vLLM drops the connection after such a refusal

    def wait(self) -> None:
        """Wait for a server that is starting."""
        self.client.has_path("/health")

    def send(self, weights: WeightStream, files: Sequence[Path], version: str) -> None:
        """Send weights, from `files` if the backend reads files, and rename the weights of the server to `version`.

        Requests that began before are answered by the old weights; later requests wait for the new ones.
        """
        if self.link is None:
            try:
                self.link = self._opened(weights)
            except (Refusal, OSError, RuntimeError) as error:
                raise Refusal(f"{error}; does it take weights? Started as {self.start} it does") from error
        self._post("/pause?mode=wait", {})
        try:
            self.link(files)
        except (OSError, RuntimeError) as error:  # raised by vLLM's client and its backends
            reason = f"{type(error).__name__}: {one_line(error)}"
            raise Refusal(f"--engine {self.client.url}: the weights did not get there: {reason}") from error
        self._post("/update_weight_version", {"new_version": version})
        self._post("/reset_prefix_cache", {})  # its keys belong to the old weights
        self._post("/resume", {})

    def generate(self, ids: Sequence[int], parameters: dict[str, Any], read: Callable[[dict], T]) -> T:
        """Ask for rollouts after the prompt `ids`, and return what `read` makes of the answer."""
        body = {"model": self.name, "token_ids": list(ids), "sampling_params": parameters}
        return self.client.post("/inference/v1/generate", body, read_json(read))

    def _opened(self, weights: WeightStream) -> Callable[[Sequence[Path]], None]:
        """Return the function that sends weights, for the backend that the server was started with."""
        if self.config.engine_transfer == "opd":
            self._post("/init_weight_transfer_engine", {"init_info": {}})
            return self._send_files
        try:
            from opd.rollouts.weight_sync.sender import ipc, nccl
        except ImportError as error:
            raise Refusal(
                f"--engine-transfer {self.config.engine_transfer}: vLLM has to be installed here, too; pip install "
                "'opd[vllm]', or take --engine-transfer opd"
            ) from error
        if self.config.engine_transfer == "ipc":
            send = ipc(self.client.url, weights)
        else:
            workers = self.client.get("/get_world_size", read_json(lambda answer: int(answer["world_size"])))
            send = nccl(self.client.url, weights, workers)
        return lambda files: send()

    def _send_files(self, files: Sequence[Path]) -> None:
        """Let the server load weights from files."""
        self._post("/start_weight_update", {})
        self._post("/update_weights", {"update_info": {"files": [str(file) for file in files]}})
        self._post("/finish_weight_update", {})

    def _post(self, path: str, body: object, tries: int = 1) -> None:
        """Call a route for weights.  By default it is not retried, because most of these calls must not run twice."""
        self.client.post(path, body, lambda response: None, tries=tries)
