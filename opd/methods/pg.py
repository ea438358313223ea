"""Methods of the opd project: any reward, baseline and estimator; the optimal baseline; the stratified estimator."""

from collections.abc import Callable
from typing import Literal

from opd.core.types import Column
from opd.losses import rewards
from opd.losses.baselines import Baseline, Optimal, TopKValue, Value
from opd.losses.estimators import Estimator, Full, Sampled, Stratified
from opd.losses.surrogates import Clipped, ImportanceSampling, OffPolicy, Reinforce
from opd.losses.terms import PolicyGradient
from opd.methods.method import Method

Rewards = Literal[
    "log-ratio", "power", "clip", "tanh", "reopold", "topd", "signlog", "sign", "trusted",
    "jsd-plus", "forward-kl-plus", "reverse-kl-plus",
]  # fmt: skip
Baselines = Literal["none", "value", "topk", "optimal"]
Estimators = Literal["sampled", "stratified", "full"]
Surrogates = Literal["reinforce", "importance", "off-policy", "clipped"]


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
    surrogate: Surrogates = "reinforce",
    ratio_clip: float = 0.2,
) -> Method:
    """Policy gradient with any reward, baseline, estimator and surrogate.  opd project, docs/estimators.md.

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
        surrogate: Loss of a token.  All but `reinforce` have a ratio to the policy that generated it, which --updates
            above 1 needs: `importance` and `clipped` to the student that measured the batch, `off-policy` to the
            sampler.
        ratio_clip: Clip range of the ratio of --surrogate clipped.
    """
    of: dict[str, Callable[[], rewards.Reward]] = {
        "log-ratio": rewards.LogRatio,
        "power": lambda: rewards.Power(alpha),
        "clip": lambda: rewards.Clip(-clip, clip),
        "tanh": lambda: rewards.Tanh(scale),
        "reopold": lambda: rewards.Floor(share),
        "topd": lambda: rewards.Proximal(mix),
        "signlog": rewards.SignedLog,
        "sign": rewards.Sign,
        "trusted": rewards.Trusted,
        "jsd-plus": lambda: rewards.JSDPlus(beta),
        "forward-kl-plus": rewards.ForwardKLPlus,
        "reverse-kl-plus": rewards.ReverseKLPlus,
    }
    how: dict[str, Callable[[], Estimator]] = {"sampled": Sampled, "stratified": lambda: Stratified(k), "full": Full}
    losses: dict[str, Callable[[], Column]] = {
        "reinforce": Reinforce,
        "importance": ImportanceSampling,
        "off-policy": OffPolicy,
        "clipped": lambda: Clipped(ratio_clip, ratio_clip),
    }
    chosen = losses[surrogate]()
    return Method((PolicyGradient(of[reward](), baseline_of(baseline, k), how[estimator](), surrogate=chosen),))


def baseline_of(name: Baselines, k: int) -> Baseline | None:
    """Return the baseline of that name; only `topk` uses k."""
    return {"none": lambda: None, "value": Value, "topk": lambda: TopKValue(k), "optimal": Optimal}[name]()


def opd_optimal() -> Method:
    """Log-ratio reward minus the baseline of least variance in logit space.  opd project, docs/estimators.md."""
    return Method((PolicyGradient(baseline=Optimal()),))


def opd_stratified(k: int = 16, baseline: Baselines = "none") -> Method:
    """Sum over the student's top k, sample the rest: full gradient, top-k cost.  opd project, docs/estimators.md.

    Args:
        k: Number of tokens summed exactly (0 is `opd`, the vocabulary size is `opd-full`).
        baseline: Baseline subtracted from the reward of every token.
    """
    return Method((PolicyGradient(baseline=baseline_of(baseline, k), estimator=Stratified(k)),))
