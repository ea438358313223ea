"""What a step looked like: pure functions of the batch, `(columns) -> named numbers`.  Nats, tokens, shares."""

from collections.abc import Collection, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from opd.method import Target
from opd.types import Batch


def summary(batch: Batch) -> dict[str, float]:
    """The numbers of one batch; means are over trained tokens, unless they are about responses."""
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
        column = getattr(batch, name)
        if column is not None:
            out[name] = float(column[mask].mean())
    if batch.student_logp is not None:
        own = mask if batch.prefix is None else mask & (torch.arange(mask.shape[1]) >= batch.prefix[:, None])
        gap = (batch.student_logp - batch.sampler_logp)[own]
        if len(gap) and "beta" not in batch.notes:
            out["sampler_gap"] = float(gap.abs().max())  # trainer against sampler: 0 up to rounding, or it is wrong
    if batch.student_logp is not None and batch.teacher_logp is not None:
        accepted = (batch.teacher_logp - batch.student_logp)[mask].clamp(max=0).exp()
        out["rejected"] = float(1 - accepted.mean())  # by a teacher that speculates: on policy the total variation
    for i, score in enumerate(batch.scores):
        if score is not None:
            suffix = f"_{i}" if len(batch.scores) > 1 else ""
            out[f"advantage{suffix}"] = float(score[mask].mean())
            out[f"advantage_std{suffix}"] = float(score[mask].std(correction=0))
    return out


def speaking(batch: Batch) -> dict[str, float]:
    """What the rollout policy did, by what the sampler noted: blending, cuts, the teacher's prefixes."""
    notes, mask, out = batch.notes, batch.mask, {}
    if "beta" in notes and mask.any():
        beta = notes["beta"][mask]
        out["beta"], out["beta_one"] = float(beta.mean()), float((beta == 1).float().mean())  # 1: the teacher speaks
        out["behavior_kl"] = float(notes["behavior_kl"][mask].mean())  # KL(mu || student), nats
    if "cut" in notes:
        cut = notes["cut"]
        out["cut"] = float((cut > 0).float().mean())  # share of rollouts
        out["cut_tokens"] = float(cut.sum() / (cut.sum() + mask.sum()).clamp(min=1))  # of the tokens that were sampled
    if "threshold" in notes:
        out["threshold"] = float(notes["threshold"].mean())  # nats
    if "prefix_limit" in notes and batch.prefix is not None:
        prefix = torch.arange(mask.shape[1]) < batch.prefix[:, None]
        out["prefix_limit"] = float(notes["prefix_limit"].float().mean())
        out["prefix_length"] = float(batch.prefix.float().mean())
        out["prefix_share"] = float((mask & prefix).sum() / mask.sum().clamp(min=1))  # of trained tokens
    return out


def weighting(targets: Sequence[Target], mask: Bool[Tensor, "B T"]) -> dict[str, float]:
    """How each term spreads over the trained tokens: the share that it weighs at all, and the effective share.

    The latter is (sum w)^2 / (n sum w^2): 1 where all weigh the same, 1/n where one has all the weight.
    """
    out = {}
    for i, target in enumerate(targets):
        suffix, w = f"_{i}" if len(targets) > 1 else "", target.weight[mask]
        some = bool((w != 0).any())
        out[f"weighted{suffix}"] = float((w != 0).float().mean()) if some else 0.0
        out[f"effective{suffix}"] = float(w.sum().square() / (len(w) * w.square().sum())) if some else 0.0
    return out


def by_teacher(batch: Batch, names: Collection[str], teachers: Sequence[str]) -> dict[str, float]:
    """Reverse KL to each teacher that has a row here, given all names and that of each row; nothing if there is one."""
    if len(names) < 2 or batch.reverse_kl is None:
        return {}
    out = {}
    for name in names:
        mask = batch.mask & torch.tensor([t == name for t in teachers])[:, None]
        if mask.any():
            out[f"reverse_kl.{name or 'teacher'}"] = float(batch.reverse_kl[mask].mean())
    return out


def standard_error(column: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> float:
    """Of the mean over responses of each one's mean: tokens of a response are not independent; 0 for one response."""
    means = (column.where(mask, 0).sum(1) / mask.sum(1).clamp(min=1))[mask.any(1)]
    return float(means.std() / len(means) ** 0.5) if len(means) > 1 else 0.0
