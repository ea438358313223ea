"""Ours: the variance-optimal baseline and the stratified estimator."""

from typing import Literal

from opd.estimators import Baseline, Full, Optimal, Sampled, Stratified, TopKValue, Value
from opd.method import Method, PolicyGradient
from opd.rewards import Clip, LogRatio, Power, Tanh

Rewards = Literal["log-ratio", "power", "clip", "tanh"]
Baselines = Literal["none", "value", "topk", "optimal"]
Estimators = Literal["sampled", "stratified", "full"]


def opd_optimal() -> Method:
    """Log-ratio reward minus the baseline of least variance in logit space.  opd project; see docs, "Estimators"."""
    return Method((PolicyGradient(baseline=Optimal()),))


def opd_stratified(k: int = 16, baseline: Baselines = "none") -> Method:
    """Exact on the student's top k, sampled elsewhere: the full gradient at top-k cost.  opd project; "Estimators".

    Args:
        k: tokens summed exactly (0 is `opd`, the vocabulary size is `opd-full`).
        baseline: subtracted from the reward of every token.
    """
    return Method((PolicyGradient(baseline=_baseline(baseline, k), estimator=Stratified(k)),))


def pg(
    reward: Rewards = "log-ratio",
    baseline: Baselines = "none",
    estimator: Estimators = "sampled",
    alpha: float = 5.0,
    clip: float = 1.0,
    scale: float = 5.0,
    k: int = 16,
) -> Method:
    """Any reward with any baseline and any estimator.  Compose your own policy gradient; opd project, "Estimators".

    Args:
        reward: what the teacher pays.
        baseline: what is subtracted.
        estimator: what is summed instead of sampled.
        alpha: power of --reward power.
        clip: bound of --reward clip (nats).
        scale: scale of --reward tanh (nats).
        k: tokens of --baseline topk and --estimator stratified.
    """
    rewards = {
        "log-ratio": LogRatio,
        "power": lambda: Power(alpha),
        "clip": lambda: Clip(-clip, clip),
        "tanh": lambda: Tanh(scale),
    }
    how = {"sampled": Sampled, "stratified": lambda: Stratified(k), "full": Full}
    return Method((PolicyGradient(rewards[reward](), _baseline(baseline, k), how[estimator]()),))


def _baseline(name: Baselines, k: int) -> Baseline | None:
    return {"none": lambda: None, "value": Value, "topk": lambda: TopKValue(k), "optimal": Optimal}[name]()
