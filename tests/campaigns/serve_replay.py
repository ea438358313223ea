"""Ordinary requests to `opd serve`, by the thousand: each is answered as the first time, and memory does not grow."""

import json
from pathlib import Path

from tests.campaigns import Counts
from tests.campaigns.serve import Server, head, post, served
from tests.tiny_models import tiny_bytes

SETTLED = 0.3  # share of the requests after which memory is measured: until then caches fill
GROWTH = 12 << 20  # bytes by which it may grow from there on
TURNS = [{"role": "user", "content": "2 + 3?"}]
SCHEMA = {"type": "json_schema", "json_schema": {"name": "sum", "schema": {"type": "integer", "maximum": 9}}}
IDS = [5, 6, 7, 8, 9, 10]
BODIES = (
    ("/v1/completions", {"prompt": [IDS] * 4, "max_tokens": 1, "seed": 0, "prompt_logprobs": 4}),
    ("/v1/completions", {"prompt": "Ann has 3 coins.", "max_tokens": 4, "seed": 1, "logprobs": 2}),
    ("/v1/chat/completions", {"messages": TURNS, "max_tokens": 4, "seed": 2, "n": 2}),
    ("/v1/chat/completions", {"messages": TURNS, "max_tokens": 4, "seed": 3, "response_format": SCHEMA}),
    ("/inference/v1/generate", {"token_ids": IDS, "sampling_params": {"prompt_logprob_token_ids": [[1, 2]] * 5}}),
    ("/opd/hidden", {"rows": [{"ids": IDS, "at": [2, 4, 5]}] * 3}),
    ("/v1/completions", {"prompt": [IDS], "max_tokens": 999}),  # refused
)
REQUESTS = (
    *(post(path, json.dumps(body).encode()) for path, body in BODIES),
    *(head("GET", path) for path in ("/v1/models", "/opd/identity", "/opd/tokenizer", "/opd/head", "/ready")),
    head("GET", "/v1/models", Authorization="Bearer wrong"),
)


def content(answer: tuple[int, bytes]) -> tuple[int, object]:
    """Return an answer without what differs every time."""
    status, body = answer
    try:
        found = json.loads(body)
    except ValueError:  # tensors
        return status, body
    return status, {name: x for name, x in found.items() if name not in ("id", "created")}


def run(folder: Path, count: int, seed: int) -> Counts:
    """Send `count` requests, in turn; `seed` is where they begin."""
    counts = Counts()
    with served(tiny_bytes(folder / "model", context=128)) as server:
        first = [content(server.exchange(raw)) for raw in REQUESTS]
        for i in range(count):
            if i == int(SETTLED * count):
                memory = _memory(server)
            place = (seed + i) % len(REQUESTS)
            answer = content(server.exchange(REQUESTS[place]))
            fault = "" if answer == first[place] and 200 <= answer[0] < 500 else f"at first {first[place]}"[:400]
            counts.add(f"{answer}"[:400], fault, refused=answer[0] >= 300)
        grown = _memory(server) - memory
    fault = f"grown by {grown / 2**20:.0f} MB" if grown > GROWTH else ""
    counts.add(f"memory over {count - int(SETTLED * count)} requests", fault, refused=False)
    return counts


def _memory(server: Server) -> int:
    return server.process.memory_info().rss
