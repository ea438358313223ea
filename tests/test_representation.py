"""Hidden states: the mathematics against torch's own, the models against transformers' own, the runs end to end."""

import pytest
import torch
from torch.nn.functional import cosine_similarity, mse_loss, normalize

from opd.representation import Bridge, Lens, Projection, distance, fit, layer_map, pca
from opd.weights import LastTokens

close = torch.testing.assert_close


@pytest.mark.parametrize("student, teacher", [(2, 3), (3, 2), (28, 36), (24, 24), (12, 61), (61, 12), (9, 5), (5, 3)])
def test_layers_are_spread_evenly_from_end_to_end(student, teacher):
    found = layer_map(student, teacher)
    official = torch.linspace(0, teacher - 1, student, dtype=torch.float64).round() + 1  # halves to even, as torch does
    assert found == tuple(official.int().tolist())
    assert found[0] == 1 and found[-1] == teacher and list(found) == sorted(found)


def test_a_student_of_one_layer_looks_at_the_last():
    assert layer_map(1, 7) == (7,) and layer_map(7, 1) == (1,) * 7


def test_distance_is_the_mean_square_and_the_teacher_stands_still(float64):
    student, teacher = torch.randn(2, 5, 7, requires_grad=True)
    found = distance(student, teacher)
    close(found.mean(), mse_loss(student, teacher))
    assert torch.autograd.grad(found.sum(), teacher, allow_unused=True, retain_graph=True)[0] is None
    close(torch.autograd.grad(found.sum(), student)[0], 2 / 7 * (student - teacher))


def test_bridge_distance_is_two_minus_two_cosines_over_the_rank(float64):
    rank, h, t = 4, torch.randn(50, 9), torch.randn(50, 6)
    own, other = Projection(torch.randn(rank, 9), torch.zeros(9)), Projection(torch.randn(rank, 6), torch.randn(6))
    cosine = cosine_similarity(h @ own.matrix.T, (t - other.mean) @ other.matrix.T)
    close(distance(own(h), other(t)), (2 - 2 * cosine) / rank)
    a, b = Lens((1,), (own,))([h]), Lens((1,), (other,))([t])
    close(distance(a[0], b[0]), (2 - 2 * cosine) / rank)


def test_a_projection_of_nothing_is_finite_with_a_finite_gradient():
    h = torch.zeros(2, 3, requires_grad=True)
    Projection(torch.randn(2, 3), torch.zeros(3))(h).sum().backward()
    assert h.grad.isfinite().all()


def test_a_lens_without_projections_only_widens():
    h = torch.randn(4, 3).bfloat16()
    (view,) = Lens((2,))([h])
    assert view.dtype == torch.float32 and torch.equal(view, h.float())


def test_pca_is_the_singular_vectors_of_the_centred_states(float64):
    states = torch.randn(400, 12) * torch.linspace(1, 3, 12) + torch.randn(12) * 5
    found = pca(states, 5)
    close(found.mean, states.mean(0))
    close(found.matrix @ found.matrix.T, torch.eye(5))
    _, _, v = torch.linalg.svd(states - states.mean(0), full_matrices=False)
    close((found.matrix @ v[:5].T).abs(), torch.eye(5), atol=1e-8, rtol=0)
    _, _, low = torch.pca_lowrank(states, q=12, niter=10)
    close((found.matrix @ low[:, :5]).abs(), torch.eye(5), atol=1e-6, rtol=0)


def states(rows: int = 3000, noise: float = 0.3):
    """Two models that hold the same few numbers, in their own bases, scales and widths; and a noise of their own."""
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g)
    shared = draw(rows, 4) * torch.tensor([4.0, 3.0, 2.0, 1.5])
    student = 100 * (shared @ draw(4, 10) + noise * draw(rows, 10))
    return student, 0.01 * (shared @ draw(4, 16) + noise * draw(rows, 16)) + draw(16)


def test_fit_finds_nearly_what_least_squares_finds_and_holds_out_the_last_rows():
    student, teacher = states()
    ours, theirs, cosine = fit(student, teacher, Bridge(rank=4), seed=0)
    target = (teacher[:2700] - theirs.mean) @ theirs.matrix.T
    best = torch.linalg.lstsq(student[:2700], target).solution
    held = normalize(student[2700:] @ best), theirs(teacher[2700:])
    optimum = (held[0] * held[1]).sum(-1).mean().item()
    measured = (ours(student[2700:]) * theirs(teacher[2700:])).sum(-1).mean().item()
    assert measured == pytest.approx(cosine, abs=1e-4)
    assert optimum - 0.02 < cosine < 1 and cosine > 0.8
    blind = Projection(torch.randn(4, 10), torch.zeros(10))
    assert abs((blind(student[2700:]) * theirs(teacher[2700:])).sum(-1).mean()) < cosine - 0.3
    close(theirs.matrix, pca(teacher[:2700], 4).matrix)  # the held-out rows shape neither side


def test_fit_is_reproducible_and_better_than_its_own_first_epoch():
    student, teacher = states()
    once, again = (fit(student, teacher, Bridge(rank=4), seed=3)[0].matrix for _ in range(2))
    assert torch.equal(once, again)
    first = fit(student, teacher, Bridge(rank=4, epochs=1), seed=3)[2]
    assert first < fit(student, teacher, Bridge(rank=4), seed=3)[2]


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"rollouts": 0}, {"epochs": 0}, {"lr": 0.0}, {"rank": 8, "rows": 79}])
def test_impossible_bridges_are_refused(wrong):
    with pytest.raises(ValueError, match="bridge " + list(wrong)[-1]):
        Bridge(**wrong)


def test_last_tokens_are_the_trained_ones_and_the_mean_is_theirs():
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 0, 1, 0, 0], [0, 0, 0, 0, 0]]).bool()
    weight = LastTokens(2)(mask)
    kept = torch.tensor([[0, 0, 1, 1, 0], [1, 0, 1, 0, 0], [0, 0, 0, 0, 0]]).bool()
    close(weight, kept * (6 / 4))
    x = torch.rand(3, 5)
    close((x * weight * mask / mask.sum()).sum(), x[kept].mean())
    assert torch.equal(LastTokens(9)(mask), mask.float())
    assert not LastTokens(2)(torch.zeros(2, 3).bool()).any()
    with pytest.raises(ValueError, match="last=0"):
        LastTokens(0)
