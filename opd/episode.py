"""What a run with reflections remembers from step to step: rubrics and notes by question, reflections to be trained on.

`of(memory) -> Episode`, `Episode.memory() -> memory`: a value in and out of the step, saved with its checkpoints.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch

from opd import prompts
from opd.collect import Rendered
from opd.noise import uniform
from opd.questions import Reflect
from opd.reading import Prompts
from opd.rollouts import Memory
from opd.rubrics import Buffer, Criterion
from opd.runs import digest
from opd.types import Prompt, Rollout

T = TypeVar("T")
NAME = "episode"  # of its place in a memory
PICKED = -4  # a token number of no draw but that of the rollout that is reflected on


@dataclass(frozen=True)
class Deferred:
    """A reflection to be trained on in the step after the one that wrote it."""

    messages: tuple[Mapping[str, str], ...]
    text: str  # of a prompt without messages
    teacher: str
    group: int  # reflections on one rollout share it
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    logp: tuple[float, ...]  # the student's own when it was written, at temperature 1
    stopped: bool
    worth: float  # a judge's, in [0, 1]

    def rollout(self, index: int, first: int) -> Rollout:
        """As a row of a batch; `first` is the number of its first group of reflections."""
        return Rollout(
            prompt_ids=self.prompt_ids,
            teacher_prompt_ids=self.prompt_ids,
            ids=self.ids,
            sampler_logp=self.logp,
            index=index,
            group=first + self.group,
            stopped=self.stopped,
            teacher=self.teacher,
            prompt=Prompt(messages=self.messages, text=self.text),
        )


@dataclass(frozen=True)
class Episode:
    """What is remembered; questions by their digest, oldest first."""

    rubrics: Mapping[str, Buffer] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    deferred: tuple[Deferred, ...] = ()

    def memory(self) -> Memory:
        """As json in bytes: floats come back as they were."""
        rubrics = {key: [asdict(c) for c in buffer] for key, buffer in self.rubrics.items()}
        said = {"rubrics": rubrics, "notes": dict(self.notes), "deferred": [asdict(d) for d in self.deferred]}
        return {NAME: torch.from_numpy(np.frombuffer(json.dumps(said).encode(), dtype=np.uint8).copy())}

    def keeping(self, rubrics: Mapping[str, Buffer], most: int) -> "Episode":
        """With the rubrics of some questions, now the newest; the oldest beyond `most` are forgotten."""
        return replace(self, rubrics=_newest(self.rubrics, rubrics, most))

    def reflecting(self, notes: Mapping[str, str], deferred: Sequence[Deferred], most: int) -> "Episode":
        """With the notes of some questions, and the reflections of a step in place of those of the last."""
        return replace(self, notes=_newest(self.notes, notes, most), deferred=tuple(deferred))


def of(memory: Memory) -> Episode:
    """What a memory holds of an episode; an empty one before the first step."""
    if NAME not in memory:
        return Episode()
    said: dict[str, Any] = json.loads(memory[NAME].numpy().tobytes())
    whole: Callable[[dict[str, Any]], dict[str, Any]] = lambda row: {
        name: tuple(x) if isinstance(x, list) else x for name, x in row.items()
    }
    return Episode(
        {key: tuple(Criterion(**row) for row in rows) for key, rows in said["rubrics"].items()},
        said["notes"],
        tuple(Deferred(**whole(row)) for row in said["deferred"]),
    )


def reminded(asked: Sequence[Rendered], notes: Mapping[str, str], how: Reflect, reader: Prompts) -> list[Rendered]:
    """The prompts, those with a note as the student then reads them; one that would not fit stays as it is."""
    out = []
    for rendered in asked:
        note = notes.get(digest(rendered.prompt))
        if note is not None:
            ids = reader.reads(prompts.rewritten(rendered.prompt, how.remember, reflection=note))
            rendered = replace(rendered, ids=ids) if len(ids) <= reader.room else rendered
        out.append(rendered)
    return out


def attempts(rollouts: Sequence[Rollout], *, seed: int, step: int) -> list[Rollout]:
    """One rollout of each group, any as likely as the others."""
    groups: dict[int, list[Rollout]] = {}
    for r in rollouts:
        groups.setdefault(r.group, []).append(r)
    coin = lambda some: float(uniform(seed, step, some[0].index, PICKED))
    return [some[int(coin(some) * len(some))] for some in groups.values()]


def asked_of(attempt: Rollout, text: str, how: Reflect, reader: Prompts) -> Rendered | None:
    """The question that a reflection answers; None where it leaves no room for one."""
    prompt = prompts.rewritten(attempt.prompt, how.template, response=text)
    ids = reader.reads(prompt)
    return Rendered(prompt, ids, ids, attempt.teacher) if len(ids) <= reader.room else None


def _newest(old: Mapping[str, T], new: Mapping[str, T], most: int) -> dict[str, T]:
    whole = {**{key: x for key, x in old.items() if key not in new}, **new}
    return {key: whole[key] for key in list(whole)[-most:]}
