"""Every leaf by hand: golden values, limits, invariances, independent references."""

import dataclasses
import inspect
import math
import sys
from math import log

import pytest
import torch

from opd.core.types import DATA, STUDENT, TEACHER, Batch, call, pad, reads
from opd.losses import advantages as transforms
from opd.losses import baselines, divergences, estimators, reductions, rewards, surrogates
from opd.losses import token_weights as weights
from opd.losses.advantages import Discount, DiscountExpected, GroupAdvantage, GroupWhiten, MeanFuture, Whiten
from opd.losses.baselines import Optimal, TopKValue, Value
from opd.losses.divergences import (
    JSD,
    BucketJSD,
    BucketKL,
    ForwardKL,
    GeneralisedKL,
    RenormalisedKL,
    ReverseKL,
    Support,
    SupportMeanKL,
)
from opd.losses.estimators import Full, Sampled, Several, Stratified
from opd.losses.reductions import Constant, LastTokens, SequenceMean, TokenMean
from opd.losses.rewards import Clip, LogRatio, Power, Tanh
from opd.losses.surrogates import Clipped, ImportanceSampling, OffPolicy, Reinforce, TruncatedRatio
from opd.losses.token_weights import TruncatedImportance
from opd.methods.omniopd import Audited, CentredPosterior, Posterior, Unaudited
from opd.methods.rollout_policies.on_policy import Mixture, OnPolicy
from opd.methods.rubricem import StageReturn, StageScore
from tests.by_hand import INF, POISON, close, logp, tensor
from tests.methods import test_reward_methods, test_selection_methods
from tests.reference_losses import DensityPower

pytestmark = pytest.mark.usefixtures("float64")


def leaves(module) -> set[type]:
    """The leaves that a module defines."""
    return {
        x
        for x in vars(module).values()
        if inspect.isclass(x) and dataclasses.is_dataclass(x) and x.__module__ == module.__name__
    }


# rewards


REWARDS = [
    (LogRatio(), log(2)),  # p = 1/4, q = 1/2
    (Power(0.5), 0.5**0.5 - 0.5),
    (Power(2.0), 3 / 16),
    (Clip(-1.0, 0.5), 0.5),
    (Clip(0.8, 1.0), 0.8),
    (Clip(-1.0, 1.0), log(2)),
    (Clip(-1.0, 0.1, Power(2.0)), 0.1),
    (Tanh(1.0), 3 / 5),  # tanh(log 2) = (4 - 1) / (4 + 1)
    (Tanh(2.0), 1 / 3),
    (Tanh(2.0, Power(2.0)), math.tanh(3 / 32)),
]


@pytest.mark.parametrize(("reward", "want"), REWARDS, ids=repr)
def test_reward(reward, want):
    close(reward(logp(0.25), logp(0.5)), tensor([want]))


@pytest.mark.parametrize("reward", [LogRatio(), Power(0.5), Clip(), Tanh()], ids=repr)
def test_reward_has_the_sign_of_what_the_teacher_prefers(reward):
    p, q = logp(0.1, 0.3, 0.6), logp(0.3, 0.3, 0.4)
    close(reward(p, q).sign(), tensor([1.0, 0, -1]))
    close(reward(q, p), -reward(p, q))


def test_small_powers_tend_to_the_log_ratio():
    p, q = torch.randn(2, 50).log_softmax(-1)
    for alpha in (1e-3, 1e-6):
        close(Power(alpha)(p, q) / alpha, LogRatio()(p, q), rtol=0, atol=20 * alpha)


@pytest.mark.parametrize("alpha", [500.0, 1e6, 1e30])
def test_large_powers_stay_bounded(alpha):
    p, q = logp(1.0, 0.0, 1.0, 0.5, 0.0), logp(0.0, 1.0, 1.0, 0.5, 0.0)
    close(Power(alpha)(p, q), tensor([-1.0, 1, 0, 0, 0]))


# baselines and estimators; p = (1/2, 1/4, 1/4), q = (1/4, 1/4, 1/2): f = (-1, 0, 1) log 2


P, Q = logp(0.5, 0.25, 0.25), logp(0.25, 0.25, 0.5)
HEAD = tensor([True, False, False])


def test_value_is_minus_the_kl():
    close(Value()(LogRatio(), P, Q, None), tensor(-log(2) / 4))


