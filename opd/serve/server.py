"""`opd serve MODEL`: load it, open a port, answer until stopped."""

import ipaddress
import socket
from dataclasses import dataclass, field
from typing import Annotated

import torch
import tyro

from opd import models
from opd.config import DTYPES, Precision, native
from opd.serve.model import Served
from opd.teachers.client import secret
from opd.types import Refusal, positive


@dataclass(frozen=True, kw_only=True)
class Serve:
    """Which model, where, for whom."""

    model: Annotated[str, tyro.conf.Positional]
    """Hub id (owner/name or owner/name@revision), local folder, .gguf file, run folder (its last checkpoint), LoRA
    adapter, or embedded:NAME."""
    host: str = "127.0.0.1"
    """Address to listen on; any but this machine's own (127.0.0.1, ::1, localhost) needs --token-env."""
    port: int = 8001
    """Port to listen on; 0 takes a free one and prints it."""
    token_env: str = ""
    """Name of an environment variable with the token that clients must send; empty: no token asked."""
    name: str = ""
    """Name under which clients ask for the model; empty: the name it was given by."""
    precision: Precision = field(default_factory=native)
    """Type of the weights."""
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")
    """Where the model runs: cpu, cuda, cuda:1, ..."""
    max_batch_tokens: int = 16384
    """Padded tokens that go through the model at once."""
    max_request_mb: int = 64
    """Largest request, MB."""
    max_sequences: int = 1024
    """Most sequences in one request."""
    max_logprobs: int = 20
    """Most log-probs per token that a request may ask for."""
    decode_rows: int = 64
    """Responses decoded at once."""
    takes_weights: bool = False
    """Let clients replace the weights by safetensors files that this machine can read: for `opd train --engine`."""
    trust_remote_code: bool = False
    """Let a hub model run its own Python code."""

    def check(self) -> str:
        """Refuse impossible settings before anything loads; the token, empty where none is asked."""
        positive(self, "max_batch_tokens", "max_request_mb", "max_sequences", "max_logprobs", "decode_rows")
        if not 0 <= self.port < 65536:
            raise Refusal(f"--port {self.port}: must lie in [0, 65535]")
        token = secret(self.token_env)
        if self.token_env and not token:
            raise Refusal(
                f"--token-env {self.token_env}: the variable is not set; export {self.token_env}=... to any secret"
            )
        if not token and not _loopback(self.host):
            raise Refusal(
                f"--host {self.host}: reachable from other machines, and no token is asked; put a secret into a "
                "variable and name it by --token-env, or listen on 127.0.0.1"
            )
        return token


def serve(config: Serve) -> None:
    """Answer until SIGINT or SIGTERM; raises Refusal for what the user can mend."""
    token = config.check()
    try:
        import uvicorn

        from opd.serve.app import build
        from opd.serve.gate import Limits
    except ImportError as error:
        raise Refusal(f"opd serve: {error.name} is not installed; pip install 'opd[serve]'") from error
    with _listen(config.host, config.port) as listening:
        served = _open(config)
        limits = Limits(
            body_bytes=config.max_request_mb << 20, sequences=config.max_sequences, logprobs=config.max_logprobs
        )
        listening.listen()  # from here on a client is queued, not turned away
        host, port = listening.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(f"serving {served.name} at http://{shown}:{port}" + (" with a token" if token else ""), flush=True)
        # uvicorn's access log would hold a line for each request of a run.
        options = uvicorn.Config(
            build(served, limits, token=token, takes_weights=config.takes_weights),
            access_log=False,
            log_level="warning",
        )
        uvicorn.Server(options).run(sockets=[listening])


def _open(config: Serve) -> Served:
    source = models.locate(config.model, field="model", trust_remote_code=config.trust_remote_code)
    text = models.tokenizer(source, field="model")
    stop = models.stop_ids(source, text)
    on = models.device(config.device, field="device")
    model = models.load(source, field="model", dtype=DTYPES[config.precision], device=on)
    models.verify_head(model, field="model")
    models.small_threads(model)
    return Served(
        model,
        text,
        name=config.name or config.model,
        stop=stop,
        max_batch_tokens=config.max_batch_tokens,
        decode_rows=config.decode_rows,
    )


def _loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name: who knows where it leads
        return False


def _listen(host: str, port: int) -> socket.socket:
    """A socket bound before the model loads: a port in use is known at once."""
    try:
        (family, _, _, _, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        out = socket.socket(family, socket.SOCK_STREAM)
        out.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            out.bind(address)
        except OSError:
            out.close()
            raise
    except OSError as error:
        raise Refusal(
            f"--host {host} --port {port}: {error.strerror}; choose another (--port 0 finds a free one)"
        ) from error
    return out
