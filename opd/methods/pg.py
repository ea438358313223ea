"""A configurable policy gradient: any reward, any baseline, any estimator."""

from collections.abc import Callable
from typing import Literal

from opd.losses.baselines import Baseline, Optimal, TopKValue, Value
from opd.losses.estimators import Estimator, Full, Sampled, Stratified
from opd.losses.rewards import (
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
from opd.losses.terms import PolicyGradient
from opd.methods.method import Method

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
    """Policy gradient with any combination of reward, baseline and estimator.  opd project, docs/estimators.md.

    Args:
        reward: Reward of a token.
        baseline: Baseline subtracted from the reward.
        estimator: Tokens that are summed exactly instead of sampled.
        alpha: Exponent of --reward power.
        clip: Bound of --reward clip, in nats.
        scale: Scale of --reward tanh, in nats.
        share: The student's share of the mixture that defines the floor of --reward reopold.
        mix: The teacher's share of the proximal teacher of --reward topd.
        beta: The teacher's share of --reward jsd-plus.
        k: Number of tokens of --baseline topk and --estimator stratified.
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
    """Return the baseline of that name; only `topk` uses k."""
    return {"none": lambda: None, "value": Value, "topk": lambda: TopKValue(k), "optimal": Optimal}[name]()
