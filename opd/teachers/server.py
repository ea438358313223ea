"""A teacher behind HTTP: `opd serve`, whole distributions by hidden states; or vLLM's protocol, log-probs of tokens.

`reach(url, how) -> Server` asks who is there; `open_teacher` makes of it what `LocalTeacher` is, for the same rollouts
and masks.  A batch goes out as chunks, several at once; a chunk that fails is asked again alone.
"""

import base64
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, TypeVar

import httpx
import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer

from opd.engines.hf import Sample
from opd.noise import uniform
from opd.representation import Lens
from opd.teachers import wire
from opd.teachers.client import Client, Malformed, Remote, Traffic, read_json
from opd.teachers.local import LocalTeacher
from opd.types import MEASURED, Refusal, Rollout, Sampling
from opd.vocabulary import Given, Head, Hidden, Vocabulary, scores

CHUNK = 4096  # tokens of a request: the loss of one is cheap, and it fills a forward
LOWEST = -9998.0  # vLLM writes -9999 for -inf
TIES = 2  # tokens beside the student's k most probable: a tie may round otherwise in its next pass
SPREAD = 64  # ids whose text a plain server is asked for
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STUDENTS = frozenset({"student_logp", "student_entropy"})  # columns that need no teacher
T = TypeVar("T")
K = TypeVar("K", Hidden, Given)
R = TypeVar("R")
NONE: Mapping[str, int] = MappingProxyType({})


@dataclass(frozen=True)
class Server:
    """Who answers at an address."""

    client: Client
    model: str
    context: int  # tokens
    told: Mapping[str, Any]  # the identity of an `opd serve`; empty for any other
    chosen: bool = False  # whether it scores tokens that the client names

    @property
    def provides(self) -> frozenset[str]:
        """The columns it allows to measure, and whether whole distributions."""
        if self.told:
            return HiddenTeacher.provides
        return LogpTeacher.provides | ({"chosen"} if self.chosen else set())

    def tokenizer(self, likely: Tokenizer) -> Tokenizer:
        """An `opd serve` hands out its own; any other has the likely one, if it reads ids as that does.

        Raises Refusal where it does not.
        """
        if not self.told:
            self._probe(likely)
            return likely
        read = lambda files: wire.unpack_tokenizer(files, self.client.url)
        found = self.client.get("/opd/tokenizer", read_json(read))
        if wire.vocabulary_hash(found) != self.told["vocabulary"]:
            raise Refusal(
                f"--teacher {self.client.url}: the tokenizer it hands out is not the one it hashes: restart it"
            )
        return found

    def _probe(self, likely: Tokenizer) -> None:
        ids = _spread(likely)
        told = self.client.post("/v1/completions", _scoring(self.model, [ids]), read_json(lambda r: _first(r)))
        if told is None:
            raise Refusal(
                f"--teacher {self.client.url}: it gives no log-probs of prompts (prompt_logprobs), and a teacher's "
                "tokens are scored by them: take a vLLM server, `opd serve`, or a method for text-only teachers"
            )
        wrong = []
        for i, entry in zip(ids[1:], told[1:], strict=True):
            text, here = entry[str(i)].get("decoded_token"), str(likely.decode([i]))
            if text is not None and text.strip() != here.strip():
                wrong.append(f"id {i} is {text!r} there and {here!r} here")
        if len(wrong) > len(ids) // 8:  # a few differ where servers decode in context
            raise Refusal(
                f"--teacher {self.client.url}: {len(wrong)} of {len(ids) - 1} probed ids mean another token: "
                f"{'; '.join(wrong[:3])}: serve a model with the student's vocabulary"
            )


def reach(url: str, how: Remote) -> Server:
    """Ask an address who it is; waits for one that is starting."""
    how.check()
    client = Client(url, how)
    if client.knows("/opd/identity"):
        told = client.get("/opd/identity", read_json(dict))
        if told.get("protocol") != wire.VERSION:
            raise Refusal(
                f"--teacher {client.url}: it speaks version {told.get('protocol')} of the protocol, this opd version "
                f"{wire.VERSION}: install one version of opd on both machines"
            )
        return Server(client, told["model"], told["context"], told)
    cards = client.get("/v1/models", read_json(lambda r: {c["id"]: c.get("max_model_len") for c in r["data"]}))
    model = client.model or next(iter(cards), "")
    if model not in cards or (len(cards) > 1 and not client.model):
        raise Refusal(
            f"--teacher {client.url}: it serves {', '.join(cards) or 'no model'}; name one as {client.url}#NAME"
        )
    # One token is always generated beside the prompt that is scored.
    return Server(client, model, (cards[model] or 1 << 30) - 1, {}, _chooses(client, model))


