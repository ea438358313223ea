"""What every method must obey.  A new line in METHODS is tested by being there."""

import dataclasses
import sys

import pytest
import torch

from opd.analysis.exact import World
from opd.core.types import ANSWER_COLUMNS, DATA, MEASURED, ROLLOUT_COLUMNS, STUDENT
from opd.losses.advantages import Discount, DiscountExpected, Whiten
from opd.losses.baselines import Optimal, Value
from opd.losses.divergences import ForwardKL
from opd.losses.reductions import Constant, SequenceMean
from opd.losses.rewards import Power
from opd.losses.surrogates import Clipped, ImportanceSampling
from opd.losses.target_distribution import Extrapolated, Reference
from opd.losses.terms import Match, PolicyGradient, Positions
from opd.losses.token_weights import TruncatedImportance
from opd.methods import METHODS, omniopd, pg
from opd.methods.classic import gkd, gkd_forward, opd, opd_topk
from opd.methods.method import Method
from opd.methods.npd import DeltaIFD
from opd.methods.pg import opd_stratified
from opd.methods.privileged import opsd, sdpo
from opd.methods.rollout_policies.on_policy import OnPolicy
from opd.methods.vopd import vopd_topk

pytestmark = pytest.mark.usefixtures("float64")
close = torch.testing.assert_close
BY_TOKEN = MEASURED | {"sampler_logp", "coin", "agreement"}

VARIANTS = {
    # Terms on hidden states have no place in a world of tables: test_representation.py has their laws, on models.
    **{name: m for name, factory in METHODS.items() if not (m := factory()).headless()},
    "g-opd of a power": Method((PolicyGradient(Power(0.5), Optimal(), against=Extrapolated(1.5)),)),
    "against the reference": Method((Match(ForwardKL(), against=Reference()),)),
    "opd gamma=1": opd(1.0),
    "opd gamma=1 expected": opd(1.0, "expected"),
    "opd-topk 1": opd_topk(1),
    "opd-topk 2 renorm": opd_topk(2, "student", "renorm"),
    "opd-topk 2 teacher bucket": opd_topk(2, "teacher"),
    "opd-topk 2 teacher generalised": opd_topk(2, "teacher", "generalised"),
    "vopd-topk 2": vopd_topk(2),
    **{f"opd-stratified 2 {b}": opd_stratified(2, b) for b in ("none", "value", "topk", "optimal")},
    "opd-stratified 0": opd_stratified(0),
    "gkd share=0.5": gkd(0.1, 0.5, "response"),
    "gkd-forward share=0": gkd_forward(0.0),
    "pg power optimal": pg("power", "optimal"),
    "pg clip value stratified": pg("clip", "value", "stratified", k=2),
    "pg tanh topk full": pg("tanh", "topk", "full", k=2),
    "pg power none stratified": pg("power", "none", "stratified", k=1),
    "opsd clip": opsd(clip=0.05),
    "sdpo reverse": sdpo(2, 1.0),
    "omniopd centred": omniopd(centred=True),
    "truncated importance": Method((PolicyGradient(weights=(TruncatedImportance(1.1),), coef=0.5),)),
    "importance sampling": Method(
        (PolicyGradient(baseline=Optimal(), surrogate=ImportanceSampling()),), SequenceMean(), OnPolicy(updates=2)
    ),
    "clipped": Method((PolicyGradient(Power(0.5), transforms=(Discount(0.9), Whiten()), surrogate=Clipped()),)),
    "Delta-IFD": Method((Match(ForwardKL()),), filters=(DeltaIFD(),)),
    "baseline and future": Method((PolicyGradient(baseline=Value(), transforms=(DiscountExpected(0.9),)),)),
    "two terms": Method(
        (PolicyGradient(transforms=(Discount(0.5),), coef=0.3), Match(ForwardKL(), (TruncatedImportance(),), 2.0)),
        Constant(7),
    ),
}
every = pytest.mark.parametrize("m", VARIANTS.values(), ids=VARIANTS)