def test_top_k_value_renormalises_both_models():
    p, q = logp(1 / 2, 1 / 3, 1 / 6), logp(1 / 3, 1 / 6, 1 / 2)  # on the top two: (3/5, 2/5) and (2/3, 1/3)
    close(TopKValue(2)(LogRatio(), p, q, None), tensor(3 / 5 * log(10 / 9) + 2 / 5 * log(5 / 6)))
    close(TopKValue(1)(LogRatio(), p, q, None), tensor(0.0))
    close(TopKValue(9)(LogRatio(), p, q, None), Value()(LogRatio(), p, q, None))


def test_optimal_baseline():
    """|s|^2 = 1 - 2 p + |p|^2 = (3, 7, 7)/8; p |s|^2 = (6, 7, 7)/32."""
    close(Optimal()(LogRatio(), P, Q, None), tensor((7 - 6) / (6 + 7 + 7) * log(2)))


def test_optimal_baseline_of_the_tail():
    """First token exact: the others have p |s|^2 = (7, 7)/32, G_1 = (-2, 1, 1)/8, G_f = (-2, -1, 3)/16 log 2."""
    above, below = 7 / 32 - (4 - 1 + 3) / 128, 14 / 32 - 6 / 64
    close(Optimal()(LogRatio(), P, Q, HEAD), tensor(above / below * log(2)))
    close(tensor(above / below), tensor(1 / 2))  # two tokens of equal probability: the mean of their rewards
    close(Optimal()(LogRatio(), P, Q, HEAD & False), Optimal()(LogRatio(), P, Q, None))


def test_optimal_baseline_where_nothing_is_sampled_is_the_value():
    close(Optimal()(LogRatio(), P, Q, HEAD | True), Value()(LogRatio(), P, Q, None))


@pytest.mark.parametrize("baseline", [Value(), TopKValue(2), Optimal()], ids=repr)
def test_baseline_of_a_constant_reward_is_that_constant(baseline):
    constant = lambda p, q: torch.full_like(p, 3.0)
    p, q = torch.randn(2, 4, 6).log_softmax(-1)
    for exact in (None, torch.rand(4, 6) < 0.5):
        close(baseline(constant, p, q, exact), torch.full((4,), 3.0))


def test_what_an_estimator_sums_exactly():
    p = torch.stack((P, logp(0.2, 0.2, 0.6)))
    assert Sampled().exact(p) is None
    assert not Stratified(0).exact(p).any()
    assert Stratified(1).exact(p).tolist() == [[True, False, False], [False, False, True]]
    assert Stratified(3).exact(p).all() and Stratified(99).exact(p).all() and Full().exact(p).all()


# divergences; p = (1/2, 1/3, 1/6), q = (1/3, 1/6, 1/2): p's top is the first token, q's the last


