"""Comparisons of runs: paired differences on the same held-out prompts, and the settings in which runs differ."""

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np

from opd.analysis.evaluate import EvaluationScores
from opd.core.intervals import Paired, paired
from opd.training.run_log import INCIDENTAL, RunGroup


def compare_scores(a: tuple[str, EvaluationScores], b: tuple[str, EvaluationScores]) -> dict[str, Paired]:
    """Return the paired difference of two models on the same problems, for each measure by name."""
    (first_name, first), (second_name, second) = a, b
    assert first.prompts == second.prompts
    second_values = second.each()
    return {
        name: paired(np.array([values]), np.array([second_values[name]]), (first_name, second_name))
        for name, values in first.each().items()
    }


def training_effects(groups: Sequence[RunGroup], name: str) -> list[Paired]:
    """Return the effect of training: the last evaluation of each group minus its evaluation at step 0."""
    out = []
    for g in groups:
        common_prompts = [p for p in g.shared(g.last()) if p in set(g.shared(0))]
        final, initial = g.held_out(name, g.last(), common_prompts), g.held_out(name, 0, common_prompts)
        if common_prompts and g.last() and final is not None and initial is not None:
            out.append(paired(final, initial, (g.name, "before training")))
    return out


def group_differences(groups: Sequence[RunGroup], name: str) -> list[Paired]:
    """Compare every pair of groups at their last evaluations, on the prompts that both have."""
    out = []
    for a, b in combinations(groups, 2):
        second_prompts = set(b.shared(b.last()))
        common_prompts = [p for p in a.shared(a.last()) if p in second_prompts]
        first, second = a.held_out(name, a.last(), common_prompts), b.held_out(name, b.last(), common_prompts)
        if common_prompts and first is not None and second is not None:
            out.append(paired(first, second, (a.name, b.name)))
    return out


def differing_settings(tables: Sequence[Mapping[str, object]]) -> tuple[list[str], list[str]]:
    """Return the names whose values differ between tables, and the remaining names."""
    names = [k for k in dict.fromkeys(k for t in tables for k in t) if k not in INCIDENTAL]
    differ = [k for k in names if any(t.get(k) != tables[0].get(k) for t in tables)]
    return differ, [k for k in names if k not in differ]
