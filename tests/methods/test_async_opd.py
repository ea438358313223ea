"""More tokens drawn at each position: by whom, what the loss makes of them, how they travel, what a server is asked."""

import itertools
from array import array
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import opd
from opd.analysis.exact import dependence_reason, measure
from opd.config import checks
from opd.config.plan import resolved
from opd.core.sampling import Sampling
from opd.core.tensors import save_tensors
from opd.core.types import Others, Rollout
from opd.head.head_pass import head_pass
from opd.head.inputs import FrozenOutputs, Hidden, TeacherLogps
from opd.head.vocabulary import Head, Vocabulary
from opd.losses.baselines import TopKValue, Value
from opd.losses.estimators import Several
from opd.losses.surrogates import Clipped, OffPolicy
from opd.losses.terms import PolicyGradient, Positions, Target
from opd.methods import METHODS
from opd.methods.method import Method
from opd.methods.rollout_policies.on_policy import Mixture, OnPolicy
from opd.rollouts import buffer
from opd.rollouts.engines.base import GenerateRequest
from opd.rollouts.engines.hf import HFEngine
from opd.rollouts.extra_samples import with_others
from opd.training.checkpoint import load as load_state
from tests.end_to_end.test_asynchronous_rollouts import alike, config
from tests.tiny_models import interrupted_at

close = torch.testing.assert_close
PROMPTS = [[1, 5, 9], [1, 7], [1, 5, 9], [1, 20, 30, 40, 50, 60], [1, 7], [1, 8, 8]]
M = 4


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "top_p": 0.9}], ids=["plain", "truncated"])
def test_tokens_drawn_beside_a_finished_response_are_those_of_an_engine_that_draws_them_at_once(model, sampling):
    """The same noise at the same contexts, in any order and company of the rollouts."""
    how, index = Sampling(max_new_tokens=24, **sampling), [4, 0, 9, 7, 3, 5]
    engine = HFEngine(model, model.config.vocab_size, (2, 3), rows=4)
    wanted = engine.generate(GenerateRequest(PROMPTS, how, seed=3, step=5, index=index, samples=M))
    rollouts = [
        Rollout(
            prompt_ids=tuple(p), teacher_prompt_ids=(), ids=x.ids, sampler_logp=x.logp, index=i, group=i, stopped=True
        )
        for p, x, i in zip(PROMPTS, wanted, index, strict=True)
    ]
    empty = replace(rollouts[0], ids=(), sampler_logp=())
    found = with_others([*rollouts, empty], engine, how, M, (3, 5))
    for mine, x in zip(found, wanted, strict=False):
        assert mine.others.ids == x.others.ids
        assert list(mine.others.logp) == pytest.approx(list(x.others.logp), abs=1e-4)
    assert len(found) == len(wanted) + 1 and not found[-1].others.ids


@pytest.fixture(scope="module")
def model(pair):
    return AutoModelForCausalLM.from_pretrained(pair[0]).eval()


def written(model, samples, prompts=PROMPTS, index=range(6), **sampling):
    engine = HFEngine(model, model.config.vocab_size, (2, 3), rows=4)
    how = Sampling(max_new_tokens=24, **sampling)
    return engine.generate(GenerateRequest(prompts, how, seed=3, step=5, index=index, samples=samples))


def test_the_response_is_the_one_it_would_be_without_them(model):
    for one, some in zip(written(model, 1), written(model, M), strict=True):
        assert one.others is None and some.others is not None
        assert replace(some, others=None) == one
        assert len(some.others.ids) == len(some.others.logp) == (M - 1) * len(one.ids)
    (alone,) = written(model, M, PROMPTS[3:4], [3])
    assert alone.others.ids == written(model, M)[3].others.ids  # in whatever company


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_they_are_drawn_from_the_models_own_distribution(model, temperature):
    """Against transformers' log-probs, the stop class at its own; frequencies at the first position by chi-square."""
    for prompt, sample in zip(PROMPTS, written(model, M, temperature=temperature), strict=True):
        logits = model(torch.tensor([prompt + list(sample.ids)])).logits[0, len(prompt) - 1 : -1]
        logp = (logits / temperature).log_softmax(-1)
        logp[:, [2, 3]] = logp[:, [2, 3]].logsumexp(-1, keepdim=True)
        ids = torch.tensor(sample.others.ids, dtype=torch.long).view(-1, M - 1)
        close(torch.tensor(sample.others.logp).view(-1, M - 1), logp.gather(-1, ids), rtol=1e-3, atol=1e-4)
    n, engine = 4000, HFEngine(model, model.config.vocab_size, (2,), rows=1)
    how = Sampling(max_new_tokens=1, temperature=temperature)
    (first,) = engine.generate(GenerateRequest([[1, 7]], how, seed=0, step=1, index=[0], samples=n))
    p = (model(torch.tensor([[1, 7]])).logits[0, -1].double() / temperature).softmax(-1).detach()
    group = (p.cumsum(0) * 19.999).long()
    classes = lambda x: torch.zeros(20, dtype=torch.float64).index_add(0, group, x)
    seen = torch.bincount(torch.tensor(first.others.ids), minlength=len(p)).double()
    expected, observed = classes(p * (n - 1)), classes(seen)
    some = expected > 0
    chi, freedom = ((observed - expected).square() / expected)[some].sum(), int(some.sum()) - 1
    assert abs(chi - freedom) < 5 * (2 * freedom) ** 0.5


