"""Connect to a server, `reach(url, how) -> Server`, and build and parse requests of vLLM's log-prob protocol.

`scoring` requests the log-probs of prompts (/v1/completions).  `choosing` requests those of given token ids
(/inference/v1/generate), and `matrix` parses the response.
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
from opd.core.errors import Refusal
from opd.core.types import MEASURED, STUDENTS
from opd.models.remote import opd_protocol as wire
from opd.models.remote.client import AGAIN, ANY, Client, payload, read_json, said

CHUNK = 4096  # tokens per request: cheap to repeat when one fails, and enough to fill a forward
LOWEST = -9998.0  # nats: vLLM sends -9999 for -inf
HIGHEST = 1e-3  # nats: rounding makes no log-prob larger than this
SPREAD = 64  # ids whose text is probed on a server other than `opd serve`, in addition to the added tokens
NO = frozenset(range(400, 500)) - AGAIN - {401} | {500, 501}  # HTTP status: no such route, or the runner cannot do it
WHOLE = MEASURED | {"vocabulary"}  # what `opd serve` provides
TOKENS = STUDENTS | {"teacher_logp", "teacher_top"}  # what any other server provides


@dataclass(frozen=True)
class Server:
    """A server that was reached, and what it can score."""

    client: Client
    model: str
    context: int  # tokens
    told: Mapping[str, Any]  # the identity that `opd serve` sends; empty for any other server
    chosen: bool = False  # whether it scores token ids that the client names

    @property
    def provides(self) -> frozenset[str]:
        """Return the columns that can be measured with it, and "vocabulary" if it gives whole distributions."""
        return WHOLE if self.told else TOKENS | ({"chosen"} if self.chosen else set())

    @property
    def weights(self) -> str:
        """Return an id of the server's weights: the hash that `opd serve` sends, else only the model's name."""
        return str(self.told.get("fingerprint", self.model))

    def tokenizer(self, likely: Tokenizer, rows: int) -> Tokenizer:
        """Return the server's tokenizer.

        An `opd serve` sends its tokenizer.  Any other server is expected to have the `likely` one, which is probed on
        the first `rows` ids (the student's).  Raises Refusal if ids mean other tokens there.
        """
        if not self.told:
            self._probe(likely, rows)
            return likely
        read = lambda files: wire.unpack_tokenizer(files, self.client.url)
        found = self.client.get("/opd/tokenizer", read_json(read))
        if wire.vocabulary_hash(found) != self.told["vocabulary"]:
            raise Refusal(f"{self.client.who}: the tokenizer it hands out is not the one it hashes: restart it")
        return found

    def _probe(self, likely: Tokenizer, rows: int) -> None:
        # Sibling models differ in added tokens: where one model has a token, the other has an untrained row, or no row.
        added = sorted(i for i in likely.get_added_vocab().values() if i < rows)
        some = [i for i in _spread(likely) if i < rows and i not in added]
        wrong = self._differing(some, likely)
        moved = self._differing([*some[:1], *added], likely, fine=frozenset({400}))
        if moved or len(wrong) > len(some) // 8:  # a few ids differ on servers that decode in context
            raise Refusal(
                f"{self.client.who}: {len(wrong)} of {len(some) - 1} probed ids and {len(moved)} of {len(added)} added "
                f"tokens mean another token there: {'; '.join([*moved, *wrong][:3])}: serve a model with the student's "
                "vocabulary, or name the server's own tokenizer by --teacher-tokenizer"
            )

    def _differing(self, ids: Sequence[int], likely: Tokenizer, fine: frozenset[int] = ANY) -> list[str]:
        """Describe each id whose text differs from the `likely` one, except the first id, which has no prediction.

        If the server rejects the ids with a status in `fine`, return its error message.
        """
        first, *rest = ids or [0]
        room = min(CHUNK, self.context) - 1
        rows = [[first, *rest[i : i + room]] for i in range(0, len(rest), room)]

        def read(told: dict) -> list[str]:
            choices = sorted(told["choices"], key=lambda c: c["index"])
            prompts = [choice.get("prompt_logprobs") for choice in choices]
            if None in prompts:
                raise Refusal(
                    f"{self.client.who}: it gives no log-probs of prompts (prompt_logprobs), and a teacher's tokens "
                    "are scored by them: take a vLLM server, `opd serve`, or a method for text-only teachers"
                )
            out = []
            every = [x for row, at in zip(rows, prompts, strict=True) for x in zip(row[1:], at[1:], strict=True)]
            for i, entry in ((i, at[str(i)]) for i, at in every):
                if entry["logprob"] > HIGHEST:
                    raise Refusal(
                        f"{self.client.who}: it gives {entry['logprob']:.4g} for id {i}, which is no log-prob: start "
                        "vLLM with --logprobs-mode raw_logprobs"
                    )
                text, here = entry.get("decoded_token"), str(likely.decode([i]))
                if text is not None and text.strip() != here.strip():
                    out.append(f"id {i} is {text!r} there and {here!r} here")
            return out

        def whole(response: httpx.Response) -> list[str]:
            if response.status_code in fine:
                return [f"HTTP {response.status_code} ({said(response)})"]
            return read_json(read)(response)

        if not rows:
            return []
        return self.client.post("/v1/completions", scoring(self.model, rows), whole, fine=fine)


def reach(url: str, how: Remote, *, field: str = "teacher") -> Server:
    """Identify the server at an address.  Waits for a server that is starting.

    Raises Refusal if the server has another protocol version, or if the model cannot be chosen.
    """
    how.check()
    client, told = Client(url, how, field=field), {}
    if client.knows("/opd/identity"):
        told = client.get("/opd/identity", read_json(dict))
        if told.get("protocol") != wire.VERSION:
            raise Refusal(
                f"{client.who}: it speaks version {told.get('protocol')} of the protocol, this opd version "
                f"{wire.VERSION}: install one version of opd on both machines"
            )
        cards = {told["model"]: told["context"]}
    else:
        cards = client.get("/v1/models", read_json(lambda r: {c["id"]: c.get("max_model_len") for c in r["data"]}))
    model = client.model or next(iter(cards), "")
    if model not in cards or (len(cards) > 1 and not client.model):
        raise Refusal(f"{client.who}: it serves {', '.join(cards) or 'no model'}; name one as {client.url}#NAME")
    if told:
        return Server(client, model, cards[model], told)
    # vLLM generates at least one token after the prompt that it scores.
    return Server(client, model, (cards[model] or 1 << 30) - 1, {}, _chooses(client, model))


def _chooses(client: Client, model: str) -> bool:
    """Return whether a server scores chosen tokens.  It sends one request for a sequence of two tokens."""
    asked = [[1]]

    def read(response: httpx.Response) -> bool:
        if response.status_code in NO or payload(response).get("prompt_token_id_logprobs") is None:
            return False
        read_json(matrix(asked))(response)
        return True

    return client.post("/inference/v1/generate", choosing(model, [1, 1], 1, asked), read, fine=NO)


def scoring(model: str, rows: Sequence[Sequence[int]], top: int = 0) -> dict[str, object]:
    """Build a request for the log-probs of prompts, and of the `top` most probable tokens at each position.

    vLLM generates at least one token.
    """
    how = {"max_tokens": 1, "temperature": 1.0, "prompt_logprobs": top}
    return {"model": model, "prompt": list(map(list, rows)), **how}


def choosing(model: str, ids: Sequence[int], start: int, asked: Sequence[Sequence[int]]) -> dict[str, object]:
    """Build a request for the log-probs of given ids at each token of a sequence, from position `start` (> 0).

    `asked` has one row of ids per token; an id of -1 is a placeholder.
    """
    how = {"max_tokens": 1, "prompt_logprob_token_ids": asked, "prompt_logprob_start": start - 1, "detokenize": False}
    return {"model": model, "token_ids": list(ids), "sampling_params": how}


def matrix(asked: Sequence[Sequence[int]]) -> Callable[[dict], Float[Tensor, "n k"]]:
    """Return a parser of the response to `choosing`: log-probs [n, k] in nats, -inf where the id is -1.

    The response holds them as float32 .npy in base64.  The parser raises ValueError for another shape or dtype.
    """
    named = torch.tensor(asked) >= 0

    def read(told: dict) -> Tensor:
        file = io.BytesIO(base64.b64decode(told["prompt_token_id_logprobs"], validate=True))
        found = np.lib.format.read_array(file, allow_pickle=False)
        if found.shape != named.shape or found.dtype != np.float32:
            raise ValueError(f"{found.dtype} of {found.shape} instead of float32 of {tuple(named.shape)}")
        return logprobs(torch.from_numpy(found).where(named, -torch.inf))

    return read


def logprobs(found: Tensor) -> Tensor:
    """Return the log-probs with -inf restored, which vLLM sends as -9999.  Raises ValueError for invalid log-probs."""
    if found.isnan().any() or (found > HIGHEST).any():
        raise ValueError(f"{found.max():.4g} is no log-prob")
    return found.where(found > LOWEST, -torch.inf)


def _spread(tokenizer: Tokenizer) -> list[int]:
    """Return ids, spread over the vocabulary, that decode to whole characters."""
    every = sorted(tokenizer.get_vocab().values())
    whole = [i for i in every[:: max(1, len(every) // (4 * SPREAD))] if "\ufffd" not in str(tokenizer.decode([i]))]
    return whole[:: max(1, len(whole) // SPREAD)]
