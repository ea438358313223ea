"""The request handlers of `opd serve`.  Each mistake of a caller gives a 4xx with one line of json.

The protocol is vLLM's OpenAI-compatible one (0.33) for any client, and `opd.models.remote.opd_protocol` for exact
distillation.
"""

import base64
import io
import secrets
import time
from collections.abc import Sequence

import numpy as np
import torch
from fastapi import Response
from starlette.exceptions import HTTPException

from opd.config.commands import Serve
from opd.core.errors import Refusal
from opd.core.sampling import Prompt, Sampling
from opd.data import prompts
from opd.head.token_scores import TokenScores
from opd.models.remote import opd_protocol as wire
from opd.rollouts.engines.base import GenerateRequest, Sample
from opd.teachers.serve import answers
from opd.teachers.serve.answers import Json
from opd.teachers.serve.metrics import Metrics
from opd.teachers.serve.model import ScoredSequence, Served
from opd.teachers.serve.protocol import (
    Chat,
    Completion,
    DrawingParameters,
    Generate,
    HiddenRows,
    NewWeights,
    SamplingFields,
    Version,
)


class Routes:
    """The request handlers, one method per route; `app.build` has the routes."""

    def __init__(self, served: Served, config: Serve, metrics: Metrics) -> None:
        self.served, self.config, self.metrics = served, config, metrics
        self.started = int(time.time())

    def models(self) -> Json:
        name, context = self.served.name, self.served.context
        card = {"id": name, "object": "model", "created": self.started, "owned_by": "opd", "root": name}
        return {"object": "list", "data": [card | {"parent": None, "max_model_len": context}]}

    def completions(self, request: Completion) -> Json:
        self._check_model(request.model)
        rows, tokenizer = self._prompts(request), self.served.tokenizer
        max_tokens = 16 if request.max_tokens is None else request.max_tokens
        for row in rows:
            self._check_row(row, max_tokens)
        for field, k in (("prompt_logprobs", request.prompt_logprobs), ("logprobs", request.logprobs)):
            if k is not None and k > self.config.max_logprobs:
                raise Refusal(f"{field}: {k} requested, and this server gives at most {self.config.max_logprobs}")
        prompt_logprobs: list[list[Json | None] | None] = [None] * len(rows)
        if request.prompt_logprobs is not None:
            scores = self._scores([ScoredSequence(row, range(1, len(row))) for row in rows], request.prompt_logprobs)
            prompt_logprobs = [answers.prompt_logprobs(tokenizer, *pair) for pair in zip(rows, scores, strict=True)]
        samples = self._sample([row for row in rows for _ in range(request.n)], request, max_tokens)
        choices = []
        for i, sample in enumerate(samples):
            choice = answers.choice(tokenizer, sample, request, index=i, row=rows[i // request.n])
            choices.append(choice | {"prompt_logprobs": prompt_logprobs[i // request.n]})
        if request.logprobs is not None:
            pairs = [(rows[i // request.n], sample.ids) for i, sample in enumerate(samples)]
            sequences = [ScoredSequence(row + ids, range(len(row), len(row) + len(ids))) for row, ids in pairs]
            scores = self._scores(sequences, request.logprobs)
            for choice, sample, score in zip(choices, samples, scores, strict=True):
                choice["logprobs"] = answers.response_logprobs(tokenizer, sample.ids, score)
        return self._answer(("text_completion", "cmpl"), choices, rows, samples)

    def chat(self, request: Chat) -> Json:
        self._check_model(request.model)
        turns = tuple({"role": m.role, "content": m.text()} for m in request.messages)
        prefix = str(turns[-1]["content"]) if request.continue_final_message else ""
        turns = turns[:-1] if request.continue_final_message else turns
        row = prompts.prefilled_ids(self.served.tokenizer, Prompt(messages=turns), prefix, request.chat_template_kwargs)
        max_tokens = request.max_completion_tokens or request.max_tokens or self.served.context - len(row)
        self._check_row(row, max(1, max_tokens))
        schema = None if request.response_format is None else request.response_format.json_schema.json_schema
        samples = self._sample([row] * request.n, request, max_tokens, schema)
        choices = []
        for i, sample in enumerate(samples):
            choice = answers.choice(self.served.tokenizer, sample, request, index=i, row=row)
            choices.append(choice | {"message": {"role": "assistant", "content": choice.pop("text")}})
        return self._answer(("chat.completion", "chatcmpl"), choices, [row], samples)

    def generate(self, request: Generate) -> Json:
        """Handle POST /inference/v1/generate: rollouts, or log-probs of chosen ids as float32 .npy in base64."""
        self._check_model(request.model)
        row, parameters = tuple(request.token_ids), request.sampling_params
        self._check_row(row, parameters.max_tokens)
        if isinstance(parameters, DrawingParameters):
            return self._rollouts(row, parameters)
        ids, start = parameters.prompt_logprob_token_ids, parameters.prompt_logprob_start
        if len(ids) != len(row) - 1 - start:
            raise Refusal(
                f"prompt_logprob_token_ids: {len(ids)} rows; a prompt of {len(row)} tokens scored from "
                f"{start} has {len(row) - 1 - start}"
            )
        widest = max(map(len, ids))
        if not 0 < widest <= self.config.max_logprobs:
            raise Refusal(
                f"prompt_logprob_token_ids: {widest} ids in a row; this server gives 1 to {self.config.max_logprobs}"
            )
        if max(map(max, filter(None, ids))) >= self.served.rows:
            raise Refusal(f"prompt_logprob_token_ids: an id beyond the vocabulary of {self.served.rows}")
        table = torch.tensor([[*candidates, *[-1] * (widest - len(candidates))] for candidates in ids])
        (scores,) = self.served.scores([ScoredSequence(row, range(start + 1, len(row)))], [table], 0)
        greedy = Sampling(temperature=0.0, max_new_tokens=parameters.max_tokens)
        completion = GenerateRequest([row], greedy, seed=0, step=0, index=[0])
        (sample,) = self.served.generate(completion, self.served.stop)
        file = io.BytesIO()
        np.save(file, scores.logp.float().cpu().numpy())
        choice = {"index": 0, "token_ids": list(sample.ids), "finish_reason": "stop" if sample.stopped else "length"}
        answer = self._answer(("generate", "gen"), [choice], [row], [sample])
        return answer | {"prompt_token_id_logprobs": base64.b64encode(file.getvalue()).decode()}

    def _rollouts(self, row: tuple[int, ...], parameters: DrawingParameters) -> Json:
        """Return n rollouts with log-probs of the sampled distribution; the j-th has the seed + j, as in vLLM."""
        if max(parameters.stop_token_ids) >= self.served.rows:
            raise Refusal(f"stop_token_ids: an id beyond the vocabulary of {self.served.rows}")
        if len(parameters.stop_token_ids) > 1:
            raise Refusal("stop_token_ids: this server tells no class of stop tokens apart: give one, or use vLLM")
        sampling = Sampling(
            temperature=parameters.temperature,
            top_p=parameters.top_p,
            top_k=max(0, parameters.top_k),
            max_new_tokens=parameters.max_tokens,
        )
        seeds = range(parameters.seed, parameters.seed + parameters.n)
        generation = GenerateRequest([row] * parameters.n, sampling, seed=0, step=0, index=seeds)
        samples = self.served.generate(generation, parameters.stop_token_ids)
        choices = [answers.rollout(x, index=i, version=self.served.version) for i, x in enumerate(samples)]
        return self._answer(("generate", "gen"), choices, [row], samples)

    def take(self, request: NewWeights) -> dict[str, str]:
        self.served.take(request.update_info.files)
        return {"message": "taken"}

    def rename(self, request: Version) -> Json:
        self.served.version = request.new_version
        return {"success": True, "new_version": request.new_version}

    def hidden(self, request: HiddenRows) -> Response:
        for row in request.rows:
            self._check_row(row.ids, 0)
            if any(b <= a for a, b in zip(row.at, row.at[1:], strict=False)) or max(row.at, default=0) >= len(row.ids):
                raise Refusal(f"at: positions must ascend from 1 to {len(row.ids) - 1}, the last of this sequence")
        self._check_count(len(request.rows))
        states = self.served.states([ScoredSequence(tuple(row.ids), row.at) for row in request.rows])
        self.metrics.count_tokens(prompt=sum(len(row.ids) for row in request.rows), generated=0)
        return self._tensors({"states": torch.cat(states)})

    def head(self) -> Response:
        bias = {} if self.served.head.bias is None else {"bias": self.served.head.bias}
        return self._tensors({"weight": self.served.head.weight, **bias})

    def _tensors(self, tensors: dict[str, torch.Tensor]) -> Response:
        stamp = {wire.FINGERPRINT: self.served.fingerprint}
        return Response(wire.pack(tensors), media_type="application/octet-stream", headers=stamp)

    def _check_model(self, name: str | None) -> None:
        if name not in (None, "", self.served.name):
            raise HTTPException(404, f"The model `{name}` does not exist; this server has `{self.served.name}`.")

    def _check_count(self, count: int) -> None:
        if count > self.config.max_sequences:
            raise Refusal(f"{count} sequences in one request; this server takes at most {self.config.max_sequences}")

    def _check_row(self, row: Sequence[int], new_tokens: int) -> None:
        if max(row) >= self.served.rows:
            raise Refusal(f"prompt: token id {max(row)} is out of vocabulary; this model has {self.served.rows} ids")
        if len(row) + new_tokens > self.served.context:
            raise Refusal(
                f"This model's maximum context length is {self.served.context} tokens. However, you requested "
                f"{len(row) + new_tokens} tokens ({len(row)} in the prompt, {new_tokens} in the completion)."
            )

    def _prompts(self, request: Completion) -> list[tuple[int, ...]]:
        values = request.prompt if isinstance(request.prompt, list) else [request.prompt]
        if isinstance(values[0], int):
            values = [values]
        self._check_count(len(values) * request.n)
        tokenizer, special = self.served.tokenizer, request.add_special_tokens
        rows = [tokenizer(p, add_special_tokens=special)["input_ids"] if isinstance(p, str) else p for p in values]
        if not all(rows):
            raise Refusal("prompt: a text that gives no token")
        return [tuple(row) for row in rows]

    def _sample(
        self, rows: Sequence[Sequence[int]], request: SamplingFields, max_tokens: int, schema: Json | None = None
    ) -> list[Sample]:
        if max_tokens == 0:
            return [Sample((), (), False)] * len(rows)
        self._check_count(len(rows))
        beyond = [i for i in request.stop_token_ids or [] if i >= self.served.rows]
        if beyond:
            raise Refusal(f"stop_token_ids: {beyond[0]} is out of vocabulary; this model has {self.served.rows} ids")
        sampling = Sampling(
            temperature=1.0 if request.temperature is None else request.temperature,
            top_p=1.0 if request.top_p is None else request.top_p,
            top_k=max(0, request.top_k or 0),
            max_new_tokens=max_tokens,
        )
        seed = secrets.randbits(63) if request.seed is None else request.seed
        generation = GenerateRequest(rows, sampling, seed=seed, step=0, index=range(len(rows)))
        return self.served.generate(generation, (*self.served.stop, *(request.stop_token_ids or ())), schema)

    def _answer(
        self, kind: tuple[str, str], choices: Sequence[Json], rows: Sequence[Sequence[int]], samples: Sequence[Sample]
    ) -> Json:
        """Return the response body around its choices.  `kind` is the name of the object and the prefix of its id."""
        name, prefix = kind
        read, written = sum(map(len, rows)), sum(len(sample.ids) for sample in samples)
        self.metrics.count_tokens(prompt=read, generated=written)
        return {
            "id": f"{prefix}-{secrets.token_hex(12)}",
            "object": name,
            "created": int(time.time()),
            "model": self.served.name,
            "choices": choices,
            "usage": {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written},
        }

    def _scores(self, sequences: Sequence[ScoredSequence], top: int) -> list[TokenScores]:
        sampled = [torch.tensor(s.ids)[list(s.positions)][:, None] for s in sequences]
        return self.served.scores(sequences, sampled, top)
