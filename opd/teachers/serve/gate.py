"""The checks before every request, token and body size, and the format of error responses."""

import secrets

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

KINDS = {400: "BadRequestError", 401: "AuthenticationError", 404: "NotFoundError", 413: "RequestTooLarge"}


def error(status: int, text: str) -> JSONResponse:
    """Return an error response in vLLM's format."""
    kind = KINDS.get(status, "InternalServerError" if status >= 500 else "BadRequestError")
    return JSONResponse({"error": {"message": text, "type": kind, "param": None, "code": status}}, status)


class Gate:
    """ASGI middleware that checks the bearer token (except of /health) and the body size of a request."""

    def __init__(self, app: ASGIApp, *, token: str, max_bytes: int) -> None:
        self.app, self.token, self.max_bytes = app, token, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request, then pass it to the application."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        too_large = error(413, f"the request is larger than {self.max_bytes >> 20} MB: send fewer sequences at once")
        headers = dict(scope["headers"])
        is_authorized = not self.token or secrets.compare_digest(
            headers.get(b"authorization", b""), b"Bearer " + self.token.encode()
        )
        if not is_authorized and scope["path"] != "/health":
            refusal = error(401, "this server wants the header `Authorization: Bearer` with its token")
            return await refusal(scope, receive, send)
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self.max_bytes:
            return await too_large(scope, receive, send)
        body, is_open = bytearray(), scope["method"] == "POST"
        while is_open:  # count the bytes, because a body may come without a length
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self.max_bytes:
                return await too_large(scope, receive, send)
            is_open = message.get("more_body", False)
        unread: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Message:
            return unread.pop() if unread else await receive()

        return await self.app(scope, replay, send)