def _chooses(client: Client, model: str) -> bool:
    """Whether a server scores chosen tokens: asked once, for a sequence of two."""
    try:
        client.post("/inference/v1/generate", _choosing(model, [1, 1], 1, [[1]]), read_json(_matrix((1, 1))), tries=1)
    except Refusal:  # no such route, or a vLLM whose runner cannot
        return False
    return True


@dataclass(frozen=True)
class _Row:
    """One rollout as the teacher reads it."""

    ids: tuple[int, ...]
    start: int  # where the response begins
    at: tuple[int, ...]  # the trained tokens


class _Remote(Generic[K]):
    """What both kinds of server teacher share: rows out in chunks, answers back in order, an account of the bytes."""

    def __init__(self, server: Server, *, to: torch.device) -> None:
        self.server, self.client, self.to = server, server.client, to
        self.pool = ThreadPoolExecutor(server.client.how.teacher_concurrency, "teacher")
        self.early = ThreadPoolExecutor(1, "teacher-ahead")
        self.pending: tuple[object, Future] | None = None
        self.before = Traffic()

    def ahead(self, rollouts: Sequence[Rollout], masks: Sequence[Sequence[bool]]) -> None:
        """Ask now what `hidden` will want next: the server works while the student does."""
        self.pending = (_key(rollouts, masks), self.early.submit(self._ask, rollouts, masks))

    def hidden(self, rollouts: Sequence[Rollout], masks: Sequence[Sequence[bool]], lens: Lens | None = None) -> K:
        """What the server says of the trained tokens, after the teacher's own prompt; no layer below the last."""
        assert lens is None, "a server shows no layers"
        pending, self.pending = self.pending, None
        if pending is not None and pending[0] == _key(rollouts, masks):
            return pending[1].result()
        return self._ask(rollouts, masks)

    def _ask(self, rollouts: Sequence[Rollout], masks: Sequence[Sequence[bool]]) -> K:
        raise NotImplementedError

    def follow(self) -> None:
        """The student made a step."""

    def save(self, folder: Path) -> None:
        """Nothing: what the server has stays there."""

    def restore(self, folder: Path) -> None:
        """Nothing."""

    def traffic(self) -> dict[str, float]:
        """What went over the wire since the last call, for perf.jsonl."""
        with self.client.lock:
            now = Traffic(**asdict(self.client.traffic))
        new = {name: value - getattr(self.before, name) for name, value in asdict(now).items()}
        self.before = now
        return {
            "teacher_sent_mb": new["sent"] / 2**20,
            "teacher_received_mb": new["received"] / 2**20,
            "teacher_requests": float(new["requests"]),
            "teacher_retries": float(new["retries"]),
        }

    def _each(self, rows: Sequence[_Row], most: int, ask: Callable[[list[_Row]], list[R]]) -> list[R]:
        """The answer for each row; chunks of at most `most` tokens are asked side by side."""
        out: dict[int, R] = {}
        groups = list(_chunks(rows, most))
        jobs = [self.pool.submit(ask, [rows[i] for i in group]) for group in groups]
        try:
            for group, job in zip(groups, jobs, strict=True):
                out |= zip(group, job.result(), strict=True)
        finally:
            for job in jobs:
                job.cancel()
        return [out[i] for i in range(len(rows)) if i in out]


class HiddenTeacher(_Remote[Hidden]):
    """An `opd serve`: final states come over the wire, 2 or 4 bytes times the width for each token.

    Exact, and every method works: the head is fetched once, and the head pass measures whole distributions.
    """

    provides = MEASURED | {"vocabulary"}

    def __init__(self, server: Server, *, to: torch.device) -> None:
        super().__init__(server, to=to)
        told = server.told
        self.dtype, self.width = DTYPES[told["dtype"]], told["width"]
        found = self.client.get("/opd/head", self._tensors("weight", (told["rows"], self.width)))
        on = {name: x.to(to) for name, x in found.items()}
        self.head = Head(on["weight"], on.get("bias"), told["scale"], told["softcap"])

    def _ask(self, rollouts: Sequence[Rollout], masks: Sequence[Sequence[bool]]) -> Hidden:
        found = self._each(_rows(rollouts, masks), CHUNK, self._states)
        empty = torch.empty(0, self.width, dtype=self.dtype)
        return Hidden(torch.cat([empty, *found]).to(self.to), self.head)

    def _states(self, rows: list[_Row]) -> list[Tensor]:
        sizes = [len(row.at) for row in rows]
        body = {"rows": [{"ids": row.ids, "at": row.at} for row in rows]}
        found = self.client.post("/opd/hidden", body, self._tensors("states", (sum(sizes), self.width)))
        return list(found["states"].split(sizes))

    def _tensors(self, name: str, shape: tuple[int, int]) -> Callable[[httpx.Response], dict[str, Tensor]]:
        def read(response: httpx.Response) -> dict[str, Tensor]:
            who = response.headers.get(wire.FINGERPRINT)
            if who is None:
                raise Malformed("it does not say whose weights")
            if who != self.server.told["fingerprint"]:
                raise Refusal(
                    f"--teacher {self.client.url}: other weights answer there now than when the run started: serve "
                    f"{self.server.model} again, or start a new run"
                )
            try:
                found = wire.unpack(response.content)
            except SafetensorError as error:
                raise Malformed(f"no safetensors: {error}") from error
            if name not in found or found[name].shape != shape or found[name].dtype != self.dtype:
                raise Malformed(f"{name} is not {shape} of {self.dtype}")
            return found

        return read


