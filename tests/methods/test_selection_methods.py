"""Which tokens and rollouts count: weights and filters by hand, on the whole batch, blind to what is masked."""

import dataclasses
import json
from math import log

import pytest
import torch

from opd.analysis.exact import World
from opd.core.types import Batch, call, reads
from opd.losses.divergences import BucketForwardKL, ReverseKL, Support
from opd.losses.rewards import One
from opd.losses.terms import Match, PolicyGradient
from opd.losses.token_weights import (
    Confidence,
    Frozen,
    FrozenWindow,
    PrefixAgreement,
    RightRollouts,
    TeacherEntropyAbove,
    TopEntropy,
    TopTeacherEntropy,
    WrongRollouts,
    group_softmax,
)
from opd.methods import METHODS, entropy, eopd, scope
from opd.methods.classic import opd, opd_full
from opd.methods.eopd import eopd_sampled
from opd.methods.method import Method
from opd.methods.rock import rock_freeze
from opd.methods.token_weighting import LikelyRollouts, iw_opd
from tests.by_hand import INF, NAN, POISON, close, tensor

pytestmark = pytest.mark.usefixtures("float64")

MASK = tensor([[True, True, False, True], [True, True, False, False], [False, False, False, False]])


def masked(x, fill=0.0):
    return x.where(MASK, fill)


WEIGHTS = {  # of opd.losses.token_weights, each with its golden values here
    Confidence,
    Frozen,
    FrozenWindow,
    PrefixAgreement,
    RightRollouts,
    TeacherEntropyAbove,
    TopEntropy,
    TopTeacherEntropy,
    WrongRollouts,
}


# by hand; the mask has a hole and an empty row, and masked entries hold anything


