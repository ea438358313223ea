"""Rewards in the place of the log ratio, by hand and by enumeration; EOPD's and TrOPD's forward KLs."""

import math
from dataclasses import dataclass
from math import log

import pytest
import torch

from opd.analysis.exact import measure
from opd.losses.advantages import GroupWhiten, MeanFuture
from opd.losses.baselines import Optimal, TopKValue, Value
from opd.losses.divergences import JSD, BucketForwardKL, ForwardKL, ReverseKL, Support
from opd.losses.estimators import Full, Sampled, Stratified
from opd.losses.rewards import (
    Clip,
    Floor,
    ForwardKLPlus,
    JSDPlus,
    LogRatio,
    One,
    Proximal,
    ReverseKLPlus,
    Sign,
    SignedLog,
    Trusted,
)
from opd.losses.terms import Match, PolicyGradient, Positions
from opd.methods import METHODS, pg, tropd
from opd.methods.classic import opd
from opd.methods.eopd import TopKForwardKL
from opd.methods.method import Method
from opd.methods.privileged import ClippedForwardKL
from opd.methods.reward_shapes import g_opd, opd_plus
from opd.methods.tropd import Outlier, RawForwardKL
from tests.by_hand import INF, NAN, close, logp, tensor
from tests.reference_losses import Plus, token_gradients

pytestmark = pytest.mark.usefixtures("float64")


@dataclass(frozen=True)
class Pearson:
    """(u - 1)^2, whose reward is u^2 - 1."""

    def __call__(self, log_u):
        return log_u.expm1().square()


# by hand: (reward, at p = 1/4 and q = 1/2, at p = 1/2 and q = 1/4)


REWARDS = [
    (One(), 1.0, 1.0),
    (Floor(0.5), log(2), -log(2)),
    (Floor(0.9), log(2), -log(2)),
    (Floor(0.3), log(2), -log(2)),
    (Floor(0.9, Clip(-9.0, 0.5)), 0.5, -log(2)),
    (Proximal(0.1), log(1.1), log(0.95)),
    (Proximal(0.5), log(1.5), log(0.75)),
    (SignedLog(), log(1 + log(2)), -log(1 + log(2))),
    (SignedLog(Clip(-0.5, 0.5)), log(1.5), -log(1.5)),
    (Sign(), 1.0, -1.0),
    (Trusted(), log(2), -log(2) / 2),
    (ReverseKLPlus(), log(2) - 1, -log(2) - 1),
    (ForwardKLPlus(), 2.0, 0.5),
    (JSDPlus(), log(1.5) / 2, log(0.75) / 2),
    (JSDPlus(0.25), 0.75 * log(1.25), 0.75 * log(0.875)),
    (Plus(Pearson()), 3.0, -0.75),
]


@pytest.mark.parametrize(("reward", "up", "down"), REWARDS, ids=lambda x: repr(x) if callable(x) else "")
def test_reward(reward, up, down):
    close(reward(logp(0.25, 0.5), logp(0.5, 0.25)), tensor([up, down]))


@pytest.mark.parametrize(
    ("reward", "least"),
    [
        (Floor(0.3), log(0.3) / 0.7),
        (Floor(0.5), -2 * log(2)),
        (Floor(0.5, Clip(-1.0, 1.0)), -1.0),
        (Proximal(0.1), log(0.9)),
        (Sign(), -1.0),
        (Trusted(), 0.0),
        (ForwardKLPlus(), 0.0),
        (JSDPlus(), -log(2) / 2),
    ],
    ids=repr,
)
def test_bounded_where_the_teacher_rules_the_token_out(reward, least):
    close(reward(logp(0.5), logp(0.0)), tensor([least]))
    assert reward(tensor([-1e-4]), tensor([-1e4])).isfinite().all()


def test_trusted_is_least_at_u_of_one_over_e():
    u = torch.linspace(-20, 20, 4001)
    values = Trusted()(torch.zeros_like(u), u)
    assert values.min() >= -1 / math.e and u[values.argmin()] == pytest.approx(-1, abs=0.01)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.9])
def test_floor_is_the_limit_of_the_mixture_whose_slope_is_one(share):
    """log(share + (1 - share) u) / (1 - share) at u -> 0, and at u = 1; it is `Proximal` in another scale."""
    relaxed = lambda r: Proximal(1 - share)(torch.zeros_like(r), r) / (1 - share)
    close(relaxed(tensor([-700.0])), Floor(share)(tensor([0.0]), tensor([-700.0])))
    close(relaxed(tensor([1e-6])), tensor([1e-6]), rtol=1e-5, atol=0)


