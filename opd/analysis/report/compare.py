"""Comparisons of runs: paired differences on the same held-out prompts, and the settings in which runs differ."""

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np

from opd.analysis.evaluate import Scores
from opd.core.intervals import Paired, paired
from opd.training.run_log import INCIDENTAL, Group


def versus(a: tuple[str, Scores], b: tuple[str, Scores]) -> dict[str, Paired]:
    """Return the paired difference of two models on the same problems, for each measure by name."""
    (one, mine), (other, theirs) = a, b
    assert mine.prompts == theirs.prompts
    against = theirs.each()
    return {
        name: paired(np.array([values]), np.array([against[name]]), (one, other))
        for name, values in mine.each().items()
    }


def gains(groups: Sequence[Group], name: str) -> list[Paired]:
    """Return the effect of training: the last evaluation of each group minus its evaluation at step 0."""
    out = []
    for g in groups:
        both = [p for p in g.shared(g.last()) if p in set(g.shared(0))]
        after, before = g.held_out(name, g.last(), both), g.held_out(name, 0, both)
        if both and g.last() and after is not None and before is not None:
            out.append(paired(after, before, (g.name, "before training")))
    return out


def between(groups: Sequence[Group], name: str) -> list[Paired]:
    """Compare every pair of groups at their last evaluations, on the prompts that both have."""
    out = []
    for a, b in combinations(groups, 2):
        known = set(b.shared(b.last()))
        both = [p for p in a.shared(a.last()) if p in known]
        left, right = a.held_out(name, a.last(), both), b.held_out(name, b.last(), both)
        if both and left is not None and right is not None:
            out.append(paired(left, right, (a.name, b.name)))
    return out


def apart(tables: Sequence[Mapping[str, object]]) -> tuple[list[str], list[str]]:
    """Return the names whose values differ between tables, and the remaining names."""
    names = [k for k in dict.fromkeys(k for t in tables for k in t) if k not in INCIDENTAL]
    differ = [k for k in names if any(t.get(k) != tables[0].get(k) for t in tables)]
    return differ, [k for k in names if k not in differ]
