"""The variance of real gradients, against full enumeration: every token drawn and backpropagated, in float64."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from opd.analysis.exact import dependence_reason, gradient_moments, slopes, source_shares, to_logits
from opd.analysis.gradient_moments import Means, directions, measure_rollout
from opd.analysis.variance import variance
from opd.cli import main
from opd.config.commands import Variance
from opd.core.intervals import ratio, t_quantile
from opd.head.inputs import Hidden
from opd.head.vocabulary import Vocabulary
from opd.losses.baselines import Optimal, TopKValue, Value
from opd.losses.rewards import Power
from opd.losses.surrogates import Clipped, ImportanceSampling
from opd.losses.terms import Match, PolicyGradient, Positions
from opd.methods import METHODS, vopd
from opd.methods.classic import gkd, opd, opd_full
from opd.methods.method import Method
from opd.methods.pg import opd_optimal, opd_stratified
from opd.methods.reward_shapes import poweropd
from opd.methods.vopd import vopd_topk
from opd.models.batching import Rows
from opd.models.forward import final_states
from opd.models.load import head
from opd.models.student import Student
from tests.reference_losses import token_gradients
from tests.tiny_models import tiny

close = torch.testing.assert_close
LISTED = {
    "opd": opd(),
    "opd-full": opd_full(),
    "vopd": vopd(),
    "vopd-topk": vopd_topk(3),
    "opd-optimal": opd_optimal(),
    "opd-stratified": opd_stratified(4, "optimal"),
    "poweropd": poweropd(1.0),
    "gkd": gkd(),
}

# one position


ALONE = {name: make() for name, make in METHODS.items() if not dependence_reason(make())} | {
    "importance sampling": Method((PolicyGradient(baseline=Value(), surrogate=ImportanceSampling()),)),
    "clipped": Method((PolicyGradient(surrogate=Clipped()),)),
    "stratified 0": opd_stratified(0),
    "stratified 3 optimal": opd_stratified(3, "optimal"),
    "stratified 9": opd_stratified(9),
    "power, top-k value": Method((PolicyGradient(Power(0.5), TopKValue(2)),)),
    "two terms": Method((PolicyGradient(baseline=Optimal(), coef=0.3), Match(coef=2.0))),
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("m", ALONE.values(), ids=ALONE)
def test_slopes_are_the_gradients_of_every_token(m):
    """Of `Method.loss` itself, token by token, through autograd."""
    student, *frozen = 2 * torch.randn(3, 4, 9)
    at = Positions(torch.zeros(4, dtype=torch.long), *(x.log_softmax(-1) for x in (student, *frozen)))
    s, p = slopes(m, at), student.softmax(-1)
    own = token_gradients(m, student, *frozen)
    close(to_logits(s.always[:, None] + torch.diag_embed(s.drawn), p[:, None].expand(-1, 9, -1)), own)
    first, total = gradient_moments(p, own)
    close(s.mean(p), first)
    close(s.variance(p), total)
    direction = torch.randn(9)  # of the logits; log p moves by it less its mean
    along = (own * direction).sum(-1)
    tangent = direction - (p * direction).sum(-1, keepdim=True)
    close(s.spread(p, tangent), (p * along.square()).sum(-1) - (p * along).sum(-1).square())


# a model


def opened(folder, seed, **shape):
    return AutoModelForCausalLM.from_pretrained(tiny(folder, seed=seed, width=16, layers=1, **shape)).double().eval()


class Pair:
    """A student and a teacher, one rollout of 4 tokens, and the gradient of every token that could stand there."""

    def __init__(self, folder, *, tied=False, seed=0):
        self.student = Student(opened(folder / "student", 1, tied=tied))
        teacher = opened(folder / "teacher", 2)
        torch.manual_seed(seed)
        size = len(head(teacher).weight)
        ids = torch.randint(0, size, (1, 9))
        ids[0, 2] = self.student.model.config.pad_token_id  # in a prompt: its embedding gets no gradient
        trained = torch.tensor([[False] * 5 + [True] * 4])
        self.at = Rows(ids, trained, (9,))
        self.teacher = Hidden(final_states(teacher, self.at).detach(), head(teacher))
        self.vocabulary = Vocabulary(size, stop=(3, 7))
        self.trained = dict(self.student.named_parameters())

    def logp(self, side):
        return self.vocabulary.logp(side.states @ side.head.weight.T, side.head)

    def gradients(self, method):
        """[T, V, parameters], by the method's own loss and reverse mode, and p."""
        live = self.logp(Hidden(final_states(self.student.model, self.at), head(self.student.model)))
        q = self.logp(self.teacher).detach()
        in_logits = token_gradients(method, live.detach(), q)  # log-probs are logits, too
        inputs = list(self.trained.values())
        jacobian = torch.autograd.grad(
            live, inputs, torch.eye(live.numel()).view(-1, *live.shape), is_grads_batched=True, allow_unused=True
        )
        flat = torch.cat([x.flatten(1) for x in jacobian], 1).view(*live.shape, -1)
        return torch.einsum("tyv,tvd->tyd", in_logits, flat), live.detach().exp()

    def look(self, methods, along, trained=None, means=None):
        return measure_rollout(
            self.student,
            self.at,
            self.teacher,
            self.vocabulary,
            trained or self.trained,
            along,
            {"opd": opd(), **methods},
            Means() if means is None else means,
        )


