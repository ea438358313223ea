"""Hostile clients of `opd serve`: generated and damaged requests, slow connections, too many of them, then SIGTERM.

The server is another process.  The generator reads the OpenAPI schema of its routes, so that a new field is attacked,
too.  A request is lost if its answer has status 500, is no json with a message, or does not come.
"""

import contextlib
import functools
import http.client
import json
import math
import os
import random
import re
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoTokenizer

from opd import cli
from opd.config.commands import Serve
from opd.teachers.serve import draining
from opd.teachers.serve.app import build
from opd.teachers.serve.model import Served
from tests.campaigns import Counts
from tests.tiny_models import tiny_bytes

TOKEN = "campaign-token"
HEAD, BODY = 1.0, 1.5  # seconds for headers and body in this server; 10 and 30 in others, by the same code
HELD = 400  # connections of a client that holds them; 32 are the most for a process that may open 256 files
GROWTH = 48 << 20  # bytes by which the server's memory may grow in a campaign
SMALL = {"max_tokens": 4, "max_completion_tokens": 4, "n": 2, "logprobs": 5, "prompt_logprobs": 5}  # largest numbers
USUAL = {"model": None, "add_generation_prompt": True, "continue_final_message": False, "at": [1]}  # three in four
NUMBERS = (0, -1, 1, 2, 129, 2**31, 2**63, -(2**63), 2**70, 10**30, 0.5, -0.0, 1e-308, 1e308)
TEXTS = ("", "a", "\0", "\u202e\U0001f600", "<eos>", "../../etc/passwd", "/dev/zero", "{{7*7}}", "x" * 5000, "\x1b]0;x")
RAW = ("1e400", "9" * 5000, "[" * 9000 + "]" * 9000, '"\\q"', "", "'a'", '"\\ud8')  # what json.dumps does not write
WRONG = (math.nan, -math.inf, "\ud800", None, True, [], {}, [[]], [0], ["a"], {"": {}}, {"$ref": "#"}, {"type": 7})
HOSTILE = (*NUMBERS, *TEXTS, *WRONG, *(f"RAW{i}" for i in range(len(RAW))))
METHODS = ("GET", "PUT", "DELETE", "OPTIONS", "HEAD", "TRACE", "BREW")
PATHS = (
    "/docs",
    "/openapi.json",
    "//",
    "/%2e%2e/etc/passwd",
    "*",
    "http://evil/",
    "/%00",
    "/health?/opd/head",
    "/\x7f",
)
FIELDS = ("Host", "Origin", "Authorization", "Content-Type", "Transfer-Encoding", "Expect", "Upgrade", "Connection")
VALUES = ("", "evil.example", "[::1", "a@evil", "chunked", "gzip", "text/plain", "100-continue", "Bearer \xe9", "null")
VALUES += ("websocket", "application/json; charset=utf-16", ";", "x" * 20000, "upgrade", "\x00")


class Server:
    """A running `opd serve`, and the seconds within which it must answer."""

    def __init__(self, process: psutil.Process, port: int) -> None:
        self.process, self.port = process, port

    def connect(self, source: str = "127.0.0.1") -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=60, source_address=(source, 0))

    def exchange(self, raw: bytes, source: str = "127.0.0.1") -> tuple[int, bytes]:
        """Send bytes and return status and body of the answer; status 0 if the server closed the connection."""
        with self.connect(source) as connection, contextlib.suppress(ConnectionError, http.client.BadStatusLine):
            with contextlib.suppress(ConnectionError):  # the answer may come before everything is sent
                connection.sendall(raw)
            answer = http.client.HTTPResponse(connection, method=raw.partition(b" ")[0].decode("latin-1"))
            answer.begin()
            return answer.status, answer.read()
        return 0, b""


@contextlib.contextmanager
def served(folder: Path, *flags: str) -> Iterator[Server]:
    """Start `opd serve` in a fork, which has no imports to do, with short time limits and 256 open files."""
    log = folder.parent / "log.txt"
    log.write_text("")
    child = os.fork()
    if not child:
        with log.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
        torch.set_num_threads(1)
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
        os.environ["CAMPAIGN_TOKEN"] = TOKEN
        limits = {"head_seconds": HEAD, "body_seconds": BODY}
        draining.Connections = functools.partial(draining.Connections, **limits)
        os._exit(cli.main(["serve", str(folder), "--port", "0", "--token-env", "CAMPAIGN_TOKEN", *flags]))
    process = psutil.Process(child)
    try:
        for _ in range(1200):
            if (line := log.read_text()).endswith("\n"):
                break
            time.sleep(0.05)
        yield Server(process, int(line.split(" at ")[1].split()[0].rpartition(":")[2]))
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
            process.wait(30)


