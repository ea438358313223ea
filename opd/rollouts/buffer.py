"""The rollout buffer: `RolloutBuffer.take(step, memory)` returns this process's share of the rollouts of a step.

A rollout batch is identified by the number of the first step that trains on it.  This number keys its noise, so
generating a batch again with the same weights gives the same rollouts.  Checkpoints include the buffered batches.
"""

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from opd.core.types import Others, Rollout
from opd.data.prompts import Rendered
from opd.methods.rollout_policies.base import Memory, RolloutPolicy

SCALARS = {
    "index": torch.int64,
    "group": torch.int64,
    "stopped": torch.bool,
    "source": torch.int64,
    "version": torch.int64,
    "outcome": torch.float64,
    "prefix": torch.int64,
}
STORED = ("ids", "sampler_logp", "others", "notes", *SCALARS)  # fields of a rollout without its prompts

Batches = dict[int, list[Rollout]]  # rollouts by batch number, without prompts (see `without_prompts`)


@runtime_checkable
class RolloutBuffer(Protocol):
    """A buffer that generates rollout batches and holds them until the steps that train on them."""

    batches: Batches

    def advance(self, step: int, memory: Memory) -> None:
        """Note that `step` steps are done; the batches that the new weights allow may now be generated."""

    def take(self, step: int, memory: Memory) -> list[Rollout]:
        """Return the rollouts that `step` trains on."""

    def settle(self) -> None:
        """Wait before a checkpoint for the batches that a resumed run could not generate again."""

    def rest(self) -> None:
        """Wait until no batch is being generated."""

    def numbers(self) -> dict[str, float]:
        """Return the buffer's columns of perf.jsonl, measured since the last call."""

    def close(self) -> None:
        """Stop the generation and release its resources."""


@dataclass
class InProcessBuffer:
    """A buffer that generates in the training process, in turns with training.

    A batch is generated with the weights before the step that first trains on it.
    """

    policy: RolloutPolicy
    generate: Callable[[int, Memory], list[Rollout]]  # generates this process's share of a batch
    total: int  # number of steps in the run
    batches: Batches = field(default_factory=dict)

    def advance(self, step: int, memory: Memory) -> None:
        """Do nothing: batches are generated in `take`."""

    def take(self, step: int, memory: Memory) -> list[Rollout]:
        """Generate the batches that belong to the weights before `step`; return the rollouts that `step` trains on."""
        number = self.policy.batch_number(step, memory)
        discard(self.batches, self.policy.oldest_valid(step, memory))
        for new in sorted({*self.policy.open_batches(step, memory), number} - self.batches.keys()):
            if new <= self.total:  # the run ends before later batches are used
                self.batches[new] = without_prompts(self.generate(new, memory), step - 1)
        rollouts = self.batches[number]
        discard(self.batches, self.policy.oldest_needed(step, memory))
        return rollouts

    def settle(self) -> None:
        """Do nothing: no batch is generated in the background."""

    def rest(self) -> None:
        """Do nothing: no batch is generated in the background, so none can be unfinished."""

    def numbers(self) -> dict[str, float]:
        """Return no columns: the step's rollout phase already measures the time."""
        return {}

    def close(self) -> None:
        """Do nothing: the buffer holds no resources."""


def discard(batches: Batches, first: int) -> None:
    """Discard the buffered batches with numbers below `first`."""
    for number in [n for n in batches if n < first]:
        del batches[number]