def test_proximal_teacher_is_a_mixture():
    p, q = torch.randn(2, 4, 6).log_softmax(-1)
    close(Proximal(0.2)(p, q), (0.2 * q.exp() + 0.8 * p.exp()).log() - p)
    close(Proximal(1e-9)(p, q) * 1e9, (q - p).expm1(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reward", [r for r, _, _ in REWARDS if not isinstance(r, Plus)], ids=repr)
def test_rewards_hold_in_fp32(reward):
    p, q = -torch.rand(1000) * 60, -torch.rand(1000) * 60
    close(reward(p.float(), q.float()), reward(p.float().double(), q.float().double()).float(), rtol=2e-5, atol=2e-6)


def test_forward_ratio_of_a_token_the_student_never_says_is_finite_in_fp32():
    p, q = torch.tensor([-103.0, -1e4]), torch.tensor([0.0, -1.0])
    assert ForwardKLPlus()(p.float(), q.float()).isfinite().all()


@pytest.mark.parametrize("value", [0.0, 1.0, -0.1])
@pytest.mark.parametrize("leaf", [Floor, Proximal, JSDPlus])
def test_shares_lie_inside_the_unit_interval(leaf, value):
    with pytest.raises(ValueError, match=f"={value}: a mixture"):
        leaf(value)


# OPD+: u f'(u) - f(u)


F = {
    ReverseKLPlus(): lambda x: -x,
    ForwardKLPlus(): lambda x: x.exp() * x,
    **{
        JSDPlus(b): lambda x, b=b: (
            b * x.exp() * (x - (b * x.exp() + 1 - b).log()) - (1 - b) * (b * x.exp() + 1 - b).log()
        )
        for b in (0.1, 0.5, 0.9)
    },
    Proximal(0.1): lambda x: F[JSDPlus(0.1)](x) / 0.9,
}


@pytest.mark.parametrize(("reward", "f"), F.items(), ids=lambda x: repr(x) if x in F else "f")
def test_closed_forms_follow_the_rule(reward, f):
    p, q = torch.randn(2, 40, 6).log_softmax(-1)
    close(reward(p, q), Plus(f)(p, q))
    with torch.no_grad():  # as the head pass calls it
        close(Plus(f)(p, q), reward(p, q))


@pytest.fixture
def pair():
    return 2 * torch.randn(6, 5), 2 * torch.randn(6, 5)


def expectation(method, student, teacher):
    """Of the gradient over the token drawn, in the student's logits."""
    return (student.softmax(-1)[..., None] * token_gradients(method, student, teacher)).sum(1)


def gradient(loss, student, teacher):
    live = student.clone().requires_grad_()
    return torch.autograd.grad(loss(live.log_softmax(-1), teacher.log_softmax(-1)).sum(), live)[0]


def variation(p, q):
    return (p.exp() - q.exp()).abs().sum(-1) / 2


DESCENDED = [
    (ReverseKLPlus(), ReverseKL()),
    (ForwardKLPlus(), ForwardKL()),
    (JSDPlus(0.5), JSD(0.5)),
    (JSDPlus(0.2), JSD(0.2)),
    (Proximal(0.1), lambda p, q: JSD(0.1)(p, q) / 0.9),
    (Sign(), lambda p, q: 2 * variation(p, q)),
    (Plus(Pearson()), lambda p, q: (p.exp() * (q - p).expm1().square()).sum(-1)),
]


@pytest.mark.parametrize("baseline", [None, Value(), TopKValue(2), Optimal()], ids=repr)
@pytest.mark.parametrize("estimator", [Sampled(), Stratified(2), Full()], ids=repr)
@pytest.mark.parametrize(("reward", "divergence"), DESCENDED, ids=lambda x: repr(x)[:24])
def test_expected_gradient_is_that_of_the_divergence(reward, divergence, estimator, baseline, pair):
    got = expectation(Method((PolicyGradient(reward, baseline, estimator),)), *pair)
    close(got, gradient(divergence, *pair))


SHAPES = {
    "reopold": (METHODS["reopold"](), lambda p, q: (q - p).clamp(min=log(0.3) / 0.7)),
    "topd": (METHODS["topd"](), lambda p, q: (0.1 * (q - p).exp() + 0.9).log()),
    "opd-signlog": (METHODS["opd-signlog"](), lambda p, q: (q - p).sign() * (1 + (q - p).abs()).log()),
    "opd-tv": (METHODS["opd-tv"](), lambda p, q: (q > p).double() - (q < p).double()),
    "opd-plus": (opd_plus(), lambda p, q: 0.5 * ((1 + (q - p).exp()) / 2).log()),
    "opd-plus forward": (opd_plus("forward-kl"), lambda p, q: (q - p).exp()),
    "opd-plus reverse": (opd_plus("reverse-kl"), lambda p, q: q - p - 1),
}


@pytest.mark.parametrize(("method", "shape"), SHAPES.values(), ids=SHAPES)
def test_shaped_rewards_follow_their_formula(method, shape, pair):
    """Every sample, not the mean alone: the reward is detached, and the gradient is -A (1_y - p)."""
    student, teacher = pair
    p, q = student.log_softmax(-1), teacher.log_softmax(-1)
    want = -shape(p, q)[..., None] * (torch.eye(5) - p.exp()[:, None])
    close(token_gradients(method, student, teacher), want)


def test_floor_fires_on_a_random_batch(pair):
    p, q = (x.log_softmax(-1) for x in pair)
    bounded = (Floor(0.3)(p, q) != LogRatio()(p, q)).double().mean()
    assert 0 < bounded < 1


PG = {
    "reopold": Floor(0.4),
    "topd": Proximal(0.2),
    "signlog": SignedLog(),
    "sign": Sign(),
    "trusted": Trusted(),
    "jsd-plus": JSDPlus(0.3),
    "forward-kl-plus": ForwardKLPlus(),
    "reverse-kl-plus": ReverseKLPlus(),
}


@pytest.mark.parametrize(("name", "reward"), PG.items(), ids=PG)
def test_pg_has_every_reward(name, reward):
    method = pg(name, "optimal", share=0.4, mix=0.2, beta=0.3)
    assert method == Method((PolicyGradient(reward, Optimal()),))


@pytest.mark.parametrize("baseline", [Value(), TopKValue(3), Optimal()], ids=repr)
@pytest.mark.parametrize("reward", [r for r, _, _ in REWARDS], ids=repr)
def test_baselines_skip_tokens_nobody_can_say(reward, baseline):
    p, q = torch.randn(2, 4, 6).log_softmax(-1)
    never = torch.full((4, 2), -INF)
    wide = baseline(reward, torch.cat((p, never), -1), torch.cat((q, never), -1), None)
    close(wide, baseline(reward, p, q, None))


def test_mean_of_the_future():
    mask = tensor([[True, True, False, True], [True, False, False, False]])
    for junk in (NAN, INF):
        x = tensor([[1.0, 2, junk, 4], [5, junk, junk, junk]])
        close(MeanFuture()(x, mask).where(mask, 0), tensor([[1.0 + 3, 2 + 4, 0, 4], [5, 0, 0, 0]]))


def test_topd_of_the_paper():
    """With scalars: R_t = r_t + mean of the later r, standardised over the tokens of the group; clipped ratio."""
    method = METHODS["topd"](0.2, future=True, whiten=True, clip=0.2)
    lengths, group = [3, 2, 1, 3], tensor([0, 1, 0, 1])
    live, teacher = torch.randn(4, 3, 5, requires_grad=True), torch.randn(4, 3, 5)
    at = Positions(torch.randint(5, (4, 3)), live.log_softmax(-1), teacher.log_softmax(-1))
    mask = torch.arange(3) < tensor(lengths)[:, None]
    batch = measure(method, at, mask=mask, group=group)
    p, q = (at.sampled(x).exp().tolist() for x in (at.student_logp.detach(), at.teacher_logp))
    mean = lambda x: sum(x) / len(x) if x else 0.0
    rewards = [[log(0.2 * q[i][t] / p[i][t] + 0.8) for t in range(n)] for i, n in enumerate(lengths)]
    returns = [[r + mean(row[t + 1 :]) for t, r in enumerate(row)] for row in rewards]
    advantage = torch.zeros(4, 3)
    for i, row in enumerate(returns):
        together = [r for j, other in enumerate(returns) if group[j] == group[i] for r in other]
        deviation = mean([(r - mean(together)) ** 2 for r in together]) ** 0.5
        advantage[i, : len(row)] = tensor([(r - mean(together)) / (deviation + 1e-6) for r in row])
    (target,) = method.prepare(batch)
    close(target.advantage, advantage)
    # several updates later: the ratio to the measured student is clipped, and the mean is over the batch's 9 tokens
    moved = (live.detach() + 0.5 * torch.randn(4, 3, 5)).requires_grad_()
    later = Positions(at.ids, moved.log_softmax(-1), at.teacher_logp)
    ratio = later.sampled(later.student_logp).exp() / tensor(p)
    want = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).where(mask, 0).sum() / 9
    close(method.loss(later, (target,)).sum(), want)


def test_group_whitening_reads_no_padding():
    mask, group = tensor([[True, False], [True, True], [True, False]]), tensor([7, 7, 8])
    for junk in (NAN, INF):
        x = tensor([[1.0, junk], [2, 6], [5, junk]])
        high, low = (6 - 3) / (14 / 3) ** 0.5, (1 - 3) / (14 / 3) ** 0.5
        want = tensor([[low, 0], [low / 2, high], [0, 0]])
        close(GroupWhiten(eps=0.0)(x, group, mask).nan_to_num(0), want)


# forward KLs on the teacher's top k, or clipped; p = (1/2, 1/3, 1/6), q = (1/3, 1/6, 1/2)


FORWARD = [
    (BucketForwardKL(Support(1, "teacher")), 1 / 2 * log(3) + 1 / 2 * log(3 / 5)),  # (1/6, 5/6) and (1/2, 1/2)
    (BucketForwardKL(Support(2, "teacher")), 1 / 2 * log(3) + 1 / 3 * log(2 / 3) + 1 / 6 * log(1 / 2)),
    (BucketForwardKL(Support(1)), 1 / 3 * log(2 / 3) + 2 / 3 * log(4 / 3)),  # (1/2, 1/2) and (1/3, 2/3)
    (TopKForwardKL(1), log(6)),  # the teacher renormalised to 1, the student's own 1/6
    (TopKForwardKL(2), 3 / 5 * log(18 / 5) + 2 / 5 * log(4 / 5)),
    (RawForwardKL(1), 1 / 2 * log(3)),
    (ClippedForwardKL(0.05), 1 / 3 * log(2 / 3) + 1 / 6 * log(1 / 2) + 0.05),  # the third token's share is 0.55
    (ClippedForwardKL(0.6), 1 / 3 * log(2 / 3) + 1 / 6 * log(1 / 2) + 1 / 2 * log(3)),
    (RawForwardKL(2), 1 / 2 * log(3) + 1 / 3 * log(2 / 3)),
]


@pytest.mark.parametrize(("d", "want"), FORWARD, ids=repr)
def test_forward_kl(d, want):
    close(d(logp(1 / 2, 1 / 3, 1 / 6), logp(1 / 3, 1 / 6, 1 / 2)), tensor(want))


@pytest.mark.parametrize("d", [d for d, _ in FORWARD], ids=repr)
def test_forward_kl_gradient(d):
    x, y = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6)
    assert torch.autograd.gradcheck(lambda x: d(x.log_softmax(-1), y.log_softmax(-1)), (x,))
    never = torch.full((4, 2), -INF)
    p, q = (torch.cat((z, never), -1).log_softmax(-1) for z in (x, y))
    close(d(p, q), d(x.log_softmax(-1), y.log_softmax(-1)))
    assert torch.autograd.grad(d(p, q).sum(), x)[0].isfinite().all()


