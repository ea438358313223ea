"""The rehearsal of a run: a few rollouts, scored and passed backward, which the doctor's later checks read."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor

from opd.core.rng import NoiseStep
from opd.core.types import Batch, Rollout
from opd.data.prompts import Rendered
from opd.methods.rollout_policies.on_policy import OnPolicy
from opd.training.doctor.findings import teacher_label
from opd.training.session import Session
from opd.training.timing import Clock
from opd.training.trainer import Trainer

ROLLOUTS = 16  # rollouts of the rehearsal, limited by --batch


@dataclass(frozen=True)
class RehearsedRun:
    """A run after its rehearsal: the input of checks on rollouts."""

    session: Session
    rollouts: list[Rollout]
    batch: Batch
    alternative_logp: Float[Tensor, "B T"] | None  # the teacher's, after the alternative prompt; None if both are equal
    phases: Mapping[str, float]  # seconds of rollout, measure, update
    seconds: float  # all of them, and the second measurement


def rehearse_run(session: Session, trainer: Trainer) -> RehearsedRun:
    """Run a timed trial step without an optimizer step, then score its rollouts after the alternative prompt."""
    clock, start = Clock(), time.perf_counter()
    with clock("rollout"):
        rollouts = sample_rollouts(trainer)
    with clock("measure"):
        batch = trainer.measure(rollouts, NoiseStep.REHEARSAL)
    with clock("update"):
        trainer.passes.run(batch, rollouts, trainer.method.prepare(batch))
    session.optimizer.zero_grad()
    alternatives, alternative_logp = [_alternative_prompt(session, r) for r in rollouts], None
    if not session.plan.context and alternatives != [r.teacher_prompt_ids for r in rollouts]:
        others = [replace(r, teacher_prompt_ids=ids) for r, ids in zip(rollouts, alternatives, strict=True)]
        alternative_logp = trainer.measure(others, NoiseStep.REHEARSAL).teacher_logp
    return RehearsedRun(session, rollouts, batch, alternative_logp, clock.seconds, time.perf_counter() - start)


def sample_rollouts(trainer: Trainer) -> list[Rollout]:
    """Generate a few rollouts as at the first step, whatever the method's rollout policy."""
    session = trainer.session
    sampling, task = session.config.sampling, session.prompts.task
    return trainer.rollout_source.collect(_prompts(session), OnPolicy(), sampling, NoiseStep.REHEARSAL, task)


def _prompts(session: Session) -> list[Rendered]:
    """Return prompts of the first step, the same number for each teacher."""
    num_rollouts, num_teachers = min(ROLLOUTS, session.config.batch), len(session.teachers)
    candidates = session.prompts.batch(1, num_rollouts * 4 if num_teachers > 1 else num_rollouts)
    per_teacher = -(-num_rollouts // num_teachers)
    return [p for name in session.teachers for p in [c for c in candidates if c.teacher == name][:per_teacher]]


def _alternative_prompt(session: Session, rollout: Rollout) -> tuple[int, ...]:
    """Return the ids of the alternative teacher prompt: in the template that --teacher-prompt does not select."""
    if session.config.teacher_prompt == "own":
        return rollout.prompt_ids
    return session.prompts.teacher_ids(rollout.prompt, rollout.teacher, "")


def teachers(run: RehearsedRun) -> Iterator[tuple[str, Tensor]]:
    """Yield (label for messages, mask [B, T] of its tokens) for each teacher that scored a rollout."""
    # A teacher may exclude a token under a bounded loss (`finite`), and means over such tokens would be infinite.
    finite = run.batch.mask if run.batch.teacher_logp is None else run.batch.mask & run.batch.teacher_logp.isfinite()
    for name in run.session.teachers:
        mask = finite & run.batch.mask.new_tensor([r.teacher == name for r in run.rollouts])[:, None]
        if mask.any():
            yield teacher_label(name), mask
