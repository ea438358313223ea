"""Connect to a server, `connect(url, settings) -> Server`, and build and parse requests of vLLM's log-prob protocol.

`scoring_request` asks for the log-probs of prompts (/v1/completions).  `chosen_logprobs_request` asks for those of
given token ids (/inference/v1/generate), and `chosen_logprobs_reader` parses the response.
"""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer

from opd.config.servers import Remote
from opd.core.errors import Refusal, one_line
from opd.core.types import MEASURED, STUDENT_COLUMNS
from opd.models.remote import opd_protocol as wire
from opd.models.remote.client import NO_STATUS, RETRIED_STATUS, Client, error_message, payload, read_json

TOKENS_PER_REQUEST = 4096  # tokens per request: cheap to repeat when one fails, and enough to fill a forward
LOWEST = -9998.0  # nats: vLLM sends -9999 for -inf
HIGHEST = 1e-3  # nats: rounding makes no log-prob larger than this
NUM_PROBED_IDS = 64  # ids whose text is probed on a server other than `opd serve`, in addition to the added tokens
# HTTP status: no such route, or the runner cannot do it
UNSUPPORTED_STATUS = frozenset(range(400, 500)) - RETRIED_STATUS - {401} | {500, 501}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
IDENTITY = {  # what `opd serve` says of itself
    "model": str,
    "vocabulary": str,
    "fingerprint": str,
    "dtype": str,
    "rows": int,
    "width": int,
    "context": int,
    "scale": int | float,
    "softcap": int | float,
}
OPD_SERVE_COLUMNS = MEASURED | {"vocabulary"}  # what `opd serve` provides
OTHER_SERVER_COLUMNS = STUDENT_COLUMNS | {"teacher_logp", "teacher_top"}  # what any other server provides