DIVERGENCES = [
    (ReverseKL(), 1 / 2 * log(3 / 2) + 1 / 3 * log(2) - 1 / 6 * log(3)),
    (ForwardKL(), -1 / 3 * log(3 / 2) - 1 / 6 * log(2) + 1 / 2 * log(3)),
    (  # M = (5, 3, 4) / 12
        JSD(0.5),
        1 / 2 * (1 / 3 * log(4 / 5) + 1 / 6 * log(2 / 3) + 1 / 2 * log(3 / 2))
        + 1 / 2 * (1 / 2 * log(6 / 5) + 1 / 3 * log(4 / 3) + 1 / 6 * log(1 / 2)),
    ),
    (  # M = (q + 3 p) / 4 = (11, 7, 6) / 24
        JSD(0.25),
        1 / 4 * (1 / 3 * log(8 / 11) + 1 / 6 * log(4 / 7) + 1 / 2 * log(2))
        + 3 / 4 * (1 / 2 * log(12 / 11) + 1 / 3 * log(8 / 7) + 1 / 6 * log(2 / 3)),
    ),
    (BucketKL(Support(1)), 1 / 2 * log(3 / 2) + 1 / 2 * log(3 / 4)),  # (1/2, 1/2) and (1/3, 2/3)
    (BucketKL(Support(1, "teacher")), 1 / 6 * log(1 / 3) + 5 / 6 * log(5 / 3)),  # (1/6, 5/6) and (1/2, 1/2)
    (  # (1/2, 1/2) and (1/3, 2/3), M = (5, 7) / 12
        BucketJSD(Support(1)),
        1 / 2 * (1 / 3 * log(4 / 5) + 2 / 3 * log(8 / 7)) + 1 / 2 * (1 / 2 * log(6 / 5) + 1 / 2 * log(6 / 7)),
    ),
    (  # (1/6, 5/6) and (1/2, 1/2), M = (q + 3 p) / 4 = (1, 3) / 4
        BucketJSD(Support(1, "teacher"), 0.25),
        1 / 4 * (1 / 2 * log(2) + 1 / 2 * log(2 / 3)) + 3 / 4 * (1 / 6 * log(2 / 3) + 5 / 6 * log(10 / 9)),
    ),
    (RenormalisedKL(Support(2)), 3 / 5 * log(9 / 10) + 2 / 5 * log(6 / 5)),  # (3/5, 2/5) and (2/3, 1/3)
    (RenormalisedKL(Support(2, "teacher")), 3 / 4 * log(15 / 8) + 1 / 4 * log(5 / 12)),  # (3/4, 1/4) and (2/5, 3/5)
    (GeneralisedKL(Support(1)), 1 / 2 * log(3 / 2) - 1 / 2 + 1 / 3),
    (GeneralisedKL(Support(2, "teacher")), 1 / 2 * log(3 / 2) + 1 / 6 * log(1 / 3) - 1 / 2 - 1 / 6 + 1 / 3 + 1 / 2),
    (DensityPower(1.0), (1 / 36 + 1 / 36 + 1 / 9) / 2),  # half the squared distance
    (DensityPower(2.0), 2 / 3 * (1 / 27 + 1 / 216 + 1 / 8 - 3 / 2 * (1 / 18 + 1 / 108 + 1 / 24) + 1 / 2 * (1 / 6))),
]
ALL = pytest.mark.parametrize("d", [d for d, _ in DIVERGENCES], ids=repr)


@pytest.mark.parametrize(("d", "want"), DIVERGENCES, ids=repr)
def test_divergence(d, want):
    close(d(logp(1 / 2, 1 / 3, 1 / 6), logp(1 / 3, 1 / 6, 1 / 2)), tensor(want))


def test_every_leaf_has_a_golden_value():
    more = (*test_reward_methods.FORWARD, *test_reward_methods.REWARDS)
    golden = {type(x) for x, *_ in (*DIVERGENCES, *REWARDS, *more)}
    # The gradient of SupportMeanKL is not that of its value, on purpose: test_exact.
    assert leaves(divergences) - {Support, SupportMeanKL} <= golden and leaves(rewards) <= golden
    assert leaves(estimators) == {Sampled, Several, Stratified, Full}  # Several: test_async_opd
    assert leaves(baselines) == {Value, TopKValue, Optimal}
    # GroupAdvantage and the leaves of omniopd: test_text_teachers; StageScore, StageReturn: test_stages.
    assert leaves(transforms) == {Discount, DiscountExpected, Whiten, GroupWhiten, MeanFuture, GroupAdvantage}
    assert leaves(sys.modules[Posterior.__module__]) == {Posterior, CentredPosterior, Audited, Unaudited}
    assert leaves(sys.modules[StageScore.__module__]) >= {StageScore, StageReturn}
    assert leaves(reductions) == {TokenMean, SequenceMean, Constant, LastTokens}  # LastTokens: test_hidden_states
    assert leaves(weights) == {TruncatedImportance} | test_selection_methods.WEIGHTS
    assert leaves(surrogates) == {Reinforce, ImportanceSampling, OffPolicy, TruncatedRatio, Clipped}


@ALL
def test_divergence_gradient(d):
    x, y = (torch.randn(4, 5, requires_grad=True) for _ in "xy")
    assert torch.autograd.gradcheck(lambda x, y: d(x.log_softmax(-1), y.log_softmax(-1)), (x, y))


@ALL
def test_divergence_vanishes_with_its_gradient_where_the_models_agree(d):
    """Also why no raw truncated KL is a leaf: its gradient at p = q is not zero."""
    x, y = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6)
    p, q = x.log_softmax(-1), x.detach().log_softmax(-1)
    close(d(p, q), torch.zeros(4))
    close(torch.autograd.grad(d(p, q).sum(), x)[0], torch.zeros(4, 6))
    assert (d(p, y.log_softmax(-1)) > 0).all()


