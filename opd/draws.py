"""Rollout batches between being written and being trained on: `Source.take(step, memory) -> this process's share`.

A draw is one rollout batch, by the number of the step that trains on it first; its noise is keyed by it, so whoever
writes it again with the same weights writes the same.  What a checkpoint finds written is part of it.
"""

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from safetensors.torch import load_file
from torch import Tensor

from opd.collect import Rendered
from opd.rollouts import Memory, Rollouts, Snapshot, draw_of, opened
from opd.tensors import save_tensors
from opd.types import Others, Rollout

SCALARS = {
    "index": torch.int64,
    "group": torch.int64,
    "stopped": torch.bool,
    "source": torch.int64,
    "version": torch.int64,
    "outcome": torch.float64,
    "prefix": torch.int64,
}


@runtime_checkable
class Source(Protocol):
    """Where a step has its rollouts from."""

    kept: dict[int, list[Rollout]]  # `bare`

    def advance(self, step: int, memory: Memory) -> None:
        """`step` steps are made: draws that the new weights allow may be written."""

    def take(self, step: int, memory: Memory) -> list[Rollout]:
        """What `step` trains on."""

    def settle(self) -> None:
        """Before a checkpoint: wait for what could not be written again after it."""

    def rest(self) -> None:
        """Wait until nothing is under way."""

    def numbers(self) -> dict[str, float]:
        """What perf.jsonl says of it, since the last time."""

    def close(self) -> None:
        """Nothing more will be asked."""


@dataclass
class Here:
    """The student's own process writes, in turns with its training: the weights of a draw are those before it."""

    who: Rollouts
    write: Callable[[int, Memory], list[Rollout]]  # this process's share of a draw
    total: int  # steps
    kept: dict[int, list[Rollout]] = field(default_factory=dict)

    def advance(self, step: int, memory: Memory) -> None:
        """Nothing is written before it is asked for."""

    def take(self, step: int, memory: Memory) -> list[Rollout]:
        """Write what the weights before `step` are to write; return what it trains on."""
        asked = draw_of(self.who, step, memory)
        outdate(self.who, self.kept, step, memory)
        for draw in sorted({*opened(self.who, step, memory), asked} - self.kept.keys()):
            if draw <= self.total:  # later steps are never made
                self.kept[draw] = bare(self.write(draw, memory), step - 1)
        found = self.kept[asked]
        forget(self.who, self.kept, step, memory)
        return found

    def settle(self) -> None:
        """Nothing is under way."""

    def rest(self) -> None:
        """Nothing ever is."""

    def numbers(self) -> dict[str, float]:
        """Nothing beside the phase of the step."""
        return {}

    def close(self) -> None:
        """Nothing is open."""


def outdate(who: Rollouts, kept: dict[int, list[Rollout]], step: int, memory: Memory) -> None:
    """Drop what an older snapshot wrote than the one due before `step`."""
    if isinstance(who, Snapshot):
        for draw in [d for d in kept if d < who.outdated(step, memory)]:
            del kept[draw]


def forget(who: Rollouts, kept: dict[int, list[Rollout]], step: int, memory: Memory) -> None:
    """Drop the draws that no step after `step` trains on."""
    first = who.start(step, memory) if isinstance(who, Snapshot) else step + 1
    for draw in [d for d in kept if d < first]:
        del kept[draw]


