"""The application of `opd serve`: its routes, its reader of json, and its answers to mistakes."""

import json
import traceback
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from opd.config.commands import Serve
from opd.core.errors import Refusal
from opd.models.remote import opd_protocol as wire
from opd.teachers.serve.answers import Json
from opd.teachers.serve.gate import Gate, error
from opd.teachers.serve.metrics import Metrics
from opd.teachers.serve.model import Served
from opd.teachers.serve.pause import Pause
from opd.teachers.serve.protocol import Generate
from opd.teachers.serve.routes import Routes

# the POST routes that only vLLM needs before and after new weights
IDLE = "init_weight_transfer_engine start_weight_update finish_weight_update reset_prefix_cache"
EXPOSITION = "text/plain; version=0.0.4; charset=utf-8"  # media type of Prometheus's text format


class StrictRequest(Request):
    """A request whose json must be UTF-8 of bounded depth, without lone surrogates, NaN and infinity."""

    async def json(self) -> Any:
        """Return the parsed body."""
        try:
            return from_json(await self.body(), allow_inf_nan=False)
        except ValueError as mistake:
            raise HTTPException(400, f"body: no valid json: {mistake}") from mistake


class StrictRoute(APIRoute):
    """A route that parses its body as a `StrictRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler of requests."""
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            return await handle(StrictRequest(request.scope, request.receive))

        return handle_strictly


def build(served: Served, config: Serve, *, token: str) -> Gate:
    """Build the ASGI application, with the checks of `Gate` around it."""
    app = FastAPI(title="opd serve", openapi_url=None)
    app.router.route_class = StrictRoute
    metrics = Metrics()
    routes, pause = Routes(served, config, metrics), Pause()

    @app.get("/health")
    async def health() -> Response:  # async: requests that wait for the model occupy every thread
        return Response()

    @app.get("/ready", response_model=None)
    async def ready() -> Response:
        if gate.is_draining or served.is_taking:
            return error(503, "the server is stopping" if gate.is_draining else "new weights are being read")
        return JSONResponse({"status": "ready"})

    @app.get("/metrics")
    async def prometheus() -> Response:
        return PlainTextResponse(metrics.text(computing=int(served.lock.locked())), media_type=EXPOSITION)

    app.get("/v1/models")(routes.models)
    app.post("/v1/completions")(routes.completions)
    app.post("/v1/chat/completions")(routes.chat)

    @app.post("/inference/v1/generate")
    async def generate(request: Generate) -> Any:  # async: requests that wait for new weights must occupy no thread
        async with pause.rollout():
            return await run_in_threadpool(routes.generate, request)

    app.post("/opd/hidden", response_model=None)(routes.hidden)
    app.get("/opd/head", response_model=None)(routes.head)
    app.get("/opd/identity")(served.identity)
    app.get("/opd/tokenizer")(lambda: wire.pack_tokenizer(served.tokenizer))

    readers = frozenset(route.path for route in app.routes if isinstance(route, APIRoute))
    if config.takes_weights:  # vLLM's routes for new weights, with the backend `opd`

        @app.post("/pause")
        async def begin_pause() -> Json:
            await pause.begin()
            return {"status": "paused"}

        @app.post("/resume")
        async def end_pause() -> Json:
            pause.end()
            return {"status": "resumed"}

        app.get("/get_world_size")(lambda: {"world_size": 1})
        app.post("/update_weights")(routes.take)
        app.post("/update_weight_version")(routes.rename)
        for path in IDLE.split():
            app.post(f"/{path}")(lambda: {"message": "nothing to do"})
    metrics.routes = frozenset(route.path for route in app.routes if isinstance(route, APIRoute))

    for kind in (RequestValidationError, Refusal, HTTPException, Exception):
        app.add_exception_handler(kind, _failed)
    gate = Gate(app, config=config, token=token, metrics=metrics, guarded=metrics.routes - readers)
    return gate


async def _failed(request: Request, mistake: Exception) -> JSONResponse:
    if isinstance(mistake, RequestValidationError):
        first = mistake.errors()[0]
        where = ".".join(str(x) for x in first["loc"][1:]) or "body"
        reason = "not served by opd" if first["type"] == "extra_forbidden" else first["msg"]
        return error(400, f"{where}: {reason}")
    if isinstance(mistake, Refusal):
        return error(400, str(mistake))
    if isinstance(mistake, HTTPException):
        return error(mistake.status_code, str(mistake.detail))
    traceback.print_exception(mistake)
    return error(500, f"{type(mistake).__name__}: {json.dumps(str(mistake)[:200])}; the server's log has more")