@POISON
@pytest.mark.parametrize(
    ("fraction", "want"),
    [
        (0.2, [[0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]),
        (0.4, [[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]),
        (0.6, [[1, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]]),  # two tie at the edge: both are in
        (1.0, [[1, 1, 0, 1], [1, 1, 0, 0], [0, 0, 0, 0]]),
        (0.01, [[0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]),  # at least one
    ],
)
def test_top_entropy(fraction, want, junk):
    h = masked(tensor([[1.0, 3, 0, 1], [2, 0.5, 0, 0], [0, 0, 0, 0]]), junk)
    for leaf in (TopEntropy, TopTeacherEntropy):
        close(masked(leaf(fraction)(h, MASK)), tensor(want).double())
        assert not leaf(fraction)(h, MASK & False).any()


def test_teacher_entropy_above():
    close(TeacherEntropyAbove(0.8)(tensor([[0.79, 0.8, 0.81]])), tensor([[0.0, 0, 1]]))


@POISON
def test_confidence(junk):
    """max H(q) = 4, max H(p) = 2: (1 + 1 - H(q)/4) (1 + H(p)/2), over its mean in each row."""
    teacher = masked(tensor([[4.0, 2, 9, 0], [1, 3, 9, 9], [9, 9, 9, 9]]), junk)
    student = masked(tensor([[2.0, 1, 9, 0], [1, 0, 9, 9], [9, 9, 9, 9]]), junk)
    raw = tensor([[1 * 2, 1.5 * 1.5, 0, 2 * 1], [1.75 * 1.5, 1.25 * 1, 0, 0], [0, 0, 0, 0]])
    want = raw / tensor([[(2 + 2.25 + 2) / 3], [(2.625 + 1.25) / 2], [1.0]])
    close(masked(Confidence()(teacher, student, MASK, MASK)), want)
    close(masked(Confidence(0.0, 0.0)(teacher, student, MASK, MASK)), MASK.double())
    half = masked(Confidence(0.0, 2.0)(teacher, student, MASK, MASK))[1]
    close(half, tensor([2 / 1.5, 1 / 1.5, 0, 0]))


@POISON
def test_the_maxima_of_fire_are_over_the_batch_before_its_filter(junk):
    """The second rollout is dropped, and its entropies, 8 and 4, are still the maxima."""
    mask = tensor([[1.0, 1, 0], [1, 1, 0]]).bool()
    column = lambda *rows: tensor(rows).where(mask, junk)
    batch = Batch(
        ids=torch.zeros(2, 3, dtype=torch.long),
        mask=mask,
        group=torch.arange(2),
        source=torch.zeros(2, dtype=torch.long),
        stopped=torch.ones(2, dtype=torch.bool),
        outcome=torch.zeros(2),
        sampler_logp=column([-1.0, -1, 0], [-1, -1, 0]),
        teacher_logp=column([-1.0, -1, 0], [-9, -9, 0]),
        teacher_entropy=column([4.0, 2, 0], [8, 0, 0]),
        student_entropy=column([2.0, 1, 0], [4, 0, 0]),
        scores=(torch.ones(2, 3, dtype=torch.float64),),
    )
    raw = tensor([(2 - 4 / 8) * (1 + 2 / 4), (2 - 2 / 8) * (1 + 1 / 4), 0])
    (target,) = METHODS["fire"](drop=0.5).prepare(batch)
    close(target.weight, torch.stack([raw / raw.sum(), 0 * raw]))  # mean 1, over the 2 tokens that are kept
    raw = torch.stack([raw, tensor([(2 - 8 / 8) * (1 + 4 / 4), 2 * 1, 0])])
    (target,) = METHODS["fire"](drop=0.0).prepare(batch)
    close(target.weight, raw / raw.sum(1, keepdim=True) / 2)


@POISON
def test_likely_rollouts(junk):
    """Means -1, -2, -3, -4, -5 and an empty row; the quantile 0.2 of five lies above the lowest."""
    mask = torch.ones(6, 2, dtype=torch.bool)
    mask[1, 1] = mask[5, 0] = mask[5, 1] = False
    logp = tensor([[-0.5, -1.5], [-2, 0], [-1, -5], [-4, -4], [-10, 0], [0, 0]]).where(mask, junk)
    kept = lambda drop, rows=slice(None): LikelyRollouts(drop)(logp[rows], mask[rows])
    assert kept(0.2).tolist() == [[True, True], [True, False], [True, True], [True, True], [False] * 2, [False] * 2]
    assert kept(0.5).any(1).tolist() == [True, True, True, False, False, False]
    assert (kept(0.0) == mask).all() and not kept(0.2, slice(5, 6)).any()
    assert kept(0.2, slice(4, 5)).all()  # alone in its micro-batch, the worst rollout stays: why it must see all


@pytest.mark.parametrize("n", [5, 10, 20, 100])
def test_a_fifth_of_the_rollouts_is_dropped(n):
    logp, mask = -torch.rand(n, 3), torch.ones(n, 3, dtype=torch.bool)
    kept = LikelyRollouts(0.2)(logp, mask).all(1)
    assert (~kept).sum() == n // 5
    assert logp.mean(1)[kept].min() > logp.mean(1)[~kept].max()


@POISON
def test_prefix_agreement(junk):
    """|r| = 1, 3, (hole), 4: nothing, 1/8 and 4/8 of the sum lie before."""
    student = masked(torch.zeros(3, 4), junk)
    teacher = masked(tensor([[-1.0, 3, 9, -4], [0, 0, 9, 9], [9, 9, 9, 9]]), junk)
    want = tensor([[1.5, 1 + 0.5 * 7 / 8, 0, 1 + 0.5 * 4 / 8], [1.5, 1.5, 0, 0], [0, 0, 0, 0]])
    close(masked(PrefixAgreement(0.5)(student, teacher, MASK)), want)
    close(masked(PrefixAgreement(0.0)(student, teacher, MASK)), MASK.double())


def test_prefix_agreement_is_the_released_formula():
    """F_{t-1} = sum_{k<t} d_k / sum d_k, g_t = 1 + (weight_max - 1) (1 - F_{t-1}), weight_max = 1.5."""
    d = torch.rand(5)
    want = [1 + 0.5 * (1 - sum(d[:t]) / d.sum()) for t in range(5)]
    close(PrefixAgreement()(torch.zeros(1, 5), d[None], torch.ones(1, 5, dtype=torch.bool)), torch.stack(want)[None])


def test_group_softmax():
    score, group = tensor([0.0, log(3), 5, 2, NAN, 7]), tensor([3, 3, 3, 9, 9, 4])
    among = tensor([True, True, False, True, False, False])
    close(group_softmax(score, group, among), tensor([0.5, 1.5, 0, 1, 0, 0]))
    close(group_softmax(score - 1e4, group, among), tensor([0.5, 1.5, 0, 1, 0, 0]))


@POISON
def test_scope_weights(junk):
    """Rows 0, 1, 2 are right and 3, 4, 5 wrong, in one group; 6 and 7 stand alone; nothing of 8 is trained."""
    mask = torch.ones(9, 2, dtype=torch.bool)
    mask[1, 1] = mask[8, 0] = mask[8, 1] = False
    mean = tensor([-1.0, -1 - log(2), -1, -1, -1 - log(3), -1, -9, -9, 0])
    logp = (mean[:, None] + tensor([[0.5, -0.5]]) * mask.all(1)[:, None]).where(mask, junk)
    group, outcome = tensor([0, 0, 0, 0, 0, 0, 1, 2, 0]), tensor([1.0, 1, 1, 0, 0, 0, 1, 0, 1])
    right, wrong = tensor([0.75, 1.5, 0.75, 0, 0, 0, 1, 0, 0]), tensor([0, 0, 0, 9 / 7, 3 / 7, 9 / 7, 0, 1, 0])
    read = (logp, outcome, group, mask)
    wide = lambda x: x[:, None].expand(9, 2)
    close(RightRollouts()(*read), wide(right))  # nll: harder by log 2 counts twice
    close(WrongRollouts()(*read), wide(wrong))  # less likely by log 3 counts a third
    easy = 2 * 3 / 5
    close(RightRollouts(reverse=True)(*read), wide(tensor([easy, easy / 2, easy, 0, 0, 0, 1, 0, 0])))
    close(RightRollouts(tau=0.5)(*read)[:3, 0], tensor([3 / 6, 3 * 4 / 6, 3 / 6]))
    close(WrongRollouts(tau=0.5)(*read)[3:6, 0], 3 * tensor([9.0, 1, 9]) / 19)


def test_scope_weights_are_the_perplexities_of_the_paper():
    """PPL_S^(1/tau) / sum over the right ones, PPL_T^(-1/tau) / sum over the wrong ones; times their number."""
    logp, ones = -torch.rand(6, 5), torch.ones(6, 5, dtype=torch.bool)
    ppl, group = (-logp.mean(1)).exp(), torch.zeros(6, dtype=torch.long)
    hard, likely = ppl ** (1 / 0.7), ppl ** (-1 / 0.7)
    close(RightRollouts(0.7)(logp, torch.ones(6), group, ones)[:, 0], 6 * hard / hard.sum())
    close(WrongRollouts(0.7)(logp, torch.zeros(6), group, ones)[:, 0], 6 * likely / likely.sum())


IDS = tensor([[5, 7, 8, 9, 5, 1, 1, 1]])


def test_frozen():
    close(Frozen((5, 8), 0.0)(IDS), tensor([[0.0, 1, 0, 1, 0, 1, 1, 1]]))
    close(Frozen((8,), 0.3)(IDS), tensor([[1, 1, 0.3, 1, 1, 1, 1, 1]]))
    close(Frozen()(IDS), torch.ones(1, 8))


@POISON
def test_frozen_window(junk):
    """Token 8 at place 2.  KL is high at places 1, 4 and 7; 5 is masked, so 7 are trained: a quarter is two."""
    mask = tensor([[True] * 5 + [False] + [True] * 2])
    kl = tensor([[0.0, 9, 1, 1, 8, 0, 1, 2]]).where(mask, junk)
    near = lambda width, quantile: FrozenWindow((8,), 0.3, width, quantile)(IDS, kl, mask).where(mask, 0)[0].tolist()
    assert near(1, 0.75) == [1, 0.3, 0.3, 1, 1, 0, 1, 1]
    assert near(2, 0.75) == [1, 0.3, 0.3, 1, 0.3, 0, 1, 1]
    assert near(5, 0.57) == [1, 0.3, 0.3, 1, 0.3, 0, 1, 0.3]
    assert near(5, 0.95) == [1, 0.3, 0.3, 1, 1, 0, 1, 1]
    hidden = mask & (IDS != 8)  # a rock token that is not trained opens no window
    assert FrozenWindow((8,))(IDS, kl, hidden).where(hidden, 1).all()


def test_frozen_matches_the_predicted_token_not_the_one_before():
    """The released code masks what follows a rock token."""
    assert Frozen((7,))(IDS)[0, :4].tolist() == [1, 0, 1, 1]


REFUSED = {
    "fraction=0.0": lambda: TopEntropy(0.0),
    "fraction=1.5": lambda: TopTeacherEntropy(1.5),
    "quantile=1.0": lambda: eopd(1.0),
    "teacher=-1.0": lambda: Confidence(-1.0),
    "gamma=-0.5": lambda: iw_opd(-0.5),
    "tau=0.0": lambda: scope(0.0),
    "tau=-1.0": lambda: WrongRollouts(-1.0),
    "drop=1.0": lambda: LikelyRollouts(1.0),
    "width=0": lambda: FrozenWindow(width=0),
    "weight=-1.0": lambda: rock_freeze(weight=-1.0),
}


@pytest.mark.parametrize(("reason", "make"), REFUSED.items(), ids=REFUSED)
def test_refused_with_the_reason(reason, make):
    with pytest.raises(ValueError, match=reason):
        make()


# the list of rock tokens


def test_rock_list_from_a_file(tmp_path):
    path = tmp_path / "rocks.json"
    for content in ([3, 1, 2], {"ids": [3, 1, 2], "coverage": 0.6}):
        path.write_text(json.dumps(content))
        method = rock_freeze(str(path), 0.3)
        assert method == Method((Match(ReverseKL(), weights=(Frozen((3, 1, 2), 0.3),)),))
        assert rock_freeze(str(path), window=5).terms[0].weights == (FrozenWindow((3, 1, 2), 0.0, 5),)


@pytest.mark.parametrize("content", ["", "nonsense", '{"tokens": [1]}', '["a"]', "[1.5]", "[true]", "[-1]", "3"])
def test_rock_list_that_is_none(content, tmp_path):
    path = tmp_path / "rocks.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"--tokens .*rocks.json: (not readable|needs a list)") as error:
        rock_freeze(str(path))
    assert "\n" not in str(error.value)


def test_rock_list_that_is_missing(tmp_path):
    with pytest.raises(ValueError, match=r"--tokens .*: no such file; name a json file"):
        rock_freeze(str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match="--tokens"):
        rock_freeze(str(tmp_path))


# whole methods on a random world


@pytest.fixture
def world(float64):
    return World.random(vocab=4, steps=3)


@pytest.fixture
def ids(world):
    return world.sequences()[torch.randperm(64)[:24]]


@pytest.fixture
def given(ids):
    mask = torch.arange(3) < torch.randint(1, 4, (24, 1))
    mask[0], mask[1] = tensor([True, False, True]), False
    return {
        "mask": mask,
        "group": torch.arange(24) % 5,
        "outcome": torch.rand(24).round(),
        "prefix": torch.arange(24) % 3,
    }


SELECTORS = {
    **{name: METHODS[name]() for name in ("entropy", "iw-opd", "eopd", "eopd-sampled", "scope", "tropd")},
    "rock": Method((Match(weights=(Frozen((1,), 0.3),)),)),
    "rock window": Method((Match(weights=(FrozenWindow((1,), 0.3, 1, 0.7),)),)),
    "scope reversed": scope(reverse_student=True),
    "fire weights": Method((PolicyGradient(weights=(Confidence(),)),)),
}
every = pytest.mark.parametrize("m", SELECTORS.values(), ids=SELECTORS)


@every
def test_the_mechanism_fires(m, world, ids, given):
    """Some token weighs more than another, and of the gates some open and some do not."""
    batch = world.measure(m, ids, **given)
    for leaf in (w for term in m.terms for w in term.weights):
        weight = call(leaf, batch)[batch.mask]
        assert weight.isfinite().all() and (weight >= 0).all()
        assert weight.max() > weight.min()
        if not isinstance(leaf, Confidence | PrefixAgreement | Frozen | FrozenWindow):
            assert 0 < (weight > 0).double().mean() < 1


@every
def test_weights_leave_the_denominator_alone(m, world, ids, given):
    batch = world.measure(m, ids, **given)
    for term, target in zip(m.terms, m.prepare(batch), strict=True):
        want = term.coef * batch.mask.double()
        for leaf in term.weights:
            want = want * call(leaf, batch).where(batch.mask, 0)
        close(target.weight * batch.mask.sum(), want)


BATCH = {"entropy", "eopd", "scope", "scope reversed", "fire weights", "rock window"}


@every
def test_statistics_are_of_the_whole_batch(m, request, world, ids, given):
    """Prepared by parts, the batch methods weigh differently: prepare must see all rows of all ranks."""
    batch = world.measure(m, ids, **given)
    rows = torch.arange(24).split(1)
    weights = lambda parts: [
        torch.cat([m.prepare(part)[i].weight * part.mask.sum() for part in parts]) for i in range(len(m.terms))
    ]
    whole, single = weights([batch]), weights([batch[r] for r in rows])
    differ = any(not torch.allclose(a, b) for a, b in zip(whole, single, strict=True))
    assert differ == (request.node.callspec.id in BATCH)


@every
def test_masked_columns_do_not_leak(m, world, ids, given):
    batch = world.measure(m, ids, **given)
    for leaf in (w for term in m.terms for w in term.weights):
        want = call(leaf, batch)[batch.mask]
        columns = {name: getattr(batch, name) for name in reads(leaf)}
        for junk in (NAN, INF, -INF):
            poisoned = {
                name: x.where(batch.mask, junk) if x.is_floating_point() and x.ndim == 2 else x
                for name, x in columns.items()
            }
            close(leaf(**poisoned)[batch.mask], want)


@every
def test_weights_and_gates_carry_no_gradient(m, world, ids, given):
    """The student's arms are detached: the loss is linear in the weights, and only log p or D is differentiated."""
    batch = world.measure(m, ids, **given)
    targets = m.prepare(batch)
    at = world.positions(ids)
    got = torch.autograd.grad(m.loss(at, targets).sum(), world.student)[0]
    want = torch.zeros_like(got)
    for term, target in zip(m.terms, targets, strict=True):
        at = world.positions(ids)
        unweighted = term.loss(at, target)
        assert not target.weight.requires_grad
        want += torch.autograd.grad((target.weight.detach() * unweighted).sum(), world.student)[0]
    close(got, want)


def test_neutral_settings_are_the_base_method(world, ids, given):
    for method, base in (
        (iw_opd(0.0), opd()),
        (entropy(1.0), opd()),
        (rock_freeze(), opd_full()),
        (rock_freeze(weight=1.0), opd_full()),
    ):
        a, b = (world.gradient(x, ids) for x in (method, base))
        close(a, b)


def test_scope_splits_the_batch(world, ids, given):
    """Right rollouts: likelihood alone.  Wrong ones: OPD alone.  One denominator."""
    m = scope()
    batch = world.measure(m, ids, **given)
    right, wrong = m.prepare(batch)
    is_right = (batch.outcome == 1)[:, None] & batch.mask
    assert ((right.weight > 0) == is_right).all() and ((wrong.weight > 0) == (batch.mask & ~is_right)).all()
    assert (right.advantage[batch.mask] == 1).all()
    close(wrong.advantage[batch.mask], (batch.teacher_logp - batch.student_logp)[batch.mask])
    for group in batch.group.unique():
        for target, arm in ((right, batch.outcome == 1), (wrong, batch.outcome == 0)):
            mine = arm & (batch.group == group) & batch.mask.any(1)
            if mine.any():
                per_row = (target.weight * batch.mask.sum()).amax(1)[mine]
                close(per_row.mean(), tensor(1.0))


def test_scope_of_all_right_or_all_wrong(world, ids, given):
    likelihood = Method((PolicyGradient(One()),))
    alone = given | {"group": torch.arange(24)}
    for outcome, base in ((1.0, likelihood), (0.0, opd())):
        columns = alone | {"outcome": torch.full((24,), outcome)}
        a, b = (
            torch.autograd.grad(
                x.loss(world.positions(ids), x.prepare(world.measure(x, ids, **columns))).sum(), world.student
            )[0]
            for x in (scope(), base)
        )
        close(a, b)


def test_eopd_adds_the_forward_kl_where_the_teacher_is_unsure(world, ids, given):
    m = eopd(0.8, 2)
    batch = world.measure(m, ids, **given)
    gate = m.prepare(batch)[1].weight > 0
    h = batch.teacher_entropy
    assert gate.sum() >= round(0.2 * int(batch.mask.sum()))
    assert h[gate].min() > h[batch.mask & ~gate].max()
    at = world.positions(ids)
    p, q = at.student_logp.detach(), at.teacher_logp
    want = ReverseKL()(p, q) + gate * BucketForwardKL(Support(2, "teacher"))(p, q)
    close(m.loss(at, m.prepare(batch)).detach(), (want / batch.mask.sum()).where(batch.mask, 0))


def test_eopd_as_published(world, ids, given):
    m = eopd_sampled(1.0, 2)
    batch = world.measure(m, ids, **given)
    base, gated = m.prepare(batch)
    assert ((gated.weight > 0) == (batch.mask & (batch.teacher_entropy > 1.0))).all() and (gated.weight > 0).any()
    close(base.advantage[batch.mask], (batch.teacher_logp - batch.student_logp)[batch.mask])


def test_iw_opd_prefers_the_start_of_every_rollout(world, ids, given):
    (target,) = iw_opd().prepare(world.measure(iw_opd(), ids))
    weight = target.weight * ids.numel()
    close(weight[:, 0], torch.full((24,), 1.5))
    assert (weight.diff(dim=1) <= 0).all() and (weight[:, -1] > 1).all()


# filters


def test_a_filter_takes_its_tokens_out_of_the_denominator(world, ids, given):
    m = METHODS["fire"]()
    batch = world.measure(m, ids, **given)
    (target,) = m.prepare(batch)
    kept = call(LikelyRollouts(0.2), batch)
    some = batch.mask.any(1)
    assert 0 < (some & ~kept.any(1)).double().sum() / some.sum() < 0.3
    assert ((target.weight > 0) == kept).all()
    rows = (target.weight * kept.sum()).sum(1)  # mean weight 1 in each kept rollout
    close(rows[kept.any(1)], batch.mask.sum(1).double()[kept.any(1)])
    assert m.reads() >= {"teacher_logp", "teacher_entropy", "student_entropy"} and not m.local()


def test_the_filter_comes_before_the_reduction_and_the_statistics(world, ids, given):
    m = METHODS["fire"]()
    batch = world.measure(m, ids, **given)
    cut = dataclasses.replace(batch, mask=call(LikelyRollouts(0.2), batch))
    bare = dataclasses.replace(m, filters=())
    close(m.prepare(batch)[0].weight, bare.prepare(cut)[0].weight)
    assert not torch.allclose(m.prepare(batch)[0].weight, bare.prepare(batch)[0].weight)
    assert bare == METHODS["fire"](drop=0.0)
