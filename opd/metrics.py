"""What a step looked like: pure functions of the batch, `(columns) -> named numbers`.  Nats, tokens, shares."""

from jaxtyping import Bool, Float
from torch import Tensor

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
    for name in ("reverse_kl", "student_entropy", "teacher_entropy", "student_logp", "teacher_logp"):
        column = getattr(batch, name)
        if column is not None:
            out[name] = float(column[mask].mean())
    if batch.student_logp is not None:
        gap = (batch.student_logp - batch.sampler_logp)[mask]
        out["sampler_gap"] = float(gap.abs().max())  # trainer against sampler: 0 up to rounding, or something is wrong
    for i, score in enumerate(batch.scores):
        if score is not None:
            suffix = f"_{i}" if len(batch.scores) > 1 else ""
            out[f"advantage{suffix}"] = float(score[mask].mean())
            out[f"advantage_std{suffix}"] = float(score[mask].std(correction=0))
    return out


def standard_error(column: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> float:
    """Of the mean over responses of each one's mean: tokens of a response are not independent; 0 for one response."""
    means = (column.where(mask, 0).sum(1) / mask.sum(1).clamp(min=1))[mask.any(1)]
    return float(means.std() / len(means) ** 0.5) if len(means) > 1 else 0.0
