"""A server asked until it answers: retries with back-off, time limits, and an account of what went over the wire.

What comes back malformed is asked again like what does not come back: `read` turns a response into a value, or raises
`Malformed`.  What the server says is the caller's mistake (4xx) is not: it is refused at once.
"""

import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar
from urllib.parse import urlsplit

import httpx

from opd.types import Refusal

AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})  # the server may answer later what it cannot now
LONGEST = 30.0  # seconds between two tries
T = TypeVar("T")


class Malformed(ValueError):
    """A response that is not what was asked for."""


@dataclass(frozen=True, kw_only=True)
class Remote:
    """How a teacher behind a server is spoken to; unused by teachers in this process."""

    teacher_token_env: str = "OPD_TOKEN"
    """Name of the environment variable with a server teacher's token or API key; unset: none is sent."""
    teacher_timeout: float = 300.0
    """Seconds until a request to a server teacher counts as failed."""
    teacher_retries: int = 8
    """Times a failed request is asked again, after 0.5, 1, 2, ... 30 s (with jitter)."""
    teacher_concurrency: int = 8
    """Requests to a server teacher in flight at once."""
    teacher_tokenizer: str = ""
    """Tokenizer of a server that is not `opd serve`: hub id or folder; empty: it has the student's."""
    teacher_local: str = ""
    """A local copy of the server's model: its log-probs are compared with the server's before the first step."""
    teacher_prefix: Literal["continue", "ask"] = "continue"
    """How a text-only teacher (openai:) is made to go on from a begun answer: continue, by continue_final_message,
    which vLLM and `opd serve` have; or ask, in words, for any other endpoint."""
    teacher_cache: str = ""
    """Folder where the answers of text-only teachers and judges are kept, for several runs; empty: the run's own."""
    judge_tokens: int = 4096
    """Longest answer of a judge, in tokens."""
    judge_failures: float = 0.4
    """Share of the last questions to a text-only teacher or judge that may fail; beyond it the run stops."""

    def check(self) -> None:
        """Refuse impossible settings."""
        for name in ("teacher_timeout", "teacher_concurrency", "judge_tokens"):
            if not getattr(self, name) > 0:
                raise Refusal(f"--{name.replace('_', '-')} {getattr(self, name)}: must be above 0")
        if self.teacher_retries < 0:
            raise Refusal(f"--teacher-retries {self.teacher_retries}: must be 0 or more")
        if not 0 <= self.judge_failures <= 1:
            raise Refusal(f"--judge-failures {self.judge_failures}: a share lies in [0, 1]")


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
        self.field, parts = field, urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise Refusal(f"--{field} {url}: not the address of a server; write http://host:port")
        if parts.username or parts.password:
            raise Refusal(
                f"--{field} {parts.scheme}://...@{parts.hostname}: no secrets in an address, for it is logged; put the "
                f"token into {how.teacher_token_env}"
            )
        self.url = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1')}"
        self.model = parts.fragment
        self.how = how
        self.traffic = Traffic()
        self.lock = threading.Lock()
        token = os.environ.get(how.teacher_token_env, "") if how.teacher_token_env else ""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        most = httpx.Limits(max_connections=how.teacher_concurrency)
        # trust_env: a proxy of the environment must not see log-probs meant for the loopback.
        self.http = httpx.Client(headers=headers, timeout=how.teacher_timeout, limits=most, trust_env=False)

    def get(self, path: str, read: Callable[[httpx.Response], T]) -> T:
        """What `read` makes of GET path."""
        return self._ask("GET", path, None, read)

    def post(self, path: str, body: object, read: Callable[[httpx.Response], T], *, tries: int = 0) -> T:
        """What `read` makes of POST path with a json body; `tries` 0: as many as the run was told."""
        return self._ask("POST", path, body, read, tries=tries)

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
        fine: frozenset[int] = frozenset(),
        tries: int = 0,
    ) -> T:
        failure, tries = "", tries or self.how.teacher_retries + 1
        for attempt in range(tries):
            if attempt:
                with self.lock:
                    self.traffic.retries += 1
                time.sleep(random.uniform(0.5, 1) * min(LONGEST, 0.5 * 2 ** (attempt - 1)))
            try:
                response = self.http.request(method, self.url + path, json=body)
                self._count(response)
                if response.status_code not in AGAIN:
                    self._accept(response, path, fine)
                    return read(response)
                failure = f"HTTP {response.status_code} ({_said(response)})"
            except httpx.InvalidURL as error:
                raise Refusal(f"--{self.field} {self.url}: {error}") from error
            except httpx.TimeoutException:
                failure = f"no answer within {self.how.teacher_timeout:g} s"
            except httpx.HTTPError as error:
                failure = f"{type(error).__name__}: {_line(str(error))}"
            except Malformed as error:
                failure = f"a malformed answer ({error})"
        raise Refusal(
            f"--{self.field} {self.url}: {path} failed {tries} times, last with {failure}; bring the "
            "server back, then run the same command with --resume to go on from the last checkpoint"
        )

    def _accept(self, response: httpx.Response, path: str, fine: frozenset[int]) -> None:
        code = response.status_code
        if code == 401:
            raise Refusal(
                f"--{self.field} {self.url}: {path} wants a token (HTTP 401): export it in "
                f"{self.how.teacher_token_env or 'a variable'}, or name another variable by --{self.field}-token-env"
            )
        if not (200 <= code < 300 or code in fine):
            raise Refusal(f"--{self.field} {self.url}: {path} was refused with HTTP {code}: {_said(response)}")

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
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise Malformed(f"{type(error).__name__}: {error}") from error

    return whole


def payload(response: httpx.Response) -> dict:
    """A json object."""
    try:
        found = response.json()
    except ValueError as error:
        raise Malformed(f"no json: {_line(response.text)!r}") from error
    if not isinstance(found, dict):
        raise Malformed(f"not a json object: {_line(response.text)!r}")
    return found


def _said(response: httpx.Response) -> str:
    """The server's own words, in one line."""
    try:
        error = response.json()["error"]
        return _line(str(error["message"] if isinstance(error, dict) else error))
    except (ValueError, KeyError, TypeError):
        return _line(response.text) or response.reason_phrase


def _line(text: str) -> str:
    short = " ".join(text.split())
    return short if len(short) <= 200 else short[:197] + "..."