@pytest.fixture
def world(float64):
    return World.random(vocab=4, steps=3)


@pytest.fixture
def ids(world):
    return world.sequences()[torch.randperm(64)[:20]]


@pytest.fixture
def given(ids):
    """Masks ragged, with a hole and an empty row; samples from some other policy."""
    mask = torch.arange(3) < torch.randint(1, 4, (20, 1))
    mask[0], mask[1] = torch.tensor([True, False, True]), False
    chunk = torch.randint(0, 3, (20, 3))
    return {
        "mask": mask,
        "group": torch.arange(20) % 5,
        "source": torch.where(torch.arange(20) < 15, STUDENT, DATA),
        "outcome": torch.rand(20).round(),
        "sampler_logp": -torch.rand(20, 3),
        "prefix": torch.arange(20) % 3,
        "chunk": chunk,
        "agreement": torch.rand(20, 3) * (chunk > 0),
        "verdict": torch.rand(20),
        "student_alone": torch.rand(20),  # as likely as not Delta-IFD leaves a row out
        "teacher_alone": torch.rand(20),
        "judged": torch.arange(20) % 5 != 4,  # of each group all or none
        "stage": torch.randint(1, 5, (20, 3)).sort(1).values,
        "stage_scores": torch.rand(20, 4),
    }


def gradient(m, world, batch, targets=None, rows=slice(None)):
    """In the student's table, as the head pass takes it: only trained positions enter."""
    targets = m.prepare(batch) if targets is None else targets
    part = batch[rows]
    at = world.positions(part.ids)
    compact = Positions(*(getattr(at, f.name)[part.mask] for f in dataclasses.fields(at)))
    loss = m.loss(compact, tuple(t[rows][part.mask] for t in targets))
    assert loss.shape == (part.mask.sum(),)
    return torch.autograd.grad(loss.sum(), world.student)[0]


def same(some, others):
    """Targets are equal."""
    for x, y in zip(some, others, strict=True):
        for f in dataclasses.fields(x):
            a, b = getattr(x, f.name), getattr(y, f.name)
            assert (a is None) == (b is None), f.name
            if a is not None:
                close(a, b)


def poisoned(batch, junk, columns):
    """Columns that hold junk where nothing is trained."""
    hide = lambda x: x if x is None else x.where(batch.mask, junk)
    columns = {name: hide(getattr(batch, name)) for name in columns}
    return dataclasses.replace(batch, **columns, scores=tuple(hide(x) for x in batch.scores))


@every
def test_gradient_is_finite_and_not_zero(m, world, ids, given):
    g = gradient(m, world, world.measure(m, ids, **given))
    assert g.isfinite().all() and g.abs().max() > 1e-6


@every
@pytest.mark.parametrize("junk", [float("nan"), -float("inf")])
def test_padding_is_invisible(m, junk, world, ids, given):
    batch = world.measure(m, ids, **given)
    other = poisoned(batch, junk, BY_TOKEN)
    after = batch.mask.flip(1).cumsum(1).flip(1) == 0  # a hole in the mask is context of what follows
    other = dataclasses.replace(other, ids=other.ids.where(~after, (other.ids + 1) % 4))
    targets = m.prepare(other)
    for x, y in zip(targets, m.prepare(batch), strict=True):
        close(x.weight, y.weight)
        assert (x.weight[~batch.mask] == 0).all()
        if x.advantage is not None:
            close(x.advantage, y.advantage)
            assert (x.advantage[~batch.mask] == 0).all()
    close(gradient(m, world, other, targets), gradient(m, world, batch))


def test_masking_does_not_rest_on_the_leaves(world, ids, given):
    """Leaves that look at masked tokens: prepare hides from them what it can, and what they say there."""
    seen = []
    weight = lambda teacher_logp: teacher_logp
    transform = lambda x, student_logp: seen.append(x) or x + student_logp
    m = Method((PolicyGradient(transforms=(transform,), weights=(weight,)),))
    batch = poisoned(world.measure(m, ids, **given), float("nan"), MEASURED)
    (target,) = m.prepare(batch)
    for x in (target.weight, target.advantage, *seen):
        assert x.isfinite().all() and (x[~batch.mask] == 0).all()


