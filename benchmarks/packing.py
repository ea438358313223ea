"""Benchmark of length-sorted micro-batches against packing: forward and backward of the layers over a pool of rollouts.

A packed row holds several sequences, chosen by first fit decreasing as in NPD, with a block-diagonal attention mask.
Positions start at 0 in each sequence.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from benchmarks.result import Result, Timed, in_turn, ratio, spread, versions
from benchmarks.run import Trained, opened
from opd.core.errors import positive
from opd.core.types import pad
from opd.methods.rollout_policies.on_policy import OnPolicy
from opd.models.batching import micro_batches
from opd.models.load import base


@dataclass(frozen=True)
class Way:
    """A way to batch a pool of sequences: the groups of sequences, and the function that runs a group."""

    run: Callable[[Any, Sequence[Tensor]], Tensor]  # returns the states of all tokens, sequence by sequence
    groups: list[list[int]]
    computed: int  # tokens, including padding

    def states(self, model: Any, texts: Sequence[Tensor]) -> Float[Tensor, "N H"]:
        """Return the states [N, H] of all sequences, in the order of the pool."""
        order = [i for group in self.groups for i in group]
        found = torch.cat([self.run(model, [texts[i] for i in group]) for group in self.groups])
        parts = dict(zip(order, found.split([len(texts[i]) for i in order]), strict=True))
        return torch.cat([parts[i] for i in range(len(texts))])

    def train(self, model: Any, texts: Sequence[Tensor]) -> None:
        """Run forward and backward over all groups."""
        for group in self.groups:
            self.run(model, [texts[i] for i in group]).square().mean().backward()


@dataclass(frozen=True)
class Packing(Timed):
    """Settings of `python -m benchmarks packing`: the rollouts, and the length of packed rows."""

    student: str = "embedded:student"
    """Student model.  Hub id, folder, GGUF file or embedded model."""
    prompts: str = "embedded:ledger"
    """Prompts.  Same kinds of name as for `opd train`."""
    pool: int = 128
    """Number of rollouts, 1 per prompt."""
    max_new_tokens: int = 256
    """Length limit of a response, in tokens."""
    lengths: tuple[int, ...] = (512, 2048)
    """Tokens per packed row; each value is an arm.  At least the longest rollout with its prompt."""
    rows: int = 16
    """Rollouts per padded pass, in the order in which they were generated."""
    micro_batch_tokens: int = 8192
    """Padded tokens per pass of the length-sorted arm."""
    rounds: int = 5
    """Alternating rounds, after a warm-up round."""


def measured(asked: Packing) -> Result:
    """Measure the tokens per second of each way of batching, after a check that all ways give the same states."""
    positive(asked, "threads", "pool", "max_new_tokens", "rows", "micro_batch_tokens", "rounds")
    torch.set_num_threads(asked.threads)
    with tempfile.TemporaryDirectory() as folder:
        told = Trained(asked.student, "self", asked.prompts, asked.pool, asked.max_new_tokens)
        loop = opened(told.run(Path(folder) / "run", "opd"))
        session = loop.session
        prompts, sampling = session.prompts.batch(1, asked.pool), loop.config.sampling
        drawn = loop.writing.collect(prompts, OnPolicy(), sampling, 1, session.prompts.task)
        model = base(session.plain().model)
        device = model.device
    texts = [torch.tensor((*r.prompt_ids, *r.ids), device=device) for r in drawn]
    widths = {i: len(text) for i, text in enumerate(texts)}
    whole, room = sum(widths.values()), lambda groups: sum(max(widths[i] for i in g) * len(g) for g in groups)
    plain = [list(widths)[i : i + asked.rows] for i in range(0, len(texts), asked.rows)]
    alike = micro_batches(widths, asked.micro_batch_tokens)
    first = f"padded, {asked.rows} rows each in their order"
    ways = {
        first: Way(_padded, plain, room(plain)),
        "rows of like length": Way(_padded, alike, room(alike)),
        **{f"packed to {n}, block mask": Way(_blocks, packed(widths, n), whole) for n in asked.lengths},
    }
    with torch.no_grad():
        alone = ways[first].states(model, texts)
        for way in ways.values():
            torch.testing.assert_close(way.states(model, texts), alone, rtol=1e-3, atol=1e-3)
    arms: dict[str, Callable[[], object]] = {name: partial(way.train, model, texts) for name, way in ways.items()}
    clear = lambda: model.zero_grad(set_to_none=True)
    seconds = in_turn(arms, rounds=asked.rounds, clock=asked.clock, gpu=device.type == "cuda", after=clear)
    rows = tuple(
        (
            name,
            str(way.computed),
            spread([whole / s for s in seconds[name]], 0),
            "" if name == first else ratio(seconds[first], seconds[name]),
        )
        for name, way in ways.items()
    )
    known = versions("opd", "torch", "transformers")
    notes = (
        f"{len(texts)} rollouts of {min(widths.values())} to {max(widths.values())} tokens with their prompts; forward "
        "and backward of the layers without the head",
        f"medians [min, max] of {asked.rounds} rounds, {asked.clock} clock, {device.type}; {asked}; {known}",
    )
    header = ("passes", f"tokens, of {whole}", "tokens a second", "beside padded")
    return Result("packing", header, rows, notes, {"seconds": seconds, "tokens": whole, "versions": known})


def packed(widths: dict[int, int], length: int) -> list[list[int]]:
    """Return the sequences of each packed row of at most `length` tokens, by first fit decreasing.

    A sequence longer than `length` gets a row for itself.
    """
    out: list[list[int]] = []
    room: list[int] = []
    for i in sorted(widths, key=lambda i: (-widths[i], i)):
        at = next((k for k, left in enumerate(room) if widths[i] <= left), len(out))
        if at == len(out):
            out.append([])
            room.append(length)
        out[at].append(i)
        room[at] -= widths[i]
    return out


def _padded(model: Any, texts: Sequence[Int[Tensor, " _"]]) -> Float[Tensor, "N H"]:
    """Run padded rows; the padding is on the right, where causal attention never reads it."""
    found = model.base_model(input_ids=pad(list(texts), 0), use_cache=False).last_hidden_state
    return torch.cat([row[: len(text)] for row, text in zip(found, texts, strict=True)])


def _blocks(model: Any, texts: Sequence[Int[Tensor, " _"]]) -> Float[Tensor, "N H"]:
    """Run all sequences as a single packed row; each token attends to its sequence up to itself."""
    owner = torch.cat([torch.full_like(text, i) for i, text in enumerate(texts)])
    mask: Bool[Tensor, "N N"] = (owner[:, None] == owner[None]).tril()
    at = torch.cat([torch.arange(len(text), device=text.device) for text in texts])
    out = model.base_model(
        input_ids=torch.cat(list(texts))[None], position_ids=at[None], attention_mask=mask[None, None], use_cache=False
    )
    return out.last_hidden_state[0]
