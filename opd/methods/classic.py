"""Baseline methods: sampled-token OPD, full-vocabulary and top-k matching, GKD, and post-hoc reward shaping."""

from collections.abc import Callable
from typing import Literal

from opd.core.types import DATA, TEACHER, Column
from opd.losses.advantages import Discount, DiscountExpected, Whiten
from opd.losses.divergences import (
    JSD,
    BucketKL,
    Divergence,
    ForwardKL,
    GeneralisedKL,
    RenormalisedKL,
    ReverseKL,
    Support,
    SupportMeanKL,
)
from opd.losses.rewards import Clip, Tanh
from opd.losses.terms import Match, PolicyGradient
from opd.methods.method import Method
from opd.methods.rollout_policies.base import RolloutPolicy
from opd.methods.rollout_policies.on_policy import Mixture, OnPolicy


def opd(gamma: float = 0.0, future: Literal["sampled", "expected"] = "sampled") -> Method:
    """Policy gradient with the log-ratio reward on sampled tokens.  Thinking Machines, "On-Policy Distillation" (2025).

    Args:
        gamma: Discount of future rewards, in [0, 1].  0 rewards each token by its log ratio only; 1 gives the
            sequence-KL gradient, unbiased with --reduction constant.
        future: How future rewards enter if gamma > 0.  `sampled` uses the log ratios of the later tokens, `expected`
            their conditional means -KL.
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma={gamma}: the discount lies in [0, 1]")
    steps: dict[str, Column] = {"sampled": Discount(gamma), "expected": DiscountExpected(gamma)}
    return Method((PolicyGradient(transforms=(steps[future],) if gamma else ()),))


def opd_full() -> Method:
    """Reverse KL over the whole vocabulary, differentiated.  The single-step term of MiniLLM, arXiv:2306.08543."""
    return Method((Match(ReverseKL()),))


def opd_topk(
    k: int = 16,
    support: Literal["student", "teacher"] = "student",
    tail: Literal["bucket", "renorm", "generalised"] = "bucket",
) -> Method:
    """Reverse KL on the top-k tokens and the rest.  verl issue 7856; generalised: MOPD, arXiv:2606.30406, Eq. 5.

    `rethinking-opd` is the published top-k loss.

    Args:
        k: Number of tokens in the support.
        support: Model whose most probable tokens form the support (MOPD uses the teacher's 64).
        tail: Treatment of the mass outside the support.  `bucket` adds a class for it, `renorm` renormalises both
            models on the support, `generalised` adds -p + q to each summand.
    """
    leaves: dict[str, Callable[[Support], Divergence]] = {
        "bucket": BucketKL,
        "renorm": RenormalisedKL,
        "generalised": GeneralisedKL,
    }
    return Method((Match(leaves[tail](Support(k, support))),))


def rethinking_opd(k: int = 16) -> Method:
    """Policy gradient on each of the student's top k tokens, weighted by p.  Rethinking OPD, arXiv:2604.13016.

    The loss is -sum_v sg[w_v (log q_v - log p_v)] log p_v, w the student's probabilities renormalised on its top k.
    Its gradient is that of `opd-topk --tail generalised`, divided by the student's mass on the top k.

    Args:
        k: Number of the student's most probable tokens.
    """
    return Method((Match(SupportMeanKL(Support(k))),))


def _mixture(share: float, other: Literal["teacher", "response"]) -> RolloutPolicy:
    return OnPolicy() if share == 1 else Mixture(share, {"teacher": TEACHER, "response": DATA}[other])


def gkd(beta: float = 0.5, share: float = 1.0, other: Literal["teacher", "response"] = "teacher") -> Method:
    """Jensen-Shannon divergence over the whole vocabulary.  GKD, arXiv:2306.13649, Eq. 1 and Algorithm 1.

    Args:
        beta: Weight of the teacher in the mixture, inside (0, 1).
        share: Share of rollouts that the student generates (the paper's lambda).
        other: Source of the remaining rollouts: `teacher` generates them, `response` takes the data's response column.
    """
    return Method((Match(JSD(beta)),), rollouts=_mixture(share, other))


def gkd_forward(share: float = 1.0, other: Literal["teacher", "response"] = "teacher") -> Method:
    """KL(teacher || student) over the whole vocabulary: mass covering.  GKD, arXiv:2306.13649, Section 3.

    Args:
        share: Share of rollouts that the student generates (the paper's lambda).
        other: Source of the remaining rollouts: `teacher` generates them, `response` takes the data's response column.
    """
    return Method((Match(ForwardKL()),), rollouts=_mixture(share, other))


def gkd_reverse(share: float = 1.0, other: Literal["teacher", "response"] = "teacher") -> Method:
    """KL(student || teacher) over the whole vocabulary: mode seeking.  GKD, arXiv:2306.13649, Section 3.

    Args:
        share: Share of rollouts that the student generates (the paper's lambda).
        other: Source of the remaining rollouts: `teacher` generates them, `response` takes the data's response column.
    """
    return Method((Match(ReverseKL()),), rollouts=_mixture(share, other))


def opd_clip(low: float = -1.0, high: float = 1.0) -> Method:
    """Log-ratio reward clipped to [low, high].  Post-hoc baseline of PowerOPD, arXiv:2606.17199, Table 1.

    Args:
        low: Lower bound of the reward, in nats.
        high: Upper bound of the reward, in nats.
    """
    return Method((PolicyGradient(Clip(low, high)),))


def opd_tanh(scale: float = 5.0) -> Method:
    """Log-ratio reward r compressed to tanh(r / scale).  Post-hoc baseline of PowerOPD, arXiv:2606.17199, Table 1.

    Args:
        scale: Reward at which tanh begins to saturate, in nats.  5 is from the authors' code; the paper gives none.
    """
    return Method((PolicyGradient(Tanh(scale)),))


def opd_zscore() -> Method:
    """Log-ratio reward standardised over the batch.  Post-hoc baseline of PowerOPD, arXiv:2606.17199, Table 1."""
    return Method((PolicyGradient(transforms=(Whiten(),)),))
