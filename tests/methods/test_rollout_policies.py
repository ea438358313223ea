"""Rollout policies: the blend is optimal, joint decoding is what full forward passes say, online cuts are late cuts.

The mechanisms fire end to end on small models, and runs that remember resume bitwise.
"""

import ast
import copy
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import opd
from opd.config import checks
from opd.config.plan import resolved
from opd.config.train import Train
from opd.core.rng import uniform
from opd.core.sampling import Prompt, Sampling
from opd.core.types import STUDENT, Batch
from opd.data.prompts import Rendered
from opd.head.vocabulary import Vocabulary
from opd.losses.divergences import kl
from opd.losses.terms import Match, PolicyGradient
from opd.losses.token_weights import TruncatedImportance
from opd.methods import METHODS
from opd.methods.method import Method
from opd.methods.rollout_policies.base import NOTHING, RolloutPolicy, RunState
from opd.methods.rollout_policies.kl_ball import Blend, BlendHook, blend
from opd.methods.rollout_policies.on_policy import Mixture, OnPolicy
from opd.methods.rollout_policies.stop_on_agreement import AgreementHook, StopOnAgreement
from opd.methods.rollout_policies.teacher_prefix import TeacherPrefix
from opd.methods.tropd import PrefixTokens, StudentTokens
from opd.models.source import EMBEDDED
from opd.rollouts.batch import collate
from opd.rollouts.collector import Collector, RolloutRequest
from opd.rollouts.engines.base import GenerateRequest, TeacherDecoding
from opd.rollouts.engines.hf import HFEngine
from opd.training.build import open_session
from opd.training.metrics import rollout_metrics
from opd.training.run_folder import Run
from opd.training.trainer import Trainer
from tests.tiny_models import logged, small, tiny

