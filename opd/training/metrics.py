"""Metrics of a training step: pure functions of the batch that return named numbers, in nats, tokens or shares."""

from collections.abc import Collection, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opd.core.sampling import Prompt
from opd.core.types import Batch
from opd.losses.terms import Target
from opd.methods.rollout_policies.snapshot import measured_drift


def summary(batch: Batch) -> dict[str, float]:
    """Return the metrics of a batch.  Means are over trained tokens, except for metrics of responses."""
    mask = batch.mask
    lengths = mask.sum(1).float()
    out = {
        "tokens": float(mask.sum()),
        "length": float(lengths.mean()),
        "length_max": float(lengths.max()),
        "stopped": float(batch.stopped.float().mean()),
        "outcome": float(batch.outcome.float().mean()),
    }
    if not mask.any():
        return out
    columns = ("reverse_kl", "student_entropy", "teacher_entropy", "student_logp", "teacher_logp")
    for name in (*columns, "hidden_distance", "hidden_cosine"):
        if (column := getattr(batch, name)) is not None:
            out[name] = float(column[mask].mean())
    if batch.student_entropy is not None and batch.teacher_entropy is not None:
        out["entropy_gap"] = float((batch.student_entropy - batch.teacher_entropy)[mask].abs().mean())
    if batch.reverse_kl is not None:
        out |= {f"reverse_kl_{part}": value for part, value in by_third(batch.reverse_kl, mask).items()}
    out["repetition"] = repetition(batch.ids, mask)
    if batch.student_logp is not None:
        gap = (batch.student_logp - batch.sampler_logp)[batch.written()]
        if len(gap) and not {"beta", "staleness"} & batch.notes.keys():
            out["sampler_gap"] = float(gap.abs().max())  # trainer to sampler, nats; an error unless 0 up to rounding
        if len(gap):
            out["sampler_ess"] = effective_share(gap.exp())  # of the ratios p / mu; 1 if on-policy
            out |= mismatch(gap)
    if batch.student_logp is not None and batch.teacher_logp is not None:
        accepted = (batch.teacher_logp - batch.student_logp)[mask].clamp(max=0).exp()
        out["rejected"] = float(1 - accepted.mean())  # by speculative decoding; on policy: total variation
    return out


def advantages(batch: Batch, targets: Sequence[Target]) -> dict[str, float]:
    """Return statistics of each term's advantages: of those of its target, else of the head pass's scores."""
    out: dict[str, float] = {}
    for i, (score, target) in enumerate(zip(batch.scores, targets, strict=True)):
        advantage = score if target.advantage is None else target.advantage
        if advantage is not None and batch.mask.any():
            suffix, trained_advantages = f"_{i}" if len(targets) > 1 else "", advantage[batch.mask]
            out[f"advantage{suffix}"] = float(trained_advantages.mean())
            out[f"advantage_std{suffix}"] = float(trained_advantages.std(correction=0))
            ordered = trained_advantages.sort().values
            out[f"advantage_p1{suffix}"] = float(ordered[round(0.01 * (len(ordered) - 1))])
            out[f"advantage_p99{suffix}"] = float(ordered[round(0.99 * (len(ordered) - 1))])
            out[f"advantage_max{suffix}"] = float(trained_advantages.abs().max())
    return out


def mismatch(gap: Float[Tensor, " n"]) -> dict[str, float]:
    """Return statistics of gap = log p - log mu, where p is the trainer's and mu the sampler's probability.

    They are the mean absolute gap in nats, KL(mu || p) by the k3 estimator p/mu - 1 - gap, and the largest p/mu.
    k3: Schulman, "Approximating KL divergence", 2020; unbiased under mu, and never negative.
    """
    gap = gap.double()
    return {
        "sampler_gap_mean": float(gap.abs().mean()),
        "sampler_kl": float((gap.expm1() - gap).mean()),
        "sampler_ratio_max": float(gap.max().exp()),
    }


