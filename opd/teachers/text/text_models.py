"""Requests to models that generate text, and these models: behind an endpoint, or in this process.

A model has a `name`, which is part of each cache key, and `model_input` returns what it reads, as json.
"""

import importlib
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from queue import SimpleQueue
from typing import Any, TypeVar
from urllib.parse import urlsplit

from transformers import PreTrainedTokenizerBase as Tokenizer

from opd.config.model_names import ChatEndpoint
from opd.config.servers import Remote, secret
from opd.core.errors import Refusal, one_line
from opd.core.sampling import Prompt, Sampling
from opd.data import prompts
from opd.data.verifiers import response_text
from opd.rollouts.engines.base import GenerateRequest
from opd.rollouts.engines.hf import HFEngine
from opd.rollouts.engines.json_schema import GrammarCompiler

T = TypeVar("T")
CONTINUE_REQUEST = (
    "Below, an answer to the last question has begun. Write what comes next, from the very character where it breaks "
    "off. Repeat none of it, and say nothing else.\n\n"
)


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


class Failure(Exception):
    """A request without an answer, with the reason."""


TextResults = list[tuple[int, list[str] | Failure]]
"""Pairs (index of a request, its texts or its failure)."""


class EndpointModel:
    """A model behind an OpenAI-compatible server."""

    def __init__(self, name: ChatEndpoint, settings: Remote, *, field: str) -> None:
        self.model, self.url = name.model, name.url
        self.name, self.settings, self.field = f"openai:{self.model}", settings, field
        parts = urlsplit(self.url)
        if not self.model or ("@" in name.name and (parts.scheme not in ("http", "https") or not parts.hostname)):
            raise Refusal(f"--{field} {name}: write openai:MODEL@http://host:port/v1, or openai:MODEL for OpenAI's own")
        if parts.username or parts.password:
            raise Refusal(
                f"--{field} {self.name}@...: no secrets in an address, for it is logged; put the key into "
                f"{settings.keep(field)}"
            )
        openai = import_extra("openai", f"--{field} {self.name}")
        self.errors = openai
        local = parts.hostname in ("localhost", "127.0.0.1", "::1")  # a proxy from the environment cannot reach it
        self.client = openai.OpenAI(
            api_key=secret(settings.teacher_token_env) or "none",
            base_url=self.url or "https://api.openai.com/v1",
            timeout=settings.teacher_timeout,
            max_retries=settings.teacher_retries,
            http_client=openai.DefaultHttpxClient(trust_env=not local),
        )

    def model_input(self, request: TextRequest) -> object:
        """Return the conversation with the extra fields of the request, or the plain text."""
        return self._turns(request) if request.prompt.messages else request.prompt.text + request.prefix

    def generate(
        self, requests: Sequence[tuple[TextRequest, int]], sampling: TextSampling, counters: RequestCounters
    ) -> Iterator[TextResults]:
        """Send pairs (request, seed) in parallel, at most --teacher-concurrency at once.  Yields what has come."""
        jobs = [partial(self._texts, request, seed, sampling, counters) for request, seed in requests]
        return run_parallel(jobs, self.settings.teacher_concurrency)

    def _texts(
        self, request: TextRequest, seed: int, sampling: TextSampling, counters: RequestCounters
    ) -> list[str] | Failure:
        """Return all n texts of one request.  A server that returns fewer at once gets further requests."""
        texts: list[str] = []
        start, openai = time.perf_counter(), self.errors
        try:
            while len(texts) < sampling.n:
                missing = replace(sampling, n=sampling.n - len(texts))
                result = self._send(request, (seed + len(texts)) % (1 << 31), missing, counters)
                if isinstance(result, Failure):
                    return result
                texts += result
            return texts[: sampling.n]
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise Refusal(
                f"--{self.field} {self.name}: it wants a key (HTTP {error.status_code}): export it in "
                f"{self.settings.keep(self.field)}"
            ) from error
        except openai.NotFoundError as error:
            raise Refusal(f"--{self.field} {self.name}: {one_line(error)}: name a model that the server has") from error
        except Refusal:
            raise
        except Exception as error:  # the libraries' own, and whatever a malformed answer leads to
            return Failure(f"{type(error).__name__}: {one_line(error)}")
        finally:
            counters.add(seconds=time.perf_counter() - start)

    def _send(
        self, request: TextRequest, seed: int, sampling: TextSampling, counters: RequestCounters
    ) -> list[str] | Failure:
        """Send one request and return its texts, at least one and possibly fewer than `sampling.n`."""
        parameters = dict[str, Any](model=self.model, n=sampling.n, temperature=sampling.temperature, seed=seed)
        if request.prompt.messages:
            turns, extra_body = self._turns(request)
            # OpenAI's current models accept max_completion_tokens, older servers only max_tokens.
            parameters["max_tokens" if self.url else "max_completion_tokens"] = sampling.max_tokens
            response = self.client.chat.completions.create(messages=turns, extra_body=extra_body, **parameters)
            texts = [(choice.message.content or "", choice.finish_reason) for choice in response.choices]
        else:
            prompt = request.prompt.text + request.prefix
            response = self.client.completions.create(prompt=prompt, max_tokens=sampling.max_tokens, **parameters)
            texts = [(choice.text or "", choice.finish_reason) for choice in response.choices]
        if (usage := response.usage) is not None:
            counters.add(read_tokens=usage.prompt_tokens, written_tokens=usage.completion_tokens)
        return texts_or_failure(texts, sampling) if texts else Failure(f"{self.name} gave no text")

    def _turns(self, request: TextRequest) -> tuple[list[dict[str, str]], dict[str, object]]:
        """Return the conversation, and the extra fields of the request."""
        turns = [dict(turn) for turn in request.prompt.messages]
        if request.schema:
            form = {"name": "form", "schema": json.loads(request.schema)}
            return turns, {"response_format": {"type": "json_schema", "json_schema": form}}
        if not request.prefix:
            return turns, {}
        if self.settings.teacher_prefix == "ask":
            return [*turns, {"role": "user", "content": CONTINUE_REQUEST + request.prefix}], {}
        # Extensions of vLLM, which some other servers have, too.
        extra_body: dict[str, object] = {"add_generation_prompt": False, "continue_final_message": True}
        return [*turns, {"role": "assistant", "content": request.prefix}], extra_body