@pytest.fixture
def pair(tmp_path, float64):
    return Pair(tmp_path)


@pytest.mark.parametrize("tied", [False, True])
def test_along_a_direction_the_variance_is_that_of_every_token_backpropagated(tmp_path, float64, tied):
    """d' Cov_y(g_y) d for a given d; with E[d d'] = I its mean is the total variance."""
    pair = Pair(tmp_path, tied=tied)
    direction = {n: torch.randn_like(x) for n, x in pair.trained.items()}
    d = torch.cat([x.flatten() for x in direction.values()])
    sums, _ = pair.look(LISTED, [direction])
    for name, m in LISTED.items():
        own, p = pair.gradients(m)
        total = gradient_moments(p, (own @ d)[..., None])[1]
        close(torch.tensor(sums[name].variance), total.sum(), rtol=1e-6, atol=1e-9)  # norms of Llama are fp32


def test_directions_have_the_identity_as_their_second_moment():
    config = Variance(student="", teacher="", prompts="", directions=4000, seed=3)
    drawn = torch.stack([x["a"] for x in directions({"a": torch.zeros(6)}, config, 5)])
    assert drawn.abs().eq(1).all()
    off = (drawn.T @ drawn / len(drawn) - torch.eye(6)).abs()
    assert off.max() < 5 / len(drawn) ** 0.5
    (again,) = directions({"a": torch.zeros(6)}, replace(config, directions=1), 5)
    (other,) = directions({"a": torch.zeros(6)}, replace(config, directions=1), 6)
    close(again["a"], drawn[0])
    assert not torch.equal(again["a"], other["a"])


def test_over_all_directions_it_is_the_total_variance(pair):
    """For some parameters, exactly: the mean over sqrt(D) e_1 ... sqrt(D) e_D."""
    some = {n: x for n, x in pair.trained.items() if "norm" in n}
    size = sum(x.numel() for x in some.values())
    basis = torch.eye(size) * size**0.5
    cut = lambda row: {n: x.view_as(some[n]) for n, x in zip(some, row.split([y.numel() for y in some.values()]))}  # noqa: B905
    sums, _ = pair.look(LISTED, map(cut, basis), trained=some)
    pair.trained = some
    for name, m in LISTED.items():
        own, p = pair.gradients(m)
        close(torch.tensor(sums[name].variance), gradient_moments(p, own)[1].sum(), atol=1e-9, rtol=1e-6)


def test_over_random_directions_it_is_unbiased(pair):
    config = Variance(student="", teacher="", prompts="", directions=1)
    each = [pair.look({"vopd": vopd()}, directions(pair.trained, config, i))[0] for i in range(150)]
    for name, m in (("opd", opd()), ("vopd", vopd())):
        x = torch.tensor([s[name].variance for s in each])
        own, p = pair.gradients(m)
        truth = gradient_moments(p, own)[1].sum()
        assert abs(x.mean() - truth) < 4 * x.std() / len(x) ** 0.5
        assert x.std() / len(x) ** 0.5 < 0.1 * truth  # or the line above says nothing


def test_deterministic_losses_have_no_variance(pair):
    direction = {n: torch.randn_like(x) for n, x in pair.trained.items()}
    sums, _ = pair.look({"opd-full": opd_full(), "gkd": gkd()}, [direction])
    for name in ("opd-full", "gkd"):
        assert (sums[name].variance, sums[name].logits, sums[name].raised) == (0, 0, 0)


