"""Bias and variance by enumeration, in float64, and the refusals that keep biased methods unwritten."""

import dataclasses
from dataclasses import dataclass

import pytest
import torch

from opd.analysis.exact import World, gradient_moments, measure
from opd.core.types import STUDENT, TEACHER, UNPROMPTED_COLUMNS
from opd.losses.advantages import Discount, DiscountExpected
from opd.losses.baselines import Baseline, Optimal, TopKValue, Value
from opd.losses.divergences import JSD, BucketKL, RenormalisedKL, ReverseKL, Support
from opd.losses.estimators import Full, Sampled, Stratified
from opd.losses.reductions import Constant, TokenMean
from opd.losses.rewards import Clip, LogRatio, Power, Tanh
from opd.losses.surrogates import Clipped, ImportanceSampling
from opd.losses.terms import Match, PolicyGradient, Positions
from opd.methods import METHODS, vopd
from opd.methods.classic import (
    gkd,
    gkd_forward,
    opd,
    opd_clip,
    opd_full,
    opd_tanh,
    opd_topk,
    opd_zscore,
    rethinking_opd,
)
from opd.methods.method import Method
from opd.methods.pg import opd_optimal, opd_stratified
from opd.methods.reward_shapes import poweropd
from opd.methods.rollout_policies.on_policy import Mixture, OnPolicy
from opd.methods.vopd import vopd_topk
from tests.reference_losses import DensityPower, token_gradients

pytestmark = pytest.mark.usefixtures("float64")
close = torch.testing.assert_close
grad = lambda y, x: torch.autograd.grad(y.sum(), x)[0]

# Logits of student and teacher at some contexts: alike, peaked, at odds.
PAIRS = {
    "mild": lambda n, v: ((x := torch.randn(n, v)), x + 0.3 * torch.randn(n, v)),
    "peaked": lambda n, v: (8 * torch.randn(n, v), 8 * torch.randn(n, v)),
    "strong": lambda n, v: (3 * torch.randn(n, v), 3 * torch.randn(n, v)),
}
pairs = pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)


def expectation(m, student, teacher):
    """Mean and total variance of the gradient at each context."""
    return gradient_moments(student.log_softmax(-1).exp(), token_gradients(m, student, teacher))


def exact(divergence, student, teacher):
    """The gradient of a divergence in the student's logits."""
    live = student.clone().requires_grad_()
    return grad(divergence(live.log_softmax(-1), teacher.log_softmax(-1)), live)


# fixed contexts: bias

REVERSE_KL = {
    "opd": opd(),
    "opd-full": opd_full(),
    "vopd": vopd(),
    **{f"vopd-topk {k}": vopd_topk(k) for k in (1, 3, 7)},
    "opd-optimal": opd_optimal(),
    **{f"opd-stratified {k} {b}": opd_stratified(k, b)
       for k in range(8) for b in ("none", "value", "topk", "optimal") if k or b != "topk"},
    "full estimator": Method((PolicyGradient(estimator=Full()),)),
    "importance sampling": Method((PolicyGradient(surrogate=ImportanceSampling()),)),
    "clipped": Method((PolicyGradient(baseline=Value(), surrogate=Clipped()),)),
    "opd-topk V": opd_topk(7),
    "rethinking-opd V": rethinking_opd(7),
}  # fmt: skip


@pairs
@pytest.mark.parametrize("m", REVERSE_KL.values(), ids=REVERSE_KL)
def test_expected_gradient_is_that_of_the_reverse_kl(m, pair):
    student, teacher = pair(5, 7)
    close(expectation(m, student, teacher)[0], exact(ReverseKL(), student, teacher))


@pairs
@pytest.mark.parametrize("baseline", [None, Value(), TopKValue(2), Optimal()], ids=repr)
@pytest.mark.parametrize("estimator", [Sampled(), Stratified(2), Full()], ids=repr)
@pytest.mark.parametrize("alpha", [0.1, 1.0, 5.0, 50.0])
def test_power_reward_descends_the_density_power_divergence(alpha, estimator, baseline, pair):
    student, teacher = pair(5, 7)
    m = Method((PolicyGradient(Power(alpha), baseline, estimator),))
    close(expectation(m, student, teacher)[0], exact(DensityPower(alpha), student, teacher))