@dataclass
class InProcessModel:
    """A text model in this process."""

    name: str
    engine: HFEngine
    tokenizer: Tokenizer
    context: int  # tokens
    arguments: Mapping[str, Any]  # arguments of its chat template

    @cached_property
    def grammar_compiler(self) -> GrammarCompiler:
        """Return the compiler of JSON schemas for this tokenizer; made once."""
        return GrammarCompiler.of(self.tokenizer, self.engine.vocabulary, self.engine.stop)

    def model_input(self, request: TextRequest) -> object:
        """Return the token ids after the chat template, and the schema if the request has one."""
        return [self._ids(request), request.schema] if request.schema else self._ids(request)

    def generate(
        self, requests: Sequence[tuple[TextRequest, int]], sampling: TextSampling, counters: RequestCounters
    ) -> Iterator[TextResults]:
        """Generate texts for all requests in batches.  Each text of a request has a separate random stream."""
        start, n = time.perf_counter(), sampling.n
        rows, index, grammars = [], [], []  # of each text: prompt ids, random-number index, and grammar
        sent = []  # indices of the requests that fit into the context
        for i, (request, seed) in enumerate(requests):
            ids = self._ids(request)
            if len(ids) + sampling.max_tokens > self.context:
                reason = f"{len(ids)} tokens and {sampling.max_tokens} new ones, in a context of {self.context}"
                yield [(i, Failure(f"{reason}: lower {sampling.flag}"))]
                continue
            rows += [ids] * n
            index += [seed * n + j for j in range(n)]
            grammars += [self.grammar_compiler.grammar(json.loads(request.schema)) for _ in range(n) if request.schema]
            sent.append(i)
        engine_sampling = Sampling(temperature=sampling.temperature, max_new_tokens=sampling.max_tokens)
        samples = self.engine.generate(
            GenerateRequest(rows, engine_sampling, seed=0, step=0, index=index, grammars=grammars)
        )
        counters.add(
            seconds=time.perf_counter() - start,
            read_tokens=sum(map(len, rows)),
            written_tokens=sum(len(sample.ids) for sample in samples),
        )
        texts = [
            (response_text.decode(self.tokenizer, sample.ids, context_ids=ids), "stop" if sample.stopped else "length")
            for ids, sample in zip(rows, samples, strict=True)
        ]
        yield [(i, texts_or_failure(texts[k * n : (k + 1) * n], sampling)) for k, i in enumerate(sent)]

    def _ids(self, request: TextRequest) -> tuple[int, ...]:
        return prompts.prefilled_ids(self.tokenizer, request.prompt, request.prefix, self.arguments)


def texts_or_failure(texts: Sequence[tuple[str, str | None]], sampling: TextSampling) -> list[str] | Failure:
    """Return the texts of pairs (text, finish_reason), or a failure if one is empty for another reason than "stop".

    A reasoning model may spend all its tokens on thinking and return no text.
    """
    for text, reason in texts:
        if not text and reason != "stop":
            return Failure(f"no text in {sampling.max_tokens} tokens (finish_reason {reason}): raise {sampling.flag}")
    return [text for text, _ in texts]


def run_parallel(jobs: Sequence[Callable[[], T]], max_threads: int) -> Iterator[list[tuple[int, T]]]:
    """Run calls in at most `max_threads` threads.

    Yields lists of (index, result): all calls that ended since the last list.  The threads are daemons.  When the
    caller stops reading, a call that still waits delays neither the caller nor the end of the process.
    """
    queue = deque(enumerate(jobs))
    done = SimpleQueue[tuple[int, T] | BaseException]()

    def work() -> None:
        with suppress(IndexError):  # no job is left
            while True:
                i, job = queue.popleft()
                try:
                    done.put((i, job()))
                except BaseException as error:
                    done.put(error)

    for _ in range(min(max_threads, len(jobs))):
        threading.Thread(target=work, name="text", daemon=True).start()
    waiting = len(jobs)
    try:
        while waiting:
            results = [done.get()]
            while not done.empty():
                results.append(done.get())
            waiting -= len(results)
            yield [result for result in results if not isinstance(result, BaseException)]
            for error in results:
                if isinstance(error, BaseException):
                    raise error
    finally:
        queue.clear()


def import_extra(package: str, user: str) -> Any:
    """Import a package of the extra `text`.  Raises Refusal, which names the `user`, if it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise Refusal(f"{user}: needs {package}, which is not installed; pip install 'opd[text]'") from error
