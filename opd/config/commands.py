"""Settings of the commands beside `opd train` and `opd eval`: a frozen dataclass for each."""

import ipaddress
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from opd.config.data import Data
from opd.config.precision import Precision, default_device, default_precision
from opd.config.servers import secret
from opd.core.errors import Refusal, at_least, check_seed, positive
from opd.core.sampling import Sampling


def layers(text: str) -> tuple[int, ...]:
    """Layer numbers written as numbers and ranges: "0-2,5" is (0, 1, 2, 5)."""
    out: list[int] = []
    for part in filter(None, text.replace(" ", "").split(",")):
        first, _, last = part.partition("-")
        if not (first.isdecimal() and (last or first).isdecimal() and ("-" in part) == bool(last)):
            raise Refusal(f"--keep {text}: {part!r} is not a layer; write numbers and ranges, such as 0-21,28,29")
        out += range(int(first), int(last or first) + 1)
    return tuple(out)


LAYERS = tyro.constructors.PrimitiveConstructorSpec(
    nargs=1,
    metavar="LAYERS",
    instance_from_str=lambda words: layers(words[0]),
    is_instance=lambda value: isinstance(value, tuple),
    str_from_instance=lambda value: [",".join(map(str, value))],
)


@dataclass(frozen=True, kw_only=True)
class Prune:
    """A smaller model made of some layers of a model."""

    model: str
    """Hub id (owner/name or owner/name@revision), local folder, .gguf file, run folder (its last checkpoint), LoRA
    adapter, or embedded:NAME."""
    keep: Annotated[tuple[int, ...], LAYERS]
    """Decoder layers to keep, in their order, counted from 0: numbers and ranges, such as 0-21,28,29."""
    out: Path
    """Folder of the smaller model; must not exist, or be empty."""
    trust_remote_code: bool = False
    """Let a hub model run its own Python code."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """The student of a checkpoint as a model folder, which transformers, vLLM and `opd eval` read."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run folder."""
    out: Path
    """Folder of the model; must not exist, or be empty."""
    step: int = 0
    """Step of the checkpoint.  0: the newest."""
    merge: bool = False
    """Add the adapter of a LoRA run to its base, for programs that read whole models only."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Runs as one page: curves with bands over seeds, intervals, paired comparisons, alarms, configurations."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Run folders; those that differ by their seed alone are drawn as one line with a band."""
    out: Path = Path("report.html")
    """The page."""
    static: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Also write the pictures there, as PNG and SVG."""
    overwrite: bool = False
    """Replace files that another command, or you, wrote; what is read is never replaced."""


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Saved rollouts as one page: every token with its numbers, and what both models would rather have said."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run folder."""
    step: int = 0
    """A step that saved its rollouts; 0 is the newest of them."""
    out: Path = Path("inspect.html")
    """The page."""
    overwrite: bool = False
    """Replace a file that another command, or you, wrote; what is read is never replaced."""


@dataclass(frozen=True, kw_only=True)
class Rescore:
    """Settings of `opd rescore`: the run, the step and the number of tokens to show."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run folder."""
    step: int = 0
    """A step that saved its rollouts; 0 is the newest of them."""
    tokens: int = 5
    """Tokens shown on which a method disagrees most with the run's own."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """Size and seed of the random world of `opd exact`."""

    vocab: int = 3
    """Number of tokens in the vocabulary.  2 or more; vocab^length may be at most 4096."""
    length: int = 3
    """Number of tokens in a sequence.  1 or more."""
    mismatch: float = 1.0
    """Standard deviation of the student's logits around the teacher's.  Above 0."""
    seed: int = 0
    """Seed of both models' logits."""

    def check(self) -> None:
        """Refuse a world that is too large to enumerate, or has no gradient."""
        at_least(self, vocab=2, length=1, seed=0)
        if not 0 < self.mismatch < math.inf:
            raise Refusal(f"--mismatch {self.mismatch}: must be above 0, or there is no gradient to estimate")
        if self.length * math.log(self.vocab) > math.log(4096):
            raise Refusal(
                f"--vocab {self.vocab} --length {self.length}: {self.vocab}^{self.length} sequences are too many to "
                "enumerate; 4096 are the most"
            )