def test_poweropd_is_that_reward():
    assert poweropd(3.0) == Method((PolicyGradient(Power(3.0)),))


@pairs
@pytest.mark.parametrize(
    ("m", "shape"), [(opd_clip(-1.0, 0.5), lambda r: r.clamp(-1, 0.5)), (opd_tanh(5.0), lambda r: (r / 5).tanh())]
)
def test_shaped_rewards_follow_their_formula(m, shape, pair):
    """-sum_v p_v f_v (1_v - p) = p (E f - f)."""
    student, teacher = pair(5, 7)
    p, f = student.softmax(-1), shape(teacher.log_softmax(-1) - student.log_softmax(-1))
    want = p * ((p * f).sum(-1, keepdim=True) - f)
    close(expectation(m, student, teacher)[0], want)


@pytest.mark.parametrize(
    "m", [opd_topk(3), opd_topk(3, tail="renorm"), opd_topk(3, tail="generalised"), gkd(), opd_clip()], ids=repr
)
def test_other_objectives_are_not_the_reverse_kl(m):
    student, teacher = PAIRS["strong"](5, 7)
    assert not torch.allclose(expectation(m, student, teacher)[0], exact(ReverseKL(), student, teacher), rtol=0.01)


@pytest.mark.parametrize(
    ("m", "d"),
    [
        (gkd(0.3), JSD(0.3)),
        (gkd_forward(), lambda p, q: (q.exp() * (q - p)).sum(-1)),
        (opd_topk(3), BucketKL(Support(3))),
        (opd_topk(3, "teacher", "renorm"), RenormalisedKL(Support(3, "teacher"))),
    ],
)
def test_matching_descends_its_divergence_without_noise(m, d):
    student, teacher = PAIRS["strong"](5, 7)
    mean, variance = expectation(m, student, teacher)
    close(mean, exact(d, student, teacher))
    close(variance, torch.zeros(5))


@pairs
@pytest.mark.parametrize("k", [1, 3])
def test_rethinking_opd_is_the_published_loss(pair, k):
    """-sum_v sg[w_v (log q_v - log p_v)] log p_v over the student's top k, w its probabilities renormalised there."""
    student, teacher = pair(5, 7)
    mean, variance = expectation(rethinking_opd(k), student, teacher)
    live, q = student.clone().requires_grad_(), teacher.log_softmax(-1)
    top = live.topk(k).indices
    p, q, w = live.log_softmax(-1).gather(-1, top), q.gather(-1, top), live.gather(-1, top).softmax(-1)
    close(mean, grad(-((w * (q - p)).detach() * p).sum(-1), live))
    close(variance, torch.zeros(5))


# fixed contexts: sample by sample


@pairs
@pytest.mark.parametrize(
    ("m", "twin"),
    [
        (vopd_topk(1), opd()),
        (vopd_topk(7), vopd()),
        (vopd_topk(99), vopd()),
        (opd_stratified(0), opd()),
        (opd_stratified(7), opd_full()),
        (opd_stratified(7, "optimal"), opd_full()),
        (opd_stratified(0, "optimal"), opd_optimal()),
        (opd_topk(7), opd_full()),
        (opd_topk(7, "teacher", "renorm"), opd_full()),
        (opd_topk(99, "teacher", "generalised"), opd_full()),
    ],
    ids=lambda m: repr(m).removeprefix("Method"),
)
def test_limits_agree_on_every_sample(m, twin, pair):
    student, teacher = pair(5, 7)
    close(token_gradients(m, student, teacher), token_gradients(twin, student, teacher))


def test_stratified_on_the_whole_vocabulary_has_no_variance():
    student, teacher = PAIRS["strong"](5, 7)
    close(expectation(opd_stratified(7), student, teacher)[1], torch.zeros(5))