def test_mean_gradients_are_those_of_the_losses(pair):
    means = Means()
    pair.look(LISTED, [{n: torch.randn_like(x) for n, x in pair.trained.items()}], means=means)
    flat = {}
    for name, m in LISTED.items():
        own, p = pair.gradients(m)
        flat[name] = gradient_moments(p, own)[0].sum(0)
        norm2, cosine = means.compare(name)
        assert norm2 == pytest.approx(float(flat[name].square().sum()), rel=1e-4)  # fp32 inside
        full = flat.setdefault("full", gradient_moments(p, pair.gradients(opd_full())[0])[0].sum(0))
        assert cosine == pytest.approx(float(torch.nn.functional.cosine_similarity(flat[name], full, dim=0)), rel=1e-6)
    assert {method for method, _ in means.sums} - {"opd-full"} == {
        "poweropd",
        "gkd",
    }  # the others estimate the same gradient, context by context


def test_counts_and_divergence(pair):
    live = pair.logp(Hidden(final_states(pair.student.model, pair.at), head(pair.student.model))).detach()
    q = pair.logp(pair.teacher)
    sums, nats = pair.look(LISTED, [{n: torch.randn_like(x) for n, x in pair.trained.items()}])
    assert nats == pytest.approx(float((live.exp() * (live - q)).sum()))
    total = {name: gradient_moments(live.exp(), token_gradients(m, live, q))[1] for name, m in LISTED.items()}
    for name, x in total.items():
        assert sums[name].logits == pytest.approx(float(x.sum()), rel=1e-6, abs=1e-12)
        assert sums[name].raised == int((x > 1.001 * total["opd"]).sum())


# intervals


def test_intervals_cover(tmp_path, float64):
    """Rollouts drawn from a population whose every gradient is enumerated, a direction for each."""
    config = Variance(student="", teacher="", prompts="", directions=1)
    truth, seen = [], []
    for seed in range(6):
        pair = Pair(tmp_path / str(seed), seed=seed)
        truth.append([float(gradient_moments(*reversed(pair.gradients(m)))[1].sum()) for m in (vopd(), opd())])
        draws = [pair.look({"vopd": vopd()}, directions(pair.trained, config, 100 * seed + i))[0] for i in range(40)]
        seen.append([(x["vopd"].variance, x["opd"].variance) for x in draws])
    above, below = torch.tensor(truth).sum(0)
    target, hits, rounds = float(above / below), 0, 1000
    for _ in range(rounds):
        rollouts, direction = torch.randint(6, (24,)), torch.randint(40, (24,))
        got = ratio(*zip(*(seen[i][j] for i, j in zip(rollouts, direction, strict=True)), strict=True))
        hits += got.low <= target <= got.high
    assert 0.9 < hits / rounds < 0.99


def test_ratio_by_hand():
    """Two over one is two without doubt; residuals of -1 and 1 are a doubt."""
    sure = ratio([2.0] * 8, [1.0] * 8)
    assert (sure.value, sure.low, sure.high) == (2, 2, 2)
    got = ratio([1.0, 3.0] * 4, [1.0] * 8)
    assert got.high - got.value == pytest.approx(2.3646 * (8 / 7) ** 0.5 / 8**0.5, rel=1e-3)
    assert ratio([0.0] * 8, [1.0] * 8).high == 0


def test_quantiles_of_student():
    """Tables."""
    for freedom, want in ((5, 2.5706), (7, 2.3646), (15, 2.1314), (31, 2.0395), (1000, 1.9623)):
        assert t_quantile(0.975, freedom) == pytest.approx(want, rel=3e-3)


# commands


PAIR = ["--student", "embedded:student", "--teacher", "embedded:teacher", "--prompts", "embedded:ledger-short"]
SHORT = ["--rollouts", "6", "--max-new-tokens", "8"]


def refused(capsys, *args):
    assert main(list(args)) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("opd: ") and "Traceback" not in err
    return err


def test_variance_of_the_embedded_pair(capsys):
    args = ["variance", *PAIR, *SHORT, "--methods", "vopd,vopd-topk:k=1,opd-stratified:k=4:baseline=optimal,gkd"]
    assert main([*args, "--json"]) == 0
    got = json.loads(capsys.readouterr().out)
    found = got["methods"]
    assert list(found) == ["opd", "opd-full", "vopd", "vopd-topk:k=1", "opd-stratified:k=4:baseline=optimal", "gkd"]
    assert found["opd"]["ratio"] == {"value": 1, "low": 1, "high": 1}
    assert found["vopd-topk:k=1"]["ratio"]["value"] == pytest.approx(1, abs=1e-5)
    for name in ("opd-full", "gkd"):
        assert found[name]["variance"] == {"value": 0, "low": 0, "high": 0}
    assert 0 < found["opd-stratified:k=4:baseline=optimal"]["ratio"]["value"] < found["vopd"]["ratio"]["value"]
    assert found["vopd"]["cosine"] == pytest.approx(1, abs=1e-4) and found["gkd"]["cosine"] < 0.9999
    assert got["rollouts"] == 6 and 6 <= got["contexts"] <= 48
    assert main([*args]) == 0
    shown = capsys.readouterr().out
    assert "opd-strat" in shown and "48 contexts of 6 rollouts" in shown
    assert (f"{got['largest']:.0%} of opd's variance" in shown) == (got["largest"] > 0.2)


