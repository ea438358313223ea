"""vOPD in a verl with docs/verl-hooks.patch, as a script: its baseline is over the teacher's top k.

It prints the largest error of the gradient, of any element, against the definition.
"""

import torch
from tensordict import TensorDict
from verl.trainer.distillation import losses
from verl.utils import tensordict_utils
from verl.workers.config import DistillationConfig, DistillationLossConfig, FSDPActorConfig
from verl.workers.utils.padding import no_padding_2_padding

K, PROMPTS, RESPONSES, VOCABULARY = 4, (3, 2), (4, 6), 50


def value(logp: torch.Tensor, teacher_logp: torch.Tensor) -> torch.Tensor:
    """Return -KL on the last axis, both models renormalised on it."""
    p, q = logp.log_softmax(-1), teacher_logp.log_softmax(-1)
    return (p.exp() * (q - p)).sum(-1)


def baseline(*, student_logits, data, config):
    """Return the baseline of each position as verl's logits processors return columns, [1, nnz]."""
    ids, teacher_logp = (data[name].values()[:, :-1] for name in ("teacher_ids", "teacher_logprobs"))
    logp = student_logits[0].detach().log_softmax(-1).gather(-1, ids.long())
    return {"baseline": value(logp, teacher_logp)[None]}


@losses.register_distillation_loss(
    losses.DistillationLossSettings(names=["vopd"], use_topk=True, logits_processor=baseline)
)
def vopd(config, distillation_config, model_output, data):
    student_logp = no_padding_2_padding(model_output["log_probs"], data).detach()
    teacher_logp = no_padding_2_padding(data["teacher_logprobs"], data)[..., -1]  # of the token itself
    return -(teacher_logp - student_logp - no_padding_2_padding(model_output["baseline"], data)), {}


def main() -> None:
    torch.manual_seed(0)
    nest = lambda parts: torch.nested.as_nested_tensor(parts, layout=torch.jagged)
    ids = [torch.randint(0, VOCABULARY, (p + r,)) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    following = [row.roll(-1)[:, None] for row in ids]
    logits = [torch.randn(len(row), VOCABULARY, requires_grad=True) for row in ids]
    teacher = [torch.randn(len(row), VOCABULARY).log_softmax(-1) for row in ids]
    columns = [torch.cat((q.topk(K).indices, y), -1) for q, y in zip(teacher, following, strict=True)]
    logp = [z.log_softmax(-1).gather(-1, y)[:, 0] for z, y in zip(logits, following, strict=True)]
    mask = torch.zeros(2, max(RESPONSES))
    old = torch.zeros(2, max(RESPONSES))
    for i, (p, r) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        mask[i, :r], old[i, :r] = 1, logp[i].detach()[p - 1 : -1]
    batch = {
        "prompts": nest([row[:p] for row, p in zip(ids, PROMPTS, strict=True)]),
        "responses": nest([row[p:] for row, p in zip(ids, PROMPTS, strict=True)]),
        "teacher_ids": nest(columns),
        "teacher_logprobs": nest([q.gather(-1, c) for q, c in zip(teacher, columns, strict=True)]),
        "old_log_probs": old,
        "response_mask": mask,
        "advantages": torch.zeros_like(mask),
    }
    data = TensorDict(batch, batch_size=2)
    tensordict_utils.assign_non_tensor(data, dp_size=1, batch_num_tokens=sum(RESPONSES), global_batch_size=2)
    actor = FSDPActorConfig(
        strategy="fsdp", ppo_micro_batch_size_per_gpu=1, ppo_mini_batch_size=2, rollout_n=1, loss_agg_mode="token-mean"
    )
    chosen = dict(use_policy_gradient=True, use_task_rewards=False, loss_max_clamp=None, log_prob_min_clamp=None)
    configs = {
        name: DistillationConfig(enabled=False, distillation_loss=DistillationLossConfig(loss_mode=name, **chosen))
        for name in ("vopd", "forward_kl_topk")
    }

    packed = torch.cat(logits)[None]
    process = lambda name: losses.distillation_ppo_loss(actor, configs[name], data=data, student_logits=packed)
    found = process("vopd")["baseline"][0].split([len(row) for row in ids])
    output = {"log_probs": nest(logp), "baseline": nest(list(found))}
    loss, _ = losses.distillation_ppo_loss(actor, configs["vopd"], output, data)
    mine = torch.autograd.grad(loss, logits, retain_graph=True)

    wanted = torch.zeros(())
    for z, q, c, y, p in zip(logits, teacher, columns, following, PROMPTS, strict=True):
        at = slice(p - 1, -1)
        token = z.log_softmax(-1).gather(-1, y)[at, 0]
        b = value(z.detach().log_softmax(-1).gather(-1, c[:, :K]), q.gather(-1, c[:, :K]))[at]
        advantage = q.gather(-1, y)[at, 0] - token.detach() - b
        wanted = wanted - (advantage * token).sum() / sum(RESPONSES)
    errors = [(a - b).abs().max() for a, b in zip(mine, torch.autograd.grad(wanted, logits), strict=True)]

    # verl's own top-k loss reads the same columns without the last.
    kl = process("forward_kl_topk")["distillation_losses"][0]
    s, q, c = packed[0].log_softmax(-1), torch.cat(teacher), torch.cat(columns)[:, :K]
    own = (q.gather(-1, c).exp() * (q.gather(-1, c) - s.gather(-1, c))).sum(-1)
    print(float(max(*errors, (kl - own).abs().max())))


if __name__ == "__main__":
    main()
