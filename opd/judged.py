"""Weights `(columns) -> [B T]` and transforms `(x [B T], columns) -> [B T]` that use a judge's or a teacher's texts.

The columns are those of `types.ASKED`.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Posterior:
    """(agreement + alpha pbar) / (texts + alpha) on audited chunks, else 0.  OmniOPD, arXiv:2606.01476, Eq. 4-5.

    `agreement` sums the similarity of the chunk to each text of a text-only teacher.  pbar is the geometric mean of p
    over the chunk.  `apart` scales the weight so that a token mean becomes a mean over the audited tokens.
    """

    texts: int = 10
    alpha: float = 1.0
    apart: bool = False

    def __post_init__(self) -> None:
        if not self.alpha >= 0:
            raise ValueError(f"alpha={self.alpha}: the student's own weight in texts, 0 (none) or more")

    def __call__(
        self,
        chunk: Int[Tensor, "B T"],
        agreement: Float[Tensor, "B T"],
        student_logp: Float[Tensor, "B T"],
        mask: Bool[Tensor, "B T"],
    ) -> Float[Tensor, "B T"]:
        audited = mask & (chunk > 0)
        prior = _chunk_mean(student_logp, chunk, audited).exp()
        found = (agreement.to(prior.dtype) + self.alpha * prior) / (self.texts + self.alpha)
        return found.where(audited, 0) * _share(audited, mask, self.apart)


@dataclass(frozen=True)
class Audited:
    """Weight 1 on the audited chunks, else 0; `apart` as in `Posterior`."""

    apart: bool = False

    def __call__(self, chunk: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        audited = mask & (chunk > 0)
        return audited * _share(audited, mask, self.apart)


@dataclass(frozen=True)
class Unaudited:
    """Weight 1 outside the audited chunks, else 0.  OmniOPD, arXiv:2606.01476, Eq. 8; `apart` as in `Posterior`."""

    apart: bool = False

    def __call__(self, chunk: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        rest = mask & (chunk == 0)
        return rest * _share(rest, mask, self.apart)


@dataclass(frozen=True)
class CentredPosterior:
    """x times OmniOPD's posterior minus its mean over the batch's audited tokens; 0 outside the chunks.

    The paper's posterior is positive for every chunk.  The mean part of its gradient is noise of mean 0, which grows
    with the length of a chunk while the part that distinguishes chunks shrinks (docs/LOG.md).  This variant is from the
    opd project.
    """

    texts: int = 10
    alpha: float = 1.0

    def __post_init__(self) -> None:
        Posterior(self.texts, self.alpha)  # raises ValueError for an invalid alpha

    def __call__(
        self,
        x: Float[Tensor, "B T"],
        chunk: Int[Tensor, "B T"],
        agreement: Float[Tensor, "B T"],
        student_logp: Float[Tensor, "B T"],
        mask: Bool[Tensor, "B T"],
    ) -> Float[Tensor, "B T"]:
        audited = mask & (chunk > 0)
        found = Posterior(self.texts, self.alpha)(chunk, agreement, student_logp, mask)  # 0 outside the chunks
        return (x * (found - found.sum() / audited.sum().clamp(min=1))).where(audited, 0)


@dataclass(frozen=True)
class GroupAdvantage:
    """x times a judge's verdict minus its group mean, divided by the group's deviation if `norm_std`.

    GRPO, arXiv:2402.03300; without the division it is Dr. GRPO, arXiv:2503.20783.  A group without verdicts has
    advantage 0.  Rollouts without a trained token do not enter the statistics.
    """

    norm_std: bool = False
    eps: float = 1e-6

    def __call__(
        self,
        x: Float[Tensor, "B T"],
        verdict: Float[Tensor, " B"],
        judged: Bool[Tensor, " B"],
        group: Int[Tensor, " B"],
        mask: Bool[Tensor, "B T"],
    ) -> Float[Tensor, "B T"]:
        advantage = group_centred(verdict.to(x.dtype), group, judged & mask.any(1), self.eps if self.norm_std else None)
        return x.where(mask, 0) * advantage[:, None]


@dataclass(frozen=True)
class StageScore:
    """x times a judge's score of the stage that contains the token.  RubricEM, arXiv:2605.10899.

    A stage without a score gets the score of the last stage, the answer.  An answer without a score counts 0.
    """

    def __call__(
        self,
        x: Float[Tensor, "B T"],
        stage: Int[Tensor, "B T"],
        stage_scores: Float[Tensor, "B K"],
        mask: Bool[Tensor, "B T"],
    ) -> Float[Tensor, "B T"]:
        scores = stage_scores.to(x.dtype)
        scores = scores.where(scores.isfinite(), scores[:, -1:]).nan_to_num(0.0)
        return x.where(mask, 0) * scores.gather(1, stage.where(mask, 1) - 1)


# Row k: how much the scores of the stages plan, research, review and answer count for stage k.  RubricEM.
LAMBDA = ((1.0, 0.4, 0.6, 0.8), (0.0, 1.0, 0.4, 0.8), (0.0, 0.0, 1.0, 0.8), (0.0, 0.0, 0.0, 1.0))


@dataclass(frozen=True)
class StageReturn:
    """The group advantage of a stage's return, given to all tokens of the stage.  RubricEM, arXiv:2605.10899, SS-GRPO.

    G_k = sum_{j >= k} matrix_kj R_j, R_j the mean of x over the trained tokens of stage j; A_k = (G_k - mean) / (std +
    eps) over the same stage of the group's rollouts.  A stage without tokens gets the R of the last stage, the answer;
    without an answer that is 0.  x may be any reward.
    """

    matrix: tuple[tuple[float, ...], ...] = LAMBDA
    eps: float = 1e-6

    def __post_init__(self) -> None:
        k = len(self.matrix)
        if not k or any(len(row) != k for row in self.matrix):
            raise ValueError(f"matrix={self.matrix}: a row and a column for each stage")
        if any(x for i, row in enumerate(self.matrix) for x in row[:i]):
            raise ValueError(f"matrix={self.matrix}: 0 below the diagonal, for no stage earns what came before it")

    def __call__(
        self,
        x: Float[Tensor, "B T"],
        stage: Int[Tensor, "B T"],
        group: Int[Tensor, " B"],
        mask: Bool[Tensor, "B T"],
    ) -> Float[Tensor, "B T"]:
        # In float64: a small deviation would amplify rounding differences between rows of equal returns.
        returns = stage_means(x.double(), stage, mask, len(self.matrix)) @ torch.tensor(self.matrix).double().T
        among = mask.any(1)
        each = torch.stack([group_centred(column, group, among, self.eps) for column in returns.unbind(1)], 1)
        return each.gather(1, stage.where(mask, 1) - 1).to(x.dtype).where(mask, 0)


def stage_means(
    x: Float[Tensor, "B T"], stage: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"], stages: int
) -> Float[Tensor, "B K"]:
    """Return the mean of x over the trained tokens of each stage, [B, K].

    A stage without tokens gets the last stage's mean, which is 0 if the last stage has no tokens either.
    """
    at, zero = stage.where(mask, 0), x.new_zeros(len(x), stages + 1)
    total, count = zero.scatter_add(1, at, x.where(mask, 0)), zero.scatter_add(1, at, mask.to(x.dtype))
    mean = (total / count.clamp(min=1))[:, 1:]
    return mean.where(count[:, 1:] > 0, mean[:, -1:])


def group_centred(
    x: Float[Tensor, " B"], group: Int[Tensor, " B"], among: Bool[Tensor, " B"], eps: float | None = None
) -> Float[Tensor, " B"]:
    """Return x minus its mean over the marked rows of its group, [B]; 0 on the other rows.

    If `eps` is given, divide by the deviation of the marked rows plus `eps`.
    """
    _, at = group.unique(return_inverse=True)
    add = lambda y: y.new_zeros(len(at)).scatter_add(0, at, y.where(among, 0))[at]
    count = add(torch.ones_like(x)).clamp(min=1)
    centred = (x - add(x) / count).where(among, 0)
    return centred if eps is None else centred / ((add(centred.square()) / count).sqrt() + eps)


def _chunk_mean(
    x: Float[Tensor, "B T"], chunk: Int[Tensor, "B T"], audited: Bool[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """Return, for each token, the mean of x over its chunk, [B, T]."""
    at = chunk.where(audited, 0)
    empty = x.new_zeros(len(x), int(at.max()) + 1 if at.numel() else 1)
    total = empty.scatter_add(1, at, x.where(audited, 0))
    count = empty.scatter_add(1, at, audited.to(x.dtype))
    return (total / count.clamp(min=1)).gather(1, at)


def _share(some: Bool[Tensor, "B T"], mask: Bool[Tensor, "B T"], apart: bool) -> float | Float[Tensor, ""]:
    """Return the factor that turns a token mean into a mean over the `some` tokens, or 1 without `apart`."""
    return mask.sum() / some.sum().clamp(min=1) if apart else 1.0