def test_stratified_by_hand():
    """p = (1/2, 1/4, 1/4), q = (1/4, 1/4, 1/2), first token exact: -sum_K p A (1 - p) - 1[y not in K] A_y (1_y - p)."""
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.25, 0.5]])
    got = token_gradients(opd_stratified(1), p.log(), q.log())[0] / torch.tensor(2.0).log()
    head = 0.5 * torch.tensor([0.5, -0.25, -0.25])
    close(got, torch.stack((head, head, head - torch.tensor([-0.5, -0.25, 0.75]))))


def test_opd_by_hand():
    p, q = torch.tensor([[0.75, 0.25]]), torch.tensor([[0.5, 0.5]])
    r = (q / p).log()[0]
    want = torch.stack((-r[0] * torch.tensor([0.25, -0.25]), -r[1] * torch.tensor([-0.75, 0.75])))  # -r_y (1_y - p)
    close(token_gradients(opd(), p.log(), q.log())[0], want)


def test_zscore_by_hand():
    """Scores 1, 2, 4, 5 over two rows: mean 3, population deviation sqrt(10/4)."""
    score = torch.tensor([[1.0, 2, 9], [4, 5, 9]])
    mask = torch.tensor([[True, True, False]] * 2)
    flat = Positions(torch.zeros(2, 3, dtype=torch.long), *torch.zeros(2, 2, 3, 4).log_softmax(-1))
    batch = dataclasses.replace(measure(opd_zscore(), flat, mask=mask), scores=(score,))
    (target,) = opd_zscore().prepare(batch)
    close(target.advantage, torch.tensor([[-2.0, -1, 0], [1, 2, 0]]) / 2.5**0.5)
    close(target.weight, mask / 4)


# fixed contexts: variance


REWARDS = [LogRatio(), Power(0.5), Power(5.0), Clip(), Tanh(2.0)]


@pairs
@pytest.mark.parametrize("vocab", [2, 7, 50])
@pytest.mark.parametrize("reward", REWARDS, ids=repr)
def test_optimal_baseline_has_the_least_variance(reward, vocab, pair):
    student, teacher = pair(40, vocab)
    variance = lambda b: expectation(Method((PolicyGradient(reward, b),)), student, teacher)[1]
    best = variance(Optimal())
    for other in (None, Value(), TopKValue(2)):
        assert (best <= variance(other) * (1 + 1e-9) + 1e-15).all(), other


@dataclass(frozen=True)
class Shifted:
    """Another baseline, moved."""

    of: Baseline
    by: float

    def __call__(self, *at):
        return self.of(*at) + self.by


@pairs
@pytest.mark.parametrize("estimator", [Sampled(), Stratified(0), Stratified(1), Stratified(3)], ids=repr)
@pytest.mark.parametrize("reward", [LogRatio(), Power(2.0)], ids=repr)
def test_optimal_baseline_is_stationary(reward, estimator, pair):
    """The variance is a parabola in the baseline: equal on both sides of the optimum, and higher."""
    student, teacher = pair(30, 7)
    terms = (PolicyGradient(reward, Shifted(Optimal(), by), estimator) for by in (-0.1, 0.0, 0.1))
    low, best, high = (expectation(Method((term,)), student, teacher)[1] for term in terms)
    close(low, high, rtol=1e-6, atol=1e-12)
    assert (low > best).all()


def test_value_baseline_helps_exactly_where_the_optimum_is_below_half_of_it():
    student, teacher = (torch.cat(x) for x in zip(*(pair(200, 5) for pair in PAIRS.values()), strict=True))
    p, q = student.log_softmax(-1), teacher.log_softmax(-1)
    helps = expectation(vopd(), student, teacher)[1] <= expectation(opd(), student, teacher)[1]
    assert (helps == (Optimal()(LogRatio(), p, q, None) <= Value()(LogRatio(), p, q, None) / 2)).all()
    assert helps.any() and not helps.all()


def test_optimal_baseline_equals_its_closed_form_for_the_log_ratio():
    student, teacher = (x.log_softmax(-1) for x in PAIRS["mild"](100, 7))
    p, r = student.exp(), teacher - student
    c = p.square().sum(-1)
    want = ((1 + c) * (p * r).sum(-1) - 2 * (p.square() * r).sum(-1)) / (1 - c)
    close(Optimal()(LogRatio(), student, teacher, None), want)