@ALL
def test_names_of_tokens_do_not_matter(d):
    p, q = torch.randn(2, 4, 6).log_softmax(-1)
    order = torch.randperm(6)
    close(d(p[:, order], q[:, order]), d(p, q))
    close(d(p[2], q[2]), d(p, q)[2])  # a row alone, without a batch axis


@pytest.mark.parametrize("k", [6, 7, 100])
@pytest.mark.parametrize("of", ["student", "teacher"])
@pytest.mark.parametrize("truncated", [BucketKL, RenormalisedKL, GeneralisedKL], ids=lambda d: d.__name__)
def test_k_of_the_vocabulary_is_the_full_divergence(truncated, of, k):
    x, q = torch.randn(5, 6, requires_grad=True), torch.randn(5, 6).log_softmax(-1)
    p = x.log_softmax(-1)
    short, full = truncated(Support(k, of))(p, q), ReverseKL()(p, q)
    close(short, full)
    close(*(torch.autograd.grad(d.sum(), x, retain_graph=True)[0] for d in (short, full)))


@pytest.mark.parametrize("of", ["student", "teacher"])
def test_bucketed_jsd_of_the_vocabulary_is_the_jsd(of):
    x, q = torch.randn(5, 6, requires_grad=True), torch.randn(5, 6).log_softmax(-1)
    p = x.log_softmax(-1)
    short, full = BucketJSD(Support(6, of), 0.3)(p, q), JSD(0.3)(p, q)
    close(short, full)
    close(*(torch.autograd.grad(d.sum(), x, retain_graph=True)[0] for d in (short, full)))


def test_bucket_is_a_lower_bound_that_rises_with_k():
    p, q = (3 * torch.randn(2, 200, 9)).log_softmax(-1)
    bounds = torch.stack([BucketKL(Support(k))(p, q) for k in range(1, 10)])
    assert (bounds >= -1e-12).all() and (bounds.diff(dim=0) >= -1e-12).all()
    close(bounds[-1], ReverseKL()(p, q))


def test_support_follows_the_model_it_names():
    p, q = logp(1 / 2, 1 / 3, 1 / 6), logp(1 / 3, 1 / 6, 1 / 2)
    assert Support(1)(p, q).tolist() == [0] and Support(1, "teacher")(p, q).tolist() == [2]


def test_density_power_tends_to_the_reverse_kl():
    p, q = torch.randn(2, 4, 6).log_softmax(-1)
    close(DensityPower(1e-5)(p, q) / 1e-5, ReverseKL()(p, q), rtol=0, atol=1e-3)


# independent references


def test_kl_equals_torch():
    p, q = torch.randn(2, 4, 6).log_softmax(-1)
    want = lambda inner, outer: torch.nn.functional.kl_div(inner, outer, reduction="none", log_target=True).sum(-1)
    close(ReverseKL()(p, q), want(q, p))
    close(ForwardKL()(p, q), want(p, q))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jsd_equals_trl(beta, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    gkd = pytest.importorskip(
        "trl.experimental.gkd", reason="the reference is trl, extra `bench`", exc_type=ImportError
    )
    theirs = gkd.GKDTrainer.generalized_jsd_loss
    x, y = torch.randn(2, 3, 4, 6)
    x.requires_grad_()
    ours = JSD(beta)(x.log_softmax(-1), y.log_softmax(-1)).sum()
    want = theirs(x, y, beta=beta, reduction="sum")
    close(ours, want, rtol=1e-6, atol=0)  # they hold beta in fp32
    close(*(torch.autograd.grad(loss, x)[0] for loss in (ours, want)), rtol=1e-5, atol=1e-7)
    for d, end in ((ForwardKL(), 0), (ReverseKL(), 1)):
        close(d(x.log_softmax(-1), y.log_softmax(-1)).sum(), theirs(x, y, beta=end, reduction="sum"))


# tokens that a model cannot say


@ALL
def test_impossible_tokens_count_nothing(d):
    """Both models at -inf: the same value and gradient as without the token."""
    x, y = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5)
    never = torch.full((4, 2), -INF)
    values, gradients = [], []
    for extra in (never[:, :0], never):
        p, q = (torch.cat((extra, z), -1).log_softmax(-1) for z in (x, y))
        values.append(d(p, q))
        gradients.append(torch.autograd.grad(values[-1].sum(), x)[0])
    close(*values)
    close(*gradients)


