"""Limits on connections, in number and in time, below ASGI: uvicorn starts no application before a request's headers.

A client that sends slowly, or does not read its answer, is disconnected, so that it cannot hold a place for ever.
"""

import json
from asyncio import TimerHandle, Transport
from collections import Counter
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from opd.teachers.serve.gate import error_body
from opd.teachers.serve.metrics import Metrics


@dataclass
class Connections:
    """The connections of a server, and their limits."""

    total: int
    per_client: int
    metrics: Metrics
    head_seconds: float = 10.0  # time for the headers of a request
    body_seconds: float = 30.0  # time for its body, and a second more for each `body_rate` bytes that arrived
    body_rate: int = 1 << 16
    stall_seconds: float = 60.0  # time in which a client must take some of its answer
    by_client: Counter[str] = field(default_factory=Counter)

    def full(self, client: str) -> str:
        """Return the reason why a client cannot connect; empty if it can."""
        if self.by_client[client] >= self.per_client:
            return f"{self.per_client} connections from one address are open, the most (--client-connections)"
        if self.by_client.total() >= self.total:
            return f"{self.total} connections are open, the most (--max-connections)"
        return ""

    def change(self, client: str, by: int) -> None:
        """Note that a client has connected (1) or gone (-1)."""
        self.by_client[client] += by
        if not self.by_client[client]:
            del self.by_client[client]
        self.metrics.connections = self.by_client.total()


class LimitedConnection(H11Protocol):
    """One connection, with time limits for headers, body and answer."""

    def __init__(self, connections: Connections, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.all, self.is_counted = connections, False
        self.receiving: TimerHandle | None = None  # runs while a request arrives
        self.sending: TimerHandle | None = None  # runs while an answer waits for the client
        self.has_head, self.deadline = False, 0.0

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.host = self.client[0] if self.client else ""
        if reason := self.all.full(self.host):
            return self._refuse(503, reason)
        self.all.change(self.host, 1)
        self.is_counted = True
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.is_counted:
            self.all.change(self.host, -1)
        self._stop()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.deadline += len(data) / self.all.body_rate
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY:  # of a pipelined request; before headers, keep-alive has a limit
            self._watch()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, msg)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_sending()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.sending:
            self.sending.cancel()

    def _watch(self) -> None:
        """Run the timer of the part of a request that is arriving."""
        has_head = self.conn.their_state is h11.SEND_BODY
        if self.transport.is_closing() or not (has_head or self.conn.their_state is h11.IDLE):
            self._stop()
        elif self.receiving is None or self.has_head != has_head:
            self._stop()
            self.has_head = has_head
            seconds = self.all.body_seconds if has_head else self.all.head_seconds
            self.deadline = self.loop.time() + seconds
            self.receiving = self.loop.call_later(seconds, self._is_late)

    def _is_late(self) -> None:
        left = self.deadline - self.loop.time()
        if self.has_head and left > 0 and not self.cycle.response_complete:
            self.receiving = self.loop.call_later(left, self._is_late)
        elif self.has_head or self.conn.trailing_data[0]:
            self._refuse(408, f"the {'body' if self.has_head else 'headers'} of the request came too slowly")
        else:
            self.transport.close()

    def _stop(self) -> None:
        if self.receiving:
            self.receiving.cancel()
        self.receiving = None

    def _watch_sending(self) -> None:
        left = self.transport.get_write_buffer_size()
        self.sending = self.loop.call_later(self.all.stall_seconds, self._is_stalled, left)

    def _is_stalled(self, left: int) -> None:
        if self.transport.get_write_buffer_size() < left:
            self._watch_sending()
        else:
            self.transport.abort()

    def _refuse(self, status: int, reason: str) -> None:
        """Close the connection, with an error response unless another response has begun."""
        if self.transport.is_closing():
            return
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(error_body(status, reason)).encode()
            head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
            head += f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            self.transport.write(head.encode() + body)
            self.all.metrics.count("connection", status, 0.0)
        self.transport.close()