# a nearly certain student, in fp32


def certain(rest: float, contexts: int = 20, vocab: int = 50):
    """fp32 logits of a student whose first token has probability 1 - rest, and of a teacher that is less sure."""
    others = (2 * torch.randn(contexts, vocab - 1)).log_softmax(-1) + torch.tensor(rest).log()
    student = torch.cat((torch.zeros(contexts, 1), others), -1).float()
    teacher = (student / 3 + torch.randn(contexts, vocab)).float()
    return student, teacher


@pytest.mark.parametrize("exact", [None, 0, 1, 3])
@pytest.mark.parametrize("reward", REWARDS, ids=repr)
@pytest.mark.parametrize("rest", [10.0**-n for n in range(3, 13)])
def test_optimal_baseline_survives_fp32(rest, reward, exact):
    """The noise that rounding adds is small beside that of sampling, and the rounding of the rewards themselves."""
    student, teacher = certain(rest)

    def advantage(dtype):
        p, q = (x.to(dtype).log_softmax(-1) for x in (student, teacher))
        summed = None if exact is None else Stratified(exact).exact(p)
        return (f := reward(p, q)) - Optimal()(reward, p, q, summed)[..., None], f

    (got, _), (want, f) = advantage(torch.float32), advantage(torch.float64)
    assert got.isfinite().all()
    p = student.double().softmax(-1)
    others = p.scatter(-1, p.argmax(-1, keepdim=True), 0)
    rest2 = others.sum(-1, keepdim=True) ** 2 + others.square().sum(-1, keepdim=True)
    norm2 = torch.where(p == p.amax(-1, keepdim=True), rest2, 1 - 2 * p + p.square().sum(-1, keepdim=True))
    error, noise, rounding = ((p * norm2 * x.square()).sum(-1).sqrt() for x in (got.double() - want, want, 1e-6 * f))
    assert (error <= (1e-5 if reward == LogRatio() else 1e-3) * noise + rounding).all()


@pytest.mark.parametrize("reward", REWARDS, ids=repr)
def test_a_certain_student_gives_no_gradient(reward):
    student, teacher = certain(1e-30)
    student[:, 1:] -= 200  # the others underflow: p is exactly 1
    p, q = student.log_softmax(-1), teacher.log_softmax(-1)
    assert (p[:, 0].exp() == 1).all() and (p[:, 1:].exp() == 0).all()
    for exact in (None, Stratified(1).exact(p)):
        advantage = reward(p, q) - Optimal()(reward, p, q, exact)[..., None]
        assert (advantage[:, 0] == 0).all() and advantage.isfinite().all()


@pytest.mark.parametrize("reward", REWARDS, ids=repr)
def test_optimal_baseline_of_a_nearly_certain_student_is_the_mean_over_the_other_tokens(reward):
    student, teacher = (x.double().log_softmax(-1) for x in certain(1e-9))
    p, f = student.exp()[:, 1:], reward(student, teacher)[:, 1:]
    want = (p * f).sum(-1) / p.sum(-1)
    close(Optimal()(reward, student, teacher, None), want, rtol=1e-6, atol=1e-7)


# whole sequences


def future(step, reduction) -> Method:
    return Method((PolicyGradient(transforms=(step,)),), reduction)


@pytest.mark.parametrize("stop", [-1, 0])
@pytest.mark.parametrize("step", [Discount(1.0), DiscountExpected(1.0)], ids=repr)
def test_reward_to_go_descends_the_sequence_kl(step, stop):
    for world in (World.random(3, 3, stop=stop), World.random(2, 4, seed=1, stop=stop)):
        m = future(step, Constant(world.steps))
        close(world.moments(m)[0], grad(world.sequence_kl(), world.student))
        assert world.row(m).cosine == pytest.approx(1) and world.row(m).bias < 1e-9