def by_third(column: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> dict[str, float]:
    """Return the mean of a column over the first, middle and last third of each response's trained tokens."""
    third = 3 * (mask.cumsum(1) - 1) // mask.sum(1, keepdim=True).clamp(min=1)
    parts = {name: mask & (third == i) for i, name in enumerate(("first", "middle", "last"))}
    return {name: float(column[part].mean()) for name, part in parts.items() if part.any()}


def effective_share(weights: Float[Tensor, " n"]) -> float:
    """Return the effective sample size as a share, (sum w)^2 / (n sum w^2): 1 for equal w, 1/n for a single one."""
    return float(weights.sum().square() / (len(weights) * weights.square().sum())) if weights.any() else 0.0


def repetition(ids: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"], n: int = 4) -> float:
    """Return the share of repeated n-grams in a response up to its last trained token, as mean over responses."""
    shares = []
    for row, is_response in zip(ids, mask.flip(1).cumsum(1).flip(1) > 0, strict=True):
        tokens = row[is_response].tolist()
        grams = list(zip(*(tokens[i:] for i in range(n)), strict=False))
        shares.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    return sum(shares) / len(shares) if shares else 0.0


def top_k_overlap(
    ids: Int[Tensor, "B T A"],
    student_logp: Float[Tensor, "B T A"],
    teacher_logp: Float[Tensor, "B T A"],
    mask: Bool[Tensor, "B T"],
) -> dict[str, float]:
    """Return the overlap of the two models' top-k tokens, and each model's probability mass on the overlap.

    `ids` [B, T, A] holds the student's top k, then the teacher's, with A = 2k.  The result is empty if the teacher has
    no list (its log-probs are nan).  Rethinking OPD, arXiv:2604.13016.
    """
    if not mask.any() or teacher_logp[mask].isnan().any():
        return {}
    k = ids.shape[-1] // 2
    student_ids, teacher_ids = ids[mask].split(k, -1)
    is_shared = (student_ids[:, :, None] == teacher_ids[:, None, :]).any(-1)
    mass = lambda logp: float(logp[mask][:, :k].exp().where(is_shared, 0).sum(-1).mean())
    return {
        f"top{k}_overlap": float(is_shared.float().mean()),
        f"top{k}_student_mass": mass(student_logp),
        f"top{k}_teacher_mass": mass(teacher_logp),
    }


def rollout_metrics(batch: Batch) -> dict[str, float]:
    """Return metrics of the rollout policy from the sampler's notes: blending, cuts, staleness, teacher prefixes."""
    notes, mask, out = batch.notes, batch.mask, {}
    if "beta" in notes and mask.any():
        beta = notes["beta"][mask]
        out["beta"], out["beta_one"] = float(beta.mean()), float((beta == 1).float().mean())  # 1: the teacher generates
        out["behavior_kl"] = float(notes["behavior_kl"][mask].mean())  # KL(mu || student), nats
    if "cut" in notes:
        cut = notes["cut"]
        out["cut"] = float((cut > 0).float().mean())  # share of rollouts
        out["cut_tokens"] = float(cut.sum() / (cut.sum() + mask.sum()).clamp(min=1))  # share of sampled tokens
    if "staleness" in notes:
        out["staleness"], out["staleness_max"] = float(notes["staleness"].mean()), float(notes["staleness"].max())
        if (drift := measured_drift(batch)) is not None:
            out["drift"] = drift  # KL(student || weights that generated it), nats
    if "admitted" in notes:
        out["admitted"] = float(notes["admitted"].mean())  # share of the pool that passes the policy's filter
    if "threshold" in notes:
        out["threshold"] = float(notes["threshold"].mean())  # nats
    if "prefix_limit" in notes and batch.prefix is not None:
        prefix = torch.arange(mask.shape[1]) < batch.prefix[:, None]
        out["prefix_limit"] = float(notes["prefix_limit"].float().mean())
        out["prefix_length"] = float(batch.prefix.float().mean())
        out["prefix_share"] = float((mask & prefix).sum() / mask.sum().clamp(min=1))  # share of trained tokens
    return out


def weight_metrics(targets: Sequence[Target], mask: Bool[Tensor, "B T"]) -> dict[str, float]:
    """Return for each term the share of trained tokens with a weight other than 0, and the effective share."""
    out = {}
    for i, target in enumerate(targets):
        suffix, w = f"_{i}" if len(targets) > 1 else "", target.weight[mask]
        out[f"weighted{suffix}"] = float((w != 0).float().mean()) if len(w) else 0.0
        out[f"effective{suffix}"] = effective_share(w)
    return out


def by_teacher(batch: Batch, names: Collection[str], teachers: Sequence[str]) -> dict[str, float]:
    """Return the reverse KL to each of several teachers, `names`; `teachers` holds the teacher of each row."""
    if len(names) < 2 or batch.reverse_kl is None:
        return {}
    masks = {name: batch.mask & torch.tensor([t == name for t in teachers])[:, None] for name in names}
    means = {name: float(batch.reverse_kl[mask].mean()) for name, mask in masks.items() if mask.any()}
    return {f"reverse_kl.{name or 'teacher'}": mean for name, mean in means.items()}


TASKS = ("task", "data_source", "source", "subject", "domain")  # prompt columns that may name the task
MOST_TASKS = 16  # a column with more values in a batch is not taken for a task name


def by_task(batch: Batch, prompts: Sequence[Prompt]) -> dict[str, float]:
    """Return reverse KL, outcome and length of each task, by the first column of TASKS with several values."""
    for column in TASKS:
        names = [p.columns.get(column) for p in prompts]
        tasks = sorted({n for n in names if isinstance(n, str)})
        if not 1 < len(tasks) <= MOST_TASKS:
            continue
        out = {}
        for task in tasks:
            rows = torch.tensor([n == task for n in names])
            mask = batch.mask & rows[:, None]
            out[f"outcome.{task}"] = float(batch.outcome[rows].float().mean())
            out[f"length.{task}"] = float(mask.sum() / rows.sum())
            if batch.reverse_kl is not None and mask.any():
                out[f"reverse_kl.{task}"] = float(batch.reverse_kl[mask].mean())
        return out
    return {}


def evaluation_metrics(batch: Batch) -> dict[str, float]:
    """Return the metrics of held-out rollouts: reverse KL in nats per token with its standard error, and lengths."""
    name, column, numbers = "reverse_kl", batch.reverse_kl, {}
    if batch.student_logp is not None and batch.teacher_logp is not None and column is None:
        # The teacher scores only the sampled tokens, so the full KL cannot be computed.
        name, column = "log_ratio", batch.student_logp - batch.teacher_logp
    if column is not None:
        numbers[f"eval_{name}"] = float(column[batch.mask].mean())
        numbers[f"eval_{name}_se"] = standard_error(column, batch.mask)
    numbers["eval_length"] = float(batch.mask.sum(1).float().mean())
    numbers["eval_stopped"] = float(batch.stopped.float().mean())
    for name, column in (("hidden_distance", batch.hidden_distance), ("hidden_cosine", batch.hidden_cosine)):
        if column is not None:
            numbers[f"eval_{name}"] = float(column[batch.mask].mean())
    return numbers


def standard_error(column: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> float:
    """Return the standard error of the mean over responses of their token means; 0 for a single response.

    Tokens of a response are not independent, so the error is over responses.
    """
    means = (column.where(mask, 0).sum(1) / mask.sum(1).clamp(min=1))[mask.any(1)]
    return float(means.std() / len(means) ** 0.5) if len(means) > 1 else 0.0
