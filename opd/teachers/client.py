"""A server asked until it answers: retries with back-off, time limits, and an account of what went over the wire.

What comes back malformed is asked again like what does not come back: `read` turns a response into a value, or raises
`Malformed`.  What the server says is the caller's mistake (4xx) is not: it is refused at once.
"""

import os
import random
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Literal, TypeVar
from urllib.parse import SplitResult, urlsplit

import httpx
import tyro

from opd.types import Refusal, one_line, positive

AGAIN = frozenset({408, 425, 429, *range(500, 600)}) - {501}  # the server may answer later what it cannot now
ANY: frozenset[int] = frozenset()
LONGEST = 30.0  # seconds between two tries
T = TypeVar("T")


class Malformed(ValueError):
    """A response that is not what was asked for."""


@dataclass(frozen=True, kw_only=True)
class Remote:
    """How a teacher behind a server is spoken to; unused by teachers in this process."""

    teacher_token_env: str = "OPD_TOKEN"
    """Name of the environment variable with the token or API key of --teacher's host; unset: none is sent."""
    route_token_env: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """NAME=VARIABLE: the variable with the key of a --route's host; without, --teacher's is sent where it is the same
    host, else none.  Repeat for more."""
    judge_token_env: str = ""
    """Name of the variable with the key of --judge's host; empty: --teacher's where it is the same host, else none."""
    teacher_timeout: float = 300.0
    """Seconds until a request to a server teacher counts as failed."""
    teacher_retries: int = 8
    """Times a failed request is asked again, after 0.5, 1, 2, ... 30 s (with jitter); by OpenAI's client, for text-only
    teachers and judges, at most 8 s apart or when Retry-After says."""
    teacher_concurrency: int = 8
    """Requests to a server teacher in flight at once."""
    teacher_tokenizer: str = ""
    """Tokenizer of a server that is not `opd serve`: hub id or folder; empty: it has the student's."""
    teacher_local: str = ""
    """A local copy of the model behind --teacher: their log-probs are compared before the first step."""
    teacher_prefix: Literal["continue", "ask"] = "continue"
    """How a text-only teacher (openai:) is made to go on from a begun answer: continue, by continue_final_message,
    which vLLM and `opd serve` have; or ask, in words, for any other endpoint."""
    teacher_cache: str = ""
    """Folder where the answers of text-only teachers and judges are kept, for several runs; empty: the run's own."""
    judge_tokens: int = 4096
    """Longest answer of a judge, in tokens."""
    judge_schema: bool = False
    """Ask that a judge keeps to the JSON schema of what it fills in (vLLM, SGLang, OpenAI, `opd serve`, a model here);
    a model that thinks in its answer cannot think then."""
    judge_failures: float = 0.4
    """Share of the last questions to a text-only teacher or judge that may fail, and of the last groups or rollouts
    that may go without a judgement; beyond it the run stops."""

    def check(self) -> None:
        """Refuse impossible settings."""
        positive(self, "teacher_timeout", "teacher_concurrency", "judge_tokens")
        if self.teacher_retries < 0:
            raise Refusal(f"--teacher-retries {self.teacher_retries}: must be 0 or more")
        if not 0 <= self.judge_failures <= 1:
            raise Refusal(f"--judge-failures {self.judge_failures}: a share lies in [0, 1]")

    def towards(self, field: str, model: str, teacher: str) -> "Remote":
        """The same, with the key for the model that a flag names: --teacher's goes to --teacher's host alone."""
        named = {f"route {name}": variable for name, _, variable in (x.partition("=") for x in self.route_token_env)}
        named |= {"judge": self.judge_token_env}
        own = self.teacher_token_env if host(model) == host(teacher) else ""
        return replace(self, teacher_token_env=named.get(field, "") or own)

    def keep(self, field: str) -> str:
        """Where the key for the model of a flag belongs, for messages."""
        kind, _, name = field.partition(" ")
        flag = f"--{kind}-token-env {name}=VARIABLE" if name else f"--{kind}-token-env VARIABLE"
        known = self.teacher_token_env
        return f"{known}, or name another variable by {flag}" if known else f"a variable, and name it by {flag}"


def host(model: str) -> str:
    """Scheme, name and port of the server in a teacher's name."""
    kind = model.partition(":")[0]
    parts = _split((endpoint(model)[1] or "https://api.openai.com") if kind == "openai" else model)
    usual = {"http": ":80", "https": ":443"}.get(parts.scheme, "")
    return f"{parts.scheme}://{parts.netloc.lower().removesuffix(usual)}"


def endpoint(name: str) -> tuple[str, str]:
    """Split openai:MODEL@URL into model and address; an @ may stand in the model too, as in claude-sonnet@20250219."""
    told = name.removeprefix("openai:")
    address = re.search(r"@(?=https?://)", told, re.IGNORECASE)
    if address is None:
        model, _, url = told.partition("@")
        return model, url
    return told[: address.start()], told[address.end() :]


def secret(variable: str) -> str:
    """The token in an environment variable, without the blanks around it; empty where there is none.

    Raises Refusal, which does not show it, for one that no header can hold.
    """
    token = os.environ.get(variable, "").strip() if variable else ""
    if not (token.isascii() and token.isprintable()):
        raise Refusal(f"{variable}: its token holds a line break, or another sign that no header can: export it anew")
    return token


