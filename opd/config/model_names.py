"""The names by which a run calls its models, parsed once: `parse(name)` returns a value of one of these classes.

Whether the files or the server behind a name exist is checked where they are opened.
"""

import re
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

from opd.core.errors import Refusal

DEFAULT_EMA_RATE = 0.05
OPENAI = "https://api.openai.com"


@dataclass(frozen=True)
class ModelName:
    """The name of a model, as the user wrote it."""

    name: str

    def host(self) -> str:
        """Return scheme, name and port of the model's server; empty if the model runs in this process."""
        return ""

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class ModelFiles(ModelName):
    """A model that opd loads: hub id, local folder, .gguf file, run folder, LoRA adapter, or embedded:NAME."""


@dataclass(frozen=True)
class ScoringServer(ModelName):
    """A server that returns log-probs or hidden states of given tokens: http://HOST:PORT."""

    def host(self) -> str:
        return _host(self.name)


@dataclass(frozen=True)
class ChatEndpoint(ModelName):
    """A model that only returns text, behind an OpenAI-compatible server: openai:MODEL or openai:MODEL@URL."""

    model: str
    url: str  # empty: OpenAI's own server

    def host(self) -> str:
        return _host(self.url or OPENAI)


@dataclass(frozen=True)
class Verifier(ModelName):
    """The task's verifier in place of a judge: verifier."""


@dataclass(frozen=True)
class CurrentStudent(ModelName):
    """The student's weights at each step: self."""


@dataclass(frozen=True)
class InitialStudent(ModelName):
    """The student's weights before training: base."""


@dataclass(frozen=True)
class AveragedStudent(ModelName):
    """An exponential moving average of the student's weights: ema or ema:RATE."""

    rate: float  # the current weights' share in each step, in (0, 1]


StudentItself = CurrentStudent | InitialStudent | AveragedStudent


def parse(name: str, *, flag: str = "--teacher ") -> ModelName:
    """Return the value that a model's name stands for; `flag` named it, for the error.

    Raises Refusal for an ema rate outside (0, 1].
    """
    if name.startswith(("http://", "https://")):
        return ScoringServer(name)
    if name.startswith("openai:"):
        return ChatEndpoint(name, *_endpoint(name.removeprefix("openai:")))
    if name == "ema" or name.startswith("ema:"):
        return AveragedStudent(name, _rate(name, flag) if ":" in name else DEFAULT_EMA_RATE)
    return {"verifier": Verifier, "self": CurrentStudent, "base": InitialStudent}.get(name, ModelFiles)(name)


def _rate(name: str, flag: str) -> float:
    try:
        rate = float(name.removeprefix("ema:"))
    except ValueError:
        rate = -1.0
    if not 0 < rate <= 1:
        raise Refusal(f"{flag}{name}: write ema:RATE with the student's share of each step in (0, 1], such as 0.05")
    return rate


def _endpoint(text: str) -> tuple[str, str]:
    """Split MODEL@URL; an @ may stand in the model, too, as in claude-sonnet@20250219."""
    address = re.search(r"@(?=https?://)", text, re.IGNORECASE)
    if address is None:
        model, _, url = text.partition("@")
        return model, url
    return text[: address.start()], text[address.end() :]


def _host(url: str) -> str:
    parts = split_url(url)
    default_port = {"http": ":80", "https": ":443"}.get(parts.scheme, "")
    return f"{parts.scheme}://{parts.netloc.lower().removesuffix(default_port)}"


def split_url(url: str) -> SplitResult:
    """Return the parts of an address; empty parts if it has half an IPv6 address."""
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")
