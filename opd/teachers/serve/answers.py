"""Response bodies of vLLM's OpenAI-compatible protocol (0.33): samples and scores become plain json."""

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase as Tokenizer

from opd.head.token_scores import TokenScores
from opd.rollouts.engines.base import Sample
from opd.teachers.serve.protocol import SamplingFields

LIMIT = 9999.0  # vLLM sends -9999 for -inf, which json cannot represent
Json = dict[str, object]


def choice(tokenizer: Tokenizer, sample: Sample, request: SamplingFields, *, index: int, row: Sequence[int]) -> Json:
    """Return one response to a prompt (`row`) as text, and as ids if the request wants them."""
    ids = sample.ids[:-1] if sample.stopped else sample.ids
    response = str(tokenizer.decode(list(ids), skip_special_tokens=request.skip_special_tokens))
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    ends = {response.find(stop): stop for stop in stops if stop and stop in response}
    reason: int | str | None = None
    if ends:
        response, reason = response[: min(ends)], ends[min(ends)]
    elif sample.stopped and sample.ids[-1] in (request.stop_token_ids or []):
        reason = sample.ids[-1]
    out: Json = {
        "index": index,
        "text": response,
        "logprobs": None,
        "finish_reason": "stop" if sample.stopped or ends else "length",
        "stop_reason": reason,
    }
    if request.return_token_ids:
        out |= {"token_ids": list(sample.ids), "prompt_token_ids": list(row)}
    return out


def rollout(sample: Sample, *, index: int, version: str) -> Json:
    """Return one rollout as ids, with log-probs under the sampled distribution and the version of the weights."""
    tokens: list[Json] = [
        {"token_id": t, "logprob": max(x, -LIMIT), "rank": None, "top_logprobs": []}
        for t, x in zip(sample.ids, sample.logp, strict=True)
    ]
    return {
        "index": index,
        "token_ids": list(sample.ids),
        "finish_reason": "stop" if sample.stopped else "length",
        "logprobs": {"content": tokens},
        "weight_versions": [{"version": version, "start": 0, "end": len(sample.ids)}],
    }


def prompt_logprobs(tokenizer: Tokenizer, ids: Sequence[int], scores: TokenScores) -> list[Json | None]:
    """Return for each prompt token the log-probs of it and of the most probable tokens, by id; None for the first."""
    out: list[Json | None] = [None]
    columns = (scores.logp[:, 0], scores.rank, scores.top_ids, scores.top_logp)
    for i, logp, rank, top_ids, top_logp in zip(ids[1:], *(x.tolist() for x in columns), strict=True):
        entries = {j: (value, place) for place, (j, value) in enumerate(zip(top_ids, top_logp, strict=True), 1)}
        entries.setdefault(i, (logp, rank))
        ordered = {i: entries.pop(i), **entries}  # the prompt's token comes first
        out.append(
            {
                str(j): {"logprob": max(x, -LIMIT), "rank": place, "decoded_token": tokenizer.decode([j])}
                for j, (x, place) in ordered.items()
            }
        )
    return out


def response_logprobs(tokenizer: Tokenizer, ids: Sequence[int], scores: TokenScores) -> Json:
    """Return OpenAI's log-probs of one response.  They are the model's, before temperature and truncation."""
    tokens = [tokenizer.decode([i]) for i in ids]
    tops: list[dict[str, float]] = [
        {str(tokenizer.decode([j])): max(x, -LIMIT) for j, x in zip(js, xs, strict=True)}
        for js, xs in zip(scores.top_ids.tolist(), scores.top_logp.tolist(), strict=True)
    ]
    logps = [max(x, -LIMIT) for x in scores.logp[:, 0].tolist()]
    for token, logp, top in zip(tokens, logps, tops, strict=True):
        top.setdefault(str(token), logp)
    offsets = np.cumsum([0, *map(len, tokens)])[:-1].tolist()
    return {"tokens": tokens, "token_logprobs": logps, "top_logprobs": tops, "text_offset": offsets}