def share(count: int, process: int, processes: int) -> slice:
    """Of `count` prompts those that a process answers."""
    each = -(-count // processes)
    return slice(process * each, min((process + 1) * each, count))


def behind(rollouts: Sequence[Rollout], step: int) -> list[Rollout]:
    """The rollouts, noting how many steps the weights that wrote them are behind those of `step`."""
    return [replace(r, notes={**r.notes, "staleness": float(step - 1 - r.version)}) for r in rollouts]


def bare(rollouts: Sequence[Rollout], version: int) -> list[Rollout]:
    """Without the prompts, which whoever asked knows; with the number of steps that who wrote them had made."""
    known = ({name: getattr(r, name) for name in BARE} for r in rollouts)
    return [Rollout(**x | {"version": version}, prompt_ids=(), teacher_prompt_ids=()) for x in known]


BARE = ("ids", "sampler_logp", "others", "notes", *SCALARS)


def dressed(rollouts: Sequence[Rollout], prompts: Sequence[Rendered], per_prompt: int) -> list[Rollout]:
    """With their prompts again; `prompts` are those of all processes."""
    out = []
    for r in rollouts:
        p = prompts[r.index // per_prompt]
        known = replace(r, prompt_ids=p.ids, teacher_prompt_ids=p.teacher_ids)
        out.append(replace(known, teacher=p.teacher, prompt=p.prompt))
    return out


def save(draws: Mapping[int, Sequence[Rollout]], folder: Path) -> None:
    """Add draws to a checkpoint, without their prompts; nothing where there are none."""
    if not draws:
        return
    tensors: dict[str, Tensor] = {}
    for draw, rolls in draws.items():
        for name, dtype in SCALARS.items():
            tensors[f"{draw}.{name}"] = torch.tensor([getattr(r, name) for r in rolls], dtype=dtype)
        tensors[f"{draw}.length"] = torch.tensor([len(r.ids) for r in rolls])
        tensors[f"{draw}.ids"] = torch.tensor([x for r in rolls for x in r.ids], dtype=torch.int64)
        flat = [x for r in rolls for x in r.sampler_logp]
        tensors[f"{draw}.sampler_logp"] = torch.tensor(flat, dtype=torch.float64)
        if rolls and rolls[0].others is not None:
            more = [r.others or Others.none() for r in rolls]
            tensors[f"{draw}.others"] = torch.tensor([x for o in more for x in o.ids], dtype=torch.int32)
            tensors[f"{draw}.others_logp"] = torch.tensor([x for o in more for x in o.logp])
        for name, first in (rolls[0].notes if rolls else {}).items():
            kind = "note" if isinstance(first, float) else "notes"
            values = [r.notes[name] for r in rolls]
            whole = values if kind == "note" else [x for v in values for x in v]  # type: ignore[union-attr]
            tensors[f"{draw}.{kind}.{name}"] = torch.tensor(whole, dtype=torch.float64)
    save_tensors(tensors, folder / "draws.safetensors")


def load(folder: Path) -> dict[int, list[Rollout]]:
    """What `save` wrote."""
    path = folder / "draws.safetensors"
    tensors = load_file(path) if path.is_file() else {}
    out: dict[int, list[Rollout]] = {}
    for draw in sorted({int(k.partition(".")[0]) for k in tensors}):
        own = {k.removeprefix(f"{draw}."): x for k, x in tensors.items() if k.startswith(f"{draw}.")}
        lengths = own["length"].tolist()
        ragged = {k: [tuple(part.tolist()) for part in own[k].split(lengths)] for k in ("ids", "sampler_logp")}
        scalars = {name: own[name].tolist() for name in SCALARS}
        notes = {k.removeprefix("note."): x.tolist() for k, x in own.items() if k.startswith("note.")}
        for k, x in own.items():
            if k.startswith("notes."):
                notes[k.removeprefix("notes.")] = [tuple(part.tolist()) for part in x.split(lengths)]
        others: list[Others | None] = [None] * len(lengths)
        if "others" in own:
            each = [len(own["others"]) // max(1, sum(lengths)) * n for n in lengths]
            parts = zip(own["others"].split(each), own["others_logp"].split(each), strict=True)
            others = [Others(array("i", ids.tolist()), array("f", logp.tolist())) for ids, logp in parts]
        out[draw] = [
            Rollout(
                prompt_ids=(),
                teacher_prompt_ids=(),
                others=others[i],
                notes={name: values[i] for name, values in notes.items()},
                **{name: values[i] for name, values in (scalars | ragged).items()},
            )
            for i in range(len(lengths))
        ]
    return out