def share(count: int, process: int, processes: int) -> slice:
    """Return the slice of `count` prompts for which a process generates the rollouts."""
    each = -(-count // processes)
    return slice(process * each, min((process + 1) * each, count))


def with_staleness(rollouts: Sequence[Rollout], step: int) -> list[Rollout]:
    """Add the note `staleness`: how many steps the weights behind each rollout are older than those before `step`."""
    return [replace(r, notes={**r.notes, "staleness": float(step - 1 - r.version)}) for r in rollouts]


def without_prompts(rollouts: Sequence[Rollout], version: int) -> list[Rollout]:
    """Remove the prompts, which the receiver can add again, and set the version of the weights that generated them.

    The version is the number of steps that these weights had been trained.
    """
    columns = ({name: getattr(r, name) for name in STORED} for r in rollouts)
    return [Rollout(**x | {"version": version}, prompt_ids=(), teacher_prompt_ids=()) for x in columns]


def with_prompts(rollouts: Sequence[Rollout], prompts: Sequence[Rendered], per_prompt: int) -> list[Rollout]:
    """Add the prompts to rollouts without them; `prompts` are the prompts of all processes."""
    out = []
    for r in rollouts:
        p = prompts[r.index // per_prompt]
        out.append(replace(r, prompt_ids=p.ids, teacher_prompt_ids=p.teacher_ids, teacher=p.teacher, prompt=p.prompt))
    return out


def to_tensors(batches: Mapping[int, Sequence[Rollout]]) -> dict[str, Tensor]:
    """Return batches, without their prompts, as tensors for a checkpoint."""
    tensors: dict[str, Tensor] = {}
    for number, rollouts in batches.items():
        for name, dtype in SCALARS.items():
            tensors[f"{number}.{name}"] = torch.tensor([getattr(r, name) for r in rollouts], dtype=dtype)
        tensors[f"{number}.length"] = torch.tensor([len(r.ids) for r in rollouts])
        tensors[f"{number}.ids"] = torch.tensor([x for r in rollouts for x in r.ids], dtype=torch.int64)
        logp = [x for r in rollouts for x in r.sampler_logp]
        tensors[f"{number}.sampler_logp"] = torch.tensor(logp, dtype=torch.float64)
        if rollouts and rollouts[0].others is not None:
            extra = [r.others or Others.none() for r in rollouts]
            tensors[f"{number}.others"] = torch.tensor([x for o in extra for x in o.ids], dtype=torch.int32)
            tensors[f"{number}.others_logp"] = torch.tensor([x for o in extra for x in o.logp])
        for name, first in (rollouts[0].notes if rollouts else {}).items():
            kind = "note" if isinstance(first, float) else "notes"
            values = [r.notes[name] for r in rollouts]
            flat = values if kind == "note" else [x for v in values for x in v]  # type: ignore[union-attr]
            tensors[f"{number}.{kind}.{name}"] = torch.tensor(flat, dtype=torch.float64)
    return tensors


def from_tensors(tensors: Mapping[str, Tensor]) -> Batches:
    """Return the batches that `to_tensors` stored, by batch number."""
    numbers = sorted({int(k.partition(".")[0]) for k in tensors})
    return {
        n: _rollouts({k.removeprefix(f"{n}."): x for k, x in tensors.items() if k.startswith(f"{n}.")}) for n in numbers
    }


def _rollouts(columns: Mapping[str, Tensor]) -> list[Rollout]:
    """Return the rollouts of a batch from its saved columns."""
    lengths = columns["length"].tolist()
    ragged = {k: [tuple(part.tolist()) for part in columns[k].split(lengths)] for k in ("ids", "sampler_logp")}
    scalars = {name: columns[name].tolist() for name in SCALARS}
    notes = {k.removeprefix("note."): x.tolist() for k, x in columns.items() if k.startswith("note.")}
    for k, x in columns.items():
        if k.startswith("notes."):
            notes[k.removeprefix("notes.")] = [tuple(part.tolist()) for part in x.split(lengths)]
    others: list[Others | None] = [None] * len(lengths)
    if "others" in columns:
        sizes = [len(columns["others"]) // max(1, sum(lengths)) * n for n in lengths]
        parts = zip(columns["others"].split(sizes), columns["others_logp"].split(sizes), strict=True)
        others = [Others(array("i", ids.tolist()), array("f", logp.tolist())) for ids, logp in parts]
    return [
        Rollout(
            prompt_ids=(),
            teacher_prompt_ids=(),
            others=others[i],
            notes={name: values[i] for name, values in notes.items()},
            **{name: values[i] for name, values in (scalars | ragged).items()},
        )
        for i in range(len(lengths))
    ]