def asked(ids, others, old, others_old):
    """The columns of one position a row, and the method's target for them."""
    m = METHODS["async-opd"](samples=1 + others.shape[-1])
    p = torch.zeros(*ids.shape, old.shape[-1])
    batch = measure(m, Positions(ids, p.log_softmax(-1), p.log_softmax(-1)))
    own = old.gather(-1, ids[..., None])[..., 0]
    return m, m.prepare(replace(batch, scores=(), sampler_logp=own, others=others, others_logp=others_old))


def test_the_mean_is_the_gradient_of_the_divergence_at_a_fraction_of_the_variance(float64):
    """All draws of three tokens by an older student, one context: E = the gradient of KL(p || q) now, variance / 3."""
    logits, teacher, mu = torch.randn(3, 4)
    logits.requires_grad_()
    old, q = mu.log_softmax(-1), teacher.log_softmax(-1)

    def moments(samples):
        mean, square = 0, 0
        for tokens in itertools.product(range(4), repeat=samples):
            ids, others = torch.tensor([[tokens[0]]]), torch.tensor([[tokens[1:]]], dtype=torch.long).view(1, 1, -1)
            m, targets = asked(ids, others, old.view(1, 1, -1), old[others])
            loss = m.loss(Positions(ids, logits.log_softmax(-1).view(1, 1, -1), q.view(1, 1, -1)), targets).sum()
            (g,) = torch.autograd.grad(loss, logits)
            chance = old[list(tokens)].sum().exp()
            mean, square = mean + chance * g, square + chance * g.square()
        return mean, square - mean.square()

    p = logits.log_softmax(-1)
    (wanted,) = torch.autograd.grad((p.exp() * (p - q)).sum(), logits)
    (one, spread), (some, less) = moments(1), moments(3)
    close(one, wanted)
    close(some, wanted)
    close(less, spread / 3)


@pytest.mark.parametrize("baseline", [None, Value()], ids=["plain", "value"])
@pytest.mark.parametrize("softcap", [0.0, 3.0], ids=["linear", "softcap"])
def test_the_head_pass_is_autograd_by_the_definition(softcap, baseline):
    """Over a teacher's states, and over what a server told of the tokens drawn; two members of the stop class."""
    draw = torch.Generator().manual_seed(0)
    made = lambda *shape: torch.randn(*shape, generator=draw)
    n, v = 23, 29
    weight, states = made(31, 6), made(n, 6)
    teacher, vocabulary = Hidden(made(n, 5), Head(made(31, 5))), Vocabulary(v, stop=(4, 9), chunk_bytes=2000)
    ids, others = (torch.randint(0, v, shape, generator=draw) for shape in ((n,), (n, 3)))
    ids[0], others[0, :2], old, others_old = 9, torch.tensor([4, 9]), made(n) - 3, made(n, 3) - 3
    term = PolicyGradient(surrogate=OffPolicy(), estimator=Several(), baseline=baseline)
    method, row = Method((term,), rollouts=OnPolicy(samples=4)), torch.rand(n, generator=draw)
    target = Target(row, None, old, others, others_old)

    s, w = states.clone().requires_grad_(), weight.clone().requires_grad_()
    p, q = (vocabulary.logp((x @ y.T)[:, :v], Head(y, softcap=cap)) for x, y, cap in (
        (s, w, softcap), (teacher.states, teacher.head.weight, 0.0),
    ))  # fmt: skip
    drawn = vocabulary.canonical(torch.cat((ids[:, None], others), -1))
    own, theirs = p.gather(-1, drawn), q.gather(-1, drawn)
    advantage = (theirs - own).detach()
    if baseline is not None:
        advantage = advantage + torch.where(p > -torch.inf, p.exp() * (p - q), 0).sum(-1, keepdim=True).detach()
    ratio = (own - torch.cat((old[:, None], others_old), -1)).exp()
    wanted = (row * -(ratio * advantage).mean(-1)).sum()
    wanted.backward()

    given = TeacherLogps(theirs[:, 0].detach(), drawn[:, 1:], theirs[:, 1:].detach())
    for heard in (teacher, given) if baseline is None else (teacher,):
        a, b = states.clone().requires_grad_(), weight.clone().requires_grad_()
        loss, _ = head_pass(
            method, Hidden(a, Head(b, softcap=softcap)), FrozenOutputs(heard), ids, (target,), vocabulary
        )
        loss.backward()
        for x, y in ((loss, wanted), (a.grad, s.grad), (b.grad, w.grad)):
            close(x, y, rtol=2e-4, atol=2e-5)


