"""Models that generate a text teacher's answers: behind an endpoint, in this process, or on another rank."""

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from queue import SimpleQueue
from typing import Any
from urllib.parse import urlsplit

from transformers import PreTrainedTokenizerBase as Tokenizer

from opd.config.model_names import ChatEndpoint
from opd.config.servers import Remote, secret
from opd.core.errors import Refusal, one_line
from opd.core.sampling import Sampling
from opd.data import prompts
from opd.rollouts.engines.hf import HFEngine
from opd.rollouts.engines.json_schema import Forms
from opd.teachers.text.text_teacher import Account, Begun, Failed, How, T, Written, needed

ON = (
    "Below, an answer to the last question has begun. Write what comes next, from the very character where it breaks "
    "off. Repeat none of it, and say nothing else.\n\n"
)


class Endpoint:
    """A model behind an OpenAI-compatible server."""

    def __init__(self, name: ChatEndpoint, how: Remote, *, field: str) -> None:
        self.model, self.url = name.model, name.url
        self.name, self.how, self.field = f"openai:{self.model}", how, field
        parts = urlsplit(self.url)
        if not self.model or ("@" in str(name) and (parts.scheme not in ("http", "https") or not parts.hostname)):
            raise Refusal(f"--{field} {name}: write openai:MODEL@http://host:port/v1, or openai:MODEL for OpenAI's own")
        if parts.username or parts.password:
            raise Refusal(
                f"--{field} {self.name}@...: no secrets in an address, for it is logged; put the key into "
                f"{how.keep(field)}"
            )
        openai = needed("openai", f"--{field} {self.name}")
        self.errors = openai
        local = parts.hostname in ("localhost", "127.0.0.1", "::1")  # a proxy from the environment cannot reach it
        self.client = openai.OpenAI(
            api_key=secret(how.teacher_token_env) or "none",
            base_url=self.url or "https://api.openai.com/v1",
            timeout=how.teacher_timeout,
            max_retries=how.teacher_retries,
            http_client=openai.DefaultHttpxClient(trust_env=not local),
        )

    def reads(self, begun: Begun) -> object:
        """Return the conversation with the extra fields of the request, or the plain text."""
        return self._turns(begun) if begun.prompt.messages else begun.prompt.text + begun.text

    def write(self, asked: Sequence[tuple[Begun, int]], how: How, account: Account) -> Iterator[Written]:
        """Send the requests in parallel, at most --teacher-concurrency at once."""
        jobs = [partial(self._one, begun, seed, how, account) for begun, seed in asked]
        return beside(jobs, self.how.teacher_concurrency)

    def _one(self, begun: Begun, seed: int, how: How, account: Account) -> list[str] | Failed:
        """Return all n texts of one request.  A server that returns fewer at once gets further requests."""
        texts: list[str] = []
        start, openai = time.perf_counter(), self.errors
        try:
            while len(texts) < how.n:
                given = self._ask(begun, (seed + len(texts)) % (1 << 31), how.n - len(texts), how, account)
                if isinstance(given, Failed):
                    return given
                texts += given
            return texts[: how.n]
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise Refusal(
                f"--{self.field} {self.name}: it wants a key (HTTP {error.status_code}): export it in "
                f"{self.how.keep(self.field)}"
            ) from error
        except openai.NotFoundError as error:
            raise Refusal(f"--{self.field} {self.name}: {one_line(error)}: name a model that the server has") from error
        except (openai.OpenAIError, ValueError, TypeError, AttributeError) as error:  # malformed answers
            return Failed(f"{type(error).__name__}: {one_line(error)}")
        finally:
            account.add(seconds=time.perf_counter() - start)

    def _ask(self, begun: Begun, seed: int, n: int, how: How, account: Account) -> list[str] | Failed:
        drawing: dict[str, Any] = {"model": self.model, "n": n, "temperature": how.temperature, "seed": seed}
        if begun.prompt.messages:
            turns, more = self._turns(begun)
            # OpenAI's current models accept max_completion_tokens, older servers only max_tokens.
            most = "max_tokens" if self.url else "max_completion_tokens"
            said = self.client.chat.completions.create(
                messages=turns, extra_body=more, **{most: how.max_tokens}, **drawing
            )
            texts = [(choice.message.content or "", choice.finish_reason) for choice in said.choices]
        else:
            whole = begun.prompt.text + begun.text
            said = self.client.completions.create(prompt=whole, max_tokens=how.max_tokens, **drawing)
            texts = [(choice.text or "", choice.finish_reason) for choice in said.choices]
        if said.usage is not None:
            account.add(read_tokens=said.usage.prompt_tokens, written_tokens=said.usage.completion_tokens)
        return worded(texts, how) if texts else Failed(f"{self.name} gave no text")

    def _turns(self, begun: Begun) -> tuple[list[dict[str, str]], dict[str, object]]:
        """Return the conversation, and the extra fields of the request."""
        turns = [dict(turn) for turn in begun.prompt.messages]
        if begun.schema:
            form = {"name": "form", "schema": json.loads(begun.schema)}
            return turns, {"response_format": {"type": "json_schema", "json_schema": form}}
        if not begun.text:
            return turns, {}
        if self.how.teacher_prefix == "ask":
            return [*turns, {"role": "user", "content": ON + begun.text}], {}
        # Extensions of vLLM, which some other servers have, too.
        more: dict[str, object] = {"add_generation_prompt": False, "continue_final_message": True}
        return [*turns, {"role": "assistant", "content": begun.text}], more