class LogpTeacher(_Remote[Given]):
    """Any server of vLLM's protocol: it says log q of the sampled tokens, and of some others where a method needs them.

    Exact ids through /inference/v1/generate where the server has it (vLLM >= 0.32, V2 runner), 4 bytes a token; else
    prompt_logprobs of /v1/completions, about 80.  Its softmax is over all its rows, padded ones included.
    The others: the server's own `tops["teacher"]` most probable tokens, or those that the caller names.
    """

    provides: frozenset[str] = STUDENTS | {"teacher_logp", "teacher_top"}

    def __init__(
        self, server: Server, *, to: torch.device, stop: tuple[int, ...], size: int, tops: Mapping[str, int]
    ) -> None:
        super().__init__(server, to=to)
        self.provides = server.provides
        self.stop = stop if len(stop) > 1 else ()  # merged into one class
        self.size, self.top = size, tops.get("teacher", 0)
        self.likeliest, self.drawn = tops["student"] + TIES if "student" in tops else 0, tops.get("drawn", 0)
        if sum(map(bool, (self.top, self.likeliest, self.drawn))) > 1:
            raise Refusal(
                f"--teacher {self.client.url}: the method looks at two of the student's most probable tokens, the "
                "teacher's and those drawn, and a server that tells of single tokens is asked for one kind: serve it "
                "by `opd serve`"
            )
        if self.stop and (self.top or not server.chosen):
            raise Refusal(
                f"--teacher {self.client.url}: it cannot say the probability of a chosen token, which merging the stop "
                f"tokens {', '.join(map(str, stop))} needs: use --stop-token mask, or train"
            )
        # What it gives at most (vLLM's --max-logprobs) is known before the first step.
        if self.top:
            self._prompted([_Row((1, 1), 1, (1,))])
        elif named := self.likeliest or self.drawn:
            self._chosen([(_Row((1, 1), 1, (1,)), torch.ones(1, named, dtype=torch.long))])

    def hidden(
        self,
        rollouts: Sequence[Rollout],
        masks: Sequence[Sequence[bool]],
        lens: Lens | None = None,
        ids: Int[Tensor, "N k"] | None = None,
    ) -> Given:
        """What the server says of the trained tokens, and of `ids` at each of them."""
        return super().hidden(rollouts, masks, lens) if ids is None else self._ask(rollouts, masks, ids)

    def _ask(
        self, rollouts: Sequence[Rollout], masks: Sequence[Sequence[bool]], ids: Int[Tensor, "N k"] | None = None
    ) -> Given:
        rows = _rows(rollouts, masks)
        if self.top or not self.server.chosen:
            found = self._each(rows, CHUNK, self._prompted)
        else:
            sizes = [len(row.at) for row in rows]
            named = torch.empty(sum(sizes), 0, dtype=torch.long) if ids is None else ids.cpu().long()
            of = dict(zip(rows, named.split(sizes), strict=True))
            found = self._each(rows, 1, lambda some: self._chosen([(row, of[row]) for row in some]))
        logp = torch.cat([torch.empty(0), *(x.logp for x in found)]).to(self.to)
        others = [(x.ids, x.others) for x in found if x.ids is not None and x.others is not None]
        if not others:
            return Given(logp)
        ids, beside = (torch.cat(list(x)).to(self.to) for x in zip(*others, strict=True))
        return Given(logp, ids, beside, min(self.top, self.size))

    def _chosen(self, rows: list[tuple[_Row, Int[Tensor, "n k"]]]) -> list[Given]:
        """By vLLM's fixed-token scoring; one sequence a request.  A class is asked for member by member."""
        ((row, named),) = rows
        beside = {t: ids.tolist() for t, ids in zip(row.at, named, strict=True)}
        own = lambda t: [row.ids[t], *self.stop, *beside.get(t, ())]
        asked = [own(t) for t in range(row.start, len(row.ids))]
        k, s = named.shape[1], len(self.stop)
        asked = [x + [-1] * (1 + s + k - len(x)) for x in asked]
        body = _choosing(self.server.model, row.ids, row.start, asked)
        shape = (len(asked), 1 + s + k)
        found = self.client.post("/inference/v1/generate", body, read_json(_matrix(shape)))
        found = found[torch.tensor(row.at, dtype=torch.long) - row.start]
        ids = torch.cat((torch.tensor([row.ids[t] for t in row.at], dtype=torch.long)[:, None], named), -1)
        logp = torch.cat((found[:, :1], found[:, 1 + s :]), -1)
        if self.stop:
            ended = torch.isin(ids, torch.tensor(self.stop))
            logp = torch.where(ended, found[:, 1 : 1 + s].logsumexp(-1, keepdim=True), logp)
        return [Given(logp[:, 0], named, logp[:, 1:]) if k else Given(logp[:, 0])]

    def _prompted(self, rows: list[_Row]) -> list[Given]:
        """By the log-probs of a prompt's own tokens, and of the most probable ones; many sequences a request."""

        def read(told: dict) -> list[Given]:
            choices = sorted(told["choices"], key=lambda c: c["index"])
            out = []
            for row, choice in zip(rows, choices, strict=True):
                said = choice["prompt_logprobs"]
                if len(said) != len(row.ids):
                    raise ValueError(f"{len(said)} log-probs for {len(row.ids)} tokens")
                found = [{int(i): float(x["logprob"]) for i, x in said[t].items()} for t in row.at]
                own = _finite([at[row.ids[t]] for t, at in zip(row.at, found, strict=True)])
                out.append(Given(own, *self._tops(row, found)) if self.top else Given(own))
            return out

        body = _scoring(self.server.model, [row.ids for row in rows], self.top)
        return self.client.post("/v1/completions", body, read_json(read))

    def _tops(self, row: _Row, found: Sequence[Mapping[int, float]]) -> tuple[Tensor, Tensor]:
        """Ids and log-probs of the common vocabulary, in rows of one width: short ones repeat their own token."""
        ids, logp = [], []
        for t, at in zip(row.at, found, strict=True):
            some = {i: x for i, x in at.items() if i < self.size}
            if len(at) < min(self.top, self.size):
                raise ValueError(f"{len(at)} log-probs where {self.top} were asked for")
            lacking, own = self.top + 1 - len(some), row.ids[t]
            ids.append([*some, *[own] * lacking])
            logp.append([*some.values(), *[at[own]] * lacking])
        shape = (-1, self.top + 1)
        return torch.tensor(ids, dtype=torch.long).view(shape), _finite(logp).view(shape)