@pytest.mark.parametrize(("leaf", "moves"), [(BucketForwardKL, False), (TopKForwardKL, True), (RawForwardKL, True)])
def test_only_the_bucket_is_stationary_where_the_models_agree(leaf, moves):
    """The published terms of EOPD and TrOPD inflate the teacher's top k; verl issue 7856 does not."""
    x = torch.randn(4, 6, requires_grad=True)
    d = leaf(Support(2, "teacher")) if leaf is BucketForwardKL else leaf(2)
    (g,) = torch.autograd.grad(d(x.log_softmax(-1), x.detach().log_softmax(-1)).sum(), x)
    assert (g.abs().max() > 1e-2) == moves


@pytest.mark.parametrize("leaf", [lambda k: BucketForwardKL(Support(k, "teacher")), TopKForwardKL, RawForwardKL])
def test_k_of_the_vocabulary_is_the_forward_kl(leaf):
    p, q = torch.randn(2, 5, 6).log_softmax(-1)
    for k in (6, 99):
        close(leaf(k)(p, q), ForwardKL()(p, q))


# TrOPD


def test_outliers_by_hand():
    mask = tensor([[True, True, True, False]])
    p, q = logp(0.5, 0.25, 0.5, 0.1)[None], logp(0.25, 0.5, 0.0, NAN)[None]
    close(Outlier()(p, q, mask), tensor([[0.5, 0.0, 1.0, 0.0]]))


