"""The HTTP routes of `opd serve`.  Each mistake of a caller gives a 4xx with one line of json.

The protocol is vLLM's OpenAI-compatible one (0.33) for any client, and `opd.teachers.wire` for exact distillation.
"""

import base64
import io
import json
import secrets
import time
import traceback
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from opd.core.errors import Refusal
from opd.core.sampling import Prompt, Sampling
from opd.data import prompts
from opd.head.token_scores import TokenScores
from opd.models.remote import opd_protocol as wire
from opd.rollouts.engines.base import Sample
from opd.teachers.serve import answers
from opd.teachers.serve.gate import Gate, Limits, error
from opd.teachers.serve.model import Asked, Served
from opd.teachers.serve.protocol import (
    Chat,
    Completion,
    Drawing,
    DrawingParameters,
    Generate,
    HiddenRows,
    NewWeights,
    Version,
)


class Routes:
    """The request handlers, one method per route."""

    def __init__(self, served: Served, limits: Limits) -> None:
        self.served, self.limits = served, limits
        self.started = int(time.time())

    def models(self) -> dict[str, object]:
        """Handle GET /v1/models."""
        name, context = self.served.name, self.served.context
        card = {"id": name, "object": "model", "created": self.started, "owned_by": "opd", "root": name}
        return {"object": "list", "data": [card | {"parent": None, "max_model_len": context}]}

    def completions(self, asked: Completion) -> dict[str, object]:
        """Handle POST /v1/completions."""
        self._check_model(asked.model)
        rows, text = self._prompts(asked), self.served.tokenizer
        most = 16 if asked.max_tokens is None else asked.max_tokens
        for row in rows:
            self._check_row(row, most)
        for field, k in (("prompt_logprobs", asked.prompt_logprobs), ("logprobs", asked.logprobs)):
            if k is not None and k > self.limits.logprobs:
                raise Refusal(f"{field}: {k} requested, and this server gives at most {self.limits.logprobs}")
        told: list[list[dict[str, object] | None] | None] = [None] * len(rows)
        if asked.prompt_logprobs is not None:
            every = [Asked(row, tuple(range(1, len(row)))) for row in rows]
            found = self._scores(every, asked.prompt_logprobs)
            told = [answers.named(text, a, s) for a, s in zip(every, found, strict=True)]
        drawn = self._draw([row for row in rows for _ in range(asked.n)], asked, most)
        choices = [answers.choice(text, x, asked, index=i, row=rows[i // asked.n]) for i, x in enumerate(drawn)]
        for i, choice in enumerate(choices):
            choice["prompt_logprobs"] = told[i // asked.n]
        if asked.logprobs is not None:
            pairs = [(rows[i // asked.n], sample.ids) for i, sample in enumerate(drawn)]
            own = [Asked(row + ids, tuple(range(len(row), len(row) + len(ids)))) for row, ids in pairs]
            for choice, (_, ids), scores in zip(choices, pairs, self._scores(own, asked.logprobs), strict=True):
                choice["logprobs"] = answers.drawn(text, ids, scores)
        return self._answer(("text_completion", "cmpl"), choices, rows, drawn)

    def chat(self, asked: Chat) -> dict[str, object]:
        """Handle POST /v1/chat/completions."""
        self._check_model(asked.model)
        turns = tuple({"role": m.role, "content": m.text()} for m in asked.messages)
        text = str(turns[-1]["content"]) if asked.continue_final_message else ""
        turns = turns[:-1] if asked.continue_final_message else turns
        row = prompts.prefilled_ids(self.served.tokenizer, Prompt(messages=turns), text, asked.chat_template_kwargs)
        most = asked.max_completion_tokens or asked.max_tokens or self.served.context - len(row)
        self._check_row(row, max(1, most))
        schema = None if asked.response_format is None else asked.response_format.json_schema.json_schema
        drawn = self._draw([row] * asked.n, asked, most, schema)
        choices = []
        for i, sample in enumerate(drawn):
            choice = answers.choice(self.served.tokenizer, sample, asked, index=i, row=row)
            choices.append(choice | {"message": {"role": "assistant", "content": choice.pop("text")}})
        return self._answer(("chat.completion", "chatcmpl"), choices, [row], drawn)

    def generate(self, asked: Generate) -> dict[str, object]:
        """Handle POST /inference/v1/generate.

        Return rollouts, or the log-probs of chosen ids at each position as float32 .npy in base64.
        """
        self._check_model(asked.model)
        row, how = tuple(asked.token_ids), asked.sampling_params
        self._check_row(row, how.max_tokens)
        if isinstance(how, DrawingParameters):
            return self._rollouts(row, how)
        ids, start = how.prompt_logprob_token_ids, how.prompt_logprob_start
        if len(ids) != len(row) - 1 - start:
            raise Refusal(
                f"prompt_logprob_token_ids: {len(ids)} rows; a prompt of {len(row)} tokens scored from "
                f"{start} has {len(row) - 1 - start}"
            )
        widest = max(map(len, ids))
        if not 0 < widest <= self.limits.logprobs:
            raise Refusal(
                f"prompt_logprob_token_ids: {widest} ids in a row; this server gives 1 to {self.limits.logprobs}"
            )
        if max(map(max, filter(None, ids))) >= self.served.rows:
            raise Refusal(f"prompt_logprob_token_ids: an id beyond the vocabulary of {self.served.rows}")
        table = torch.tensor([[*some, *[-1] * (widest - len(some))] for some in ids])
        (found,) = self.served.scores([Asked(row, tuple(range(start + 1, len(row))))], [table], 0)
        (sample,) = self.served.generate(
            [row], Sampling(temperature=0.0, max_new_tokens=how.max_tokens), seed=0, stop=()
        )
        file = io.BytesIO()
        np.save(file, found.logp.float().cpu().numpy())
        choice = {"index": 0, "token_ids": list(sample.ids), "finish_reason": "stop" if sample.stopped else "length"}
        answer = self._answer(("generate", "gen"), [choice], [row], [sample])
        return answer | {"prompt_token_id_logprobs": base64.b64encode(file.getvalue()).decode()}

    def _rollouts(self, row: tuple[int, ...], how: DrawingParameters) -> dict[str, object]:
        """Return n rollouts as ids, with log-probs under the sampled distribution.

        The j-th rollout has the seed plus j, as in vLLM.
        """
        if max(how.stop_token_ids) >= self.served.rows:
            raise Refusal(f"stop_token_ids: an id beyond the vocabulary of {self.served.rows}")
        if len(how.stop_token_ids) > 1:
            raise Refusal("stop_token_ids: this server tells no class of stop tokens apart: give one, or use vLLM")
        sampling = Sampling(
            temperature=how.temperature, top_p=how.top_p, top_k=max(0, how.top_k), max_new_tokens=how.max_tokens
        )
        drawn = self.served.draw(row, sampling, range(how.seed, how.seed + how.n), how.stop_token_ids)
        choices = [answers.rollout(x, index=i, version=self.served.version) for i, x in enumerate(drawn)]
        return self._answer(("generate", "gen"), choices, [row], drawn)

    def world(self) -> dict[str, int]:
        """Handle GET /get_world_size."""
        return {"world_size": 1}

    def called(self) -> dict[str, str]:
        """Handle the POST routes that only vLLM needs before and after new weights.  This server does nothing."""
        return {"message": "nothing to do"}

    def take(self, asked: NewWeights) -> dict[str, str]:
        """Handle POST /update_weights."""
        self.served.take(asked.update_info.files)
        return {"message": "taken"}

    def rename(self, asked: Version) -> dict[str, object]:
        """Handle POST /update_weight_version."""
        self.served.version = asked.new_version
        return {"success": True, "new_version": asked.new_version}

    def hidden(self, asked: HiddenRows) -> Response:
        """Handle POST /opd/hidden."""
        for row in asked.rows:
            self._check_row(row.ids, 0)
            if any(b <= a for a, b in zip(row.at, row.at[1:], strict=False)) or max(row.at, default=0) >= len(row.ids):
                raise Refusal(f"at: positions must ascend from 1 to {len(row.ids) - 1}, the last of this sequence")
        self._check_count(len(asked.rows))
        found = self.served.states([Asked(tuple(row.ids), tuple(row.at)) for row in asked.rows])
        return self._tensors({"states": torch.cat(found)})

    def head(self) -> Response:
        """Handle GET /opd/head."""
        return self._tensors(self.served.tensors_of_head())

    def _tensors(self, tensors: dict[str, torch.Tensor]) -> Response:
        stamp = {wire.FINGERPRINT: self.served.fingerprint}
        return Response(wire.pack(tensors), media_type="application/octet-stream", headers=stamp)

    def _check_model(self, name: str | None) -> None:
        if name not in (None, "", self.served.name):
            raise HTTPException(404, f"The model `{name}` does not exist; this server has `{self.served.name}`.")

    def _check_count(self, count: int) -> None:
        if count > self.limits.sequences:
            raise Refusal(f"{count} sequences in one request; this server takes at most {self.limits.sequences}")

    def _check_row(self, row: Sequence[int], more: int) -> None:
        if max(row) >= self.served.rows:
            raise Refusal(f"prompt: token id {max(row)} is out of vocabulary; this model has {self.served.rows} ids")
        if len(row) + more > self.served.context:
            raise Refusal(
                f"This model's maximum context length is {self.served.context} tokens. However, you requested "
                f"{len(row) + more} tokens ({len(row)} in the prompt, {more} in the completion)."
            )

    def _prompts(self, asked: Completion) -> list[tuple[int, ...]]:
        given = asked.prompt if isinstance(asked.prompt, list) else [asked.prompt]
        if isinstance(given[0], int):
            given = [given]
        self._check_count(len(given) * asked.n)
        text, add = self.served.tokenizer, asked.add_special_tokens
        rows = [text(p, add_special_tokens=add)["input_ids"] if isinstance(p, str) else p for p in given]
        if not all(rows):
            raise Refusal("prompt: a text that gives no token")
        return [tuple(row) for row in rows]

    def _draw(
        self, rows: Sequence[Sequence[int]], asked: Drawing, most: int, schema: Mapping[str, object] | None = None
    ) -> list[Sample]:
        if most == 0:
            return [Sample((), (), False)] * len(rows)
        self._check_count(len(rows))
        beyond = [i for i in asked.stop_token_ids or [] if i >= self.served.rows]
        if beyond:
            raise Refusal(f"stop_token_ids: {beyond[0]} is out of vocabulary; this model has {self.served.rows} ids")
        how = Sampling(
            temperature=1.0 if asked.temperature is None else asked.temperature,
            top_p=1.0 if asked.top_p is None else asked.top_p,
            top_k=max(0, asked.top_k or 0),
            max_new_tokens=most,
        )
        seed = secrets.randbits(63) if asked.seed is None else asked.seed
        return self.served.generate(rows, how, seed=seed, stop=asked.stop_token_ids or (), schema=schema)

    def _answer(
        self,
        kind: tuple[str, str],
        choices: Sequence[Mapping[str, object]],
        rows: Sequence[Sequence[int]],
        drawn: Sequence[Sample],
    ) -> dict[str, object]:
        read, written = sum(map(len, rows)), sum(len(sample.ids) for sample in drawn)
        return answers.whole(kind, self.served.name, choices, read=read, written=written)

    def _scores(self, asked: Sequence[Asked], top: int) -> list[TokenScores]:
        own = [torch.tensor(a.ids)[list(a.at)][:, None] for a in asked]
        return self.served.scores(asked, own, top)


IDLE = "init_weight_transfer_engine start_weight_update finish_weight_update pause resume reset_prefix_cache"


def build(served: Served, limits: Limits, *, token: str, takes_weights: bool = False) -> ASGIApp:
    """Build the ASGI application, with the checks of `Gate` around it."""
    app = FastAPI(title="opd serve", openapi_url=None)
    routes = Routes(served, limits)

    @app.get("/health")
    async def health() -> Response:  # async: requests that wait for the model occupy every thread
        return Response()

    app.get("/v1/models")(routes.models)
    app.post("/v1/completions")(routes.completions)
    app.post("/v1/chat/completions")(routes.chat)
    app.post("/inference/v1/generate")(routes.generate)
    app.post("/opd/hidden", response_model=None)(routes.hidden)
    app.get("/opd/head", response_model=None)(routes.head)
    app.get("/opd/identity")(served.identity)
    app.get("/opd/tokenizer")(lambda: wire.pack_tokenizer(served.tokenizer))

    if takes_weights:  # vLLM's routes for new weights, with the backend `opd`
        app.get("/get_world_size")(routes.world)
        app.post("/update_weights")(routes.take)
        app.post("/update_weight_version")(routes.rename)
        for path in IDLE.split():
            app.post(f"/{path}")(routes.called)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, mistake: RequestValidationError) -> JSONResponse:
        first = mistake.errors()[0]
        where = ".".join(str(x) for x in first["loc"][1:]) or "body"
        said = "not served by opd" if first["type"] == "extra_forbidden" else first["msg"]
        return error(400, f"{where}: {said}")

    @app.exception_handler(Refusal)
    async def refused(request: Request, mistake: Refusal) -> JSONResponse:
        return error(400, str(mistake))

    @app.exception_handler(HTTPException)
    async def known(request: Request, mistake: HTTPException) -> JSONResponse:
        return error(mistake.status_code, str(mistake.detail))

    @app.exception_handler(Exception)
    async def broken(request: Request, mistake: Exception) -> JSONResponse:
        traceback.print_exception(mistake)
        return error(500, f"{type(mistake).__name__}: {json.dumps(str(mistake)[:200])}; the server's log has more")

    return Gate(app, token=token, most=limits.body_bytes)