@dataclass(frozen=True)
class Server:
    """A connected server, and what it can score."""

    client: Client
    model: str
    context: int  # tokens
    identity: Mapping[str, Any]  # the identity that `opd serve` sends; empty for any other server
    chosen: bool = False  # whether it scores token ids that the client names

    @property
    def provides(self) -> frozenset[str]:
        """Return the columns that can be measured with it, and "vocabulary" if it gives whole distributions."""
        return OPD_SERVE_COLUMNS if self.identity else OTHER_SERVER_COLUMNS | ({"chosen"} if self.chosen else set())

    @property
    def weights(self) -> str:
        """Return an id of the server's weights: the hash that `opd serve` sends, else only the model's name."""
        return str(self.identity.get("fingerprint", self.model))

    def tokenizer(self, likely: Tokenizer, rows: int) -> Tokenizer:
        """Return the server's tokenizer.

        An `opd serve` sends its tokenizer.  Any other server is expected to have the `likely` one, which is probed on
        the first `rows` ids (the student's).  Raises Refusal if ids mean other tokens there.
        """
        if not self.identity:
            self._probe(likely, rows)
            return likely
        unpack = lambda files: wire.unpack_tokenizer(files, self.client.url)
        tokenizer = self.client.get("/opd/tokenizer", read_json(unpack))
        if wire.vocabulary_hash(tokenizer) != self.identity["vocabulary"]:
            raise Refusal(f"{self.client.label}: the tokenizer it hands out is not the one it hashes: restart it")
        return tokenizer

    def _probe(self, likely: Tokenizer, rows: int) -> None:
        # Sibling models differ in added tokens: where one model has a token, the other has an untrained row, or no row.
        added = sorted(i for i in likely.get_added_vocab().values() if i < rows)
        probed_ids = [i for i in _spread_ids(likely) if i < rows and i not in added]
        wrong = self._differing(probed_ids, likely)
        moved = self._differing([*probed_ids[:1], *added], likely, fine=frozenset({400}))
        if moved or len(wrong) > len(probed_ids) // 8:  # a few ids differ on servers that decode in context
            raise Refusal(
                f"{self.client.label}: {len(wrong)} of {len(probed_ids) - 1} probed ids and {len(moved)} of "
                f"{len(added)} added tokens mean another token there: {'; '.join([*moved, *wrong][:3])}: serve a model "
                "with the student's vocabulary, or name the server's own tokenizer by --teacher-tokenizer"
            )

    def _differing(self, ids: Sequence[int], likely: Tokenizer, fine: frozenset[int] = NO_STATUS) -> list[str]:
        """Describe each id whose text differs from the `likely` one, except the first id, which has no prediction.

        If the server rejects the ids with a status in `fine`, return its error message.
        """
        first, *remaining_ids = ids or [0]
        row_length = min(TOKENS_PER_REQUEST, self.context) - 1
        rows = [[first, *remaining_ids[i : i + row_length]] for i in range(0, len(remaining_ids), row_length)]

        def read(response: dict) -> list[str]:
            prompts = [c.get("prompt_logprobs") for c in sorted(response["choices"], key=lambda c: c["index"])]
            if None in prompts:
                raise Refusal(
                    f"{self.client.label}: it gives no log-probs of prompts (prompt_logprobs), and a teacher's tokens "
                    "are scored by them: take a vLLM server, `opd serve`, or a method for text-only teachers"
                )
            out = []
            scored = [x for row, p in zip(rows, prompts, strict=True) for x in zip(row[1:], p[1:], strict=True)]
            for i, position in scored:
                entry = position[str(i)]
                if entry["logprob"] > HIGHEST:
                    raise Refusal(
                        f"{self.client.label}: it gives {entry['logprob']:.4g} for id {i}, which is no log-prob: start "
                        "vLLM with --logprobs-mode raw_logprobs"
                    )
                text, likely_text = entry.get("decoded_token"), str(likely.decode([i]))
                if text is not None and text.strip() != likely_text.strip():
                    out.append(f"id {i} is {text!r} there and {likely_text!r} here")
            return out

        def read_response(response: httpx.Response) -> list[str]:
            if response.status_code in fine:
                return [f"HTTP {response.status_code} ({error_message(response)})"]
            return read_json(read)(response)

        if not rows:
            return []
        return self.client.post("/v1/completions", scoring_request(self.model, rows), read_response, fine=fine)


def connect(url: str, settings: Remote, *, field: str = "teacher") -> Server:
    """Identify the server at an address.  Waits for a server that is starting.

    Raises Refusal if the server has another protocol version, or if the model cannot be chosen.
    """
    settings.check()
    client, identity = Client(url, settings, field=field), {}
    if client.has_path("/opd/identity"):
        identity = client.get("/opd/identity", read_json(_identity))
        if identity.get("protocol") != wire.VERSION:
            raise Refusal(
                f"{client.label}: it speaks version {identity.get('protocol')} of the protocol, this opd version "
                f"{wire.VERSION}: install one version of opd on both machines"
            )
        cards = {identity["model"]: identity["context"]}
    else:
        cards = client.get("/v1/models", read_json(_cards))
    model = client.model or next(iter(cards), "")
    if model not in cards or (len(cards) > 1 and not client.model):
        raise Refusal(f"{client.label}: it serves {', '.join(cards) or 'no model'}; name one as {client.url}#NAME")
    if identity:
        return Server(client, model, cards[model], identity)
    # vLLM generates at least one token after the prompt that it scores.
    return Server(client, model, (cards[model] or 1 << 30) - 1, {}, _scores_chosen_ids(client, model))


def _identity(answer: dict) -> dict[str, Any]:
    """Return what `opd serve` says of itself; that of another version of the protocol is not looked at."""
    if answer.get("protocol") == wire.VERSION:
        for name, types in IDENTITY.items():
            if not isinstance(answer[name], types):
                raise ValueError(f"{name} is {one_line(repr(answer[name]), 60)}")
        if answer["dtype"] not in DTYPES or min(answer["rows"], answer["width"], answer["context"]) < 1:
            raise ValueError("its dtype or its sizes are those of no model")
    return answer