def test_the_teacher_accepts_all_but_the_total_variation(pair):
    p, q = (x.log_softmax(-1) for x in pair)
    rejected = Outlier()(p, q, torch.ones(6, 5, dtype=torch.bool))
    close((p.exp() * rejected).sum(-1), variation(p, q))
    close((p.exp() * (q - p).exp().clamp(max=1)).sum(-1), 1 - variation(p, q))
    assert variation(p, q).min() > 0 and variation(p, q).max() < 1


def test_tropd_in_expectation(pair):
    """Trusted: sum of min(p, q) r grad log p.  Outlier: TV times the gradient of the raw forward KL on the top k."""
    student, teacher = pair
    p = student.log_softmax(-1)
    trusted = lambda live, q: -(torch.minimum(p, q).exp() * (q - p) * live).sum(-1)
    outlier = lambda live, q: variation(p, q) * RawForwardKL(2)(live, q)
    want = gradient(trusted, student, teacher) + gradient(outlier, student, teacher)
    close(expectation(tropd(k=2, soft=True), student, teacher), want)


def test_tropd_of_equal_models_is_at_rest(pair):
    student, _ = pair
    close(token_gradients(tropd(soft=True), student, student), torch.zeros(6, 5, 5))


def test_the_trusted_reward_has_a_baseline_of_its_own(pair):
    """A = w f - b with b from w f: unbiased.  The baseline of f beside the weight w would not be."""
    for baseline in (Value(), Optimal()):
        with_one = Method((PolicyGradient(Trusted(), baseline),))
        close(expectation(with_one, *pair), expectation(Method((PolicyGradient(Trusted()),)), *pair))
    student, teacher = pair
    p, q = student.log_softmax(-1), teacher.log_softmax(-1)
    accepted, f = (q - p).exp().clamp(max=1), q - p
    score = torch.eye(5) - p.exp()[:, None]
    beside = -((p.exp() * accepted * (f + ReverseKL()(p, q)[:, None]))[..., None] * score).sum(1)
    alone = -((p.exp() * accepted * f)[..., None] * score).sum(1)
    close(alone, expectation(Method((PolicyGradient(Trusted()),)), *pair))
    assert (beside - alone).abs().max() > 1e-2


