"""The checks before every request: who sends it, to which host, how large; and the format of error responses."""

import secrets
from collections.abc import Mapping
from urllib.parse import urlsplit

from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from opd.config.commands import Serve
from opd.core.errors import one_line
from opd.teachers.serve.metrics import Metrics

KINDS = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    413: "RequestTooLarge",
    503: "ServiceUnavailableError",
}
PROBES = frozenset({"/health", "/ready"})  # Kubernetes and load balancers send no token
LONGEST = 1000  # characters of an error message, which may quote the request


def error_body(status: int, text: str) -> dict[str, object]:
    """Return the json of an error response in vLLM's format."""
    kind = KINDS.get(status, "InternalServerError" if status >= 500 else "BadRequestError")
    text = "".join(x if x.isprintable() else ascii(x)[1:-1] for x in one_line(text, LONGEST))  # no terminal codes
    return {"error": {"message": text, "type": kind, "param": None, "code": status}}


def error(status: int, text: str) -> JSONResponse:
    """Return an error response in vLLM's format."""
    return JSONResponse(error_body(status, text), status)


class Gate:
    """ASGI middleware that checks token, Host, Origin and body size of a request, and counts it.

    A web page can send requests to the loopback.  Its own name in Host (DNS rebinding) or Origin gives it away.
    """

    def __init__(self, app: ASGIApp, *, config: Serve, token: str, metrics: Metrics, guarded: frozenset[str]) -> None:
        self.app, self.token, self.metrics = app, token, metrics
        self.guarded = guarded  # paths that no web page may call
        self.is_draining = False  # set by the server when it is asked to stop
        self.max_bytes, self.max_held = config.max_request_mb << 20, config.open_requests_mb << 20
        self.held = 0  # bytes of the bodies of all open requests
        self.hosts = {"localhost", "127.0.0.1", "::1", config.host.lower()} if config.on_loopback() else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request, then pass it to the application."""
        with self.metrics.request(scope["path"]) as request:

            async def answer(message: Message) -> None:
                if message["type"] == "http.response.start":
                    request.status = message["status"]
                await send(message)

            refusal, body = self._refusal(scope["path"], dict(scope["headers"])), bytearray()
            try:
                if not refusal and scope["method"] == "POST":
                    refusal = await self._receive_body(receive, body)
                if refusal:
                    return await refusal(scope, receive, answer)
                unread: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

                async def replay() -> Message:
                    return unread.pop() if unread else await receive()

                await self.app(scope, replay, answer)
            except ClientDisconnect:
                return
            finally:
                self.held -= len(body)

    def _refusal(self, path: str, headers: Mapping[bytes, bytes]) -> JSONResponse | None:
        """Return the response to a request that its headers rule out."""
        host, origin = (headers.get(name, b"").decode("latin-1") for name in (b"host", b"origin"))
        if self.hosts and b"host" in headers and _hostname(f"//{host}") not in self.hosts:
            names = ", ".join(sorted(self.hosts))
            remedy = "let a proxy send one of these, or use --host and --token-env"
            return error(403, f"Host {host[:100]}: on the loopback this server answers to {names}; {remedy}")
        if origin and (path in self.guarded or (self.hosts and _hostname(origin) not in self.hosts)):
            return error(403, f"Origin {origin[:100]}: web pages may not send this request")
        token = headers.get(b"authorization", b"")
        if self.token and path not in PROBES and not secrets.compare_digest(token, b"Bearer " + self.token.encode()):
            return error(401, "this server wants the header `Authorization: Bearer` with its token")
        length = headers.get(b"content-length", b"0")
        return None if length.isdigit() and int(length) <= self.max_bytes else self._too_large()

    async def _receive_body(self, receive: Receive, body: bytearray) -> JSONResponse | None:
        """Append the body of a request to `body`; return the response to one that is too large for now or ever.

        The bytes that arrive are counted, because a body may come without a length.  Raises ClientDisconnect.
        """
        is_open = True
        while is_open:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            body += (piece := message.get("body", b""))
            self.held += len(piece)
            if len(body) > self.max_bytes:
                return self._too_large()
            if self.held > self.max_held:
                return error(503, f"requests of {self.max_held >> 20} MB are open, the most (--open-requests-mb)")
            is_open = message.get("more_body", False)
        return None

    def _too_large(self) -> JSONResponse:
        return error(413, f"the request is larger than {self.max_bytes >> 20} MB: send fewer sequences at once")


def _hostname(url: str) -> str:
    """Return the host of an address in lower case, without port; empty if there is none."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:  # a bracket without its partner
        return ""
