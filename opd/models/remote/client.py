"""An HTTP client for one server, with retries, back-off, timeouts and traffic counters.

`read` turns a response into a value, or raises `Malformed`.  A malformed response is retried like a lost one.  A status
that blames the caller (most of 4xx) is not retried: the client raises Refusal at once.
"""

import contextlib
import random
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar
from weakref import WeakSet

import httpx

from opd.config.model_names import split_url
from opd.config.servers import Remote, secret
from opd.core import json_text
from opd.core.errors import Refusal, one_line

RETRIED_STATUS = frozenset({408, 425, 429, *range(500, 600)}) - {501}  # HTTP status codes that are retried
NO_STATUS: frozenset[int] = frozenset()
ANSWER_BYTES = 256 << 20  # largest answer, after decompression: longer ones fill the memory of this process
MAX_WAIT = 30.0  # seconds: the longest wait between two attempts
T = TypeVar("T")
Reader = Callable[[httpx.Response], T]


class Malformed(ValueError):
    """A response whose content does not match the protocol."""


@dataclass
class Traffic:
    """Counters of HTTP traffic.  Threads update them under the client's lock."""

    sent: int = 0  # bytes of request bodies
    received: int = 0  # bytes of response bodies, still compressed
    requests: int = 0
    retries: int = 0


class Client:
    """An HTTP client for one server.  Several threads may call it at once."""

    def __init__(self, url: str, settings: Remote, *, field: str = "teacher") -> None:
        self.field, parts = field, split_url(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise Refusal(f"--{field} {url}: not the address of a server; write http://host:port")
        if parts.username or parts.password:
            raise Refusal(
                f"--{field} {parts.scheme}://...@{parts.hostname}: no secrets in an address, for it is logged; put the "
                f"token into {settings.keep(field)}"
            )
        self.url = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1')}"
        self.model = parts.fragment
        self.settings = settings
        self.traffic = Traffic()
        self.lock, self.closed = threading.Lock(), threading.Event()
        self.sockets: WeakSet[socket.socket] = WeakSet()  # all that are open
        token = secret(settings.teacher_token_env)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        limits = httpx.Limits(max_connections=settings.teacher_concurrency)
        # trust_env=False: a proxy named in the environment must not see log-probs sent to the loopback.
        self.http = httpx.Client(headers=headers, timeout=settings.teacher_timeout, limits=limits, trust_env=False)

    @property
    def label(self) -> str:
        """Return the flag and the address with which each error message begins."""
        return f"--{self.field} {self.url}"

    def close(self) -> None:
        """Stop all requests and retries: the process ends after its threads, and a silent server keeps them waiting."""
        self.closed.set()
        for connection in list(self.sockets):
            with contextlib.suppress(OSError):  # the server has closed it
                connection.shutdown(socket.SHUT_RDWR)  # wakes a thread that waits for an answer; closing does not
        self.http.close()

    def get(self, path: str, read: Reader[T], *, fine: frozenset[int] = NO_STATUS, limit: int = ANSWER_BYTES) -> T:
        """Send GET `path` and return what `read` makes of the response, which has at most `limit` bytes; see `post`."""
        return self._ask(partial(self._send, "GET", path, None, limit), path, read, fine, 0)

    def post(self, path: str, body: object, read: Reader[T], *, fine: frozenset[int] = NO_STATUS, tries: int = 0) -> T:
        """Send POST `path` with a json body and return what `read` makes of the response.

        A response whose status is in `fine` is passed to `read`, too.  `tries` is the number of attempts; 0 means
        --teacher-retries + 1.
        """
        return self._ask(partial(self._send, "POST", path, body, ANSWER_BYTES), path, read, fine, tries)

    def has_path(self, path: str) -> bool:
        """Return whether the server has GET `path`: status 200 means yes, 404 and 405 no.  Retries while it is down."""
        return self.get(path, lambda response: response.status_code == 200, fine=frozenset({404, 405}))

    def _send(self, method: str, path: str, body: object, limit: int) -> httpx.Response:
        """Send a request and return the response, read completely.  Raises Malformed above `limit` bytes."""
        with self.http.stream(method, self.url + path, json=body, extensions={"trace": self._trace}) as response:
            parts, size = [], 0
            for part in response.iter_bytes():
                parts.append(part)
                size += len(part)
                if size > limit:
                    raise Malformed(f"more than {limit >> 20} MB")
            with self.lock:
                self.traffic.requests += 1
                self.traffic.sent += len(response.request.content)
                self.traffic.received += response.num_bytes_downloaded
        headers = [(k, v) for k, v in response.headers.multi_items() if k.lower() != "content-encoding"]
        return httpx.Response(response.status_code, headers=headers, content=b"".join(parts), request=response.request)

    def _trace(self, event: str, information: Mapping[str, Any]) -> None:
        """Remember the sockets that httpcore opens."""
        if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            self.sockets.add(information["return_value"].get_extra_info("socket"))

    def _ask(
        self, send: Callable[[], httpx.Response], path: str, read: Reader[T], fine: frozenset[int], tries: int
    ) -> T:
        failure, tries = "", tries or self.settings.teacher_retries + 1
        for attempt in range(tries):
            if attempt:
                with self.lock:
                    self.traffic.retries += 1
                self.closed.wait(random.uniform(0.5, 1) * min(MAX_WAIT, 0.5 * 2 ** (attempt - 1)))
            if self.closed.is_set():
                raise Refusal(f"{self.label}: {path} was given up, for the run ends")
            try:
                response = send()
                code = response.status_code
                if code == 401:
                    keep = self.settings.keep(self.field)
                    raise Refusal(f"{self.label}: {path} wants a token (HTTP 401): export it in {keep}")
                if response.is_success or code in fine:
                    return read(response)
                if code not in RETRIED_STATUS:
                    raise Refusal(f"{self.label}: {path} was refused with HTTP {code}: {error_message(response)}")
                failure = f"HTTP {code} ({error_message(response)})"
            except httpx.InvalidURL as error:
                raise Refusal(f"{self.label}: {error}") from error
            except httpx.TimeoutException:
                failure = f"no answer within {self.settings.teacher_timeout:g} s"
            except httpx.HTTPError as error:
                failure = f"{type(error).__name__}: {one_line(error)}"
            except Malformed as error:
                failure = f"a malformed answer ({error})"
        raise Refusal(
            f"{self.label}: {path} failed {tries} times, last with {failure}; bring the server back, then run the same "
            "command with --resume to go on from the last checkpoint"
        )


def read_json(read: Callable[[dict], T]) -> Reader[T]:
    """Return a reader that parses a json object and applies `read` to it.  Its parse errors become `Malformed`."""

    def parse_response(response: httpx.Response) -> T:
        content = payload(response)
        try:
            return read(content)
        except Refusal:
            raise
        except Exception as error:  # any exception: the content may be anything
            raise Malformed(f"{type(error).__name__}: {one_line(error)}") from error

    return parse_response


def payload(response: httpx.Response) -> dict:
    """Return the json object in a response.  Raises Malformed for any other content."""
    try:
        content = json_text.parse(response.text)
    except ValueError as error:
        raise Malformed(f"no json: {one_line(response.text)!r}") from error
    if not isinstance(content, dict):
        raise Malformed(f"not a json object: {one_line(response.text)!r}")
    return content


def error_message(response: httpx.Response) -> str:
    """Return the server's error message in one line."""
    try:
        error = payload(response)["error"]
        return one_line(str(error["message"] if isinstance(error, dict) else error))
    except (Malformed, KeyError):
        return one_line(response.text) or response.reason_phrase