@dataclass(frozen=True)
class ServerEngine:
    """A server that writes responses, for methods whose rollouts are partly the teacher's."""

    server: Server
    vocabulary: int
    stop: tuple[int, ...]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        seed: int,
        step: int,
        index: Sequence[int],
        prefixes: Sequence[Sequence[int]] = (),
    ) -> list[Sample]:
        """One response per prompt, after its prefix; rollout `index[i]` has a seed, the server's noise is its own."""

        def draw(prompt: Sequence[int], prefix: Sequence[int], i: int) -> Sample:
            body = {
                "model": self.server.model,
                "prompt": [*prompt, *prefix],
                "max_tokens": sampling.max_new_tokens - len(prefix),
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k,
                "seed": int(uniform(seed, step, i, -2) * 2**53),
                "stop_token_ids": list(self.stop),
                "logprobs": 0,
                "return_token_ids": True,
            }
            return self.server.client.post("/v1/completions", body, read_json(self._read))

        with ThreadPoolExecutor(self.server.client.how.teacher_concurrency, "teacher") as pool:
            return list(pool.map(draw, prompts, prefixes or [()] * len(prompts), index))

    def _read(self, told: dict) -> Sample:
        (choice,) = told["choices"]
        ids, logp = tuple(choice["token_ids"]), tuple(map(float, choice["logprobs"]["token_logprobs"]))
        if not ids or len(ids) != len(logp) or max(ids) >= self.vocabulary:
            raise ValueError(f"{len(ids)} tokens with {len(logp)} log-probs, or an id beyond {self.vocabulary}")
        return Sample(ids, logp, ids[-1] in self.stop)


