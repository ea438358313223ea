"""Rubrics that a run keeps for a question: criteria by stage, scores from their marks, and which criteria to keep.

`score(criteria, marks) -> [0, 1]`; `kept(criteria, sheets, caps) -> criteria`.  RubricEM, arXiv:2605.10899.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import pvariance

MOST = 2  # largest mark: 0 not met, 1 partly met, 2 fully met


@dataclass(frozen=True)
class Criterion:
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


Buffer = tuple[Criterion, ...]
"""The criteria of a question, oldest first."""
Marks = tuple[int, ...]
"""The marks of a response, one per criterion."""


def score(criteria: Sequence[Criterion], marks: Sequence[int]) -> float:
    """Return the weighted average of marks / MOST, with the marks of faults inverted; nan without a criterion."""
    pairs = list(zip(criteria, marks, strict=True))
    total = sum(c.weight for c in criteria)
    earned = sum(c.weight * (MOST - mark if c.negative else mark) for c, mark in pairs)
    return earned / (MOST * total) if total else math.nan


def stage_scores(criteria: Sequence[Criterion], marks: Sequence[int], stages: int) -> list[float]:
    """Return the score of each stage, from the criteria of that stage."""
    out = []
    for stage in range(1, stages + 1):
        mine = [(c, mark) for c, mark in zip(criteria, marks, strict=True) if c.stage == stage]
        out.append(score([c for c, _ in mine], [mark for _, mark in mine]))
    return out


def added(buffer: Buffer, new: Sequence[Criterion]) -> Buffer:
    """Return the buffer with the new criteria appended; duplicates (same stage and text) are skipped."""
    out = {(c.stage, c.text): c for c in buffer}
    for c in new:
        out.setdefault((c.stage, c.text), c)
    return tuple(out.values())


def kept(criteria: Sequence[Criterion], sheets: Sequence[Marks], caps: Sequence[int]) -> Buffer:
    """Return the criteria with the variance of their marks over the rollouts, at most `caps` per stage.

    Persistent criteria are always kept and do not count towards the cap.  The criteria of lowest variance are dropped
    first, among ties the oldest: they no longer distinguish current rollouts.
    """
    spread = [replace(c, spread=float(pvariance([sheet[i] for sheet in sheets]))) for i, c in enumerate(criteria)]
    gone: set[int] = set()
    for stage, cap in enumerate(caps, 1):
        active = [i for i, c in enumerate(spread) if c.stage == stage and not c.persistent]
        gone |= set(sorted(active, key=lambda i: spread[i].spread)[: max(0, len(active) - cap)])
    return tuple(c for i, c in enumerate(spread) if i not in gone)
