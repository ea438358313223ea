"""Inputs of the doctor's checks: an opened run, and the same run after a rehearsal on a few rollouts.

A check is a function that takes one of the two and yields findings.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor

from opd.config.train import Train
from opd.core.rng import NoiseStep
from opd.core.types import Rollout
from opd.data.prompts import Rendered
from opd.methods.method import Method
from opd.training.session import Session
from opd.training.trainer import Loop, Rehearsal

ROLLOUTS = 16  # rollouts of the rehearsal, limited by --batch


@dataclass(frozen=True)
class Probe:
    """An opened run: the input of checks that need no rollouts."""

    session: Session
    free: int  # free bytes on the student's device

    @property
    def config(self) -> Train:
        """Return the settings of the run."""
        return self.session.config

    @property
    def method(self) -> Method:
        """Return the method of the run."""
        return self.session.method


@dataclass(frozen=True)
class Looked:
    """A run after its rehearsal: the input of checks on rollouts."""

    probe: Probe
    rehearsal: Rehearsal
    other: Float[Tensor, "B T"] | None  # teacher log-probs after the alternative prompt; None if both are equal
    seconds: float  # time to generate and score the rollouts


def prompts(probe: Probe) -> list[Rendered]:
    """Return prompts of the first step, the same number for each teacher."""
    session, out = probe.session, []
    most = min(ROLLOUTS, probe.config.batch)
    each = -(-most // len(session.teachers))
    many = session.prompts.batch(1, most * 4 if len(session.teachers) > 1 else most)
    for name in session.teachers:
        out += [p for p in many if p.teacher == name][:each]
    return out


def rehearsed(probe: Probe, loop: Loop) -> Looked:
    """Generate and score the rehearsal's rollouts; score them again with the teacher's alternative prompt."""
    start = time.perf_counter()
    found = loop.rehearse(prompts(probe))
    swapped = [replace(r, teacher_prompt_ids=_other(probe, r)) for r in found.rollouts]
    same = probe.session.plan.context or [r.teacher_prompt_ids for r in swapped] == [
        r.teacher_prompt_ids for r in found.rollouts
    ]
    other = None if same else loop.measure(swapped, NoiseStep.REHEARSAL).teacher_logp
    return Looked(probe, found, other, time.perf_counter() - start)


def _other(probe: Probe, rollout: Rollout) -> tuple[int, ...]:
    """Return the ids of the alternative teacher prompt: in the template that --teacher-prompt does not select."""
    if probe.config.teacher_prompt == "own":
        return rollout.prompt_ids
    return probe.session.prompts.heard(rollout.prompt, rollout.teacher, "")


def teachers(looked: Looked) -> Iterator[tuple[str, str, Tensor]]:
    """Yield (name, label for messages, mask [B, T] of its tokens) for each teacher that scored a rollout."""
    rollouts, batch = looked.rehearsal.rollouts, looked.rehearsal.batch
    for name in looked.probe.session.teachers:
        mask = batch.mask & batch.mask.new_tensor([r.teacher == name for r in rollouts])[:, None]
        if mask.any():
            yield name, f"teacher {name}".rstrip(), mask
