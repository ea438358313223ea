"""The state of a run with stage rubrics between steps: criteria and notes of each question, and reflections.

RubricEM, arXiv:2605.10899.  Each step takes a `RubricMemory` and returns a new one.  Checkpoints contain it.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import compress
from statistics import pvariance
from typing import TypeVar

import torch
from pydantic import TypeAdapter

from opd.core.sampling import Prompt
from opd.core.types import Rollout
from opd.methods.rollout_policies.base import Memory

T = TypeVar("T")
KEY = "episode"  # the name of a rubric memory among the memories of a run
MAX_MARK = 2  # 0: not met, 1: partly met, 2: fully met


@dataclass(frozen=True)
class StageCriterion:
    """A criterion by which a judge marks one stage of a response."""

    stage: int  # from 1
    text: str
    weight: int = 1  # 1 to 3
    negative: bool = False  # it describes a fault
    persistent: bool = False  # given with the question; never dropped
    spread: float = 0.0  # variance of its marks over the most recently marked rollouts

    def __post_init__(self) -> None:
        if self.stage < 1 or not 1 <= self.weight <= 3 or not self.text:
            raise ValueError(f"{self}: a stage from 1, a text, and a weight of 1 to 3")


Criteria = tuple[StageCriterion, ...]
"""The criteria of a question, oldest first."""
Marks = tuple[int, ...]
"""The marks of a response, one per criterion."""


def score(criteria: Sequence[StageCriterion], marks: Sequence[int]) -> float:
    """Return the weighted average of marks / MAX_MARK, with the marks of faults inverted; nan without a criterion."""
    total = sum(c.weight for c in criteria)
    pairs = zip(criteria, marks, strict=True)
    earned = sum(c.weight * (MAX_MARK - mark if c.negative else mark) for c, mark in pairs)
    return earned / (MAX_MARK * total) if total else math.nan


def stage_scores(criteria: Sequence[StageCriterion], marks: Sequence[int], stages: int) -> list[float]:
    """Return the score of each stage, from the criteria of that stage."""
    chosen = [[c.stage == stage for c in criteria] for stage in range(1, stages + 1)]
    return [score(list(compress(criteria, of_stage)), list(compress(marks, of_stage))) for of_stage in chosen]


def extended(criteria: Criteria, new: Sequence[StageCriterion]) -> Criteria:
    """Return the criteria with the new ones appended; duplicates (same stage and text) are skipped."""
    by_text = {(c.stage, c.text): c for c in criteria}
    for c in new:
        by_text.setdefault((c.stage, c.text), c)
    return tuple(by_text.values())


def pruned(criteria: Sequence[StageCriterion], marks_by_rollout: Sequence[Marks], caps: Sequence[int]) -> Criteria:
    """Return the criteria with the variance of their marks over the rollouts, at most `caps` per stage.

    Persistent criteria are always kept and do not count towards the cap.  The criteria of lowest variance are dropped
    first, among ties the oldest: they no longer distinguish current rollouts.
    """
    with_spread = [
        replace(c, spread=float(pvariance([marks[i] for marks in marks_by_rollout]))) for i, c in enumerate(criteria)
    ]
    dropped: set[int] = set()
    for stage, cap in enumerate(caps, 1):
        active = [i for i, c in enumerate(with_spread) if c.stage == stage and not c.persistent]
        dropped |= set(sorted(active, key=lambda i: with_spread[i].spread)[: max(0, len(active) - cap)])
    return tuple(c for i, c in enumerate(with_spread) if i not in dropped)


@dataclass(frozen=True)
class DeferredReflection:
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

    def rollout(self, index: int, first_group: int) -> Rollout:
        """Return the reflection as a row of a batch; `first_group` is the number of the first group of reflections."""
        return Rollout(
            prompt_ids=self.prompt_ids,
            teacher_prompt_ids=self.prompt_ids,
            ids=self.ids,
            sampler_logp=self.logp,
            index=index,
            group=first_group + self.group,
            stopped=self.stopped,
            teacher=self.teacher,
            prompt=Prompt(messages=self.messages, text=self.text),
        )


@dataclass(frozen=True)
class RubricMemory:
    """The criteria and notes by question, and reflections to train on.  Keys are digests of questions, oldest first."""

    rubrics: Mapping[str, Criteria] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    deferred: tuple[DeferredReflection, ...] = ()

    @classmethod
    def load(cls, memory: Memory) -> "RubricMemory":
        """Return the rubric memory in a run's memory, or an empty one before the first step."""
        if KEY not in memory:
            return cls()
        return TypeAdapter(cls).validate_json(memory[KEY].numpy().tobytes())

    def dump(self) -> Memory:
        """Return this memory as JSON bytes in a tensor.  `load` restores floats exactly."""
        return {KEY: torch.frombuffer(bytearray(json.dumps(asdict(self)).encode()), dtype=torch.uint8)}

    def with_rubrics(self, rubrics: Mapping[str, Criteria], limit: int) -> "RubricMemory":
        """Return the memory with these rubrics as the newest.  Only the newest `limit` questions are kept."""
        return replace(self, rubrics=_newest(self.rubrics, rubrics, limit))

    def with_reflections(
        self, notes: Mapping[str, str], deferred: Sequence[DeferredReflection], limit: int
    ) -> "RubricMemory":
        """Return the memory with these notes as the newest, of which `limit` are kept, and only these reflections."""
        return replace(self, notes=_newest(self.notes, notes, limit), deferred=tuple(deferred))


def _newest(old: Mapping[str, T], new: Mapping[str, T], limit: int) -> dict[str, T]:
    merged = {**{key: x for key, x in old.items() if key not in new}, **new}
    return {key: merged[key] for key in list(merged)[-limit:]}