close = torch.testing.assert_close
V = 40  # ids that are sampled: few, so that stop tokens come
STOP = (2,)
PROMPTS = [(1, 5, 9), (1, 7), (1, 5, 9), (1, 20, 30, 35, 39, 11)]
HEARD = [(1, 3, 3, 5, 9, 8), (1, 4, 7), (1, 3, 3, 5, 9, 8), (1, 6)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pair")
    return tiny(root / "student", seed=1), tiny(root / "teacher", seed=2, width=48)


@pytest.fixture(scope="module")
def models(folders):
    return [AutoModelForCausalLM.from_pretrained(f).eval() for f in folders]


def pair(count=1000, vocab=12, mismatch=2.0):
    p = torch.randn(count, vocab)
    return p.log_softmax(-1), (p + mismatch * torch.randn(count, vocab)).log_softmax(-1)


# The blended policy


def test_the_blend_lies_on_the_ball_or_is_the_teacher():
    p, q = pair()
    for eps in (1e-3, 0.02, 0.5):
        mixed, beta, distance = blend(p, q, eps)
        far = kl(q, p) > eps
        assert far.any()
        close(distance[far], torch.full_like(distance[far], eps), atol=1e-5, rtol=0)
        assert (distance <= eps).all() and (beta[~far] == 1).all() and (beta[far] < 1).all()
        close(mixed[~far], q[~far], atol=1e-5, rtol=1e-5)
        close(kl(mixed, p), distance)
        close(mixed, ((1 - beta[:, None]) * p + beta[:, None] * q).log_softmax(-1), atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("float64")
def test_nothing_in_the_ball_is_nearer_to_the_teacher():
    p, q = pair(20)
    mixed, _, _ = blend(p, q, 0.05)
    for _ in range(500):
        other = (mixed + 10 ** (-3 * torch.rand(20, 1)) * torch.randn(20, 12)).log_softmax(-1)
        inside = kl(other, p) <= 0.05
        assert (kl(other, q) >= kl(mixed, q) - 1e-7)[inside].all()
    # Small radius: b ~ sqrt(2 eps / s^2), s^2 the variance of the log ratio under the student.
    _, beta, _ = blend(p, q, 1e-8)
    mean = (p.exp() * (q - p)).sum(-1, keepdim=True)
    close(beta, (2e-8 / (p.exp() * (q - p - mean).square()).sum(-1)).sqrt(), rtol=1e-2, atol=0)


def test_the_ends_of_the_blend():
    p, q = pair(50)
    mixed, beta, distance = blend(p, q, 0.0)
    assert (beta < 1e-2).all() and (distance.abs() < 1e-6).all()  # as far as rounding can tell 0 from less
    close(mixed, p, atol=1e-2, rtol=1e-2)
    mixed, beta, _ = blend(p, q, math.inf)
    assert (beta == 1).all()
    close(mixed, q)
    q[:, 0], p[:, 1] = -math.inf, -math.inf  # what one of them cannot say
    mixed, beta, distance = blend(p.log_softmax(-1), q.log_softmax(-1), 10.0)
    assert (mixed[:, :2] == -math.inf).all() and distance.isfinite().all()
    mixed, beta, _ = blend(p.log_softmax(-1), q.log_softmax(-1), 1e-6)  # leaving token 0 out would cost more than eps
    assert (beta == 0).sum() > 40 and (mixed[beta == 0][:, 0] > -math.inf).all()


def test_the_trust_region_closes():
    assert [Blend(0.02, 4).radius(s) for s in range(1, 7)] == pytest.approx([0.02, 0.015, 0.01, 0.005, 0, 0])


# Joint decoding


def next_logp(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1, :V].log_softmax(-1).double()


def root(f):
    """Of an increasing function on [0, 1], by the rule of Illinois: false position that cannot stall."""
    a, b, fa, fb = 0.0, 1.0, f(0.0), f(1.0)
    for _ in range(100):
        x = (a * fb - b * fa) / (fb - fa)
        if abs(fx := f(x)) < 1e-13:
            break
        a, fa, b, fb = (b, fb, x, fx) if fx * fb < 0 else (a, fa / 2, x, fx)
    return x


def slow_blend(models, prompt, heard, index, eps, length, stop=STOP):
    """One response by full forward passes, the radius met by false position in float64; numbers of each token too."""
    ids, numbers = [], []
    for t in range(length):
        p, q = (next_logp(m, [*x, *ids]) for m, x in zip(models, (prompt, heard), strict=True))
        own = stop[int(p[list(stop)].argmax())]
        for x in (p, q):
            whole = x[list(stop)].logsumexp(0)
            x[list(stop)] = -math.inf
            x[own] = whole
        at = lambda b, p=p, q=q: torch.where(p > -math.inf, (1 - b) * p + b * q, p).log_softmax(0)
        gap = lambda b, at=at, p=p: float(kl(at(b), p)) - eps
        b = 1.0 if gap(1.0) <= 0 else root(gap)
        cdf = at(b).exp().cumsum(0)
        token = int(torch.searchsorted(cdf, uniform(3, 5, index, t) * cdf[-1], right=True))
        ids.append(token)
        numbers.append((float(at(b)[token]), b, gap(b) + eps))
        if token in stop:
            break
    return ids, np.array(numbers)


@pytest.mark.parametrize("eps", [0.02, 0.3, 50.0])
@pytest.mark.parametrize("options", [{}, {"rows": 3, "compact": 1.0}])
def test_joint_decoding_equals_full_forward_passes(models, eps, options):
    engine = HFEngine(models[0], V, STOP, **options)
    teaching = TeacherDecoding(models[1], HEARD, BlendHook(eps))
    found = engine.generate(
        GenerateRequest(PROMPTS, Sampling(max_new_tokens=20), seed=3, step=5, index=range(4), teacher=teaching)
    )
    assert len({len(s.ids) for s in found}) > 1  # rows end at different times: caches were compacted
    for i, sample in enumerate(found):
        ids, numbers = slow_blend(models, PROMPTS[i], HEARD[i], i, eps, 20)
        assert list(sample.ids) == ids and sample.stopped == (ids[-1] in STOP)
        close(torch.tensor(sample.logp).double(), torch.from_numpy(numbers[:, 0]), atol=1e-3, rtol=1e-3)
        close(torch.tensor(sample.notes["beta"]).double(), torch.from_numpy(numbers[:, 1]), atol=2e-3, rtol=2e-3)
        assert all(x <= eps + 1e-6 for x in sample.notes["behavior_kl"])


def test_stop_tokens_are_one_class_and_the_students_own_is_said(models):
    """The teacher stops at 3, the student at 2: whoever's mass it is, the student's id ends the response."""
    student, teacher = models = copy.deepcopy(models)
    stop = (2, 3)
    with torch.no_grad():
        for model, id in ((student, 3), (teacher, 2)):
            model.lm_head.weight.data[id] *= 0.1
    engine, teaching = HFEngine(student, V, stop), TeacherDecoding(teacher, HEARD * 4, BlendHook(0.3))
    found = engine.generate(
        GenerateRequest(PROMPTS * 4, Sampling(max_new_tokens=20), seed=3, step=5, index=range(16), teacher=teaching)
    )
    assert any(s.stopped for s in found)
    for i, sample in enumerate(found[:4]):
        ids, _ = slow_blend(models, PROMPTS[i], HEARD[i], i, 0.3, 20, stop)
        assert list(sample.ids) == ids


def rendered(count=4):
    return [Rendered(Prompt(text=str(i)), PROMPTS[i], HEARD[i]) for i in range(count)]


def collector(models):
    student, teacher = (HFEngine(m, V, STOP) for m in models)
    text = AutoTokenizer.from_pretrained(EMBEDDED / "teacher")
    return Collector(student, {"": teacher}, text, Vocabulary(V))


def collect(c, policy, step=1, total=1):
    request = RolloutRequest(
        prompts=rendered(), policy=policy, sampling=Sampling(max_new_tokens=16), seed=3, step=step, total=total
    )
    return c.collect(request, lambda text, prompt: 0.0)


def test_without_a_radius_the_student_speaks_bit_for_bit(models):
    plain = collect(collector(models), OnPolicy(2), step=7)
    assert collect(collector(models), Blend(0.0, 50, 2), step=7) == plain
    assert collect(collector(models), Blend(0.5, 6, 2), step=7) == plain
    assert collect(collector(models), Blend(0.5, 7, 2), step=7) != plain


# Stopping on agreement


RULE = StopOnAgreement(window=3, floor=2, buffer=20, ready=4, warmup=1, eta=0.25, patience=2)


def by_hand(d, s, w=3, l0=2, patience=2):
    """The pseudo-code of arXiv:2606.09471, windows counted from 1: (tokens kept, least mean)."""
    low, least = 0, math.inf
    for t in range(l0 + w, len(d) + 1):
        z = sum(d[t - w : t]) / w
        least = min(least, z)
        low = low + 1 if z < s else 0
        if low >= patience:
            return t - (patience - 1) - (w - 1) - 1, least
    return len(d), least


def batch_of(token_kl, stopped=False):
    rows, width = len(token_kl), max(map(len, token_kl))
    real = torch.arange(width) < torch.tensor([len(row) for row in token_kl])[:, None]
    d = torch.tensor([[*row, *[math.nan] * (width - len(row))] for row in token_kl], dtype=torch.float64)
    return Batch(
        ids=torch.zeros(rows, width, dtype=torch.long),
        mask=real,
        group=torch.arange(rows),
        source=torch.zeros(rows, dtype=torch.long),
        stopped=torch.full((rows,), stopped),
        outcome=torch.zeros(rows),
        sampler_logp=torch.zeros(rows, width),
        reverse_kl=d,
    )


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("threshold", [-math.inf, 0.35, 0.6, 5.0])
def test_the_cut_is_the_papers(threshold):
    rng = np.random.default_rng(0)
    d = [rng.random(n).tolist() for n in rng.integers(1, 12, 40)]
    lengths = torch.tensor([len(row) for row in d])
    cut = RULE.cut(batch_of(d), lengths, threshold)
    wanted = [by_hand(row, threshold) for row in d]
    assert cut.mask.sum(1).tolist() == [k for k, _ in wanted]
    close(cut.notes["least"], torch.tensor([m for _, m in wanted]))
    assert cut.notes["cut"].tolist() == [len(row) - k for row, (k, _) in zip(d, wanted, strict=True)]
    assert (cut.mask.sum(1) >= RULE.floor)[lengths >= RULE.floor].all()
    # The token that ends a response is not listened to; it goes with what is cut.
    ended = RULE.cut(batch_of(d, stopped=True), lengths, threshold)
    wanted = [by_hand(row[:-1], threshold) for row in d]
    assert ended.mask.sum(1).tolist() == [k + (k == len(row) - 1) for row, (k, _) in zip(d, wanted, strict=True)]


@pytest.mark.usefixtures("float64")
def test_memory_is_a_fifo_of_least_means_and_its_quantile_the_threshold():
    batch = RULE.cut(
        batch_of([[0.5] * 6, [0.1] * 3, [0.2, 0.2, 0.2, 0.1, 0.1, 0.1, 0.9]]), torch.tensor([6, 3, 7]), 0.0
    )
    memory = RULE.remember({}, batch)  # three tokens are no window that counts
    close(memory["least"], torch.tensor([0.5, 0.1]))  # floor 2: the first window that counts ends at token 5
    assert RULE.threshold(2, memory) == -math.inf  # two rollouts of four
    for _ in range(12):
        before, memory = memory, RULE.remember(memory, batch)
    assert len(memory["least"]) == 20 and len(before["least"]) == 20
    memory = {"least": torch.tensor([0.4, 0.1, 0.3, 0.2, 0.5])}
    assert RULE.threshold(1, memory) == -math.inf  # warm-up
    assert RULE.threshold(2, memory) == pytest.approx(0.4)  # 1 - eta = 3/4 of the way
    dropped = replace(batch, mask=batch.mask & torch.tensor([[False], [True], [True]]))
    close(RULE.remember({}, dropped)["least"], torch.tensor([0.1]))


def test_online_and_late_cuts_are_the_same_tokens(models):
    """The engine that listens ends where the whole rollouts, measured by full forward passes, are cut."""
    rule, sampling, n = replace(RULE, window=4), Sampling(max_new_tokens=40), 24
    prompts, heard = PROMPTS * 6, HEARD * 6
    engine = HFEngine(models[0], V, STOP)
    whole = engine.generate(GenerateRequest(prompts, sampling, seed=3, step=5, index=range(n)))
    d = []
    for prompt, other, sample in zip(prompts, heard, whole, strict=True):
        with torch.no_grad():
            p, q = (
                m(torch.tensor([[*x, *sample.ids]])).logits[0, len(x) - 1 : -1, :V].log_softmax(-1)
                for m, x in zip(models, (prompt, other), strict=True)
            )
        d.append(kl(p, q).double().tolist())
    threshold = float(np.quantile([by_hand(row, -1, 4)[1] for row in d if len(row) >= 6], 0.9))
    watched = AgreementHook(rule, threshold, lambda logits: logits.log_softmax(-1))
    found = engine.generate(
        GenerateRequest(
            prompts, sampling, seed=3, step=5, index=range(n), teacher=TeacherDecoding(models[1], heard, watched)
        )
    )
    late = rule.cut(
        replace(batch_of(d), stopped=torch.tensor([s.stopped for s in whole])),
        torch.tensor([len(row) for row in d]),
        threshold,
    )
    kept = late.mask.sum(1).tolist()
    assert [s.ids for s in found] == [s.ids[:k] for s, k in zip(whole, kept, strict=True)]
    assert [s.logp for s in found] == [pytest.approx(s.logp[:k], abs=1e-4) for s, k in zip(whole, kept, strict=True)]
    assert 5 < sum(s.notes["cut"] > 0 for s in found) < n and not any(s.stopped for s in found if s.notes["cut"])
    close(torch.tensor([s.notes["least"] for s in found]).double(), late.notes["least"], atol=1e-4, rtol=1e-4)
    # What is cut away was sampled only as far as the rule had to listen.
    assert all(s.notes["cut"] in (0, rule.window + rule.patience - 1) for s in found)


# Teacher's prefixes


def test_the_prefix_shrinks_as_a_cosine():
    who = TeacherPrefix(100)
    limits = [who.prefix_limit(RunState(s, 10, 400, NOTHING)) for s in range(1, 11)]
    assert limits[0] == 100 and limits[5] == 50 and limits == sorted(limits, reverse=True) and limits[-1] == 2
    start = RunState(1, 10, 400, NOTHING)
    assert TeacherPrefix(0).prefix_limit(start) == 400 and TeacherPrefix(1000).prefix_limit(start) == 400


def test_the_teacher_begins_and_the_student_goes_on(models):
    c = collector(models)
    rollouts = collect(c, TeacherPrefix(12, 2), step=3, total=8)  # limit 10
    assert any(0 < r.prefix < len(r.ids) for r in rollouts)
    for r in rollouts:
        assert r.prefix <= 10 and len(r.ids) <= 16 and r.source == STUDENT
        assert r.prefix == 10 or (r.prefix == len(r.ids) and r.ids[-1] in STOP)  # shorter where the teacher ended
        for t in range(r.prefix, len(r.ids)):  # the student's tokens, by full forward passes
            logp = next_logp(models[0], [*r.prompt_ids, *r.ids[:t]])
            cdf = logp.exp().cumsum(0)
            assert r.ids[t] == int(torch.searchsorted(cdf, uniform(3, 3, r.index, t) * cdf[-1], right=True))
            assert r.sampler_logp[t] == pytest.approx(float(logp[r.ids[t]]), abs=1e-3)
        first = [next_logp(models[1], [*r.teacher_prompt_ids, *r.ids[:t]]) for t in range(r.prefix)]
        assert all(float(x[id]) > -12 for x, id in zip(first, r.ids, strict=False))
    pairs = list(zip(rollouts[::2], rollouts[1::2], strict=True))
    assert all(a.ids[: a.prefix] == b.ids[: b.prefix] for a, b in pairs)  # one response for a prompt
    assert any(a.ids != b.ids for a, b in pairs)
    batch = collate(rollouts, stop_token="train", truncated="train", seed=3, step=3)
    assert batch.prefix.tolist() == [r.prefix for r in rollouts]
    numbers = rollout_metrics(batch)
    assert numbers["prefix_limit"] == 10 and 0 < numbers["prefix_share"] < 1
    assert numbers["prefix_share"] == pytest.approx(sum(r.prefix for r in rollouts) / sum(len(r.ids) for r in rollouts))


def test_a_teachers_response_is_the_same_at_every_step_and_written_once(models, monkeypatch):
    c, wrote = collector(models), []
    teacher = c.teachers[""]
    generate = HFEngine.generate
    spy = lambda self, request: (
        wrote.extend(request.prompts) if self is teacher else None,
        generate(self, request),
    )[1]
    monkeypatch.setattr(HFEngine, "generate", spy)
    early, late = (collect(c, TeacherPrefix(12), step=s, total=8) for s in (2, 5))
    assert len(wrote) == 3  # distinct prompts, once
    fresh = collect(collector(models), TeacherPrefix(12), step=5, total=8)
    assert fresh == late
    for a, b in zip(early, late, strict=True):
        assert a.ids[: b.prefix] == b.ids[: b.prefix] and b.prefix <= a.prefix
    monkeypatch.setattr("opd.rollouts.prefix_cache.MAX_TOKENS", 0)
    assert collect(c, TeacherPrefix(12), step=5, total=8) == late and not c.prefix_cache.prefixes


@pytest.mark.usefixtures("float64")
def test_prefix_tokens_carry_beta_times_their_likelihood_and_nothing_else():
    from opd.analysis.exact import World

    world = World.random(vocab=4, steps=3)
    ids = world.sequences()[::7]
    prefix = torch.arange(len(ids)) % 4
    m = METHODS["tropd"](k=2, beta=0.25)
    batch = world.measure(m, ids, prefix=prefix)
    at = world.positions(ids)
    loss = m.loss(at, m.prepare(batch)) * batch.mask.sum()
    plain = METHODS["tropd"](k=2, prefix=False)
    wanted = plain.loss(at, plain.prepare(world.measure(plain, ids))) * batch.mask.sum()
    written = torch.arange(3) < prefix[:, None]
    close(loss[written], -0.25 * at.sampled(at.student_logp)[written])
    close(loss[~written], wanted[~written])
    close(StudentTokens()(prefix, batch.mask) + PrefixTokens()(prefix, batch.mask), torch.ones(ids.shape))


# What is refused


@pytest.mark.parametrize(
    ("who", "bad"),
    [
        (Blend, {"eps0": -1.0}),
        (Blend, {"steps": 0}),
        (TeacherPrefix, {"length": -1}),
        (StopOnAgreement, {"window": 0}),
        (StopOnAgreement, {"eta": 1.5}),
        (StopOnAgreement, {"ready": 5000}),
        (StopOnAgreement, {"warmup": -1}),
        (Mixture, {"share": 2.0}),
        (OnPolicy, {"per_prompt": 0}),
        (Blend, {"updates": 0}),
    ],
)
def test_impossible_policies_are_refused(who, bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))}={next(iter(bad.values()))}"):
        who(**bad)


