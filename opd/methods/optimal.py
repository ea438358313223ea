"""Methods of the opd project: the variance-optimal baseline and the stratified estimator."""

from opd.losses.baselines import Optimal
from opd.losses.estimators import Stratified
from opd.losses.terms import PolicyGradient
from opd.methods.method import Method
from opd.methods.pg import Baselines, baseline_of


def opd_optimal() -> Method:
    """Log-ratio reward minus the baseline of least variance in logit space.  opd project, docs/estimators.md."""
    return Method((PolicyGradient(baseline=Optimal()),))


def opd_stratified(k: int = 16, baseline: Baselines = "none") -> Method:
    """Sum over the student's top-k tokens, sample the rest: full gradient, top-k cost.  opd project,
    docs/estimators.md.

    Args:
        k: Number of tokens summed exactly (0 is `opd`, the vocabulary size is `opd-full`).
        baseline: Baseline subtracted from the reward of every token.
    """
    return Method((PolicyGradient(baseline=baseline_of(baseline, k), estimator=Stratified(k)),))