@dataclass
class Traffic:
    """What went over the wire so far; threads add to it under the lock."""

    sent: int = 0  # bytes of request bodies
    received: int = 0  # bytes of response bodies, as they came
    requests: int = 0
    retries: int = 0


class Client:
    """One server; safe to call from several threads."""

    def __init__(self, url: str, how: Remote, *, field: str = "teacher") -> None:
        self.field, parts = field, _split(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise Refusal(f"--{field} {url}: not the address of a server; write http://host:port")
        if parts.username or parts.password:
            raise Refusal(
                f"--{field} {parts.scheme}://...@{parts.hostname}: no secrets in an address, for it is logged; put the "
                f"token into {how.keep(field)}"
            )
        self.url = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1')}"
        self.model = parts.fragment
        self.how = how
        self.traffic = Traffic()
        self.lock, self.closed = threading.Lock(), threading.Event()
        token = secret(how.teacher_token_env)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        most = httpx.Limits(max_connections=how.teacher_concurrency)
        # trust_env: a proxy of the environment must not see log-probs meant for the loopback.
        self.http = httpx.Client(headers=headers, timeout=how.teacher_timeout, limits=most, trust_env=False)

    @property
    def who(self) -> str:
        """The flag and the address, as messages begin."""
        return f"--{self.field} {self.url}"

    def close(self) -> None:
        """Ask nothing again: a process cannot end before its threads do, and a silent server would hold them long."""
        self.closed.set()
        self.http.close()

    def get(self, path: str, read: Callable[[httpx.Response], T]) -> T:
        """What `read` makes of GET path."""
        return self._ask("GET", path, None, read)

    def post(
        self,
        path: str,
        body: object,
        read: Callable[[httpx.Response], T],
        *,
        fine: frozenset[int] = ANY,
        tries: int = 0,
    ) -> T:
        """What `read` makes of POST path with a json body, or of an answer of a `fine` status.

        `tries` 0: as many as the run was told.
        """
        return self._ask("POST", path, body, read, fine=fine, tries=tries)

    def knows(self, path: str) -> bool:
        """Whether the server answers GET path at all; one that is down is waited for."""
        return self._ask("GET", path, None, lambda r: r.status_code == 200, fine=frozenset({404, 405}))

    def _ask(
        self,
        method: str,
        path: str,
        body: object,
        read: Callable[[httpx.Response], T],
        *,
        fine: frozenset[int] = ANY,
        tries: int = 0,
    ) -> T:
        failure, tries = "", tries or self.how.teacher_retries + 1
        for attempt in range(tries):
            if attempt:
                with self.lock:
                    self.traffic.retries += 1
                self.closed.wait(random.uniform(0.5, 1) * min(LONGEST, 0.5 * 2 ** (attempt - 1)))
            if self.closed.is_set():
                raise Refusal(f"{self.who}: {path} was given up, for the run ends")
            try:
                response = self.http.request(method, self.url + path, json=body)
                self._count(response)
                if response.status_code in fine or response.status_code not in AGAIN:
                    self._accept(response, path, fine)
                    return read(response)
                failure = f"HTTP {response.status_code} ({said(response)})"
            except httpx.InvalidURL as error:
                raise Refusal(f"{self.who}: {error}") from error
            except httpx.TimeoutException:
                failure = f"no answer within {self.how.teacher_timeout:g} s"
            except httpx.HTTPError as error:
                failure = f"{type(error).__name__}: {one_line(error)}"
            except Malformed as error:
                failure = f"a malformed answer ({error})"
        raise Refusal(
            f"{self.who}: {path} failed {tries} times, last with {failure}; bring the "
            "server back, then run the same command with --resume to go on from the last checkpoint"
        )

    def _accept(self, response: httpx.Response, path: str, fine: frozenset[int]) -> None:
        code = response.status_code
        if code == 401:
            raise Refusal(f"{self.who}: {path} wants a token (HTTP 401): export it in {self.how.keep(self.field)}")
        if not (200 <= code < 300 or code in fine):
            raise Refusal(f"{self.who}: {path} was refused with HTTP {code}: {said(response)}")

    def _count(self, response: httpx.Response) -> None:
        with self.lock:
            self.traffic.requests += 1
            self.traffic.sent += len(response.request.content)
            self.traffic.received += response.num_bytes_downloaded


def read_json(read: Callable[[dict], T]) -> Callable[[httpx.Response], T]:
    """A reader of a json object; whatever it stumbles over is malformed."""

    def whole(response: httpx.Response) -> T:
        found = payload(response)
        try:
            return read(found)
        except Refusal:
            raise
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise Malformed(f"{type(error).__name__}: {error}") from error

    return whole


def payload(response: httpx.Response) -> dict:
    """A json object."""
    try:
        found = response.json()
    except ValueError as error:
        raise Malformed(f"no json: {one_line(response.text)!r}") from error
    if not isinstance(found, dict):
        raise Malformed(f"not a json object: {one_line(response.text)!r}")
    return found


def _split(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError:  # half an IPv6 address
        return urlsplit("")


def said(response: httpx.Response) -> str:
    """The server's own words, in one line."""
    try:
        error = response.json()["error"]
        return one_line(str(error["message"] if isinstance(error, dict) else error))
    except (ValueError, KeyError, TypeError):
        return one_line(response.text) or response.reason_phrase
