"""The rollout buffer: `RolloutBuffer.take(step, memory)` yields this process's share of the batches of a step.

A rollout batch is identified by the number of the first step that trains on it.  This number keys its noise, so
generating a batch again with the same weights gives the same rollouts.  Checkpoints include the buffered batches.
"""

from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from opd.core.sampling import Prompt
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

LISTS = ("others", "teacher_scores")  # fields of type `Others`

Batches = dict[int, list[Rollout]]  # rollouts by batch number, without prompts (see `without_prompts`)


class RolloutBuffer:
    """A buffer that generates rollout batches, by default inside `take`, and holds them until steps train on them."""

    batches: Batches

    def advance(self, step: int, memory: Memory) -> None:
        """Note that `step` steps are done; the batches that the new weights allow may now be generated."""

    def take(self, step: int, memory: Memory) -> Iterator[tuple[int, list[Rollout]]]:
        """Yield the batches that `step` may train on, with their numbers, in order."""
        raise NotImplementedError

    def settle(self) -> None:
        """Wait before a checkpoint for the batches that a resumed run could not generate again."""

    def rest(self) -> None:
        """Wait until no batch is being generated."""

    def free_engine(self) -> None:
        """Wait until the engine may generate other rollouts, with the current weights; every process must call it."""

    def numbers(self) -> dict[str, float]:
        """Return the buffer's columns of perf.jsonl, measured since the last call."""
        return {}

    def close(self) -> None:
        """Stop the generation and release its resources."""


@dataclass
class InProcessBuffer(RolloutBuffer):
    """A buffer in the training process: it generates a batch with the weights before the step that first uses it."""

    policy: RolloutPolicy
    generate: Callable[[int, Memory], list[Rollout]]  # generates this process's share of a batch
    total: int  # number of steps in the run
    batches: Batches = field(default_factory=dict)

    def take(self, step: int, memory: Memory) -> Iterator[tuple[int, list[Rollout]]]:
        """Generate the batches that belong to the weights before `step`; yield those that `step` may train on."""
        numbers = self.policy.batches(step, memory)
        discard(self.batches, self.policy.oldest_valid(step, memory))
        for new in sorted({*self.policy.open_batches(step, memory), *numbers} - self.batches.keys()):
            if new <= self.total:  # the run ends before later batches are used
                self.batches[new] = without_prompts(self.generate(new, memory), step - 1)
        taken = [(n, self.batches[n]) for n in numbers if n <= self.total]
        discard(self.batches, self.policy.oldest_needed(step, memory))
        yield from taken


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
    """Remove the prompts, which the receiver can add again; `version` is how many steps the weights were trained."""
    removed: dict[str, Any] = {"prompt_ids": (), "teacher_prompt_ids": (), "teacher": "", "prompt": Prompt()}
    return [replace(r, version=version, **removed) for r in rollouts]


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
        columns = {name: torch.tensor([getattr(r, name) for r in rollouts], dtype=x) for name, x in SCALARS.items()}
        columns["length"] = torch.tensor([len(r.ids) for r in rollouts])
        columns["ids"] = _flat((r.ids for r in rollouts), torch.int64)
        columns["sampler_logp"] = _flat((r.sampler_logp for r in rollouts), torch.float64)
        for name in LISTS:
            if rollouts and getattr(rollouts[0], name) is not None:
                lists: list[Others] = [getattr(r, name) or Others.none() for r in rollouts]
                columns[name] = _flat((x.ids for x in lists), torch.int32)
                columns[f"{name}_logp"] = _flat((x.logp for x in lists), torch.float32)
        for name, first in (rollouts[0].notes if rollouts else {}).items():
            values: list[Any] = [r.notes[name] for r in rollouts]
            if isinstance(first, float):
                columns[f"note.{name}"] = torch.tensor(values, dtype=torch.float64)
            else:
                columns[f"notes.{name}"] = _flat(values, torch.float64)
        tensors |= {f"{number}.{name}": column for name, column in columns.items()}
    return tensors


def _flat(parts: Iterable[Iterable[float]], dtype: torch.dtype) -> Tensor:
    return torch.tensor([*chain(*parts)], dtype=dtype)


def from_tensors(tensors: Mapping[str, Tensor]) -> Batches:
    """Return the batches that `to_tensors` stored, by batch number."""
    columns: dict[int, dict[str, Tensor]] = {}
    for key, x in tensors.items():
        number, _, name = key.partition(".")
        columns.setdefault(int(number), {})[name] = x
    return {number: _rollouts(columns[number]) for number in sorted(columns)}


def _rollouts(columns: Mapping[str, Tensor]) -> list[Rollout]:
    """Return the rollouts of a batch from its saved columns."""
    lengths = columns["length"].tolist()
    per_token = lambda x: [tuple(part.tolist()) for part in x.split(lengths)]
    fields = {name: columns[name].tolist() for name in SCALARS}
    fields |= {name: per_token(columns[name]) for name in ("ids", "sampler_logp")}
    notes = {k.removeprefix("note."): x.tolist() for k, x in columns.items() if k.startswith("note.")}
    notes |= {k.removeprefix("notes."): per_token(x) for k, x in columns.items() if k.startswith("notes.")}
    for name in LISTS:
        if name in columns:
            sizes = [len(columns[name]) // max(1, sum(lengths)) * n for n in lengths]
            parts = zip(columns[name].split(sizes), columns[f"{name}_logp"].split(sizes), strict=True)
            fields[name] = [Others(array("i", ids.tolist()), array("f", logp.tolist())) for ids, logp in parts]
    return [
        Rollout(
            prompt_ids=(),
            teacher_prompt_ids=(),
            notes={name: values[i] for name, values in notes.items()},
            **{name: values[i] for name, values in fields.items()},
        )
        for i in range(len(lengths))
    ]