@pytest.mark.parametrize("baseline", [Value(), TopKValue(2), Optimal()], ids=repr)
def test_baselines_leave_the_sequence_gradient_alone(baseline):
    world = World.random(3, 3, stop=0)
    m = Method((PolicyGradient(baseline=baseline, transforms=(DiscountExpected(1.0),)),), Constant(3))
    close(world.moments(m)[0], grad(world.sequence_kl(), world.student))


def test_token_mean_of_unequal_lengths_is_not_the_sequence_gradient():
    world = World.random(3, 3, stop=0)
    assert world.row(future(Discount(1.0), TokenMean())).cosine < 0.999


def test_immediate_reward_is_token_matching_not_the_sequence_gradient():
    world = World.random(3, 3)
    mean, _ = world.moments(opd())
    for m in (opd_full(), vopd(), opd_optimal(), opd_stratified(1), opd_stratified(2, "optimal")):
        close(world.moments(m)[0], mean)
    assert world.row(opd()).cosine < 0.99


def test_sequence_kl_by_hand():
    """Two tokens, one step; then two independent steps, where the KL of a sequence is the sum."""
    p, q = torch.tensor([0.75, 0.25]), torch.tensor([0.5, 0.5])
    kl = (p * (p / q).log()).sum()
    one = World(p.log()[None].requires_grad_(), q.log()[None], 1)
    two = World(p.log().repeat(3, 1).requires_grad_(), q.log().repeat(3, 1), 2)
    stopped = dataclasses.replace(two, stop=0)  # ends after the first token with probability 3/4
    close(one.sequence_kl(), kl)
    close(two.sequence_kl(), 2 * kl)
    close(stopped.sequence_kl(), kl + kl / 4)


# the world itself


@pytest.mark.parametrize(("vocab", "steps"), [(2, 4), (3, 3), (4, 3)])
def test_prefixes_are_distinct_states(vocab, steps):
    world = World.random(vocab, steps)
    ids = world.sequences()
    seen = {(tuple(row[:t]), state) for row, at in zip(ids.tolist(), world.prefixes(ids).tolist(), strict=True)
            for t, state in enumerate(at)}  # fmt: skip
    assert len(seen) == len({prefix for prefix, _ in seen}) == len({state for _, state in seen}) == len(world.student)
    assert {state for _, state in seen} == set(range(len(world.student)))
    assert len(ids.unique(dim=0)) == len(ids) == vocab**steps


def test_probabilities_sum_to_one():
    world = World.random(3, 3)
    close(world.probability(world.sequences()).sum(), torch.tensor(1.0))


def test_trained_tokens_end_with_the_stop():
    world = World.random(3, 3, stop=0)
    ids = torch.tensor([[1, 0, 0], [0, 1, 2], [1, 2, 1], [1, 1, 0]])
    assert world.trained(ids).int().tolist() == [[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 1]]
    assert world.measure(opd(), ids).stopped.tolist() == [True, True, False, True]


def test_measured_columns_by_hand():
    p, q = torch.tensor([0.75, 0.25]), torch.tensor([0.5, 0.5])
    world = World(p.log()[None].requires_grad_(), q.log()[None], 1)
    batch = world.measure(vopd(), torch.tensor([[0], [1]]))
    kl = (p * (p / q).log()).sum()
    close(batch.student_logp, p.log()[:, None])
    close(batch.sampler_logp, p.log()[:, None])
    close(batch.teacher_logp, q.log()[:, None])
    close(batch.student_entropy, -(p * p.log()).sum().expand(2, 1))
    close(batch.teacher_entropy, torch.tensor(2.0).log().expand(2, 1))
    close(batch.reverse_kl, kl.expand(2, 1))
    close(batch.scores[0], (q / p).log()[:, None] + kl)


def test_moments_by_hand():
    mean, variance = gradient_moments(torch.tensor([0.75, 0.25]), torch.tensor([[1.0, 0], [5, 4]]))
    close(mean, torch.tensor([2.0, 1]))
    close(variance, torch.tensor(0.75 * 2 + 0.25 * 18))