def head(method: str, path: str, length: int | None = None, **more: str) -> bytes:
    """Return the headers of a request, valid unless `more` replaces some."""
    fields = {"Host": "localhost", "Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"} | more
    fields |= {} if length is None else {"Content-Length": str(length)}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items()), "", ""]
    return "\r\n".join(lines).encode("latin-1")


def post(path: str, body: bytes, **more: str) -> bytes:
    return head("POST", path, len(body), **more) + body


class Requests:
    """A generator of requests from the OpenAPI schema of the server: mostly valid, each with some hostile values."""

    def __init__(self, seed: int, files: list[str]) -> None:
        self.random, self.files = random.Random(seed), files
        gate = build(Served.__new__(Served), Serve(model="x", takes_weights=True), token=TOKEN)
        self.api: dict[str, Any] = gate.app.openapi()
        self.posts = {path: route["post"] for path, route in self.api["paths"].items() if "post" in route}
        self.bodies = [path for path, route in self.posts.items() if "requestBody" in route]
        self.rate = 0.0

    def body(self, path: str) -> bytes:
        """Return a request body; half of them have hostile values."""
        self.rate = self.random.choice((0, 0, 0.03, 0.2))
        schema = self.posts[path]["requestBody"]["content"]["application/json"]["schema"]
        text = json.dumps(self.value(schema))
        return re.sub('"RAW(.)"', lambda match: RAW[int(match[1])], text).encode()

    def value(self, schema: dict[str, Any], name: str = "") -> object:
        choose = self.random.choice
        if self.random.random() < self.rate:
            return choose((*HOSTILE, *self.files))
        if name in USUAL and self.random.random() < 0.75:
            return USUAL[name]
        if "$ref" in schema:
            return self.value(self.api["components"]["schemas"][schema["$ref"].rpartition("/")[2]], name)
        if "anyOf" in schema:
            return self.value(choose(schema["anyOf"]), name)
        if "const" in schema or "enum" in schema:
            return schema["const"] if "const" in schema else choose(schema["enum"])
        match schema.get("type"):
            case "object" if "properties" in schema:
                known, needed = schema["properties"], schema.get("required", ())
                kept = [key for key in known if key in needed or key in SMALL or self.random.random() < 0.3]
                return {key: self.value(known[key], key) for key in kept}
            case "object":
                return choose(({}, {"type": choose(("object", "string", "array"))}, {"mood": choose(HOSTILE)}))
            case "array":
                least = schema.get("minItems", 0)
                return [self.value(schema["items"], name) for _ in range(self.random.randint(least, least + 3))]
            case "integer" | "number" as kind:
                low = schema.get("minimum", 0)
                high = SMALL.get(name, min(schema.get("maximum", 255), 255))
                return self.random.randint(low, high) if kind == "integer" else self.random.uniform(low, high)
            case "boolean":
                return self.random.random() < 0.5
            case "null":
                return None
        return choose((*TEXTS, *self.files, "user", "assistant", *["\ud800"] * (self.rate > 0)))

    def raw(self) -> bytes:
        """Return a request: of a known route, to another path, with other headers, or damaged in its bytes."""
        path = self.random.choice(self.bodies)
        body, choose = self.body(path), self.random.choice
        match self.random.randrange(12):
            case 0:
                return head(choose(METHODS), choose((*self.api["paths"], *PATHS)))
            case 1:
                return post(path, body, **{choose(FIELDS): choose(VALUES)})
            case 2:
                damaged = bytearray(post(path, body))
                for _ in range(self.random.randint(1, 8)):
                    at = self.random.randrange(len(damaged))
                    damaged[at : at + self.random.randrange(4)] = self.random.randbytes(self.random.randrange(4))
                return bytes(damaged)
            case 3:
                return head("POST", path, choose((0, len(body) // 2, 1 << 40))) + body
        return post(path, body)


def verdict(status: int, body: bytes, method: bytes) -> str:
    """Return "survived", "refused", or the reason why an answer counts as lost."""
    if status == 0 or (method.startswith(b"HEAD") and status < 500):
        return "refused"
    if 200 <= status < 300:
        return "survived"
    try:
        message = json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return f"no json with a message: {body[:200]!r}"
    is_line = isinstance(message, str) and 0 < len(message) < 4000 and message.isprintable()
    return "refused" if status in range(400, 500) and is_line else f"{status}: {message}"


def hold(server: Server) -> list[socket.socket]:
    """Open slow connections of each kind, more than one address may have."""
    beginnings = (
        b"",
        b"GET /health HTTP/1.1\r\nHost: x\r\nX-A: ",
        head("POST", "/v1/completions", 1000) + b"{",
        head("POST", "/v1/completions", 1000, Authorization="Bearer wrong") + b"{",
        head("POST", "/v1/completions", **{"Transfer-Encoding": "chunked"}) + b"5\r\n{",
    )
    held = [server.connect() for _ in range(HELD)]
    for i, connection in enumerate(held):
        with contextlib.suppress(ConnectionError):  # the server refused this one
            connection.sendall(beginnings[i % len(beginnings)])
    return held


def closes(connection: socket.socket, end: float) -> bool:
    """Return whether the server closes a connection on which a byte comes in now and then."""
    connection.settimeout(0.02)
    with connection:
        while time.monotonic() < end:
            try:
                connection.send(b"a")
                if not connection.recv(4096):
                    return True
            except TimeoutError:
                continue
            except ConnectionError:
                return True
    return False


def run(folder: Path, count: int, seed: int) -> Counts:
    """Attack a server with `count` requests and some hundred connections."""
    counts, model = Counts(), tiny_bytes(folder / "model", context=128)
    template = AutoTokenizer.from_pretrained(model).chat_template + "{{ mood and mood + '!' }}"
    (model / "chat_template.jinja").write_text(template)
    os.mkfifo(folder / "pipe")
    (folder / "torn.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:-100])
    files = [str(model / "model.safetensors"), *(str(folder / x) for x in ("pipe", "torn.safetensors", "none", ""))]
    requests = Requests(seed, files)
    note = functools.partial(_note, counts)
    with served(model, "--takes-weights", "--max-request-mb", "1", "--drain-seconds", "60") as server:
        for i in range(count):
            if i == count // 4:
                memory = server.process.memory_info().rss
            raw = requests.raw()
            try:
                result = verdict(*server.exchange(raw), raw)
            except OSError as error:
                result = f"no answer: {error}"
            note(result, raw)
        held, begun = hold(server), time.monotonic()
        other = verdict(*server.exchange(head("GET", "/health"), "127.0.0.2"), b"GET")
        note(other, f"/health of another address beside {HELD} slow connections")
        kept = [connection for connection in held if not closes(connection, begun + BODY + 10)]
        note("refused" if not kept else f"{len(kept)} of {HELD} slow connections stay open", "slow connections")
        grown = server.process.memory_info().rss - memory
        note("survived" if grown < GROWTH else f"{grown >> 20} MB more memory", "memory")
        for result in drained(server):
            note(result, "a request in flight at SIGTERM")
    log = (folder / "log.txt").read_text()
    note("survived" if "Traceback" not in log else log[-2000:], "the server's log")
    return counts


def drained(server: Server) -> list[str]:
    """Return what becomes of requests in flight when the server is told to stop, and of the server."""
    body = json.dumps({"prompt": [[5, 6, 7]] * 2, "max_tokens": 30}).encode()
    results: list[str] = []
    ask = lambda: results.append(verdict(*server.exchange(post("/v1/completions", body)), b"POST"))
    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    metrics = ""
    while "opd_requests_in_flight 6\n" not in metrics and not results:
        metrics = server.exchange(head("GET", "/metrics"))[1].decode()
    server.process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join(90)
    status = server.process.wait(60)
    answered = ["survived" if result == "survived" else f"in flight: {result}" for result in results]
    return [*answered, "survived" if status == 0 and len(results) == 6 else f"exit status {status}"]


def _note(counts: Counts, result: str, attempt: object) -> None:
    fault = "" if result in ("survived", "refused") else result
    counts.add(f"{attempt!r:.600}", fault, refused=result == "refused")
