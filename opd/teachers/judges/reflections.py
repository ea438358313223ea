"""The state of a run with reflections: rubrics and notes by question, and reflections to train on.

`of(memory) -> Episode` and `Episode.memory() -> memory` convert it.  Each step takes and returns it as a value, and
checkpoints contain it.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch

from opd.core.rng import uniform
from opd.core.sampling import Prompt
from opd.core.types import Rollout
from opd.data import prompts
from opd.data.prompt_stream import Prompts
from opd.data.prompts import Rendered, digest
from opd.methods.questions import Reflect
from opd.methods.rollout_policies.base import Memory
from opd.teachers.judges.rubrics import Buffer, Criterion

T = TypeVar("T")
NAME = "episode"  # its key in a memory
PICKED = -4  # a token number that no token has: its noise picks the rollout to reflect on


@dataclass(frozen=True)
class Deferred:
    """A reflection that is trained on in the step after the one that generated it."""

    messages: tuple[Mapping[str, str], ...]
    text: str  # the prompt, if it has no messages
    teacher: str
    group: int  # shared by all reflections on one rollout
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    logp: tuple[float, ...]  # nats: the student's log-probs at generation, at temperature 1
    stopped: bool
    worth: float  # the judge's score, in [0, 1]

    def rollout(self, index: int, first: int) -> Rollout:
        """Return the reflection as a row of a batch, whose first group of reflections has the number `first`."""
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
    """The state of a run with reflections.  Keys are digests of questions, oldest first."""

    rubrics: Mapping[str, Buffer] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    deferred: tuple[Deferred, ...] = ()

    def memory(self) -> Memory:
        """Return the episode as json bytes in a tensor.  Floats are restored exactly."""
        rubrics = {key: [asdict(c) for c in buffer] for key, buffer in self.rubrics.items()}
        said = {"rubrics": rubrics, "notes": dict(self.notes), "deferred": [asdict(d) for d in self.deferred]}
        return {NAME: torch.from_numpy(np.frombuffer(json.dumps(said).encode(), dtype=np.uint8).copy())}

    def keeping(self, rubrics: Mapping[str, Buffer], most: int) -> "Episode":
        """Return the episode with these rubrics as the newest.  Only the newest `most` questions are kept."""
        return replace(self, rubrics=_newest(self.rubrics, rubrics, most))

    def reflecting(self, notes: Mapping[str, str], deferred: Sequence[Deferred], most: int) -> "Episode":
        """Return the episode with these notes as the newest, and with the reflections of this step.

        Only the newest `most` notes are kept.  The reflections of the previous step are replaced.
        """
        return replace(self, notes=_newest(self.notes, notes, most), deferred=tuple(deferred))


def of(memory: Memory) -> Episode:
    """Return the episode in a memory, or an empty episode before the first step."""
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
    """Return the prompts, each with the note of its question if it has one.

    A prompt that would become too long stays without its note.
    """
    out = []
    for rendered in asked:
        note = notes.get(digest(rendered.prompt))
        if note is not None:
            ids = reader.student_ids(prompts.fill_template(rendered.prompt, how.remember, reflection=note))
            rendered = replace(rendered, ids=ids) if len(ids) <= reader.room else rendered
        out.append(rendered)
    return out


def attempts(rollouts: Sequence[Rollout], *, seed: int, step: int) -> list[Rollout]:
    """Pick one rollout of each group, uniformly at random."""
    groups: dict[int, list[Rollout]] = {}
    for r in rollouts:
        groups.setdefault(r.group, []).append(r)
    coin = lambda some: float(uniform(seed, step, some[0].index, PICKED))
    return [some[int(coin(some) * len(some))] for some in groups.values()]


def asked_of(attempt: Rollout, text: str, how: Reflect, reader: Prompts) -> Rendered | None:
    """Return the prompt for a reflection on `attempt`, whose text is `text`, or None if it is too long."""
    prompt = prompts.fill_template(attempt.prompt, how.template, response=text)
    ids = reader.student_ids(prompt)
    return Rendered(prompt, ids, ids, attempt.teacher) if len(ids) <= reader.room else None


def _newest(old: Mapping[str, T], new: Mapping[str, T], most: int) -> dict[str, T]:
    whole = {**{key: x for key, x in old.items() if key not in new}, **new}
    return {key: whole[key] for key in list(whole)[-most:]}