def _cards(answer: dict) -> dict[str, int | None]:
    """Return the context of each model that a server names; None if it does not say it."""
    cards = {card["id"]: card.get("max_model_len") for card in answer["data"]}
    if not all(isinstance(name, str) and isinstance(length, int | None) for name, length in cards.items()):
        raise ValueError(f"models {one_line(cards)}")
    return cards


def _scores_chosen_ids(client: Client, model: str) -> bool:
    """Return whether a server scores chosen tokens.  It sends one request for a sequence of two tokens."""
    token_ids = [[1]]

    def read(response: httpx.Response) -> bool:
        if response.status_code in UNSUPPORTED_STATUS or payload(response).get("prompt_token_id_logprobs") is None:
            return False
        read_json(chosen_logprobs_reader(token_ids))(response)
        return True

    return client.post(
        "/inference/v1/generate", chosen_logprobs_request(model, [1, 1], 1, token_ids), read, fine=UNSUPPORTED_STATUS
    )


def scoring_request(model: str, rows: Sequence[Sequence[int]], top: int = 0) -> dict[str, object]:
    """Build a request for the log-probs of prompts, and of the `top` most probable tokens at each position."""
    sampling = {"max_tokens": 1, "temperature": 1.0, "prompt_logprobs": top}  # vLLM generates at least one token
    return {"model": model, "prompt": list(map(list, rows)), **sampling}


def chosen_logprobs_request(
    model: str, ids: Sequence[int], start: int, chosen_ids: Sequence[Sequence[int]]
) -> dict[str, object]:
    """Build a request for the log-probs of given ids at each token of a sequence, from position `start` (> 0).

    `chosen_ids` has one row of ids per token; an id of -1 is a placeholder.
    """
    sampling = {"max_tokens": 1, "prompt_logprob_token_ids": chosen_ids, "prompt_logprob_start": start - 1}
    return {"model": model, "token_ids": list(ids), "sampling_params": sampling | {"detokenize": False}}


def chosen_logprobs_reader(chosen_ids: Sequence[Sequence[int]]) -> Callable[[dict], Float[Tensor, "n k"]]:
    """Return a parser of the response to `chosen_logprobs_request`: log-probs [n, k] in nats, -inf where the id is -1.

    The response holds them as float32 .npy in base64.  The parser raises ValueError for another shape or dtype.
    """
    is_requested = torch.tensor(chosen_ids) >= 0

    def read(response: dict) -> Tensor:
        file = io.BytesIO(base64.b64decode(response["prompt_token_id_logprobs"], validate=True))
        values = np.lib.format.read_array(file, allow_pickle=False)
        if values.shape != is_requested.shape or values.dtype != np.float32:
            raise ValueError(f"{values.dtype} of {values.shape} instead of float32 of {tuple(is_requested.shape)}")
        return restored_logprobs(torch.from_numpy(values).where(is_requested, -torch.inf))

    return read


def restored_logprobs(values: Tensor) -> Tensor:
    """Return the log-probs with -inf restored, which vLLM sends as -9999.  Raises ValueError for invalid log-probs."""
    if values.isnan().any() or (values > HIGHEST).any():
        raise ValueError(f"{values.max():.4g} is no log-prob")
    return values.where(values > LOWEST, -torch.inf)


def _spread_ids(tokenizer: Tokenizer) -> list[int]:
    """Return ids, spread over the vocabulary, that decode to whole characters."""
    ids = sorted(tokenizer.get_vocab().values())
    ids = ids[:: max(1, len(ids) // (4 * NUM_PROBED_IDS))]
    complete = [i for i in ids if "\ufffd" not in str(tokenizer.decode([i]))]
    return complete[:: max(1, len(complete) // NUM_PROBED_IDS)]
