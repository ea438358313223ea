"""Teachers behind HTTP: `opd serve` sends hidden states, and any server of vLLM's protocol sends log-probs.

`open_teacher` turns a `Server` into a teacher with the interface of `LocalTeacher`.  A batch is sent in chunks, several
at once.  If a chunk fails, only that chunk is sent again.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import MappingProxyType
from typing import Generic, TypeVar

import httpx
import torch
from jaxtyping import Int
from safetensors import SafetensorError
from torch import Tensor

from opd.core.errors import Refusal
from opd.core.types import Rollout
from opd.head.inputs import Hidden, TeacherLogps
from opd.head.vocabulary import Head
from opd.losses.hidden_states import Lens
from opd.models.remote import opd_protocol as wire
from opd.models.remote.client import ANSWER_BYTES, Malformed, Traffic, read_json
from opd.models.remote.vllm_protocol import (
    DTYPES,
    OPD_SERVE_COLUMNS,
    OTHER_SERVER_COLUMNS,
    TOKENS_PER_REQUEST,
    Server,
    chosen_logprobs_reader,
    chosen_logprobs_request,
    restored_logprobs,
    scoring_request,
)
from opd.teachers.base import BaseTeacher, TeacherState

TIES = 2  # tokens scored in addition to the student's top k: rounding may reorder ties in the student's next pass
K = TypeVar("K", Hidden, TeacherLogps)
R = TypeVar("R")
NONE: Mapping[str, int] = MappingProxyType({})


@dataclass(frozen=True)
class _Row:
    """A rollout as the teacher reads it: prompt and response in one sequence."""

    ids: tuple[int, ...]
    start: int  # position of the first response token
    positions: tuple[int, ...]  # of the trained tokens


class _ServerTeacher(BaseTeacher, Generic[K]):
    """The common part of both server teachers: it sends rows in chunks, keeps their order and counts the traffic."""

    def __init__(self, server: Server, *, to: torch.device) -> None:
        self.server, self.client, self.to = server, server.client, to
        self.pool = ThreadPoolExecutor(server.client.settings.teacher_concurrency, "teacher")
        self.ahead_pool = ThreadPoolExecutor(1, "teacher-ahead")
        self.pending: tuple[object, Future] | None = None

    def ahead(self, rollouts: Sequence[Rollout], masks: Sequence[Sequence[bool]]) -> None:
        """Send the requests of the next `hidden` call now, so that the server works while the student does."""
        self.pending = (_key(rollouts, masks), self.ahead_pool.submit(self._ask, rollouts, masks))

    def hidden(self, rollouts: Sequence[Rollout], masks: Sequence[Sequence[bool]], lens: Lens | None = None) -> K:
        """Return what the server computes at the trained tokens, after the teacher's prompt."""
        assert lens is None, "a server shows no layers"
        pending, self.pending = self.pending, None
        if pending is not None and pending[0] == _key(rollouts, masks):
            return pending[1].result()
        return self._ask(rollouts, masks)

    def _ask(self, rollouts: Sequence[Rollout], masks: Sequence[Sequence[bool]]) -> K:
        raise NotImplementedError

    def state(self) -> TeacherState:
        return TeacherState(server_weights=self.server.weights)

    def restore(self, state: TeacherState) -> None:
        if state.server_weights and state.server_weights != self.server.weights:
            raise self.changed()

    def changed(self) -> Refusal:
        """Return the Refusal for a server whose weights have changed."""
        return Refusal(
            f"{self.client.label}: other weights answer there now ({self.server.model}) than when the run started: "
            "serve those again, or start a new run"
        )

    def close(self) -> None:
        """Cancel the requests in flight, so that their threads end."""
        self.client.close()
        self.pool.shutdown(wait=False, cancel_futures=True)
        self.ahead_pool.shutdown(wait=False, cancel_futures=True)

    def traffic(self) -> dict[str, float]:
        with self.client.lock:
            new, self.client.traffic = self.client.traffic, Traffic()
        return {
            "teacher_sent_mb": new.sent / 2**20,
            "teacher_received_mb": new.received / 2**20,
            "teacher_requests": float(new.requests),
            "teacher_retries": float(new.retries),
        }

    def _each(self, rows: Sequence[_Row], max_tokens: int, ask: Callable[[list[int]], list[R]]) -> list[R]:
        """Return the answer for each row that has a trained token; `ask` gets the positions of rows in `rows`.

        Chunks of at most `max_tokens` padded tokens are sent in parallel.  If one fails, `map` cancels the others.
        """
        groups, out = list(_chunks(rows, max_tokens)), dict[int, R]()
        for group, answers in zip(groups, self.pool.map(ask, groups), strict=True):
            out |= zip(group, answers, strict=True)
        return [out[i] for i in sorted(out)]