@every
def test_longer_padding_is_invisible(m, world, ids, given):
    batch = world.measure(m, ids, **given)
    wide = lambda x, fill: torch.nn.functional.pad(x, (0, 2), value=fill)
    columns = {name: wide(getattr(batch, name), float("nan")) for name in BY_TOKEN}
    columns |= {"chunk": wide(batch.chunk, 0), "stage": wide(batch.stage, 0)}
    scores = tuple(x if x is None else wide(x, float("nan")) for x in batch.scores)
    other = dataclasses.replace(batch, **columns, ids=wide(batch.ids, 0), mask=wide(batch.mask, False), scores=scores)
    for x, y in zip(m.prepare(other), m.prepare(batch), strict=True):
        close(x.weight, wide(y.weight, 0.0))
        assert (x.advantage is None) == (y.advantage is None)
        if x.advantage is not None:
            close(x.advantage, wide(y.advantage, 0.0))


@every
def test_nothing_trained_is_no_gradient(m, world, ids, given):
    batch = world.measure(m, ids, **given | {"mask": torch.zeros(20, 3, dtype=torch.bool)})
    for target in m.prepare(batch):
        assert (target.weight == 0).all()
        assert target.advantage is None or (target.advantage == 0).all()
    assert (gradient(m, world, batch) == 0).all()


@every
def test_micro_batches_add_up(m, world, ids, given):
    batch = world.measure(m, ids, **given)
    targets = m.prepare(batch)
    parts = [gradient(m, world, batch, targets, rows) for rows in torch.arange(20).split([7, 1, 0, 12])]
    close(sum(parts), gradient(m, world, batch))


@every
def test_world_size_is_irrelevant(m, world, ids, given):
    """Ranks measure their rows, gather the columns, prepare the same whole batch, train their rows; one has none."""
    whole = world.measure(m, ids, **given)
    owner = torch.tensor([0, 1, 3])[torch.arange(20) % 3]
    order = owner.argsort(stable=True)  # gathered rank by rank
    targets = m.prepare(whole[order])
    rows = [(owner[order] == rank).nonzero()[:, 0] for rank in range(4)]
    close(sum(gradient(m, world, whole[order], targets, mine) for mine in rows), gradient(m, world, whole))


@every
def test_row_order_is_irrelevant(m, world, ids, given):
    batch, order = world.measure(m, ids, **given), torch.randperm(20)
    close(gradient(m, world, batch[order]), gradient(m, world, batch))
    same(m.prepare(batch[order]), [t[order] for t in m.prepare(batch)])


@every
def test_reads_only_what_it_names(m, world, ids, given):
    batch = world.measure(m, ids, **given)
    unread = {name: None for name in MEASURED - m.reads()}
    floats = {
        x: torch.full_like(getattr(batch, x), float("nan"))
        for x in {"outcome", "sampler_logp", "coin", "agreement", "verdict", "stage_scores"} - m.reads()
    }
    bare = dataclasses.replace(batch, **unread, **floats)
    assert m.reads() <= ROLLOUT_COLUMNS | MEASURED | ANSWER_COLUMNS
    close(gradient(m, world, bare), gradient(m, world, batch))


@every
def test_is_a_value(m):
    """Prints as the code that makes it: the log of a run is its config."""
    loaded = [x for name, x in list(sys.modules.items()) if name.startswith(("opd.losses.", "opd.methods."))]
    names = {k: v for x in loaded for k, v in vars(x).items()}
    twin = eval(repr(m), names)
    assert twin == m and hash(twin) == hash(m) and repr(twin) == repr(m)


