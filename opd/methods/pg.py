"""A policy gradient of one's own: any reward, any baseline, any estimator."""

from collections.abc import Callable
from typing import Literal

from opd.estimators import Baseline, Estimator, Full, Optimal, Sampled, Stratified, TopKValue, Value
from opd.method import Method, PolicyGradient
from opd.rewards import (
    Clip,
    Floor,
    ForwardKLPlus,
    JSDPlus,
    LogRatio,
    Power,
    Proximal,
    ReverseKLPlus,
    Reward,
    Sign,
    SignedLog,
    Tanh,
    Trusted,
)

Rewards = Literal[
    "log-ratio",
    "power",
    "clip",
    "tanh",
    "reopold",
    "topd",
    "signlog",
    "sign",
    "trusted",
    "jsd-plus",
    "forward-kl-plus",
    "reverse-kl-plus",
]
Baselines = Literal["none", "value", "topk", "optimal"]
Estimators = Literal["sampled", "stratified", "full"]


def pg(
    reward: Rewards = "log-ratio",
    baseline: Baselines = "none",
    estimator: Estimators = "sampled",
    alpha: float = 5.0,
    clip: float = 1.0,
    scale: float = 5.0,
    share: float = 0.3,
    mix: float = 0.1,
    beta: float = 0.5,
    k: int = 16,
) -> Method:
    """Any reward with any baseline and any estimator.  opd project, docs/estimators.md.

    Args:
        reward: what the teacher pays.
        baseline: what is subtracted.
        estimator: what is summed instead of sampled.
        alpha: power of --reward power.
        clip: bound of --reward clip (nats).
        scale: scale of --reward tanh (nats).
        share: the student's share of the mixture behind the floor of --reward reopold.
        mix: the teacher's share of the proximal teacher of --reward topd.
        beta: the teacher's share of --reward jsd-plus.
        k: tokens of --baseline topk and --estimator stratified.
    """
    rewards: dict[str, Callable[[], Reward]] = {
        "log-ratio": LogRatio,
        "power": lambda: Power(alpha),
        "clip": lambda: Clip(-clip, clip),
        "tanh": lambda: Tanh(scale),
        "reopold": lambda: Floor(share),
        "topd": lambda: Proximal(mix),
        "signlog": SignedLog,
        "sign": Sign,
        "trusted": Trusted,
        "jsd-plus": lambda: JSDPlus(beta),
        "forward-kl-plus": ForwardKLPlus,
        "reverse-kl-plus": ReverseKLPlus,
    }
    how: dict[str, Callable[[], Estimator]] = {"sampled": Sampled, "stratified": lambda: Stratified(k), "full": Full}
    return Method((PolicyGradient(rewards[reward](), baseline_of(baseline, k), how[estimator]()),))


def baseline_of(name: Baselines, k: int) -> Baseline | None:
    """The baseline of that name; k is of `topk`."""
    return {"none": lambda: None, "value": Value, "topk": lambda: TopKValue(k), "optimal": Optimal}[name]()
