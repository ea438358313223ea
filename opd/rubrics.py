"""Rubrics that a run keeps of a question: criteria by stage, what their marks are worth, and which of them stay.

`score(criteria, marks) -> [0, 1]`; `kept(criteria, sheets, caps) -> criteria`.  RubricEM, arXiv:2605.10899.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import pvariance

MOST = 2  # a mark says how far a criterion is met: 0 not, 1 in part, 2 wholly


@dataclass(frozen=True)
class Criterion:
    """What one stage of a response may do."""

    stage: int  # from 1
    text: str
    weight: int = 1  # 1 to 3
    negative: bool = False  # what it says is a fault
    persistent: bool = False  # given with the question: it is never dropped
    spread: float = 0.0  # variance of its marks over the rollouts that were last marked

    def __post_init__(self) -> None:
        if self.stage < 1 or not 1 <= self.weight <= 3 or not self.text:
            raise ValueError(f"{self}: a stage from 1, a text, and a weight of 1 to 3")


Buffer = tuple[Criterion, ...]
"""The criteria of a question, oldest first."""
Marks = tuple[int, ...]
"""Of one response, by criterion."""


def score(criteria: Sequence[Criterion], marks: Sequence[int]) -> float:
    """The weighted average of the marks over MOST, those of faults inverted; nan without a criterion."""
    pairs = list(zip(criteria, marks, strict=True))
    total = sum(c.weight for c in criteria)
    earned = sum(c.weight * (MOST - mark if c.negative else mark) for c, mark in pairs)
    return earned / (MOST * total) if total else math.nan


def stage_scores(criteria: Sequence[Criterion], marks: Sequence[int], stages: int) -> list[float]:
    """The score of each stage by its own criteria."""
    out = []
    for stage in range(1, stages + 1):
        mine = [(c, mark) for c, mark in zip(criteria, marks, strict=True) if c.stage == stage]
        out.append(score([c for c, _ in mine], [mark for _, mark in mine]))
    return out


def added(buffer: Buffer, new: Sequence[Criterion]) -> Buffer:
    """The buffer with the new ones that say something new."""
    out = {(c.stage, c.text): c for c in buffer}
    for c in new:
        out.setdefault((c.stage, c.text), c)
    return tuple(out.values())


def kept(criteria: Sequence[Criterion], sheets: Sequence[Marks], caps: Sequence[int]) -> Buffer:
    """The criteria with the variance of their marks over the rollouts; at most `caps` a stage beside persistent ones.

    Those that vary least go first, of those that tie the oldest: they tell the rollouts of today apart no more.
    """
    spread = [replace(c, spread=float(pvariance([sheet[i] for sheet in sheets]))) for i, c in enumerate(criteria)]
    gone: set[int] = set()
    for stage, cap in enumerate(caps, 1):
        active = [i for i, c in enumerate(spread) if c.stage == stage and not c.persistent]
        gone |= set(sorted(active, key=lambda i: spread[i].spread)[: max(0, len(active) - cap)])
    return tuple(c for i, c in enumerate(spread) if i not in gone)
