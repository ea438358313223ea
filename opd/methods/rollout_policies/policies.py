"""Rollout policies: which model generates a method's rollouts, as values.

`source_of` returns which model generates a rollout.  `per_prompt` rollouts are generated for each prompt, and `updates`
optimizer steps are made on each batch.  A batch number is the number of the first step that trains on the batch.
Anything that changes over a run is a function of the step, counted from 1, and of the `Memory` that the run carries
from step to step.  The values have no state.
"""

from opd.core.rng import uniform
from opd.core.types import STUDENT
from opd.methods.rollout_policies.base import Memory
from opd.methods.rollout_policies.kl_ball import Blend
from opd.methods.rollout_policies.on_policy import Mixture, OnPolicy
from opd.methods.rollout_policies.snapshot import Snapshot
from opd.methods.rollout_policies.stop_on_agreement import StopOnAgreement
from opd.methods.rollout_policies.teacher_prefix import TeacherPrefix

Rollouts = OnPolicy | Mixture | Blend | TeacherPrefix | StopOnAgreement | Snapshot


def source_of(who: Rollouts, step: int, rollout: int, seed: int) -> int:
    """Return which model generates a rollout: STUDENT, or for some rollouts of a `Mixture` its `other` source."""
    if not isinstance(who, Mixture):
        return STUDENT
    coin = uniform(seed, step, rollout, -1)  # key -1: no token uses this noise
    return STUDENT if coin < who.share else who.other


def draw_of(who: Rollouts, step: int, memory: Memory) -> int:
    """Return the number of the batch that a step trains on.  The batch's sampling noise is keyed by this number."""
    if not isinstance(who, Snapshot):
        return step
    start = who.start(step, memory)
    return start + (step - start) % who.pool


def opened(who: Rollouts, step: int, memory: Memory) -> range:
    """Return the numbers of the batches that may be generated once the weights before `step` are available."""
    if not isinstance(who, Snapshot):
        return range(step, step + 1)
    if who.start(step, memory) < step:
        return range(0)
    return range(step, min(step + who.pool, *(x for x in who.scheduled(step) if x > step)))


def prompts_of(who: Rollouts, draw: int) -> int:
    """Return the step, counted from 1, whose prompts a batch uses.

    Under `Snapshot`, the epochs of a cycle use the same prompts.
    """
    if not isinstance(who, Snapshot):
        return draw
    return (draw - 1) // (who.pool * who.epochs) * who.pool + (draw - 1) % who.pool + 1


def listens(who: Rollouts) -> bool:
    """Return True if the teacher scores rollouts while the student generates them."""
    return isinstance(who, Blend) or (isinstance(who, StopOnAgreement) and who.online)
