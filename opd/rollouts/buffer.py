"""The rollout buffer: `Source.take(step, memory)` returns this process's share of the rollouts that a step trains on.

A draw is a rollout batch, identified by the number of the first step that trains on it.  This number keys its noise,
so generating a draw again with the same weights gives the same rollouts.  Checkpoints include the buffered draws.
"""

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from safetensors.torch import load_file
from torch import Tensor

from opd.core.tensors import save_tensors
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


@runtime_checkable
class Source(Protocol):
    """A source of rollouts for training steps."""

    kept: dict[int, list[Rollout]]  # buffered draws by number, without prompts (see `bare`)

    def advance(self, step: int, memory: Memory) -> None:
        """Note that `step` steps are done; the draws that the new weights allow may now be generated."""

    def take(self, step: int, memory: Memory) -> list[Rollout]:
        """Return the rollouts that `step` trains on."""

    def settle(self) -> None:
        """Wait before a checkpoint for the draws that a resumed run could not generate again."""

    def rest(self) -> None:
        """Wait until no draw is being generated."""

    def numbers(self) -> dict[str, float]:
        """Return the source's columns of perf.jsonl, measured since the last call."""

    def close(self) -> None:
        """Stop the source and release its resources."""


@dataclass
class Here:
    """A source that generates in the training process, in turns with training.

    A draw is generated with the weights before the step that first trains on it.
    """

    policy: RolloutPolicy
    write: Callable[[int, Memory], list[Rollout]]  # generates this process's share of a draw
    total: int  # number of steps in the run
    kept: dict[int, list[Rollout]] = field(default_factory=dict)

    def advance(self, step: int, memory: Memory) -> None:
        """Do nothing: draws are generated in `take`."""

    def take(self, step: int, memory: Memory) -> list[Rollout]:
        """Generate the draws that belong to the weights before `step`; return the rollouts that `step` trains on."""
        asked = self.policy.batch_number(step, memory)
        discard(self.kept, self.policy.oldest_valid(step, memory))
        for draw in sorted({*self.policy.open_batches(step, memory), asked} - self.kept.keys()):
            if draw <= self.total:  # the run ends before later draws are used
                self.kept[draw] = bare(self.write(draw, memory), step - 1)
        found = self.kept[asked]
        discard(self.kept, self.policy.oldest_needed(step, memory))
        return found

    def settle(self) -> None:
        """Do nothing: no draw is generated in the background."""

    def rest(self) -> None:
        """Do nothing: no draw is generated in the background, so none can be unfinished."""

    def numbers(self) -> dict[str, float]:
        """Return no columns: the step's rollout phase already measures the time."""
        return {}

    def close(self) -> None:
        """Do nothing: the source holds no resources."""


def discard(kept: dict[int, list[Rollout]], first: int) -> None:
    """Discard the buffered batches with numbers below `first`."""
    for draw in [d for d in kept if d < first]:
        del kept[draw]


def share(count: int, process: int, processes: int) -> slice:
    """Return the slice of `count` prompts for which a process generates the rollouts."""
    each = -(-count // processes)
    return slice(process * each, min((process + 1) * each, count))


def behind(rollouts: Sequence[Rollout], step: int) -> list[Rollout]:
    """Add the note `staleness`: how many steps the weights behind each rollout are older than those before `step`."""
    return [replace(r, notes={**r.notes, "staleness": float(step - 1 - r.version)}) for r in rollouts]


def bare(rollouts: Sequence[Rollout], version: int) -> list[Rollout]:
    """Remove the prompts, which the receiver can add again, and set the version of the weights that generated them.

    The version is the number of steps that these weights had been trained.
    """
    known = ({name: getattr(r, name) for name in BARE} for r in rollouts)
    return [Rollout(**x | {"version": version}, prompt_ids=(), teacher_prompt_ids=()) for x in known]


BARE = ("ids", "sampler_logp", "others", "notes", *SCALARS)


def dressed(rollouts: Sequence[Rollout], prompts: Sequence[Rendered], per_prompt: int) -> list[Rollout]:
    """Add the prompts to rollouts without them; `prompts` are the prompts of all processes."""
    out = []
    for r in rollouts:
        p = prompts[r.index // per_prompt]
        known = replace(r, prompt_ids=p.ids, teacher_prompt_ids=p.teacher_ids)
        out.append(replace(known, teacher=p.teacher, prompt=p.prompt))
    return out


def save(draws: Mapping[int, Sequence[Rollout]], folder: Path) -> None:
    """Write draws, without their prompts, to draws.safetensors in `folder`; write no file if `draws` is empty."""
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
    """Load the draws that `save` wrote, by draw number; return an empty dict if the file is missing."""
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