def test_they_come_back_from_a_checkpoint(tmp_path):
    more = Others(array("i", [7, 8, 9, 2**30]), array("f", [-0.5, -1.5, -2.5, -1e-9]))
    whole = Rollout(
        prompt_ids=(), teacher_prompt_ids=(), ids=(3, 4), sampler_logp=(-0.1, -2.0), index=6, group=3, stopped=True,
        others=more,
    )  # fmt: skip
    other = replace(whole, ids=(5,), sampler_logp=(-7.5,), others=Others(more.ids[:2], more.logp[:2]), index=7)
    empty = replace(whole, ids=(), sampler_logp=(), others=Others.none())
    kept = {9: [whole, empty, other], 11: [replace(whole, others=None)]}
    save_tensors(buffer.to_tensors(kept), tmp_path / "draws.safetensors")
    assert buffer.from_tensors(load_file(tmp_path / "draws.safetensors")) == kept


def test_a_worker_and_a_resumed_run_have_the_same(pair, tmp_path):
    """Steps behind: what a checkpoint keeps of them is bitwise what was drawn."""
    changes = {"method": METHODS["async-opd"](samples=M), "steps": 4, "save_every": 2}
    opd.train(config(pair, tmp_path / "here", **changes))
    opd.train(config(pair, tmp_path / "apart", worker=True, **changes))
    alike(tmp_path / "here", tmp_path / "apart")
    late = {**changes, "staleness": 2, "exact_staleness": True}
    opd.train(config(pair, tmp_path / "whole", **late))
    with interrupted_at(4), pytest.raises(KeyboardInterrupt):
        opd.train(config(pair, tmp_path / "cut", **late))
    assert any(drawn[0].others for drawn in load_state(tmp_path / "cut/checkpoints/step-000002").rollouts.values())
    opd.train(config(pair, tmp_path / "cut", resume=True, **late))
    alike(tmp_path / "whole", tmp_path / "cut")


REFUSED = [
    (lambda: PolicyGradient(estimator=Several(), surrogate=Clipped()), "act on the sampled token alone"),
    (lambda: Method((PolicyGradient(estimator=Several()),)), r"use OnPolicy\(samples=...\) above 1"),
    (lambda: Method((PolicyGradient(estimator=Several()),), rollouts=Mixture()), r"use OnPolicy\(samples=...\)"),
    (lambda: OnPolicy(samples=0), "samples=0: at least the response's own token"),
]


@pytest.mark.parametrize(("make", "why"), REFUSED, ids=[why for _, why in REFUSED])
def test_what_is_no_such_method(make, why):
    with pytest.raises(ValueError, match=why):
        make()


def test_who_cannot_draw_or_tell(pair, tmp_path):
    method = METHODS["async-opd"](samples=M)
    ahead = config(pair, tmp_path, method=method, staleness=1, speaker=opd.Speaker(engine="vllm"))
    with pytest.raises(opd.Refusal, match=r"--engine vllm: shares the process and the GPU .*--engine http"):
        checks.check(resolved(ahead))
    assert method.supports() == {"drawn": M - 1} and method.needs_of_tokens() == {"teacher_logp", "chosen"}
    with_baseline = Method((PolicyGradient(estimator=Several(), baseline=TopKValue(3)),), rollouts=OnPolicy(samples=M))
    assert not with_baseline.supports() and "several tokens" in dependence_reason(with_baseline)
