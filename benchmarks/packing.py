"""Benchmark of length-sorted micro-batches against packing: forward and backward of the layers over a pool of rollouts.

A packed row holds several sequences, chosen by first fit decreasing as in NPD.  Positions start at 0 in each sequence.
Its attention has a block-diagonal mask, or sees the sequences one by one (`opd train --packing`).
"""

import copy
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
from opd.models.batching import Rows, micro_batches
from opd.models.load import base
from opd.models.packing import PackedRow
from opd.models.verify import enable_packing


@dataclass(frozen=True)
class Batching:
    """A way to batch a pool of sequences: the groups of sequences, and the function that runs a group."""

    run: Callable[[Any, Sequence[Tensor]], Tensor]  # returns the states of all tokens, sequence by sequence
    groups: list[list[int]]
    computed: int  # tokens, including padding

    def states(self, model: Any, texts: Sequence[Tensor]) -> Float[Tensor, "N H"]:
        """Return the states [N, H] of all sequences, in the order of the pool."""
        order = [i for group in self.groups for i in group]
        states = torch.cat([self.run(model, [texts[i] for i in group]) for group in self.groups])
        parts = dict(zip(order, states.split([len(texts[i]) for i in order]), strict=True))
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


def measured(settings: Packing) -> Result:
    """Measure the tokens per second of each way of batching, after a check that all ways give the same states."""
    positive(settings, "threads", "pool", "max_new_tokens", "rows", "micro_batch_tokens", "rounds")
    torch.set_num_threads(settings.threads)
    with tempfile.TemporaryDirectory() as folder:
        run_settings = Trained(settings.student, "self", settings.prompts, settings.pool, settings.max_new_tokens)
        trainer = opened(run_settings.run(Path(folder) / "run", "opd"))
        session = trainer.session
        prompts, sampling = session.prompts.batch(1, settings.pool), trainer.config.sampling
        rollouts = trainer.rollout_source.collect(prompts, OnPolicy(), sampling, 1, session.prompts.task)
        model = base(session.plain().model)
        device = model.device
    packing_model = copy.deepcopy(model)
    enable_packing(packing_model, torch.float32, field="student")
    texts = [torch.tensor((*r.prompt_ids, *r.ids), device=device) for r in rollouts]
    widths = {i: len(text) for i, text in enumerate(texts)}
    num_tokens = sum(widths.values())
    padded_tokens = lambda groups: sum(max(widths[i] for i in g) * len(g) for g in groups)
    ordered_groups = [list(widths)[i : i + settings.rows] for i in range(0, len(texts), settings.rows)]
    sorted_groups = micro_batches(widths, settings.micro_batch_tokens)
    first = f"padded, {settings.rows} rows each in their order"
    batchings = {
        first: Batching(_padded, ordered_groups, padded_tokens(ordered_groups)),
        "rows of like length": Batching(_padded, sorted_groups, padded_tokens(sorted_groups)),
        **{f"packed to {n}, block mask": Batching(_blocks, packed(widths, n), num_tokens) for n in settings.lengths},
        f"packed to {settings.micro_batch_tokens}, --packing": Batching(
            lambda _, texts: _rows_apart(packing_model, texts), packed(widths, settings.micro_batch_tokens), num_tokens
        ),
    }
    with torch.no_grad():
        expected = batchings[first].states(model, texts)
        for batching in batchings.values():
            torch.testing.assert_close(batching.states(model, texts), expected, rtol=1e-3, atol=1e-3)
    arms: dict[str, Callable[[], object]] = {
        name: partial(batching.train, model, texts) for name, batching in batchings.items()
    }

    def clear() -> None:
        for trained in (model, packing_model):
            trained.zero_grad(set_to_none=True)

    seconds = in_turn(arms, rounds=settings.rounds, clock=settings.clock, gpu=device.type == "cuda", clean_up=clear)
    rows = tuple(
        (
            name,
            str(batching.computed),
            spread([num_tokens / s for s in seconds[name]], 0),
            "" if name == first else ratio(seconds[first], seconds[name]),
        )
        for name, batching in batchings.items()
    )
    packages = versions("opd", "torch", "transformers")
    notes = (
        f"{len(texts)} rollouts of {min(widths.values())} to {max(widths.values())} tokens with their prompts; forward "
        "and backward of the layers without the head",
        f"medians [min, max] of {settings.rounds} rounds, {settings.clock} clock, {device.type}; {settings}; "
        f"{packages}",
    )
    header = ("passes", f"tokens, of {num_tokens}", "tokens a second", "beside padded")
    return Result("packing", header, rows, notes, {"seconds": seconds, "tokens": num_tokens, "versions": packages})


def packed(widths: dict[int, int], length: int) -> list[list[int]]:
    """Return the sequences of each packed row of at most `length` tokens, by first fit decreasing.

    A sequence longer than `length` gets a row for itself.
    """
    out: list[list[int]] = []
    space_by_row: list[int] = []
    for i in sorted(widths, key=lambda i: (-widths[i], i)):
        row = next((k for k, space in enumerate(space_by_row) if widths[i] <= space), len(out))
        if row == len(out):
            out.append([])
            space_by_row.append(length)
        out[row].append(i)
        space_by_row[row] -= widths[i]
    return out


def _padded(model: Any, texts: Sequence[Int[Tensor, " _"]]) -> Float[Tensor, "N H"]:
    """Run padded rows; the padding is on the right, where causal attention never reads it."""
    states = model.base_model(input_ids=pad(list(texts), 0), use_cache=False).last_hidden_state
    return torch.cat([row[: len(text)] for row, text in zip(states, texts, strict=True)])


def _blocks(model: Any, texts: Sequence[Int[Tensor, " _"]]) -> Float[Tensor, "N H"]:
    """Run all sequences as a single packed row; each token attends to its sequence up to itself."""
    owner = torch.cat([torch.full_like(text, i) for i, text in enumerate(texts)])
    mask: Bool[Tensor, "N N"] = (owner[:, None] == owner[None]).tril()
    positions = torch.cat([torch.arange(len(text), device=text.device) for text in texts])
    out = model.base_model(
        input_ids=torch.cat(list(texts))[None],
        position_ids=positions[None],
        attention_mask=mask[None, None],
        use_cache=False,
    )
    return out.last_hidden_state[0]


def _rows_apart(model: Any, texts: Sequence[Int[Tensor, " _"]]) -> Float[Tensor, "N H"]:
    """Run all sequences as a single packed row, whose attention is computed sequence by sequence."""
    ids = pad(list(texts), 0)
    row = PackedRow.of(Rows(ids, torch.zeros(ids.shape, dtype=torch.bool), tuple(map(len, texts))))
    out = model.base_model(input_ids=row.ids, position_ids=row.positions, attention_mask=row.lengths, use_cache=False)
    return out.last_hidden_state[0]
