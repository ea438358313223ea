"""The questions that every rollout policy answers, and the values that it is asked with.

A batch number is the number of the first step that trains on the batch.  It keys the batch's sampling noise.  Anything
that changes over a run is a function of the step, counted from 1, and of the `Memory` that the run carries from step
to step.  Policies have no state.
"""

from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opd.core.sampling import Sampling
from opd.core.types import STUDENT, Batch, Column, reads
from opd.losses.terms import PolicyGradient

NOTHING: Mapping[str, Tensor] = MappingProxyType({})
Memory = Mapping[str, Tensor]  # state that a run keeps between steps: shared by all processes, saved with checkpoints
LogProbs = Callable[[Tensor], Tensor]  # logits [B, V] -> log-probs [B, V], as the loss compares the two models


@dataclass(frozen=True)
class RunState:
    """The state of a run when it generates a batch."""

    step: int  # the batch number
    total: int  # number of steps in the run
    longest: int  # maximum response length, in tokens
    memory: Memory


class DecodeHook:
    """An action of a policy at each decoding step, while a teacher decodes beside the student.

    The hook knows no engine.  A hook that remembers is replaced at each step by the hook that `observe` returns.  The
    defaults sample from the student and end no response.
    """

    def begin(self, count: int) -> "DecodeHook":
        """Return the hook before the first token of `count` responses."""
        return self

    def mix(
        self, student: Float[Tensor, "B V"], teacher: Float[Tensor, "B V"], sampling: Sampling, stop: Int[Tensor, " S"]
    ) -> tuple[Float[Tensor, "B V"], Sampling, dict[str, Float[Tensor, " B"]]]:
        """Return the logits to sample the next token from, how to sample from them, and the token's notes."""
        return student, sampling, {}

    def observe(
        self,
        student: Float[Tensor, "B V"],
        teacher: Float[Tensor, "B V"],
        rows: Int[np.ndarray, " B"],
        active: Bool[np.ndarray, " B"],
        counts: Int[np.ndarray, " n"],
    ) -> "DecodeHook":
        """Return the hook after a token of the responses `rows`, of which only those in `active` go on.

        `counts` has the number of tokens sampled so far for each of the n responses.
        """
        return self

    def ended(self) -> Bool[np.ndarray, " n"] | bool:
        """Return which responses the hook ends."""
        return False

    def finish(self, response: int, count: int) -> tuple[int, dict[str, float]]:
        """Return how many of a response's `count` tokens remain, and the response's notes."""
        return count, {}


class RolloutPolicy:
    """A policy that decides which model generates each rollout, for which prompts, and where the rollout ends.

    Each policy is a frozen dataclass with the fields `per_prompt` and `updates`.  The defaults below are those of a
    policy in which the student generates each batch just before the step that trains on it.
    """

    per_prompt: int  # rollouts generated for each prompt
    updates: int  # optimizer steps made on each batch
    samples: int = 1  # tokens sampled at each position
    on_policy: ClassVar[bool] = False  # the current student generates every token of every rollout
    stationary: ClassVar[bool] = False  # the policy is the same at every step
    frozen_sampler: ClassVar[bool] = False  # exactly the weights before a certain step generate a batch
    pooled: ClassVar[bool] = False  # several steps train on the same rollouts
    admits: Column | None = None  # selects the rollouts of a pool that are trained on, once, when they enter it
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    def __post_init__(self) -> None:
        for name in ("per_prompt", "updates"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}={value}: a rollout batch needs {name} >= 1")

    def reads(self) -> frozenset[str]:
        """Return the names of the columns that `admits` reads."""
        return frozenset() if self.admits is None else reads(self.admits)

    # What a method and a run must provide.  A reason completes a sentence that begins with the policy; "" allows.

    def needs(self) -> frozenset[str]:
        """Return what every teacher must provide for the rollouts, in the terms of `Method.needs`."""
        return frozenset()

    def check_policy_gradient(self, term: PolicyGradient, columns: frozenset[str]) -> None:
        """Raise ValueError if `term`, which reads `columns`, is wrong on tokens that the policy generates."""

    def teacher_takes_part(self) -> bool:
        """Return True if the teacher must be ready while the student generates."""
        return "decoding" in self.needs()

    def worker_refusal(self) -> str:
        """Return why a worker process cannot generate these rollouts, or ""."""
        return "need the teacher or what earlier steps measured, and the worker process has the student alone"

    def engine_refusal(self) -> str:
        """Return why no engine but hf can generate these rollouts, or ""."""
        return "lets the teacher read along token by token, which hf alone does" if "decoding" in self.needs() else ""

    def tempering_refusal(self) -> str:
        """Return why the student must sample from the same distribution that the loss compares, or ""."""
        return ""

    def moving_teacher_refusal(self) -> str:
        """Return why the teacher's weights must not change during the run, or ""."""
        return ""

    # Which batches are generated, and when.

    def batches(self, step: int, memory: Memory) -> range:
        """Return the numbers of the batches that a step may train on.

        The steps from the first number on train on the rollouts of these batches that `admits` selects, --batch of them
        each, in order, and after the last on the first again.
        """
        return range(step, step + 1)

    def open_batches(self, step: int, memory: Memory) -> range:
        """Return the numbers of the batches that may be generated once the weights before `step` are available."""
        return range(step, step + 1)

    def prompt_step(self, batch_number: int) -> int:
        """Return the step, counted from 1, whose prompts a batch uses."""
        return batch_number

    def oldest_valid(self, step: int, memory: Memory) -> int:
        """Return a batch number; before `step`, all batches with lower numbers must be discarded from the buffer."""
        return 0

    def oldest_needed(self, step: int, memory: Memory) -> int:
        """Return the lowest number of a batch that steps after `step` may train on."""
        return step + 1

    # How a batch is generated.

    def source(self, step: int, rollout: int, seed: int) -> int:
        """Return which model generates a rollout: a value of the `source` column."""
        return STUDENT

    def source_shares(self) -> Mapping[int, float]:
        """Return the probability with which each source generates a rollout."""
        return {STUDENT: 1.0}

    def prefix_limit(self, state: RunState) -> int:
        """Return the maximum number of leading tokens that the teacher generates."""
        return 0

    def decode_hook(self, state: RunState, logp: LogProbs) -> DecodeHook | None:
        """Return the hook with which the teacher takes part in each decoding step, or None if it does not."""
        return None

    def notes(self, state: RunState) -> dict[str, float]:
        """Return the current values of what changes over a run, as notes for all rollouts of a batch."""
        return {}

    # What happens after scoring.

    def reads_measured(self) -> bool:
        """Return True if `after_scoring` reads measured columns, so that a measuring pass must fill them."""
        return False

    def after_scoring(
        self, batch: Batch, step: int, memory: Memory, lengths: Int[Tensor, " B"]
    ) -> tuple[Batch, Memory]:
        """Return the batch to train on and the memory for the next step; `lengths` are the responses' tokens."""
        return batch, memory
