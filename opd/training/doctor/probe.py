"""Inputs of the doctor's checks: an opened run, and the same run after a rehearsal on a few rollouts.

A check is a function that takes one of the two and yields findings.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor

from opd.core.rng import NoiseStep
from opd.core.types import Rollout
from opd.data.prompts import Rendered
from opd.training.session import Session
from opd.training.trainer import Rehearsal, Trainer

ROLLOUTS = 16  # rollouts of the rehearsal, limited by --batch


@dataclass(frozen=True)
class Probe:
    """An opened run: the input of checks that need no rollouts."""

    session: Session
    free: int  # free bytes on the student's device


@dataclass(frozen=True)
class RehearsedRun:
    """A run after its rehearsal: the input of checks on rollouts."""

    probe: Probe
    rehearsal: Rehearsal
    alternative_logp: Float[Tensor, "B T"] | None  # the teacher's, after the alternative prompt; None if both are equal
    seconds: float  # time to generate and score the rollouts


def rehearsal_prompts(probe: Probe) -> list[Rendered]:
    """Return prompts of the first step, the same number for each teacher."""
    session, out = probe.session, []
    num_rollouts = min(ROLLOUTS, probe.session.config.batch)
    per_teacher = -(-num_rollouts // len(session.teachers))
    candidates = session.prompts.batch(1, num_rollouts * 4 if len(session.teachers) > 1 else num_rollouts)
    for name in session.teachers:
        out += [p for p in candidates if p.teacher == name][:per_teacher]
    return out


def rehearse_run(probe: Probe, trainer: Trainer) -> RehearsedRun:
    """Generate and score the rehearsal's rollouts; score them again with the teacher's alternative prompt."""
    start = time.perf_counter()
    rehearsal = trainer.rehearse(rehearsal_prompts(probe))
    alternative_rollouts = [replace(r, teacher_prompt_ids=_alternative_prompt(probe, r)) for r in rehearsal.rollouts]
    is_same = probe.session.plan.context or [r.teacher_prompt_ids for r in alternative_rollouts] == [
        r.teacher_prompt_ids for r in rehearsal.rollouts
    ]
    alternative_logp = None if is_same else trainer.measure(alternative_rollouts, NoiseStep.REHEARSAL).teacher_logp
    return RehearsedRun(probe, rehearsal, alternative_logp, time.perf_counter() - start)


def _alternative_prompt(probe: Probe, rollout: Rollout) -> tuple[int, ...]:
    """Return the ids of the alternative teacher prompt: in the template that --teacher-prompt does not select."""
    if probe.session.config.teacher_prompt == "own":
        return rollout.prompt_ids
    return probe.session.prompts.teacher_ids(rollout.prompt, rollout.teacher, "")


def teachers(rehearsed: RehearsedRun) -> Iterator[tuple[str, str, Tensor]]:
    """Yield (name, label for messages, mask [B, T] of its tokens) for each teacher that scored a rollout."""
    rollouts, batch = rehearsed.rehearsal.rollouts, rehearsed.rehearsal.batch
    for name in rehearsed.probe.session.teachers:
        mask = batch.mask & batch.mask.new_tensor([r.teacher == name for r in rollouts])[:, None]
        if mask.any():
            yield name, f"teacher {name}".rstrip(), mask
