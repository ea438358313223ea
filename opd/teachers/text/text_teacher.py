"""Teachers and judges that only generate text.

The model is behind an OpenAI-compatible endpoint, or in this process.  A request that fails is counted and returns no
texts; the other answers of its batch are kept, in memory and on disk.  If too many requests fail, the run stops.
"""

import importlib
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol, TypeVar, runtime_checkable

from opd.core.errors import Refusal
from opd.core.sampling import Prompt
from opd.core.types import STUDENT_COLUMNS, Rollout
from opd.losses.hidden_states import Lens
from opd.teachers.base import BaseTeacher
from opd.teachers.text.answer_cache import AnswerCache, cache_key

T = TypeVar("T")
MIN_COUNTED, WINDOW = 10, 50  # requests: the fewest after which failures can stop a run, and the most that are counted


@dataclass(frozen=True)
class TextRequest:
    """A request: a prompt, and the prefix of its answer."""

    prompt: Prompt
    prefix: str = ""
    schema: str = ""  # JSON schema of the answer; empty: free text


@dataclass(frozen=True)
class TextSampling:
    """The generation parameters of a request."""

    n: int
    max_tokens: int
    temperature: float
    flag: str  # the flag that sets max_tokens, for error messages


@dataclass
class RequestCounters:
    """Counters of requests and tokens.  Threads update them under the lock."""

    calls: int = 0  # requests sent to the model
    cached: int = 0  # requests answered from the cache
    failed: int = 0
    read_tokens: int = 0
    written_tokens: int = 0
    seconds: float = 0.0  # sum over the calls, parallel ones included
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, **increments: float | int) -> None:
        """Add to the counters."""
        with self.lock:
            for name, value in increments.items():
                setattr(self, name, getattr(self, name) + value)

    def numbers(self) -> dict[str, float]:
        """Return all counters by name."""
        with self.lock:
            return {f.name: float(getattr(self, f.name)) for f in fields(self) if f.name != "lock"}


class FailureLimit:
    """A limit on failures: it stops the run when more than the share `limit` of the last WINDOW requests failed.

    It waits for MIN_COUNTED requests first.  `flag` and `unit` name the model and what is counted, for the message.
    """

    def __init__(self, flag: str, limit: float, unit: str = "questions") -> None:
        self.flag, self.limit, self.unit, self.lock = flag, limit, unit, threading.Lock()
        self.failures: deque[bool] = deque(maxlen=WINDOW)
        self.reason = ""  # of the last failure

    def note(self, reason: str) -> None:
        """Count one request.  `reason` says why it failed, or is empty.  Raises Refusal above the limit."""
        with self.lock:
            self.failures.append(bool(reason))
            self.reason = reason or self.reason
            count = len(self.failures)
            share = sum(self.failures) / count
            if count >= MIN_COUNTED and share > self.limit:
                raise Refusal(
                    f"--{self.flag}: {share:.0%} of the last {count} {self.unit} failed, and --judge-failures "
                    f"allows {self.limit:.0%}; the last: {self.reason}: mend that, then run the same command with "
                    "--resume"
                )


class Failure(Exception):
    """A request without an answer, with the reason."""


TextResults = list[tuple[int, list[str] | Failure]]
"""Pairs (index of a request, its texts or its failure)."""


@runtime_checkable
class TextModel(Protocol):
    """A model that generates text."""

    @property
    def name(self) -> str:
        """Return the model's name, which is part of each cache key."""

    def model_input(self, request: TextRequest) -> object:
        """Return what the model reads, as json.  With name, parameters and seed it forms the cache key."""

    def generate(
        self, requests: Sequence[tuple[TextRequest, int]], sampling: TextSampling, counters: RequestCounters
    ) -> Iterator[TextResults]:
        """Generate texts for pairs (request, seed).  Yields results as they finish, in any order."""


class TextTeacher(BaseTeacher):
    """A teacher that answers with text only.  It suits methods that need no log-probs of the teacher."""

    provides = STUDENT_COLUMNS | {"text"}

    def __init__(self, model: TextModel, cache: AnswerCache, failure_limit: FailureLimit) -> None:
        self.model, self.cache, self.failure_limit = model, cache, failure_limit
        self.counters, self.reported = RequestCounters(), dict[str, float]()

    def continuations(
        self, prefixes: Sequence[TextRequest], n: int, max_tokens: int, seed: int, temperature: float = 1.0
    ) -> list[list[str]]:
        """Return `n` continuations of each prefix; an empty list where the request failed.

        `max_tokens` counts tokens of the teacher's tokenizer.
        """
        return self.texts(prefixes, TextSampling(n, max_tokens, temperature, "--length"), seed)

    def chat(self, conversations: Sequence[Prompt], sampling: TextSampling, seed: int) -> list[list[str]]:
        """Return the answers to each conversation; an empty list where the request failed."""
        return self.texts([TextRequest(prompt) for prompt in conversations], sampling, seed)

    def forget(self, requests: Sequence[TextRequest], sampling: TextSampling, seed: int) -> None:
        """Delete useless answers from the cache, so that the requests are sent again next time."""
        self.cache.drop([self._key(request, sampling, seed) for request in requests])

    def _key(self, request: TextRequest, sampling: TextSampling, seed: int) -> str:
        model_input = self.model.model_input(request)
        return cache_key(self.model.name, model_input, sampling.n, sampling.max_tokens, sampling.temperature, seed)

    def texts(self, requests: Sequence[TextRequest], sampling: TextSampling, seed: int) -> list[list[str]]:
        """Return the texts of each request, from the cache or from the model; an empty list where it failed.

        Equal requests are sent once.
        """
        keys = [self._key(request, sampling, seed) for request in requests]
        texts_by_key: dict[str, list[str]] = {}
        to_send: dict[str, tuple[TextRequest, int]] = {}
        for key, request in zip(keys, requests, strict=True):
            if key in texts_by_key or key in to_send:
                continue
            cached = self.cache.find(key)
            if cached is not None:
                texts_by_key[key] = cached
            else:
                to_send[key] = (request, int(key[:7], 16))  # a request's seed comes from its key: 28 bits
        self.counters.add(calls=len(to_send), cached=len(texts_by_key))
        sent_keys = list(to_send)
        for results in self.model.generate(list(to_send.values()), sampling, self.counters) if to_send else ():
            for i, result in results:  # store all answers before a failure can stop the run
                if not isinstance(result, Failure):
                    self.cache.store(sent_keys[i], result)
                    texts_by_key[sent_keys[i]] = result
            for _, result in results:
                failed = isinstance(result, Failure)
                self.counters.add(failed=failed)
                self.failure_limit.note(str(result) if failed else "")
        return [texts_by_key.get(key, []) for key in keys]

    def hidden(self, rollouts: Sequence[Rollout], masks: Sequence[Sequence[bool]], lens: Lens | None = None) -> None:
        """Return None: a text-only teacher has no hidden states."""

    def traffic(self) -> dict[str, float]:
        """Return the counters since the last call, for perf.jsonl."""
        totals = self.counters.numbers()
        new = {f"teacher_{name}": value - self.reported.get(name, 0.0) for name, value in totals.items()}
        self.reported = totals
        return new


def import_extra(package: str, user: str) -> Any:
    """Import a package of the extra `text`.  Raises Refusal, which names the `user`, if it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise Refusal(f"{user}: needs {package}, which is not installed; pip install 'opd[text]'") from error
