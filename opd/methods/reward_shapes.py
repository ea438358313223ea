"""Alternatives to the log-ratio reward: bounded, compressed, a sign, extrapolated, or of any f-divergence."""

from collections.abc import Callable
from typing import Literal

from opd.core.types import Column
from opd.losses.advantages import GroupWhiten, MeanFuture
from opd.losses.rewards import Floor, ForwardKLPlus, JSDPlus, Power, Proximal, ReverseKLPlus, Reward, Sign, SignedLog
from opd.losses.surrogates import Clipped, Reinforce
from opd.losses.target_distribution import Extrapolated
from opd.losses.terms import PolicyGradient
from opd.methods.method import Method
from opd.methods.pg import Baselines, baseline_of


def poweropd(alpha: float = 5.0) -> Method:
    """Bounded reward q^alpha - p^alpha instead of the log ratio.  PowerOPD, arXiv:2606.17199, Eq. 4.

    Args:
        alpha: Exponent, above 0.  Larger values focus on tokens to which either model gives a high probability (paper:
            0.1 to 500; the authors' script: 5).
    """
    return Method((PolicyGradient(Power(alpha)),))


def reopold(share: float = 0.3) -> Method:
    """Log-ratio reward with a lower bound, which limits the penalty of a token.  Reopold, arXiv:2603.11137, Eq. 7.

    Args:
        share: The student's share of the mixture whose limit is the bound log(share) / (1 - share), the paper's lambda.
            0.3, from the code of vOPD's authors, gives -1.72 nats.
    """
    return Method((PolicyGradient(Floor(share)),))


def topd(alpha: float = 0.1, future: bool = False, whiten: bool = False, clip: float = 0.0) -> Method:
    """Log ratio to a proximal teacher, log(alpha q/p + 1 - alpha).  TOP-D, arXiv:2607.04751.

    The paper's method is --future --whiten --clip 0.2 with 8 rollouts per prompt, which --preset paper sets.

    Args:
        alpha: The teacher's share of the proximal teacher (paper: 0.1 to 0.2).  The reward is at least log(1 - alpha).
        future: Add the mean of the rollout's later rewards, as in the paper.
        whiten: Standardise over all tokens of a prompt's rollouts, as in the paper.
        clip: Clip range of the importance ratio, for several --updates (paper: 0.2).  0 leaves the ratio out.
    """
    transforms: tuple[Column, ...] = (*[MeanFuture()] * future, *[GroupWhiten()] * whiten)
    surrogate = Clipped(clip, clip) if clip else Reinforce()
    return Method((PolicyGradient(Proximal(alpha), transforms=transforms, surrogate=surrogate),))


def opd_signlog() -> Method:
    """Log-ratio reward r compressed to sign(r) log(1 + |r|).  Demystifying OPD, arXiv:2607.13399."""
    return Method((PolicyGradient(SignedLog()),))


def opd_tv() -> Method:
    """Sign of the log ratio: descends the total variation.  TV-OPD without its global scale, arXiv:2609.08341."""
    return Method((PolicyGradient(Sign()),))


def opd_plus(f: Literal["jsd", "forward-kl", "reverse-kl"] = "jsd", beta: float = 0.5) -> Method:
    """Reward u f'(u) - f(u), u = q/p: the exact gradient of any f-divergence.  OPD+, arXiv:2606.01039.

    Args:
        f: Divergence that is minimised.  `reverse-kl` is `opd` minus a constant.
        beta: The teacher's share of --f jsd, inside (0, 1).
    """
    rewards: dict[str, Callable[[], Reward]] = {
        "jsd": lambda: JSDPlus(beta),
        "forward-kl": ForwardKLPlus,
        "reverse-kl": ReverseKLPlus,
    }
    return Method((PolicyGradient(rewards[f]()),))


def g_opd(strength: float = 1.25, baseline: Baselines = "none") -> Method:
    """Reward strength (log q - log b) - (log p - log b), b the --reference model.  G-OPD, arXiv:2602.12125.

    Args:
        strength: Extrapolation factor, the paper's lambda.  1 is `opd`, above 1 goes beyond the teacher (ExOPD, 1.25),
            below 1 stays closer to the reference.
        baseline: Baseline subtracted from the reward.
    """
    return Method((PolicyGradient(baseline=baseline_of(baseline, 16), against=Extrapolated(strength)),))