def test_a_policy_gradient_on_others_tokens_is_refused():
    for who, way_out in (
        (Blend(), "TruncatedImportance"),
        (TeacherPrefix(), "StudentTokens"),
        (Mixture(), "OnPolicy"),
    ):
        with pytest.raises(ValueError, match=way_out):
            Method((PolicyGradient(),), rollouts=who)
        Method((Match(),), rollouts=who)
    Method((PolicyGradient(weights=(TruncatedImportance(),)),), rollouts=Blend())
    Method((PolicyGradient(weights=(StudentTokens(),)),), rollouts=TeacherPrefix())
    Method((PolicyGradient(),), rollouts=StopOnAgreement())


def test_only_the_files_of_the_policies_ask_for_their_class():
    """So a new policy is one file: the others ask what it answers."""
    package = Path(opd.__file__).parent
    policies = {policy.__name__ for policy in RolloutPolicy.__subclasses__()}
    assert policies >= {"OnPolicy", "Mixture", "Blend", "TeacherPrefix", "StopOnAgreement", "Snapshot"}
    for path in set(package.rglob("*.py")) - set((package / "methods/rollout_policies").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(func=ast.Name("isinstance"), args=[_, classes]) | ast.MatchClass(cls=classes):
                    names = {x.id for x in ast.walk(classes) if isinstance(x, ast.Name)}
                    assert not names & policies, f"{path}:{classes.lineno}"


# End to end


def config(folders, out, **changes) -> Train:
    own = {"steps": 6, "sampling": Sampling(max_new_tokens=32), "lr": 1e-3, "save_every": 2, "keep": 10}
    return small(folders, out, **{**own, "micro_batch_tokens": 512, **changes})


SMALL = {"window": 4, "floor": 2, "buffer": 20, "ready": 8, "after": 2, "eta": 0.1, "patience": 2}
LIMITED = {"data": opd.Data(limit=3)}  # prompts come back: their prefixes too
RUNS = {
    "trb": (METHODS["trb"](eps0=0.05, anneal=4, per_prompt=2), {}),
    "kat": (METHODS["kat"](**SMALL), {}),
    "kat --no-online": (METHODS["kat"](**SMALL, online=False), {}),
    "tropd": (METHODS["tropd"](per_prompt=2, length=24), LIMITED),
    "tropd --soft": (METHODS["tropd"](per_prompt=2, soft=True), LIMITED),
}


@pytest.fixture(scope="module")
def whole(folders, tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    return {
        name: opd.train(config(folders, root / name.replace(" ", ""), method=method, **changes))
        for name, (method, changes) in RUNS.items()
    }


def test_trb_speaks_from_between_while_the_trust_region_lasts(whole):
    rows = logged(whole["trb"])
    assert all(row["grad_norm"] > 0 for row in rows)
    for k, row in enumerate(rows[:4]):
        assert 0 < row["beta"] < 1 and 0 < row["behavior_kl"] <= 0.05 * (1 - k / 4) + 1e-6
        assert "sampler_gap" not in row  # the trainer's p is not what was sampled from
    assert rows[0]["beta"] > rows[3]["beta"]
    assert all("beta" not in row and row["sampler_gap"] < 1e-3 for row in rows[4:])


@pytest.mark.parametrize("name", ["kat", "kat --no-online"])
def test_kat_cuts_once_it_knows_what_agreement_is(whole, name):
    rows = logged(whole[name])
    assert all(row["grad_norm"] > 0 for row in rows)
    assert all(row["cut"] == 0 and "threshold" not in row for row in rows[:2])
    assert all(row["threshold"] > 0 for row in rows[2:])
    assert all(0 < row["cut"] <= 1 and 0 < row["cut_tokens"] < 1 for row in rows[2:])
    memory = load_file(sorted((whole[name] / "checkpoints").glob("step-*"))[-1] / "training_state/memory.safetensors")
    assert memory["least"].shape == (20,)


def test_online_cuts_train_fewer_sampled_tokens_and_remember_the_same(whole):
    online, late = logged(whole["kat"]), logged(whole["kat --no-online"])
    for a, b in zip(online[:3], late[:3], strict=True):  # the third step is the first that cuts
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
        assert a["tokens"] == b["tokens"] and a["cut"] == b["cut"]
    assert online[2]["cut_tokens"] < late[2]["cut_tokens"]
    first = [
        load_file(whole[n] / "checkpoints/step-000002/training_state/memory.safetensors")
        for n in ("kat", "kat --no-online")
    ]
    close(first[0]["least"], first[1]["least"], atol=1e-5, rtol=1e-4)


def test_online_and_late_cuts_have_one_gradient(folders, tmp_path):
    memory, found = {"least": torch.full((20,), 5.0, dtype=torch.float64)}, []
    for online in (True, False):
        method = METHODS["kat"](**SMALL, online=online)
        settings = config(folders, tmp_path / str(online), method=method, max_grad_norm=1e9)
        plan = resolved(settings)
        checks.check(plan)
        session = open_session(plan)
        session.optimizer.zero_grad = lambda: None
        loop = Trainer(session, Run(tmp_path / str(online)))
        (tmp_path / str(online)).mkdir()
        numbers, remembered = loop.step(3, memory)
        assert numbers["cut"] > 0.5 and len(remembered["least"]) == 20
        found.append((remembered["least"], [p.grad for p in session.plain().parameters()]))
    close(found[0][0], found[1][0], atol=1e-5, rtol=1e-4)
    for a, b in zip(found[0][1], found[1][1], strict=True):
        close(a, b, atol=1e-6 + 1e-4 * float(b.abs().max()), rtol=1e-3)


@pytest.mark.parametrize("name", ["tropd", "tropd --soft"])
def test_tropd_starts_after_the_teacher_and_ends_alone(whole, name):
    rows = logged(whole[name])
    limits = [row["prefix_limit"] for row in rows]
    assert limits == sorted(limits, reverse=True) and limits[0] == (24 if name == "tropd" else 32) and limits[-1] <= 3
    assert rows[0]["prefix_share"] > rows[3]["prefix_share"] > 0 and rows[-1]["prefix_share"] < 0.2
    assert all(row["grad_norm"] > 0 and row["rejected"] > 0 for row in rows)
    assert all(row["sampler_gap"] < 1e-3 for row in rows if "sampler_gap" in row)


@pytest.mark.parametrize("name", ["trb", "kat", "kat --no-online", "tropd"])
def test_resumed_is_bitwise_the_uninterrupted_run(folders, whole, tmp_path, name):
    """From the second of six steps: memory is taken up again, prefixes are written again."""
    method, changes = RUNS[name]
    shutil.copytree(whole[name], tmp_path / "cut")
    for step in (4, 6):
        shutil.rmtree(tmp_path / f"cut/checkpoints/step-{step:06d}")
    cut = opd.train(config(folders, tmp_path / "cut", method=method, resume=True, **changes))
    assert (cut / "metrics.jsonl").read_bytes() == (whole[name] / "metrics.jsonl").read_bytes()
    for file in ("model.safetensors", "training_state/optimizer.safetensors", "training_state/memory.safetensors"):
        paths = [f / "checkpoints" / "step-000006" / file for f in (whole[name], cut)]
        assert paths[0].exists() == paths[1].exists()
        if paths[0].exists():
            a, b = map(load_file, paths)
            assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
