"""Selection of the hidden layers to match between student and teacher, and fitting of a bridge between their widths.

A bridge is a pair of low-rank projections per matched layer.  Checkpoints contain it (bridge.safetensors), so that a
resumed run compares hidden states with the same projections.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import PretrainedConfig

from opd.core.errors import Refusal
from opd.core.types import Batch, Rollout
from opd.losses.hidden_states import Bridge, Lens, Lenses, Projection, fit, layer_map
from opd.methods.method import Method
from opd.models.batching import rows
from opd.models.forward import states
from opd.models.student import Student
from opd.rollouts.batch import masks
from opd.teachers.local import LocalTeacher


def plain_lenses(method: Method, student: PretrainedConfig, teachers: dict[str, PretrainedConfig]) -> Lenses | None:
    """Return the layers that are matched, without projections; None if the method matches no hidden states.

    `teachers` are configurations by the flag that names each teacher.  Raises Refusal if the shapes of the models'
    hidden states do not allow the comparison that the method makes.
    """
    term = method.hidden()
    if term is None:
        return None
    depth, width = student.num_hidden_layers, student.hidden_size
    layers = term.layers or tuple(range(1, depth + 1))
    if max(layers) > depth:
        raise Refusal(f"--layers {max(layers)}: the student has {depth} layers; name some of 1 to {depth}")
    for name, teacher in teachers.items():
        shape = (teacher.num_hidden_layers, teacher.hidden_size)
        if term.bridge is None and shape != (depth, width):
            raise Refusal(
                f"--{name}: {shape[0]} layers of width {shape[1]} beside the student's {depth} of "
                f"width {width}; hidden states of other shapes are matched through a bridge: add --bridge-rank 8"
            )
        if term.bridge is not None and term.bridge.rank > min(width, shape[1]):
            raise Refusal(f"--bridge-rank {term.bridge.rank}: the narrower model has width {min(width, shape[1])}")
    if term.bridge is None:
        return Lenses(Lens(layers), Lens(layers))
    if len(teachers) > 1:
        raise Refusal("--route: a bridge joins the student to one teacher; leave out --route, or --bridge-rank")
    (teacher,) = teachers.values()
    teacher_layers = layer_map(depth, teacher.num_hidden_layers)
    return Lenses(Lens(layers), Lens(tuple(teacher_layers[layer - 1] for layer in layers)))


def sampled_mask(mask: Bool[Tensor, "B T"], count: int, seed: int) -> Bool[Tensor, "B T"]:
    """Return a mask of at most `count` of the marked tokens, sampled without replacement."""
    positions = mask.flatten().nonzero()[:, 0]
    chosen = positions[torch.randperm(len(positions), generator=torch.Generator().manual_seed(seed))[:count]]
    return torch.zeros_like(mask).flatten().index_fill(0, chosen, True).view_as(mask)


@torch.no_grad()
def fit_bridge(
    bridge: Bridge,
    lenses: Lenses,
    student: Student,
    teacher: LocalTeacher,
    batch: Batch,
    rollouts: Sequence[Rollout],
    *,
    micro: Sequence[Sequence[int]],
    seed: int,
) -> tuple[Lenses, float]:
    """Fit the projections on some tokens of the rollouts.

    Returns the lenses with projections, and the mean cosine on held-out tokens.  The hidden states of both models for
    `bridge.rows` tokens at all matched layers are held in main memory, in fp32.  Raises Refusal if the rollouts have
    fewer than 10 x rank tokens.
    """
    batch = replace(batch, mask=sampled_mask(batch.mask, bridge.rows, seed))
    if batch.mask.sum() < 10 * bridge.rank:
        raise Refusal(
            f"--bridge-rank {bridge.rank}: {int(batch.mask.sum())} tokens in {len(rollouts)} rollouts are too few to "
            "fit it on; raise --max-new-tokens"
        )
    device = student.model.device
    # Restore the order of the rollouts.  Micro-batches are sorted by length, and `fit` holds out the last rows: without
    # this, the held-out tokens would be those of the shortest rollouts.
    row_of_token = torch.cat([torch.full((int(batch.mask[i].sum()),), i) for group in micro for i in group])
    order = row_of_token.argsort(stable=True)
    student_views: list[list[Tensor]] = []  # by micro-batch, then by layer
    teacher_views: list[list[Tensor]] = []
    for group in micro:
        rolls = [rollouts[i] for i in group]
        trained = masks(batch[torch.tensor(group)], rolls)
        _, student_batch = states(student.model, rows(rolls, trained, teacher=False, device=device), lenses.student)
        student_views.append([view.cpu() for view in student_batch])
        teacher_views.append([view.cpu() for view in teacher.hidden(rolls, trained, lenses.teacher).views])
    joined = lambda views: torch.cat(views)[order].to(device)
    layers = zip(zip(*student_views, strict=True), zip(*teacher_views, strict=True), strict=True)
    fits = [fit(joined(a), joined(b), bridge, seed=seed) for a, b in layers]
    students, teachers, cosines = zip(*fits, strict=True)
    lenses = Lenses(Lens(lenses.student.layers, students), Lens(lenses.teacher.layers, teachers))
    return lenses, sum(cosines) / len(cosines)


def tensors(lenses: Lenses) -> dict[str, Tensor]:
    """Return the projections by name, for a checkpoint; empty if the lenses have none."""
    return {
        f"{side}.{i}.{name}": x
        for side, lens in (("student", lenses.student), ("teacher", lenses.teacher))
        for i, p in enumerate(lens.projections)
        for name, x in (("matrix", p.matrix), ("mean", p.mean))
    }


def restored(lenses: Lenses, saved: Mapping[str, Tensor]) -> Lenses:
    """Return the lenses with the projections of a checkpoint."""
    side = lambda name, lens: Lens(
        lens.layers,
        tuple(Projection(saved[f"{name}.{i}.matrix"], saved[f"{name}.{i}.mean"]) for i in range(len(lens.layers))),
    )
    return Lenses(side("student", lenses.student), side("teacher", lenses.teacher))