@pytest.mark.parametrize("d", [ReverseKL(), JSD(0.3), BucketKL(Support(3)), DensityPower(2.0)], ids=repr)
def test_tokens_only_the_teacher_can_say_leave_finite_gradients(d):
    x, y = torch.randn(4, 5, requires_grad=True), torch.randn(4, 6).log_softmax(-1)
    p = torch.cat((x, torch.full((4, 1), -INF)), -1).log_softmax(-1)
    value = d(p, y)
    assert value.isfinite().all() and torch.autograd.grad(value.sum(), x)[0].isfinite().all()


@pytest.mark.parametrize("d", [ForwardKL(), JSD(0.3), DensityPower(2.0)], ids=repr)
def test_tokens_only_the_student_can_say_leave_finite_gradients(d):
    x, y = torch.randn(4, 6, requires_grad=True), torch.randn(4, 5)
    q = torch.cat((y, torch.full((4, 1), -INF)), -1).log_softmax(-1)
    value = d(x.log_softmax(-1), q)
    assert value.isfinite().all() and torch.autograd.grad(value.sum(), x)[0].isfinite().all()


def test_kl_is_infinite_where_the_second_model_rules_out_what_the_first_says():
    assert ReverseKL()(logp(0.5, 0.5), logp(1.0, 0.0)) == INF == ForwardKL()(logp(1.0, 0.0), logp(0.5, 0.5))


@pytest.mark.parametrize("baseline", [Value(), Optimal()], ids=repr)
@pytest.mark.parametrize("reward", [LogRatio(), Power(2.0), Clip(), Tanh()], ids=repr)
def test_baselines_skip_impossible_tokens(baseline, reward):
    for never in (logp(0.0, 0.0), logp(0.0, 0.2)):  # of the teacher; the student says neither
        p, q = torch.cat((P, logp(0.0, 0.0))), torch.cat((Q, never))
        close(baseline(reward, p, q, None), baseline(reward, P, Q, None))
        exact = tensor([True, False, False, False, True])
        close(baseline(reward, p, q, exact), baseline(reward, P, Q, HEAD))


# columns: the mask has a hole, and masked entries hold anything


MASK = tensor([[True, True, False, True], [True, False, False, False]])


@POISON
def test_transforms(junk):
    x = tensor([[1.0, 2, junk, 4], [5, junk, junk, junk]])
    kl = torch.full((2, 4), 0.5).where(MASK, junk)
    masked = lambda x: x.where(MASK, 0)
    close(masked(Discount(0.5)(x, MASK)), tensor([[1 + 2 / 2 + 4 / 8, 2 + 4 / 4, 0, 4], [5, 0, 0, 0]]))
    close(masked(Discount(1.0)(x, MASK)), tensor([[7.0, 6, 0, 4], [5, 0, 0, 0]]))
    want = tensor([[1 - 0.5 * (0.5 + 0.5 / 4), 2 - 0.25 * 0.5, 0, 4], [5, 0, 0, 0]])
    close(masked(DiscountExpected(0.5)(x, kl, MASK)), want)
    mean, std = 3.0, (10 / 4) ** 0.5  # of 1, 2, 4, 5
    close(masked(Whiten()(x, MASK)), masked((tensor([[1.0, 2, 0, 4], [5, 0, 0, 0]]) - mean) / std))


def test_whitening_equal_scores_gives_zeros():
    assert (Whiten()(torch.full((2, 4), 3.0), MASK)[MASK] == 0).all()


def test_reductions():
    close(TokenMean()(MASK), MASK / 4)
    close(SequenceMean()(MASK), MASK * tensor([[1 / 6], [1 / 2]]))
    close(SequenceMean()(MASK & tensor([[1], [0]]).bool()), MASK * tensor([[1 / 3], [0]]))  # a filter took one out
    close(Constant(10)(MASK), MASK / 20)
    for reduction in (TokenMean(), SequenceMean(), Constant(10)):
        close(reduction(MASK & False), torch.zeros(2, 4))


@POISON
def test_truncated_importance(junk):
    student = (MASK * log(3)).where(MASK, junk)
    sampler = (MASK * tensor([[log(2)], [0.0]])).where(MASK, -junk)
    close(TruncatedImportance(2.0)(student, sampler, MASK).where(MASK, 0), MASK * tensor([[1.5], [2.0]]))