@every
def test_fast_path_equals_two_phases(m, world, ids, given):
    """A local method may be scored inside the head pass; another must be measured first."""
    batch = world.measure(m, ids, **given)
    unscored = dataclasses.replace(batch, scores=())
    if not all(term.local() for term in m.terms):
        with pytest.raises(AssertionError, match="scores"):
            m.prepare(unscored)
        return
    fast, slow = m.prepare(unscored), m.prepare(batch)
    assert all(target.advantage is None for target in fast)
    close(m.loss(world.positions(ids), fast), m.loss(world.positions(ids), slow))
    close(gradient(m, world, batch, fast), gradient(m, world, batch, slow))


@every
def test_local_methods_need_no_measured_column(m, world, ids, given):
    batch = world.measure(m, ids, **given)
    if m.local():
        bare = dataclasses.replace(batch, **dict.fromkeys(MEASURED), scores=())
        close(gradient(m, world, bare), gradient(m, world, batch))


@every
def test_loss_is_linear_in_coef(m, world, ids, given):
    batch = world.measure(m, ids, **given)
    thrice = dataclasses.replace(m, terms=tuple(dataclasses.replace(term, coef=3 * term.coef) for term in m.terms))
    close(gradient(thrice, world, batch), 3 * gradient(m, world, batch))


@every
def test_terms_add(m, world, ids, given):
    other = dataclasses.replace(m, terms=(Match(ForwardKL(), coef=0.7),))
    both = dataclasses.replace(m, terms=m.terms + other.terms)
    got, *parts = (gradient(x, world, world.measure(x, ids, **given)) for x in (both, m, other))
    close(got, sum(parts))


@every
def test_data_carries_no_gradient(m, world, ids, given):
    batch = world.measure(m, ids, **given)
    live = {name: getattr(batch, name).clone().requires_grad_() for name in BY_TOKEN}
    scores = tuple(x if x is None else x.clone().requires_grad_() for x in batch.scores)
    for target in m.prepare(dataclasses.replace(batch, **live, scores=scores)):
        assert not target.weight.requires_grad
        assert target.advantage is None or not target.advantage.requires_grad


@every
def test_a_reward_carries_no_gradient(m, world, ids, given):
    """A policy gradient moves the student through log p(y) alone, and the teacher not at all."""
    if not all(isinstance(term, PolicyGradient) for term in m.terms):
        return
    at = world.positions(ids)
    teacher = at.teacher_logp.clone().requires_grad_()
    live = dataclasses.replace(at, teacher_logp=teacher)
    loss = m.loss(live, m.prepare(world.measure(m, ids, **given)))
    assert torch.autograd.grad(loss.sum(), teacher, allow_unused=True)[0] is None


@every
def test_tokens_nobody_can_say_change_nothing(m, world, ids, given):
    """Padded rows of the heads: -inf in both models."""
    batch = world.measure(m, ids, **given)
    at = world.positions(ids)
    never = torch.full((*ids.shape, 2), -float("inf"))
    wide = lambda z: torch.cat((z, never), -1).log_softmax(-1)
    padded = Positions(ids, *(wide(getattr(at, f"{name}_logp")) for name in ("student", "teacher", "reference")))
    scored = tuple(term.score(padded) for term in m.terms)
    targets = m.prepare(dataclasses.replace(batch, scores=scored))
    same(targets, m.prepare(batch))
    close(m.loss(padded, targets), m.loss(at, targets))
    live = lambda x: torch.autograd.grad(m.loss(x, targets).sum(), world.student, retain_graph=True)
    close(live(padded), live(at))


@every
def test_prepare_and_loss_are_pure(m, world, ids, given):
    batch = world.measure(m, ids, **given)
    before = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    copies = {k: v.clone() for k, v in before.items() if isinstance(v, torch.Tensor)}
    first, second = m.prepare(batch), m.prepare(batch)
    close(gradient(m, world, batch, first), gradient(m, world, batch, second), rtol=0, atol=0)
    for name, x in copies.items():
        close(before[name], x, rtol=0, atol=0)
