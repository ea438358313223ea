"""Settings of the engine that generates the student's rollouts."""

from dataclasses import dataclass
from typing import Literal

from opd.config.precision import has_gpu
from opd.core.errors import Refusal, finite, positive


@dataclass(frozen=True, kw_only=True)
class Speaker:
    """The engine that generates the student's rollouts, and how it gets the weights."""

    engine: str = "hf"
    """Select the engine that generates the student's rollouts: hf, transformers on the trained weights; vllm, vLLM in
    this process; or the http://host:port of a vLLM server that accepts weights.  Several servers, separated by commas,
    share the prompts."""
    engine_transfer: Literal["nccl", "ipc", "opd"] = "nccl"
    """Select how weights reach a vLLM server, by the backend that the server was started with: nccl, ipc (on the same
    GPU), or opd (files in the run folder; the server needs opd installed beside it)."""
    engine_kv_gb: float = 4.0
    """Memory of --engine vllm for keys and values, GB."""
    engine_sleep: bool = False
    """Free the GPU memory of --engine vllm while the student trains."""
    engine_concurrency: int = 256
    """Requests to a vLLM server in flight at once; a request is a prompt with its rollouts."""
    engine_timeout: float = 3600.0
    """Seconds until a request to a vLLM server counts as failed; --teacher-retries says how often it is repeated."""
    engine_token_env: str = "OPD_ENGINE_TOKEN"
    """Name of the environment variable with a vLLM server's API key; unset: none is sent."""
    max_mismatch: float = 0.2
    """Mean |log p trainer - log p engine| of a batch, in nats, above which the run stops."""

    def urls(self) -> list[str]:
        """Return the addresses of the servers in `engine`."""
        return self.engine.split(",")

    def check(self) -> None:
        """Refuse impossible settings."""
        urls = self.urls()
        if self.engine not in ("hf", "vllm") and not all(url.startswith(("http://", "https://")) for url in urls):
            raise Refusal(
                f"--engine {self.engine}: choose hf, vllm, or the http://host:port of a vLLM server, of several with "
                "commas between them"
            )
        if twice := [url for url in urls if urls.count(url) > 1]:
            raise Refusal(f"--engine {self.engine}: names {twice[0]} twice; name each server once")
        positive(self, "engine_kv_gb", "engine_concurrency", "engine_timeout", "max_mismatch")
        finite(self, "engine_kv_gb")
        if self.engine.startswith("http") and self.engine_transfer != "opd" and not has_gpu():
            raise Refusal(
                f"--engine-transfer {self.engine_transfer}: sends from a GPU, and none is visible here: start the "
                "server with the backend opd and take --engine-transfer opd"
            )
        if self.engine_sleep and (self.engine != "vllm" or not has_gpu()):
            raise Refusal("--engine-sleep: frees the memory of a GPU that --engine vllm shares with the student")
