"""Conversion of rollouts to a `Batch` of [B, T] columns, and of its mask to ragged rows."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from opd.core.rng import uniform
from opd.core.sampling import StopToken, Truncated
from opd.core.types import UNPROMPTED_COLUMNS, Batch, Rollout, pad
from opd.head.outputs import HeadColumns


def collate(rollouts: Sequence[Rollout], *, stop_token: StopToken, truncated: Truncated, seed: int, step: int) -> Batch:
    """Return a batch with the columns that are known before scoring; all tokens that never train are masked here."""
    rows = []
    for r in rollouts:
        mask = torch.tensor(r.mask or [True] * len(r.ids), dtype=torch.bool)
        if not r.stopped and not r.notes.get("cut") and truncated == "drop":
            mask = torch.zeros_like(mask)
        if r.stopped and stop_token == "mask":
            mask = torch.cat((mask[:-1], torch.tensor([False])))
        rows.append(mask)
    notes = {name: [torch.tensor(r.notes[name]) for r in rollouts] for name in (rollouts[0].notes if rollouts else ())}
    columns: dict[str, Any] = {name: torch.stack(notes.pop(name)) for name in UNPROMPTED_COLUMNS & notes.keys()}
    if rollouts and all(r.others is not None for r in rollouts):
        columns["others"], columns["others_logp"] = _padded(rollouts, "others")
    if rollouts and all(r.teacher_scores is not None for r in rollouts):
        ids, logp = _padded(rollouts, "teacher_scores")
        columns |= {"teacher_logp": logp[..., 0], "teacher_top": ids[..., 1:], "teacher_top_logp": logp[..., 1:]}
    return Batch(
        ids=pad([torch.tensor(r.ids) for r in rollouts], 0),
        mask=pad(rows, False),
        group=torch.tensor([r.group for r in rollouts]),
        source=torch.tensor([r.source for r in rollouts]),
        stopped=torch.tensor([r.stopped for r in rollouts]),
        outcome=torch.tensor([r.outcome for r in rollouts]),
        sampler_logp=pad([torch.tensor(r.sampler_logp) for r in rollouts], 0.0),
        prefix=torch.tensor([r.prefix for r in rollouts]),
        **columns,
        notes={name: pad(x, 0.0) if x[0].ndim else torch.stack(x) for name, x in notes.items()},
        # The fifth key, 1, separates this noise from the sampling noise, which has only the first four.
        coin=pad([torch.from_numpy(uniform(seed, step, r.index, np.arange(len(r.ids)), 1)) for r in rollouts], 0.0),
    )


def _padded(rollouts: Sequence[Rollout], name: str) -> tuple[Int[Tensor, "B T k"], Float[Tensor, "B T k"]]:
    """Return the ids and the log-probs of a field of type `Others`."""
    rows = [(getattr(r, name), len(r.ids)) for r in rollouts]
    ids = pad([torch.tensor(x.ids, dtype=torch.long).view(n, -1) for x, n in rows], 0)
    return ids, pad([torch.tensor(x.logp).view(n, -1) for x, n in rows], 0.0)


def masks(batch: Batch, rollouts: Sequence[Rollout]) -> list[list[bool]]:
    """Return for each rollout which of its tokens are trained, without padding."""
    return [row[: len(r.ids)].tolist() for row, r in zip(batch.mask, rollouts, strict=True)]


def assemble(batch: Batch, parts: Sequence[tuple[Sequence[int], HeadColumns]]) -> Batch:
    """Scatter flat columns, measured for some rows at a time, into [B, T] columns; other rows keep their values."""
    previous = vars(batch) | {f"scores.{i}": x for i, x in enumerate(batch.scores)}
    columns: dict[str, Any] = {}
    for row_numbers, flat_columns in parts:
        rows = torch.tensor(row_numbers, dtype=torch.long)
        for name, flat in flat_columns.named():
            old = previous.get(name)
            empty = torch.zeros(batch.mask.shape, dtype=flat.dtype)
            column = columns.setdefault(name, empty if old is None else old.to(flat.dtype, copy=True))
            column[rows] = torch.zeros_like(column[rows]).masked_scatter(batch.mask[rows], flat)
    scores = tuple(columns.pop(f"scores.{i}", None) for i in range(len(parts[0][1].scores)))
    return replace(batch, **columns, scores=scores)