def test_parameters_are_chosen_by_name():
    """The last layer's variance is less than that of all; along fewer numbers fewer directions are needed."""
    found = variance(Variance(student=PAIR[1], teacher=PAIR[3], prompts=PAIR[5], rollouts=6, parameters="norm"), {})
    assert found.parameters == 128 * 7 and 0 < found.largest <= 1


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--methods", "vodp"], "did you mean vopd"),
        (["--methods", "vopd-topk:k"], "k"),
        (["--methods", "vopd-topk:k=many"], "k"),
        (["--methods", "vopd-topk:k=0"], "k=0"),
        (["--methods", "fire"], "--methods fire"),
        (["--methods", "opd-zscore"], "Whiten"),
        (["--methods", "vopd,vopd"], "twice"),
        (["--methods", "vopd", "--parameters", "nothing"], "--parameters nothing"),
        (["--methods", "vopd", "--parameters", "("], "regular expression"),
        (["--methods", "vopd", "--rollouts", "3"], "--rollouts 3"),
        (["--methods", "vopd", "--directions", "0"], "--directions 0"),
        (["--methods", "vopd", "--temperature", "0.5"], "--temperature 0.5"),
        (["--methods", "vopd", "--teacher", "embedded:nobody"], "embedded:nobody"),
        (["--contexts", "3"], "--contexts"),
    ],
)
def test_mistakes_in_one_line(capsys, args, told):
    assert told in refused(capsys, "variance", *PAIR, *SHORT, *args)


def exact(capsys, *args):
    assert main(["exact", *args, "--json"]) == 0
    return {row["method"]: row for row in json.loads(capsys.readouterr().out)}


def test_exact_lists_every_method(capsys):
    rows = exact(capsys, "--length", "2")
    assert list(rows) == list(METHODS)
    for name, row in rows.items():
        assert ("why" in row) != ({"cosine", "bias", "noise"} <= set(row)), name
    assert "OnPolicy" in rows["trb"]["note"] and "note" not in rows["vopd"]
    assert "coin" in rows["tropd"]["why"] and "verifier" in rows["scope"]["why"]
    assert rows["opd-optimal"]["noise"] < min(rows["vopd"]["noise"], rows["opd"]["noise"])
    assert rows["gkd"]["cosine"] < 1


def test_exact_of_one_method_with_flags(capsys):
    (soft,) = exact(capsys, "--length", "2", "tropd", "--soft").values()
    assert -1 <= soft["cosine"] <= 1
    (future,) = exact(capsys, "opd", "--gamma", "1").values()
    assert future["cosine"] == pytest.approx(1) and future["bias"] < 1e-6
    two = exact(capsys, "--methods", "opd:gamma=1,opd")
    assert two["opd:gamma=1"] == {**future, "method": "opd:gamma=1"} and two["opd"]["bias"] > 0.01
    assert main(["exact", "--length", "2"]) == 0
    assert "scope" in capsys.readouterr().out


def test_exact_with_a_teacher_that_writes_a_share(capsys):
    """Half of the mean gradient at each speaker's contexts: enumerated by hand in the mixture."""
    rows = exact(capsys, "--methods", "gkd-reverse,gkd-reverse:share=0,gkd-reverse:share=0.5")
    ends = rows["gkd-reverse"]["bias"], rows["gkd-reverse:share=0"]["bias"]
    assert min(ends) < rows["gkd-reverse:share=0.5"]["bias"] <= max(ends) + 1e-9 or ends[0] != ends[1]
    assert source_shares(METHODS["gkd"](share=0.25)) == {0: 0.25, 1: 0.75}
    other = exact(capsys, "gkd", "--share", "0.5", "--other", "response")
    assert "writes" in other["gkd"]["why"]


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["vodp"], "did you mean vopd"),
        (["--vocab", "1"], "--vocab 1"),
        (["--length", "0"], "--length 0"),
        (["--vocab", "10", "--length", "9"], "sequences"),
        (["--mismatch", "nan"], "--mismatch nan"),
        (["--methods", "opd", "vopd"], "--methods"),
        (["opd", "--gama", "1"], "gama"),
    ],
)
def test_exact_mistakes_in_one_line(capsys, args, told):
    assert told in refused(capsys, "exact", *args)