def test_terms_over_the_same_tokens_add(pair):
    parts = [Method((term,)) for term in tropd(k=3, soft=True).terms]
    close(sum(expectation(m, *pair) for m in parts), expectation(tropd(k=3, soft=True), *pair))
    assert isinstance(parts[1].terms[0], Match) and opd() != parts[0]


def test_over_the_coin_tropd_is_its_soft_form(pair):
    """Same positions, 10,000 coins of each: the mean loss of every sampled token, and its share of outliers."""
    student, teacher = (x.log_softmax(-1)[:1].expand(5, 1, 5) for x in pair)
    at = Positions(torch.arange(5)[:, None], student, teacher)
    n = 10_000
    coins = (torch.arange(n) + 0.5) / n
    soft, hard = tropd(k=2, soft=True), tropd(k=2)
    want = soft.loss(at, soft.prepare(measure(soft, at)))
    many = Positions(at.ids.repeat(n, 1), *(x.repeat(n, 1, 1) for x in (student, teacher)))
    batch = measure(hard, many, coin=coins.repeat_interleave(5)[:, None])
    got = hard.loss(many, hard.prepare(batch)).view(n, 5, 1).sum(0)
    close(got, want, rtol=1e-3, atol=1e-4)
    assert set(hard.prepare(batch)[1].weight.unique().tolist()) == {0.0, 1 / (5 * n)}


def test_g_opd_descends_the_kl_to_what_lies_beyond_the_teacher():
    """E over y of the gradient is that of KL(student || normalised q^lambda b^(1 - lambda))."""
    student, teacher, reference = torch.randn(3, 6, 5)
    for strength in (0.5, 1.0, 1.25, 2.0):
        got = token_gradients(g_opd(strength), student, teacher, reference)
        p = student.clone().requires_grad_()
        beyond = strength * teacher.log_softmax(-1) + (1 - strength) * reference.log_softmax(-1)
        kl = torch.nn.functional.kl_div(beyond.log_softmax(-1), p.log_softmax(-1), reduction="sum", log_target=True)
        want = torch.autograd.grad(kl, p)[0]
        close((student.softmax(-1)[..., None] * got).sum(1), want)
        value = token_gradients(g_opd(strength, "value"), student, teacher, reference)
        close((student.softmax(-1)[..., None] * value).sum(1), want)


def test_g_opd_by_hand():
    """lambda (log q - log b) - (log p - log b) at the sampled token, times its score."""
    p, q, b = (torch.tensor([x]).log() for x in ([0.5, 0.5], [0.8, 0.2], [0.4, 0.6]))
    reward = 1.25 * math.log(0.8 / 0.4) - math.log(0.5 / 0.4)
    close(token_gradients(g_opd(), p, q, b)[0, 0], -reward * torch.tensor([0.5, -0.5]))
