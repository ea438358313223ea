"""Comparison of hidden states: which layers, through which projections, at what distance.

    Lens(states of a model's layers) -> views [N D], one per layer   student and teacher views have the same D
    distance(student view, teacher view) -> [N]                       >= 0, differentiable in the student's

Layers count from 1.  The last layer's states are those after the final norm, as the LM head reads them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from opd.core.tensors import map_tensors

TINY = 1e-12  # lower bound of norms in divisions


@dataclass(frozen=True)
class Bridge:
    """Settings that make states of different widths and depths comparable.  OPRD-Bridge, arXiv:2606.06021, Stage 1."""

    rank: int = 8  # dimensions of the common space
    rollouts: int = 256  # rollouts of the initial student, on the training prompts, for the fit
    rows: int = 16384  # maximum number of their tokens used
    epochs: int = 20
    lr: float = 1e-3  # of AdamW, on states scaled to root mean square 1

    def __post_init__(self) -> None:
        for name in ("rank", "rollouts", "epochs", "lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"bridge {name}={getattr(self, name)}: must be above 0")
        if self.rows < 10 * self.rank:
            raise ValueError(f"bridge rows={self.rows}: {self.rank} dimensions need at least {10 * self.rank} tokens")


def layer_map(student: int, teacher: int) -> tuple[int, ...]:
    """Return the teacher's layer for each student layer, round((l-1)/(L_S-1) (L_T-1)) + 1.  arXiv:2606.06021, Eq. 11.

    The fractions are exact, and halves go to even.  A student of one layer gets the last.
    """
    if student == 1:
        return (teacher,)
    return tuple(round(Fraction(i * (teacher - 1), student - 1)) + 1 for i in range(student))


@dataclass(frozen=True, eq=False)
class Projection:
    """A projection of one layer's states to the common space, with length 1: normalise(matrix (h - mean))."""

    matrix: Float[Tensor, "r H"]
    mean: Float[Tensor, " H"]

    def __call__(self, states: Float[Tensor, "N H"]) -> Float[Tensor, "N r"]:
        return normalize((states - self.mean) @ self.matrix.T, dim=-1, eps=TINY)


@dataclass(frozen=True, eq=False)
class Lens:
    """The layers of one model to compare, with a projection per layer, or directly without projections."""

    layers: tuple[int, ...]
    projections: tuple[Projection, ...] = ()  # one per layer

    def __call__(self, states: Sequence[Float[Tensor, "N H"]]) -> tuple[Float[Tensor, "N D"], ...]:
        """Return the views of the layers in `layers`, given the states of exactly those layers; fp32 or wider."""
        wide = [h.to(torch.promote_types(h.dtype, torch.float32)) for h in states]
        return tuple(p(h) for p, h in zip(self.projections, wide, strict=True)) if self.projections else tuple(wide)


@dataclass(frozen=True, eq=False)
class Lenses:
    """The lenses of student and teacher, which make their views comparable."""

    student: Lens
    teacher: Lens

    def to(self, student: torch.device, teacher: torch.device) -> "Lenses":
        """Return the lenses, each on its model's device."""
        moved = lambda lens, device: map_tensors(lambda x: x.to(device), lens)
        return Lenses(moved(self.student, student), moved(self.teacher, teacher))


def distance(student: Float[Tensor, "*N D"], teacher: Float[Tensor, "*N D"]) -> Float[Tensor, "*N"]:
    """Return || student - sg teacher ||^2 / D, (2 - 2 cos) / D for views of length 1.  arXiv:2606.06021, Eq. 6, 15."""
    return (student - teacher.detach()).square().mean(-1)


def pca(states: Float[Tensor, "N H"], rank: int) -> Projection:
    """Return the projection on the `rank` directions of largest variance (float64; the signs are arbitrary)."""
    wide = states.double()
    mean = wide.mean(0)
    vectors = torch.linalg.eigh((wide - mean).T @ (wide - mean)).eigenvectors.flip(1)[:, :rank].T
    return Projection(vectors.to(states.dtype).contiguous(), mean.to(states.dtype))


def fit(
    student: Float[Tensor, "N S"], teacher: Float[Tensor, "N H"], bridge: Bridge, *, seed: int
) -> tuple[Projection, Projection, float]:
    """Fit the projections of one layer: return (student projection, teacher projection, held-out mean cosine).

    The last tenth of the rows is held out.  The teacher's projection is the PCA of its states.  The student's is linear
    without a mean; AdamW fits it by least squares.  The epoch of the best held-out cosine is kept.
    """
    rows = len(student) - max(1, len(student) // 10)
    principal = pca(teacher[:rows], bridge.rank)
    scaled = lambda x: x / x[:rows].square().mean().sqrt().clamp(min=TINY)  # so that lr means the same in every model
    x, y = scaled(student), scaled((teacher - principal.mean) @ principal.matrix.T)
    matrix = torch.zeros(bridge.rank, student.shape[1], dtype=x.dtype, device=x.device, requires_grad=True)
    optimizer = torch.optim.AdamW([matrix], lr=bridge.lr, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    best, best_matrix = -1.0, matrix.detach().clone()
    with torch.enable_grad():
        for _ in range(bridge.epochs):
            for row_batch in torch.randperm(rows, generator=generator).to(x.device).split(64):
                optimizer.zero_grad()
                (x[row_batch] @ matrix.T - y[row_batch]).square().mean().backward()
                optimizer.step()
            held_out = cosine_similarity(x[rows:] @ matrix.detach().T, y[rows:], dim=-1, eps=TINY).mean().item()
            if held_out > best:
                best, best_matrix = held_out, matrix.detach().clone()
    return Projection(best_matrix, best_matrix.new_zeros(student.shape[1])), principal, best
