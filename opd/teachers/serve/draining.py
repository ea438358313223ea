"""Limits and end of the server's process.  On SIGTERM it answers the requests in flight, then exits with 0."""

import functools
import os
import resource
import signal
import socket
import sys
from types import FrameType
from typing import Any, cast

import uvicorn

from opd.config.commands import Serve
from opd.teachers.serve.connections import Connections, LimitedConnection
from opd.teachers.serve.gate import Gate

BACKLOG = 32  # connections that asyncio accepts before it looks at the first of them
OTHER_FILES = 64 + 4 * BACKLOG  # open files beside the connections, some of which were accepted and wait for refusal
KEEP_ALIVE = 10  # seconds an idle connection stays open; httpx closes its own after 5, so it never meets a closed one


def run(gate: Gate, config: Serve, listening: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM."""
    total = _connections(config.max_connections)
    connections = Connections(total, min(config.client_connections, max(1, total // 2)), gate.metrics)
    options = uvicorn.Config(
        gate,
        http=cast(Any, functools.partial(LimitedConnection, connections)),
        ws="none",
        lifespan="off",
        proxy_headers=False,
        access_log=False,  # it would have a line for each request of a run
        log_level="error",  # a warning for each malformed request would let clients fill the disk
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=config.drain_seconds,
    )
    server = DrainingServer(options, gate)
    for name in (signal.SIGINT, signal.SIGTERM):
        # Before uvicorn listens to signals, and after: it raises them again when it has shut down.
        signal.signal(name, server.handle_exit)
    server.run(sockets=[listening])


class DrainingServer(uvicorn.Server):
    """A server that ends its process if requests in flight exceed the time they are given after a signal."""

    def __init__(self, options: uvicorn.Config, gate: Gate) -> None:
        super().__init__(options)
        self.gate, self.stop_signal = gate, 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Note a signal."""
        self.gate.is_draining, self.stop_signal = True, sig
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting, and wait for the requests in flight."""
        await super().shutdown(sockets)
        if unanswered := len(self.server_state.tasks):
            seconds = f"{self.config.timeout_graceful_shutdown} s (--drain-seconds)"
            print(f"stopped after {seconds} with {unanswered} requests unanswered", file=sys.stderr, flush=True)
            os._exit(128 + self.stop_signal)  # a thread cannot be ended, and the interpreter would wait for it


def _connections(wanted: int) -> int:
    """Return how many connections the limit on open files allows, up to `wanted`.  Raises the limit if it can."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted + OTHER_FILES:
        soft = wanted + OTHER_FILES if hard == resource.RLIM_INFINITY else min(hard, wanted + OTHER_FILES)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return wanted if soft == resource.RLIM_INFINITY else max(1, min(wanted, soft - OTHER_FILES))
