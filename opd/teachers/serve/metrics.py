"""Counters of a server in the text format of Prometheus: requests, seconds, tokens, memory."""

import contextlib
import math
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import psutil

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, math.inf)  # upper bounds of the histogram's buckets
CLIENT_GONE = 499  # nginx's status for a client that closed its connection before the answer
OBSERVERS = frozenset({"/health", "/ready", "/metrics"})  # requests that look at the server: none of its work


@dataclass
class RequestRecord:
    """The numbers of a request that has ended."""

    status: int = CLIENT_GONE


@dataclass
class Metrics:
    """Counters that threads share.  A label holds a known route or a number, never text of a client."""

    routes: frozenset[str] = frozenset()
    requests: Counter[tuple[str, int]] = field(default_factory=Counter)  # by route and status
    buckets: Counter[tuple[str, float]] = field(default_factory=Counter)  # by route and smallest bound
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))  # sum by route
    tokens: Counter[str] = field(default_factory=Counter)  # by kind
    in_flight: int = 0
    connections: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @contextlib.contextmanager
    def request(self, path: str) -> Iterator[RequestRecord]:
        """Count a request and its seconds.  The caller notes its status."""
        record, begun, weight = RequestRecord(), time.monotonic(), int(path not in OBSERVERS)
        with self.lock:
            self.in_flight += weight
        try:
            yield record
        finally:
            with self.lock:
                self.in_flight -= weight
            self.count(path if path in self.routes else "other", record.status, time.monotonic() - begun)

    def count(self, route: str, status: int, seconds: float) -> None:
        """Count a finished request."""
        with self.lock:
            self.requests[route, status] += 1
            self.seconds[route] += seconds
            self.buckets[route, next(bound for bound in SECONDS if seconds <= bound)] += 1

    def count_tokens(self, *, prompt: int, generated: int) -> None:
        """Count the tokens of an answer."""
        with self.lock:
            self.tokens.update(prompt=prompt, generated=generated)

    def text(self, computing: int) -> str:
        """Return all values in the text format.  `computing` is the number of requests that the model works on."""
        process = psutil.Process()
        with self.lock:
            requests = {f'{{route="{route}",status="{code}"}}': n for (route, code), n in sorted(self.requests.items())}
            tokens = {f'{{kind="{kind}"}}': n for kind, n in self.tokens.items()}
            waiting = max(0, self.in_flight - computing)
            families = (
                ("opd_requests_total", "counter", "Requests answered.", requests),
                ("opd_request_seconds", "histogram", "Seconds from headers to answer.", self._histogram()),
                ("opd_tokens_total", "counter", "Tokens of answered requests.", tokens),
                ("opd_requests_in_flight", "gauge", "Requests received and not answered.", {"": self.in_flight}),
                ("opd_requests_waiting", "gauge", "Requests in flight that wait for the model.", {"": waiting}),
                ("opd_connections", "gauge", "Open connections.", {"": self.connections}),
                ("process_resident_memory_bytes", "gauge", "Memory in use.", {"": process.memory_info().rss}),
                ("process_open_fds", "gauge", "Open files and sockets.", {"": process.num_fds()}),
            )
            return "".join(_family(*family) for family in families)

    def _histogram(self) -> dict[str, int | float]:
        samples: dict[str, int | float] = {}
        for route in sorted(self.seconds):
            label, total = f'route="{route}"', 0
            for bound in SECONDS:
                total += self.buckets[route, bound]
                samples[f'_bucket{{{label},le="{"+Inf" if math.isinf(bound) else bound}"}}'] = total
            samples |= {f"_sum{{{label}}}": self.seconds[route], f"_count{{{label}}}": total}
        return samples


def _family(name: str, kind: str, text: str, samples: Mapping[str, int | float]) -> str:
    """Return the lines of one metric.  The keys of `samples` are what follows its name: a suffix and labels."""
    lines = (f"{name}{suffix} {value}\n" for suffix, value in samples.items())
    return f"# HELP {name} {text}\n# TYPE {name} {kind}\n" + "".join(lines)