class HiddenTeacher(_ServerTeacher[Hidden]):
    """A teacher behind `opd serve`, which sends final hidden states: 2 or 4 bytes times the hidden width per token.

    It is exact and supports every method, because the LM head is fetched once and the head pass measures whole
    distributions.
    """

    provides = OPD_SERVE_COLUMNS

    def __init__(self, server: Server, *, to: torch.device) -> None:
        super().__init__(server, to=to)
        identity = server.identity
        self.dtype, self.width = DTYPES[identity["dtype"]], identity["width"]
        shape = (identity["rows"], self.width)
        limit = ANSWER_BYTES + (shape[0] + 1) * self.width * self.dtype.itemsize
        tensors = self.client.get("/opd/head", self._tensors("weight", shape), limit=limit)
        weight, bias = tensors["weight"].to(to), tensors.get("bias")
        self.head = Head(weight, None if bias is None else bias.to(to), identity["scale"], identity["softcap"])

    def _ask(self, rollouts: Sequence[Rollout], masks: Sequence[Sequence[bool]]) -> Hidden:
        rows = _rows(rollouts, masks)
        states = self._each(rows, TOKENS_PER_REQUEST, lambda group: self._states([rows[i] for i in group]))
        empty = torch.empty(0, self.width, dtype=self.dtype)
        return Hidden(torch.cat([empty, *states]).to(self.to), self.head)

    def _states(self, rows: list[_Row]) -> list[Tensor]:
        sizes = [len(row.positions) for row in rows]
        body = {"rows": [{"ids": row.ids, "at": row.positions} for row in rows]}
        tensors = self.client.post("/opd/hidden", body, self._tensors("states", (sum(sizes), self.width)))
        return list(tensors["states"].split(sizes))

    def _tensors(self, name: str, shape: tuple[int, int]) -> Callable[[httpx.Response], dict[str, Tensor]]:
        def read(response: httpx.Response) -> dict[str, Tensor]:
            fingerprint = response.headers.get(wire.FINGERPRINT)
            if fingerprint is None:
                raise Malformed("it does not say whose weights")
            if fingerprint != self.server.identity["fingerprint"]:
                raise self.changed()
            try:
                tensors = wire.unpack(response.content)
            except SafetensorError as error:
                raise Malformed(f"no safetensors: {error}") from error
            if name not in tensors or tensors[name].shape != shape or tensors[name].dtype != self.dtype:
                raise Malformed(f"{name} is not {shape} of {self.dtype}")
            if not tensors[name].isfinite().all():
                raise Malformed(f"{name} is not finite")
            return tensors

        return read