@dataclass
class Local:
    """A text model in this process."""

    name: str
    engine: HFEngine
    tokenizer: Tokenizer
    context: int  # tokens
    arguments: Mapping[str, Any]  # arguments of its chat template

    @cached_property
    def forms(self) -> Forms:
        """Return the compiler of JSON schemas for this tokenizer; made once."""
        return Forms.of(self.tokenizer, self.engine.vocabulary, self.engine.stop)

    def reads(self, begun: Begun) -> object:
        """Return the token ids after the chat template, and the schema if the request has one."""
        return [self._ids(begun), begun.schema] if begun.schema else self._ids(begun)

    def write(self, asked: Sequence[tuple[Begun, int]], how: How, account: Account) -> Iterator[Written]:
        """Generate texts for all requests in batches.  Each text of a request has a separate random stream."""
        start, rows, index, places, forms = time.perf_counter(), [], [], [], []
        for i, (begun, seed) in enumerate(asked):
            ids = self._ids(begun)
            if len(ids) + how.max_tokens > self.context:
                why = f"{len(ids)} tokens and {how.max_tokens} new ones, in a context of {self.context}"
                yield [(i, Failed(f"{why}: lower {how.setting}"))]
                continue
            rows += [ids] * how.n
            index += [seed * how.n + j for j in range(how.n)]
            forms += [self.forms.form(json.loads(begun.schema)) for _ in range(how.n) if begun.schema]
            places.append(i)
        sampling = Sampling(temperature=how.temperature, max_new_tokens=how.max_tokens)
        drawn = self.engine.generate(rows, sampling, seed=0, step=0, index=index, forms=forms)
        account.add(
            seconds=time.perf_counter() - start,
            read_tokens=sum(map(len, rows)),
            written_tokens=sum(len(sample.ids) for sample in drawn),
        )
        ends = [
            (prompts.after(self.tokenizer, ids, sample.ids), "stop" if sample.stopped else "length")
            for ids, sample in zip(rows, drawn, strict=True)
        ]
        yield [(i, worded(ends[k * how.n : (k + 1) * how.n], how)) for k, i in enumerate(places)]

    def _ids(self, begun: Begun) -> tuple[int, ...]:
        return prompts.begun(self.tokenizer, begun.prompt, begun.text, self.arguments)


@dataclass(frozen=True)
class Elsewhere:
    """A placeholder for a text model that only the main process (rank 0) holds: it has a name and no weights."""

    name: str

    def reads(self, begun: Begun) -> object:
        """Raise AssertionError: only the main process generates."""
        raise AssertionError("the main process asks")

    def write(self, asked: Sequence[tuple[Begun, int]], how: How, account: Account) -> Iterator[Written]:
        """Raise AssertionError: only the main process generates."""
        raise AssertionError("the main process asks")


def worded(ended: Sequence[tuple[str, str | None]], how: How) -> list[str] | Failed:
    """Return the texts of pairs (text, finish_reason), or Failed if one is empty for another reason than "stop".

    A reasoning model may spend all its tokens on thinking and return no text.
    """
    for text, why in ended:
        if not text and why != "stop":
            return Failed(f"no text in {how.max_tokens} tokens (finish_reason {why}): raise {how.setting}")
    return [text for text, _ in ended]


def beside(jobs: Sequence[Callable[[], T]], most: int) -> Iterator[list[tuple[int, T]]]:
    """Run calls in at most `most` threads.  Yields lists of (index, result): all calls that ended since the last list.

    The threads are daemons.  When the caller stops reading, a call that still waits delays neither the caller nor the
    end of the process.
    """
    left = deque(enumerate(jobs))
    done, broken = SimpleQueue[tuple[int, T] | None](), list[BaseException]()

    def work() -> None:
        while left:
            try:
                i, job = left.popleft()
            except IndexError:  # another thread took the last job
                return
            try:
                done.put((i, job()))
            except BaseException as error:
                broken.append(error)
                done.put(None)

    for _ in range(min(most, len(jobs))):
        threading.Thread(target=work, name="text", daemon=True).start()
    waiting = len(jobs)
    try:
        while waiting:
            some = [done.get()]
            while not done.empty():
                some.append(done.get())
            waiting -= len(some)
            yield [x for x in some if x is not None]
            if broken:
                raise broken[0]
    finally:
        left.clear()