def test_surrogates():
    new, old, up, down = logp(0.5), logp(0.25), tensor([3.0]), tensor([-3.0])  # the ratio is 2
    close(Reinforce()(new, up), 3 * tensor([log(2)]))
    close(ImportanceSampling()(new, up, old), tensor([-6.0]))
    close(OffPolicy()(new, up, old), tensor([-6.0]))
    close(TruncatedRatio(3.0)(new, up, old), 2 * 3 * tensor([log(2)]))
    close(TruncatedRatio(1.5)(new, up, old), 1.5 * 3 * tensor([log(2)]))  # a ratio of 2 counts 1.5
    close(TruncatedRatio(1.5)(old, down, new), -1 / 2 * 3 * tensor([log(4)]))
    close(Clipped(0.2, 0.5)(new, up, old), tensor([-4.5]))  # no more than 1.5 of the good
    close(Clipped(0.2, 0.5)(new, down, old), tensor([6.0]))  # all of the bad
    close(Clipped(0.2, 0.5)(old, down, new), tensor([2.4]))  # ratio 1/2: no less than 0.8 of the bad
    close(Clipped(0.2, 0.5)(old, up, new), tensor([-1.5]))


@pytest.mark.parametrize("surrogate", [ImportanceSampling(), OffPolicy(), TruncatedRatio(), Clipped()], ids=repr)
def test_on_policy_a_ratio_has_the_gradient_of_reinforce(surrogate):
    new, advantage = logp(0.3, 0.6).requires_grad_(), tensor([1.5, -0.5])
    close(
        torch.autograd.grad(surrogate(new, advantage, new.detach()).sum(), new),
        torch.autograd.grad(Reinforce()(new, advantage).sum(), new),
    )


# rollouts


def test_student_speaks_on_policy():
    assert {OnPolicy().source(step, rollout, 0) for step in range(9) for rollout in range(9)} == {STUDENT}


@pytest.mark.parametrize("other", [TEACHER, DATA])
def test_mixture_gives_the_student_its_share(other):
    spoken = [Mixture(0.25, other).source(step, rollout, 1) for step in range(40) for rollout in range(100)]
    assert set(spoken) == {STUDENT, other}
    assert abs(spoken.count(STUDENT) / 4000 - 0.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5
    for step in (0, 39):  # a step draws a coin for each rollout
        assert len(set(spoken[100 * step : 100 * step + 100])) == 2
    assert {Mixture(1.0, other).source(0, rollout, 1) for rollout in range(100)} == {STUDENT}
    assert {Mixture(0.0, other).source(0, rollout, 1) for rollout in range(100)} == {other}


# nouns


def test_pad():
    close(pad([tensor([1, 2]), tensor([3])], -1), tensor([[1, 2], [3, -1]]))


def batch(**columns) -> Batch:
    two = torch.zeros(2, 3)
    given = {
        "ids": tensor([[1, 2, 3], [4, 5, 6]]),
        "mask": torch.ones(2, 3, dtype=torch.bool),
        "group": tensor([0, 1]),
        "source": tensor([STUDENT, DATA]),
        "stopped": tensor([True, False]),
        "outcome": tensor([0.0, 1.0]),
        "sampler_logp": two,
    }
    return Batch(**given | columns)


def test_rows_of_a_batch():
    whole = batch(student_logp=torch.randn(2, 3), scores=(torch.randn(2, 3), None))
    row = whole[1:]
    assert row.ids.tolist() == [[4, 5, 6]] and row.source.tolist() == [DATA] and row.teacher_logp is None
    close(row.student_logp, whole.student_logp[1:])
    close(row.scores[0], whole.scores[0][1:])
    assert row.scores[1] is None


def test_a_leaf_reads_the_columns_among_its_parameters():
    assert reads(TruncatedImportance()) == {"student_logp", "sampler_logp", "mask"}
    assert reads(Discount()) == {"mask"} and reads(Reinforce()) == set()
    close(call(Discount(1.0), batch(), torch.ones(2, 3)), tensor([[3.0, 2, 1]] * 2))
    with pytest.raises(AssertionError, match=r"reverse_kl.*nobody measured"):
        call(DiscountExpected(), batch(), torch.ones(2, 3))
