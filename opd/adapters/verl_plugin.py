"""Distillation losses `opd_NAME` of verl: the entry point `verl.plugins`, which verl imports in each of its processes.

With `use_policy_gradient` verl's loss of a token is -(p / p_old) A, and A is the negative of the distillation loss.  So
the loss registered here is the negative of a method's reward.
"""

import os
from collections.abc import Mapping
from functools import partial
from typing import Any

from tensordict import TensorDict
from torch import Tensor
from verl.trainer.distillation.losses import DistillationLossSettings, register_distillation_loss
from verl.utils.metric import AggregationType, Metric
from verl.workers.config import ActorConfig, DistillationConfig
from verl.workers.utils.padding import no_padding_2_padding

from opd.adapters.verl import CUSTOM_LOSS, METHOD_VARIABLE, loss_name, method_of_words, misfits
from opd.core.errors import Refusal
from opd.losses.rewards import Reward
from opd.losses.terms import PolicyGradient
from opd.methods import METHODS
from opd.methods.method import Method


def negative_reward(
    config: ActorConfig,
    distillation_config: DistillationConfig,
    model_output: Mapping[str, Any],
    data: TensorDict,
    *,
    reward: Reward,
) -> tuple[Tensor, dict[str, Any]]:
    """Return the negative reward of each response token, [B, T], and the mean log p - log q, in nats, for the log."""
    if not distillation_config.distillation_loss.use_policy_gradient:
        raise Refusal(
            "distillation.distillation_loss.use_policy_gradient=False: a loss of opd is the reward of a sampled token, "
            "which has no gradient; set it to True"
        )
    student_logp = no_padding_2_padding(model_output["log_probs"], data).detach()
    teacher_logp = no_padding_2_padding(data["teacher_logprobs"], data).squeeze(-1)
    mask = data["response_mask"]
    mask = (mask.to_padded_tensor(0) if mask.is_nested else mask).bool()
    gap = (student_logp - teacher_logp)[mask]
    metrics = {"distillation/reverse_kl": Metric(AggregationType.MEAN, gap.mean())} if len(gap) else {}
    return -reward(student_logp, teacher_logp).where(mask, 0), metrics


def register(name: str, method: Method) -> None:
    """Register the reward of a method under a name that `distillation.distillation_loss.loss_mode` can have."""
    (term,) = method.terms
    assert isinstance(term, PolicyGradient)
    settings = DistillationLossSettings(names=[name], use_estimator=True)
    register_distillation_loss(settings)(partial(negative_reward, reward=term.reward))


for listed, factory in METHODS.items():
    if not any(misfits(factory())):
        register(loss_name(listed), factory())
if words := os.environ.get(METHOD_VARIABLE):
    register(CUSTOM_LOSS, method_of_words(words))