class LogpTeacher(_ServerTeacher[TeacherLogps]):
    """A teacher behind any server of vLLM's protocol, which sends log q of single tokens.

    These are the sampled tokens and, where a method needs them, others: the server's `tops["teacher"]` most probable
    tokens, or those that the caller names.  The request is /inference/v1/generate where the server has it (vLLM >=
    0.32, V2 runner; 4 bytes per token), else prompt_logprobs of /v1/completions (about 80 bytes per token).  The
    server's softmax is over all rows of its head, padded ones included.
    """

    provides: frozenset[str] = OTHER_SERVER_COLUMNS

    def __init__(
        self, server: Server, *, to: torch.device, stop: tuple[int, ...], size: int, tops: Mapping[str, int]
    ) -> None:
        super().__init__(server, to=to)
        self.provides = server.provides
        self.stop = stop if len(stop) > 1 else ()  # ids merged into one class
        self.size, self.top = size, tops.get("teacher", 0)
        self.likeliest, self.drawn = tops["student"] + TIES if "student" in tops else 0, tops.get("drawn", 0)
        if sum(map(bool, (self.top, self.likeliest, self.drawn))) > 1:
            raise Refusal(
                f"{self.client.label}: the method looks at two of the student's most probable tokens, the teacher's "
                "and those drawn, and a server that tells of single tokens is asked for one kind: serve it by `opd "
                "serve`"
            )
        if self.stop and (self.top or not server.chosen):
            raise Refusal(
                f"{self.client.label}: it cannot say the probability of a chosen token, which merging the stop "
                f"tokens {', '.join(map(str, stop))} needs: use --stop-token mask, or train"
            )
        # This request shows before the first step whether the server's --max-logprobs is large enough.
        if self.top:
            self._prompted([_Row((1, 1), 1, (1,))])
        elif named := self.likeliest or self.drawn:
            self._chosen(_Row((1, 1), 1, (1,)), torch.ones(1, named, dtype=torch.long))

    def hidden(
        self,
        rollouts: Sequence[Rollout],
        masks: Sequence[Sequence[bool]],
        lens: Lens | None = None,
        ids: Int[Tensor, "N k"] | None = None,
    ) -> TeacherLogps:
        """Return log q of the trained tokens, and of the N rows of `ids` at them."""
        return super().hidden(rollouts, masks, lens) if ids is None else self._ask(rollouts, masks, ids)

    def _ask(
        self, rollouts: Sequence[Rollout], masks: Sequence[Sequence[bool]], ids: Int[Tensor, "N k"] | None = None
    ) -> TeacherLogps:
        rows = _rows(rollouts, masks)
        if self.top or not self.server.chosen:
            answers = self._each(rows, TOKENS_PER_REQUEST, lambda group: self._prompted([rows[i] for i in group]))
        else:
            sizes = [len(row.positions) for row in rows]
            named = torch.empty(sum(sizes), 0, dtype=torch.long) if ids is None else ids.cpu().long()
            row_ids = named.split(sizes)
            answers = self._each(rows, 1, lambda group: [self._chosen(rows[i], row_ids[i]) for i in group])
        logp = torch.cat([torch.empty(0), *(answer.logp for answer in answers)]).to(self.to)
        pairs = [(x.ids, x.others) for x in answers if x.ids is not None and x.others is not None]
        if not pairs:
            return TeacherLogps(logp)
        ids, ids_logp = (torch.cat(list(x)).to(self.to) for x in zip(*pairs, strict=True))
        return TeacherLogps(logp, ids, ids_logp, min(self.top, self.size))

    def _chosen(self, row: _Row, named: Int[Tensor, "n k"]) -> TeacherLogps:
        """Score named ids with vLLM's fixed-token scoring, one sequence per request.

        The probability of the stop class is the sum over its members, which are requested one by one.
        """
        named_at = {t: ids.tolist() for t, ids in zip(row.positions, named, strict=True)}
        start = max(1, row.start)  # nothing predicts the first token
        k, s = named.shape[1], len(self.stop)
        requested = []  # at each position: the sampled id, the stop class, the named ids, padded with -1
        for t in range(start, len(row.ids)):
            candidates = [row.ids[t], *self.stop, *named_at.get(t, ())]
            requested.append(candidates + [-1] * (1 + s + k - len(candidates)))
        body = chosen_logprobs_request(self.server.model, row.ids, start, requested)
        table = self.client.post("/inference/v1/generate", body, read_json(chosen_logprobs_reader(requested)))
        table = table[torch.tensor(row.positions, dtype=torch.long) - start]
        sampled = torch.tensor([row.ids[t] for t in row.positions], dtype=torch.long)[:, None]
        ids = torch.cat((sampled, named), -1)
        logp = torch.cat((table[:, :1], table[:, 1 + s :]), -1)
        if self.stop:
            is_stop = torch.isin(ids, torch.tensor(self.stop))
            logp = torch.where(is_stop, table[:, 1 : 1 + s].logsumexp(-1, keepdim=True), logp)
        return TeacherLogps(logp[:, 0], named, logp[:, 1:]) if k else TeacherLogps(logp[:, 0])

    def _prompted(self, rows: list[_Row]) -> list[TeacherLogps]:
        """Score tokens with vLLM's prompt_logprobs, many sequences per request.

        The response holds the log-probs of the sequence's tokens and of the most probable ones.
        """

        def read(answer: dict) -> list[TeacherLogps]:
            choices = sorted(answer["choices"], key=lambda c: c["index"])
            out = []
            for row, choice in zip(rows, choices, strict=True):
                tables = choice["prompt_logprobs"]
                if len(tables) != len(row.ids):
                    raise ValueError(f"{len(tables)} log-probs for {len(row.ids)} tokens")
                logp_by_id = [{int(i): float(x["logprob"]) for i, x in tables[t].items()} for t in row.positions]
                sampled = [table[row.ids[t]] for t, table in zip(row.positions, logp_by_id, strict=True)]
                logp = restored_logprobs(torch.tensor(sampled))
                out.append(TeacherLogps(logp, *self._tops(row, logp_by_id)) if self.top else TeacherLogps(logp))
            return out

        body = scoring_request(self.server.model, [row.ids for row in rows], self.top)
        return self.client.post("/v1/completions", body, read_json(read))

    def _tops(self, row: _Row, logp_by_id: Sequence[Mapping[int, float]]) -> tuple[Tensor, Tensor]:
        """Return ids and log-probs [n, top + 1] of the most probable tokens that both models have.

        A row with fewer of them repeats the sampled token.
        """
        ids, logp = [], []
        for t, table in zip(row.positions, logp_by_id, strict=True):
            common = {i: x for i, x in table.items() if i < self.size}
            if len(table) < min(self.top, self.size):
                raise ValueError(f"{len(table)} log-probs where {self.top} were asked for")
            missing, sampled = self.top + 1 - len(common), row.ids[t]
            ids.append([*common, *[sampled] * missing])
            logp.append([*common.values(), *[table[sampled]] * missing])
        shape = (-1, self.top + 1)
        return torch.tensor(ids, dtype=torch.long).view(shape), restored_logprobs(torch.tensor(logp)).view(shape)