def open_teacher(
    server: Server, *, to: torch.device, stop: tuple[int, ...], size: int = 1 << 62, tops: Mapping[str, int] = NONE
) -> HiddenTeacher | LogpTeacher:
    """The teacher behind a server; `stop` are the ids merged into one class, of `size` that both models have.

    `tops`: of how many of whose most probable tokens a method must know (`Method.supports`).
    """
    return HiddenTeacher(server, to=to) if server.told else LogpTeacher(server, to=to, stop=stop, size=size, tops=tops)


@torch.no_grad()
def compare(remote: HiddenTeacher | LogpTeacher, local: LocalTeacher, texts: Sequence[Sequence[int]]) -> Tensor:
    """|log q there - log q here| of every token of some texts, nats."""
    rollouts = [
        Rollout(
            prompt_ids=(),
            teacher_prompt_ids=tuple(ids[:1]),
            ids=tuple(ids[1:]),
            sampler_logp=(),
            index=i,
            group=i,
            stopped=False,
        )
        for i, ids in enumerate(texts)
    ]
    masks = [[True] * len(r.ids) for r in rollouts]
    ids = torch.tensor([i for r in rollouts for i in r.ids])[:, None]

    def of(heard: Hidden | Given) -> Tensor:
        if isinstance(heard, Given):
            return heard.logp.cpu()
        there = ids.to(heard.states.device)
        return scores(heard, there, Vocabulary(len(heard.head.weight)), 0).logp[:, 0].float().cpu()

    return (of(remote.hidden(rollouts, masks)) - of(local.hidden(rollouts, masks))).abs()


def _key(rollouts: Sequence[Rollout], masks: Sequence[Sequence[bool]]) -> object:
    """Which tokens are asked about."""
    return tuple((r.teacher_prompt_ids, r.ids, *mask) for r, mask in zip(rollouts, masks, strict=True))


def _rows(rollouts: Sequence[Rollout], masks: Sequence[Sequence[bool]]) -> list[_Row]:
    out = []
    for r, mask in zip(rollouts, masks, strict=True):
        start = len(r.teacher_prompt_ids)
        out.append(_Row((*r.teacher_prompt_ids, *r.ids), start, tuple(start + t for t, m in enumerate(mask) if m)))
    return out


def _chunks(rows: Sequence[_Row], most: int) -> Iterator[list[int]]:
    """Rows that have a trained token, longest first, within `most` padded tokens; a longer one goes alone."""
    group: list[int] = []
    for i in sorted((i for i, row in enumerate(rows) if row.at), key=lambda i: -len(rows[i].ids)):
        if group and (len(group) + 1) * len(rows[group[0]].ids) > most:
            yield group
            group = []
        group.append(i)
    if group:
        yield group


def _scoring(model: str, rows: Sequence[Sequence[int]], top: int = 0) -> dict[str, object]:
    """A request for the log-probs of prompts; vLLM generates at least one token."""
    how = {"max_tokens": 1, "temperature": 1.0, "prompt_logprobs": top}
    return {"model": model, "prompt": list(map(list, rows)), **how}


def _choosing(model: str, ids: Sequence[int], start: int, asked: list[list[int]]) -> dict[str, object]:
    """A request for the log-probs of named ids at each token of a sequence from `start` on."""
    how = {"max_tokens": 1, "prompt_logprob_token_ids": asked, "prompt_logprob_start": start - 1}
    return {"model": model, "token_ids": list(ids), "sampling_params": how}


def _matrix(shape: tuple[int, int]) -> Callable[[dict], Float[Tensor, "n k"]]:
    """A reader of its answer: float32 of a known shape, as .npy in base64."""

    def read(told: dict) -> Tensor:
        found = np.load(io.BytesIO(base64.b64decode(told["prompt_token_id_logprobs"], validate=True)))
        if found.shape != shape or found.dtype != np.float32:
            raise ValueError(f"{found.dtype} of {found.shape} instead of float32 of {shape}")
        return torch.from_numpy(found)

    return read


def _finite(logp: Sequence[float] | Sequence[Sequence[float]]) -> Tensor:
    """As a tensor, with -inf again where json had none."""
    found = torch.tensor(logp)
    return found.where(found > LOWEST, -torch.inf)


def _first(told: dict) -> list[dict[str, dict]] | None:
    return told["choices"][0].get("prompt_logprobs")


def _spread(tokenizer: Tokenizer) -> list[int]:
    """Ids all over the vocabulary that decode to whole characters."""
    every = sorted(tokenizer.get_vocab().values())
    whole = [i for i in every[:: max(1, len(every) // (4 * SPREAD))] if "\ufffd" not in str(tokenizer.decode([i]))]
    return whole[:: max(1, len(whole) // SPREAD)]