@dataclass(frozen=True, kw_only=True)
class Variance:
    """Two models, the prompts they are compared on, and how long to look."""

    student: str
    """The model whose gradients are looked at: hub id, local folder, .gguf file, run folder, or embedded:NAME."""
    teacher: str
    """The model to learn from, with the same vocabulary; same kinds of name."""
    prompts: str
    """Prompts: .jsonl, .parquet or .csv file, dataset folder, hub id, reasoning-gym:NAME, or embedded:NAME."""
    data: Data = Data()
    sampling: Sampling = Sampling(max_new_tokens=64)
    rollouts: int = 32
    """Answers sampled, one to a prompt; each of their tokens is a context."""
    directions: int = 1
    """Random directions of a rollout; more rollouts narrow the intervals faster."""
    parameters: str = ""
    """Regular expression that the names of the parameters looked at contain; empty: all."""
    chunk_mb: int = 256
    """Memory for logits, MB."""
    seed: int = 0
    """Seed of prompts, tokens and directions."""
    trust_remote_code: bool = False
    """Let a hub model run its own Python code."""

    def check(self) -> None:
        """Refuse impossible settings before anything loads."""
        at_least(self, rollouts=6, directions=1, chunk_mb=1)
        check_seed(self.seed)
        s = self.sampling
        s.check()
        if (s.temperature, s.top_p, s.top_k) != (1, 1, 0):
            raise Refusal(
                f"--temperature {s.temperature} --top-p {s.top_p} --top-k {s.top_k}: contexts are drawn from the "
                "student itself; leave the three at 1, 1 and 0"
            )
        try:
            re.compile(self.parameters)
        except re.error as error:
            raise Refusal(f"--parameters {self.parameters}: not a regular expression: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Serve:
    """A model behind HTTP: a teacher or judge for other machines, OpenAI-compatible."""

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
    precision: Precision = field(default_factory=default_precision)
    """Type of the weights."""
    device: str = field(default_factory=default_device)
    """Where the model runs: cpu, cuda, cuda:1, ..."""
    max_batch_tokens: int = 16384
    """Padded tokens that go through the model at once."""
    max_request_mb: int = 64
    """Largest request, MB."""
    open_requests_mb: int = 1024
    """Most MB of all open requests; a further one gets status 503, after which clients send it again."""
    max_sequences: int = 1024
    """Most sequences in one request."""
    max_logprobs: int = 20
    """Most log-probs per token that a request may ask for."""
    max_connections: int = 1024
    """Most connections at once.  Fewer where the system lets the process open fewer files (ulimit -n)."""
    client_connections: int = 256
    """Most connections from one address, at most half of all.  Raise it if all clients come through one proxy."""
    drain_seconds: int = 25
    """Seconds that requests in flight get to finish after SIGTERM or Ctrl-C.  Keep it below the time after which
    Kubernetes kills (terminationGracePeriodSeconds, 30)."""
    decode_rows: int = 64
    """Responses decoded at once."""
    takes_weights: bool = False
    """Let clients replace the weights by safetensors files that this machine can read: for `opd train --engine`.
    Needs --token-env, on this machine too."""
    trust_remote_code: bool = False
    """Let a hub model run its own Python code."""

    def check(self) -> str:
        """Refuse impossible settings before anything loads; the token, empty where none is asked."""
        positive(self, "max_batch_tokens", "max_request_mb", "max_sequences", "max_logprobs", "decode_rows")
        positive(self, "max_connections", "client_connections")
        at_least(self, drain_seconds=0, open_requests_mb=self.max_request_mb)
        if not 0 <= self.port < 65536:
            raise Refusal(f"--port {self.port}: must lie in [0, 65535]")
        token = secret(self.token_env)
        if self.token_env and not token:
            raise Refusal(
                f"--token-env {self.token_env}: the variable is not set; export {self.token_env}=... to any secret"
            )
        if self.takes_weights and not token:
            raise Refusal(
                "--takes-weights: anyone who reaches the port could replace the weights, and no token is asked; put a "
                "secret into a variable and name it by --token-env"
            )
        if not token and not self.on_loopback():
            raise Refusal(
                f"--host {self.host}: reachable from other machines, and no token is asked; put a secret into a "
                "variable and name it by --token-env, or listen on 127.0.0.1"
            )
        return token

    def on_loopback(self) -> bool:
        """Return whether only programs of this machine can connect."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:  # a name, which may lead anywhere
            return False


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Watch the embedded student learn from its teacher."""

    out: Path = Path("outputs/demo")
    """Folder for the runs and the picture."""
    method: str = "vopd"
    """Any listed method."""
    student: str = "embedded:student"
    """embedded:student has the teacher's shape, embedded:small is narrower and shallower."""
    seeds: int = 1
    """Runs, with seeds 0, 1, ..."""
    steps: int = 45
    """Training steps of each."""
    problems: int = 500
    """Held-out problems of the final table."""

    def check(self) -> None:
        """Refuse impossible settings before anything loads."""
        positive(self, "seeds", "steps", "problems")
