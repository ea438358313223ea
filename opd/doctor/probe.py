"""What the doctor looks at, and in which order: a check is a function of a probe that yields findings."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor

from opd.collect import Rendered
from opd.config import Train
from opd.method import Method
from opd.session import Session
from opd.steps import REHEARSED, Loop, Rehearsal
from opd.types import Rollout

ROLLOUTS = 16  # sampled; no more than a step samples


@dataclass(frozen=True)
class Probe:
    """An opened run."""

    config: Train
    method: Method
    session: Session
    free: int  # bytes of the student's device that are not taken yet


@dataclass(frozen=True)
class Looked:
    """A run after its rehearsal."""

    probe: Probe
    rehearsal: Rehearsal
    other: Float[Tensor, "B T"] | None  # log q after the other of a teacher's two prompts, where they differ
    seconds: float  # all that the rollouts took


def prompts(probe: Probe) -> list[Rendered]:
    """Of the first step, as many for each teacher."""
    session, out = probe.session, []
    most = min(ROLLOUTS, probe.config.batch)
    each = -(-most // len(session.teachers))
    many = session.prompts.batch(1, most * 4 if len(session.teachers) > 1 else most)
    for name in session.teachers:
        out += [p for p in many if p.teacher == name][:each]
    return out


def rehearsed(probe: Probe, loop: Loop) -> Looked:
    """The rollouts, and what the teacher would say of them after its other prompt."""
    start = time.perf_counter()
    found = loop.rehearse(prompts(probe))
    swapped = [replace(r, teacher_prompt_ids=_other(probe, r)) for r in found.rollouts]
    same = probe.config.told() or [r.teacher_prompt_ids for r in swapped] == [
        r.teacher_prompt_ids for r in found.rollouts
    ]
    other = None if same else loop.measure(swapped, REHEARSED).teacher_logp
    return Looked(probe, found, other, time.perf_counter() - start)


def _other(probe: Probe, rollout: Rollout) -> tuple[int, ...]:
    """A rollout's prompt in the student's template where the teacher reads its own, in its own where not."""
    if probe.config.teacher_prompt == "own":
        return rollout.prompt_ids
    return probe.session.prompts.heard(rollout.prompt, rollout.teacher, "")


def teachers(looked: Looked) -> Iterator[tuple[str, str, Tensor]]:
    """(name, how messages call it, mask of its tokens) of each teacher that scored a rollout."""
    rollouts, batch = looked.rehearsal.rollouts, looked.rehearsal.batch
    for name in looked.probe.session.teachers:
        mask = batch.mask & batch.mask.new_tensor([r.teacher == name for r in rollouts])[:, None]
        if mask.any():
            yield name, f"teacher {name}".rstrip(), mask