def open_teacher(
    server: Server, *, to: torch.device, stop: tuple[int, ...], size: int = 1 << 62, tops: Mapping[str, int] = NONE
) -> HiddenTeacher | LogpTeacher:
    """Return the teacher behind a server.

    `stop` are the ids merged into one class.  `size` is the number of ids that both models have.  `tops` says how many
    of the most probable tokens of which model a method must know (`Method.supports`).
    """
    if server.identity:
        return HiddenTeacher(server, to=to)
    return LogpTeacher(server, to=to, stop=stop, size=size, tops=tops)


def _key(rollouts: Sequence[Rollout], masks: Sequence[Sequence[bool]]) -> object:
    """Return a key that identifies the requested tokens."""
    return tuple((r.teacher_prompt_ids, r.ids, *mask) for r, mask in zip(rollouts, masks, strict=True))


def _rows(rollouts: Sequence[Rollout], masks: Sequence[Sequence[bool]]) -> list[_Row]:
    rows = []
    for r, mask in zip(rollouts, masks, strict=True):
        start = len(r.teacher_prompt_ids)
        positions = tuple(start + t for t, is_trained in enumerate(mask) if is_trained)
        rows.append(_Row((*r.teacher_prompt_ids, *r.ids), start, positions))
    return rows


def _chunks(rows: Sequence[_Row], max_tokens: int) -> Iterator[list[int]]:
    """Group the rows with a trained token, longest first, at most `max_tokens` padded tokens (or one row) a group."""
    group: list[int] = []
    for i in sorted((i for i, row in enumerate(rows) if row.positions), key=lambda i: -len(rows[i].ids)):
        if group and (len(group) + 1) * len(rows[group[0]].ids) > max_tokens:
            yield group
            group = []
        group.append(i)
    if group:
        yield group