def test_float32_tables_are_measured_in_float64():
    world = World.random(3, 2)
    single = World(world.student.detach().float().requires_grad_(), world.teacher.float(), 2)
    assert single.measure(vopd(), single.sequences()).student_logp.dtype == torch.float64
    got, want = (dataclasses.astuple(x.row(vopd())) for x in (single, world))
    assert got == pytest.approx(want, rel=1e-4)


MADE = {name: make() for name, make in METHODS.items()}


@pytest.mark.parametrize(
    "name", [n for n, m in MADE.items() if not (m.headless() or m.asks or m.reads() & UNPROMPTED_COLUMNS)]
)
def test_every_method_on_distributions_has_a_row(name):
    row = World.random(3, 2).row(MADE[name])
    assert -1 <= row.cosine <= 1.0000001 and row.bias >= 0 and row.noise >= 0


def test_a_method_on_responses_without_their_prompts_has_none():
    assert "without its prompt" in World.random(3, 2).unsupported_reason(MADE["npd"])


# refusals


REFUSALS = {
    "alpha > 0": lambda: Power(0.0),
    "low < high": lambda: Clip(1.0, 1.0),
    "scale > 0": lambda: Tanh(0.0),
    "k=0: the top-k baseline": lambda: vopd_topk(0),
    "k=-1: the stratified": lambda: opd_stratified(-1),
    "k=0: a top-k divergence": lambda: opd_topk(0),
    "renormalised top-1 KL is 0": lambda: opd_topk(1, tail="renorm"),
    "beta=0.0: the JSD needs 0 < beta < 1.*gkd-forward": lambda: gkd(0.0),
    "beta=1.0: the JSD needs 0 < beta < 1.*gkd-reverse": lambda: gkd(1.0),
    "gamma=-0.1: the discount": lambda: opd(-0.1),
    "gamma=1.1: the discount": lambda: opd(1.1),
    "share=1.5": lambda: gkd(share=1.5),
    "share=-0.5": lambda: Mixture(-0.5),
    "other=0": lambda: Mixture(0.5, STUDENT),
    "updates=0": lambda: OnPolicy(updates=0),
    "per_prompt=0": lambda: OnPolicy(per_prompt=0),
    "at least one term": lambda: Method(()),
    "policy gradient is a sum over the student's own": lambda: Method(rollouts=Mixture(0.5)),
    "off policy.*surrogate with a ratio": lambda: Method(rollouts=OnPolicy(updates=2)),
    "act on the sampled token alone": lambda: PolicyGradient(estimator=Full(), transforms=(Discount(1.0),)),
    "biases its gradient: use DiscountExpected": lambda: PolicyGradient(baseline=Value(), transforms=(Discount(1.0),)),
    "mean of log ratios alone": lambda: PolicyGradient(Power(2.0), transforms=(DiscountExpected(1.0),)),
    "surrogate .*act on the sampled token": lambda: PolicyGradient(estimator=Stratified(2), surrogate=Clipped()),
}


@pytest.mark.parametrize(("reason", "make"), REFUSALS.items(), ids=REFUSALS)
def test_refused_with_the_reason(reason, make):
    with pytest.raises(ValueError, match=reason):
        make()


def test_allowed_next_to_the_refused():
    Method((Match(),), rollouts=Mixture(0.0, TEACHER))
    Method((Match(),), rollouts=OnPolicy(updates=2))
    Method((PolicyGradient(surrogate=ImportanceSampling()),), rollouts=OnPolicy(updates=2))
    assert opd_topk(1) and vopd_topk(1) and opd_stratified(0)


def test_k1_as_a_loss_cannot_be_written():
    """Back-propagated, log p(y) - log q(y) has expected gradient 0.  A reward enters detached."""
    student, teacher = PAIRS["strong"](5, 7)
    live = student.clone().requires_grad_()
    p, q = live.log_softmax(-1), teacher.log_softmax(-1)
    close(grad(p.softmax(-1).detach() * (p - q), live), torch.zeros(5, 7))
    at = Positions(torch.zeros(5, dtype=torch.long), p, q)
    for baseline in (None, Value(), TopKValue(2), Optimal()):
        term = PolicyGradient(baseline=baseline)
        assert at.student_logp.requires_grad and not term.score(at).requires_grad
