"""Teachers behind real sockets: `opd serve` in its own process says what the local teacher says, whatever goes wrong.

A proxy in front of it injects faults; hiding what only `opd serve` has, it makes it the plain server that vLLM is.
"""

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import opd
from opd.cli import main
from opd.config.commands import Serve
from opd.config.servers import Remote
from opd.core.sampling import Sampling
from opd.core.types import Rollout
from opd.head.head_pass import head_pass, measure
from opd.head.inputs import FrozenOutputs, Hidden, TeacherLogps
from opd.head.vocabulary import Head, Vocabulary
from opd.losses.baselines import TopKValue
from opd.losses.divergences import (
    BucketForwardKL,
    BucketJSD,
    BucketKL,
    GeneralisedKL,
    RenormalisedKL,
    Support,
    SupportMeanKL,
)
from opd.losses.estimators import Stratified
from opd.losses.terms import Match, PolicyGradient, Target
from opd.methods import METHODS
from opd.methods.method import Method
from opd.models.batching import rows
from opd.models.forward import cross_entropies, final_states, unprompted
from opd.models.load import head
from opd.models.remote.client import Client
from opd.models.remote.vllm_protocol import connect
from opd.rollouts.engines.base import GenerateRequest
from opd.rollouts.engines.completions import ServerEngine
from opd.rollouts.engines.hf import HFEngine
from opd.teachers.connect import compare
from opd.teachers.local import LocalTeacher
from opd.teachers.remote import HiddenTeacher, LogpTeacher, open_teacher
from opd.teachers.serve.app import build
from opd.teachers.serve.model import Served
from scripts.soak import Proxy, free_port, serving
from tests.tiny_models import logged, small, started, tiny

CPU = torch.device("cpu")
QUICK = Remote(teacher_retries=3, teacher_timeout=20.0, teacher_concurrency=3)


PLAIN = ("/opd/",)
OLD = ("/opd/", "/inference/")  # a server that scores no chosen tokens


@pytest.fixture(scope="module")
def server(pair):
    with serving(pair[1], "--name", "big") as (url, _):
        yield url


@pytest.fixture(scope="module")
def teacher(pair):
    return LocalTeacher(AutoModelForCausalLM.from_pretrained(pair[1]).eval().requires_grad_(False), to=CPU)


@pytest.fixture
def plain(server):
    with Proxy(server, lambda path, n: None, PLAIN) as proxy:
        yield proxy.url


@pytest.fixture
def old(server):
    with Proxy(server, lambda path, n: None, OLD) as proxy:
        yield proxy.url


def rollouts(count: int = 7, ends: int = 2) -> tuple[list[Rollout], list[list[bool]]]:
    """Random sequences of many lengths, with holes in their masks; one is not trained at all."""
    draw = torch.Generator().manual_seed(3)
    out, masks = [], []
    for i in range(count):
        n, m = 3 + 5 * i, 2 + (7 * i) % 11
        ids = torch.randint(3, 140, (n + m,), generator=draw).tolist()
        ids[-1] = ends
        r = Rollout(
            prompt_ids=tuple(ids[:3]),
            teacher_prompt_ids=tuple(ids[:n]),
            ids=tuple(ids[n:]),
            sampler_logp=(0.0,) * m,
            index=i,
            group=i,
            stopped=True,
        )
        out.append(r)
        masks.append([i != 2 and (t + i) % 4 != 1 for t in range(m)])
    return out, masks


def config(pair, out, teacher=None, **changes):
    own = {"steps": 3, "save_every": 2, "micro_batch_tokens": 256, "remote": QUICK}
    return small((pair[0], teacher or pair[1]), out, **{**own, **changes})


WHOLE = ("reverse_kl", "reverse_kl_first", "reverse_kl_middle", "reverse_kl_last", "teacher_entropy", "entropy_gap")
WHOLE += ("top5_overlap", "top5_student_mass", "top5_teacher_mass")  # of the teacher's whole distribution


def same(a: Path, b: Path, but: tuple[str, ...] = ()) -> None:
    """The same metrics up to rounding, except columns that one of them cannot have."""
    for x, y in zip(logged(a), logged(b), strict=True):
        assert set(x) - set(but) == set(y) - set(but)
        for name in set(x) - set(but):
            assert x[name] == pytest.approx(y[name], rel=2e-3, abs=2e-5), name


# What comes over the wire


def test_states_are_the_local_teachers(server, teacher):
    remote = open_teacher(connect(server, QUICK), to=CPU, stop=())
    assert isinstance(remote, HiddenTeacher)
    asked = rollouts()
    there, here = remote.hidden(*asked), teacher.hidden(*asked)
    torch.testing.assert_close(there.states, here.states, rtol=1e-5, atol=1e-5)
    assert torch.equal(there.head.weight, here.head.weight) and there.head.scale == here.head.scale
    assert remote.hidden([], []).states.shape == (0, 48)
    # 4 bytes times the width a token, the head once, and little around them.
    moved = remote.traffic()
    tokens = len(here.states)
    assert moved["teacher_received_mb"] * 2**20 < 4 * 48 * tokens + 4 * 48 * 145 + 3000
    assert moved["teacher_retries"] == 0 and remote.traffic()["teacher_requests"] == 0


def test_what_is_asked_ahead_is_the_answer_to_that_question_alone(server, teacher):
    remote = open_teacher(connect(server, QUICK), to=CPU, stop=())
    many, masks = rollouts()
    remote.traffic()
    remote.ahead(many[:4], masks[:4])
    torch.testing.assert_close(
        remote.hidden(many[:4], masks[:4]).states, teacher.hidden(many[:4], masks[:4]).states, rtol=1e-5, atol=1e-5
    )
    once = remote.traffic()["teacher_requests"]
    remote.ahead(many[:4], masks[:4])
    there, here = (x.hidden(many[4:], masks[4:]).states for x in (remote, teacher))
    torch.testing.assert_close(there, here, rtol=1e-5, atol=1e-5)
    assert once == 1


@pytest.mark.parametrize("hide", [(), PLAIN, OLD], ids=["hidden", "chosen", "prompted"])
def test_responses_without_their_prompts(server, teacher, hide):
    """Nothing predicts a first token, and no server is asked what does."""
    many, masks = unprompted(rollouts()[0])
    many.append(replace(many[0], ids=many[0].ids[:1]))
    masks.append([False])
    with Proxy(server, lambda path, n: None, hide) as proxy:
        there = open_teacher(connect(proxy.url, QUICK), to=CPU, stop=()).hidden(many, masks)
    here, vocabulary = teacher.hidden(many, masks), Vocabulary(145)
    found, wanted = (cross_entropies(x, many, vocabulary) for x in (there, here))
    assert found == pytest.approx(wanted, abs=1e-4) and min(found[:-1]) > 0 == found[-1]


def columns(pair, heard, asked, vocabulary, method):
    student = AutoModelForCausalLM.from_pretrained(pair[0]).eval()
    at = rows(*asked, teacher=False, device=CPU)
    with torch.no_grad():
        states = final_states(student, at)
    return measure(method, Hidden(states, head(student)), FrozenOutputs(heard), at.ids[at.trained], vocabulary)


@pytest.mark.parametrize("hide", [PLAIN, OLD], ids=["chosen", "prompted"])
def test_logp_of_the_sampled_tokens_is_the_local_teachers(pair, server, teacher, hide):
    asked = rollouts()
    with Proxy(server, lambda path, n: None, hide) as proxy:
        remote = open_teacher(connect(proxy.url, QUICK), to=CPU, stop=())
        assert isinstance(remote, LogpTeacher) and remote.server.chosen == (hide == PLAIN)
        there = remote.hidden(*asked)
        vocabulary, method = Vocabulary(145), METHODS["opd"]()
        mine, local = (columns(pair, x, asked, vocabulary, method) for x in (there, teacher.hidden(*asked)))
        assert remote.hidden([], []).logp.shape == (0,)
    for name, x in mine.named():
        torch.testing.assert_close(x, dict(local.named())[name], rtol=1e-4, atol=2e-5)
    assert {"student_logp", "student_entropy", "teacher_logp", "scores.0"} == {name for name, _ in mine.named()}


def test_equal_rollouts_are_scored_at_the_ids_that_each_of_them_names(plain, teacher):
    """Two rollouts may hold the same tokens while the tokens drawn beside them differ (async-opd --samples)."""
    (one, *_), (mask, *_) = rollouts()
    many, masks = [one, replace(one, index=1), one], [mask] * 3
    drawn = torch.randint(3, 140, (3 * sum(mask), 2), generator=torch.Generator().manual_seed(1))
    there = open_teacher(connect(plain, QUICK), to=CPU, stop=(), tops={"drawn": 2}).hidden(many, masks, ids=drawn)
    here = teacher.hidden(many, masks)
    wanted = (here.states @ here.head.weight.T)[:, :145].log_softmax(-1).gather(-1, drawn)
    assert torch.equal(there.ids, drawn)
    torch.testing.assert_close(there.others, wanted, rtol=1e-4, atol=1e-4)


def test_a_merged_stop_class_needs_a_server_that_scores_chosen_tokens(pair, server, plain, teacher):
    asked, vocabulary = rollouts(ends=5), Vocabulary(145, stop=(2, 5, 9))
    remote = open_teacher(connect(plain, QUICK), to=CPU, stop=(2, 5, 9))
    there, here = remote.hidden(*asked), teacher.hidden(*asked)
    mine, local = (columns(pair, x, asked, vocabulary, METHODS["opd"]()) for x in (there, here))
    torch.testing.assert_close(mine.teacher_logp, local.teacher_logp, rtol=1e-4, atol=2e-5)
    with Proxy(server, lambda path, n: None, OLD) as proxy, pytest.raises(opd.Refusal, match="--stop-token mask"):
        open_teacher(connect(proxy.url, QUICK), to=CPU, stop=(2, 5, 9))


TOLD = [name for name, make in METHODS.items() if make().needs() <= LogpTeacher.provides]


def test_which_methods_a_plain_server_is_enough_for():
    assert {"opd", "opd-clip", "opd-tanh", "opd-zscore", "reopold", "topd", "opd-signlog", "poweropd"} <= set(TOLD)
    chosen = LogpTeacher.provides | {"chosen"}
    more = {name for name, make in METHODS.items() if make().needs_of_tokens() <= chosen} - set(TOLD)
    assert {"vopd-topk", "opd-topk"} <= more and "opd-topk" not in TOLD
    assert METHODS["opd-topk"](support="teacher").needs_of_tokens() <= LogpTeacher.provides
    assert not {"vopd", "opd-full", "gkd", "eopd", "opd-optimal", "tropd", "kat"} & {*TOLD, *more}


# On an enumerated vocabulary: what a server tells of k tokens is all that these methods look at.

TOPS = {
    "vopd-topk": METHODS["vopd-topk"](k=4),
    "stratified": Method((PolicyGradient(estimator=Stratified(4)),)),
    "stratified over top k": Method((PolicyGradient(baseline=TopKValue(3), estimator=Stratified(4)),)),
    **{
        f"{leaf.__name__} of the {of}": Method((Match(leaf(Support(4, of))),))
        for leaf in (BucketKL, BucketForwardKL, BucketJSD, RenormalisedKL, GeneralisedKL, SupportMeanKL)
        for of in ("student", "teacher")
    },
}


@pytest.mark.parametrize("name", TOPS)
@pytest.mark.parametrize("softcap", [0.0, 3.0], ids=["linear", "softcap"])
def test_the_head_pass_over_some_log_probs_is_that_over_the_teachers_states(name, softcap):
    """Loss, gradients and columns; the ids come unordered, with one beside the k, and the sampled one twice."""
    method = TOPS[name]
    ((who, k),) = method.supports().items()
    draw = torch.Generator().manual_seed(0)
    made = lambda *shape: torch.randn(*shape, generator=draw)
    weight, teacher = made(31, 6), Hidden(made(23, 5), Head(made(31, 5)))
    ids, vocabulary, states = torch.randint(0, 29, (23,), generator=draw), Vocabulary(29, chunk_bytes=2000), made(23, 6)
    head_ = lambda w: Head(w, softcap=softcap)
    q = vocabulary.logp((teacher.states @ teacher.head.weight.T)[:, :29], teacher.head)
    p = vocabulary.logp((states @ weight.T)[:, :29], head_(weight))
    named = torch.cat(((p if who == "student" else q).topk(k + 1, -1).indices.flip(-1), ids[:, None]), -1)
    given = TeacherLogps(q.gather(-1, ids[:, None])[:, 0], named, q.gather(-1, named), k if who == "teacher" else 0)
    targets = tuple(Target(torch.rand(23, generator=draw), None, None) for _ in method.terms)
    results = []
    for heard in (teacher, given):
        s, w = states.clone().requires_grad_(), weight.clone().requires_grad_()
        loss, seen = head_pass(method, Hidden(s, head_(w)), FrozenOutputs(heard), ids, targets, vocabulary)
        loss.backward()
        results.append((loss.detach(), s.grad, w.grad, seen.student_logp, seen.teacher_logp, seen.scores[0]))
    assert results[0][1].abs().max() > 1e-3
    for a, b in zip(*results, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5)


def test_the_rest_of_a_teachers_mass_is_no_token_of_its_top():
    draw = torch.Generator().manual_seed(0)
    q = torch.randn(40, 50, generator=draw, dtype=torch.float64).mul(3).log_softmax(-1)
    ids = torch.randint(0, 50, (40,), generator=draw)
    named = q.topk(6, -1).indices
    whole = TeacherLogps(q.gather(-1, ids[:, None])[:, 0], named, q.gather(-1, named)).over(ids, q, slice(0, 40))
    assert torch.equal(whole.topk(6, -1).indices, named)
    torch.testing.assert_close(whole.logsumexp(-1), torch.zeros(40, dtype=torch.float64), rtol=0, atol=1e-12)
    alone = TeacherLogps(q[:, 0]).over(torch.zeros(40, dtype=torch.long), q, slice(0, 40))
    assert alone[:, 0].equal(q[:, 0]) and alone[:, 1:].isnan().all()
    sure = torch.tensor([[0.0, -40.0, -40.0, -40.0]])  # all its mass on one token, to rounding
    found_of = lambda x: TeacherLogps(x[:, 0], torch.tensor([[0, 1]]), x[:, :2])
    found = found_of(sure).over(torch.zeros(1, dtype=torch.long), sure, slice(1))
    assert found.isfinite().all() and float(found[:, 2:].logsumexp(-1)) == pytest.approx(-16.1, abs=0.1)
    # Its own top two: what it gives the others is not above the second, whatever 1 minus their mass rounds to.
    found = replace(found_of(sure), top=2).over(torch.zeros(1, dtype=torch.long), sure, slice(1))
    assert found[0].tolist() == [0, -40, -40, -40]


@pytest.mark.parametrize("softcap", [0.0, 3.0], ids=["closed form", "autograd"])
@pytest.mark.parametrize("name", TOLD)
def test_the_head_pass_over_given_logp_is_that_over_the_teachers_states(name, softcap):
    method = METHODS[name]()
    draw = torch.Generator().manual_seed(0)
    made = lambda *shape: torch.randn(*shape, generator=draw)
    weight, teacher = made(31, 6), Hidden(made(23, 5), Head(made(31, 5)))
    ids, vocabulary = torch.randint(0, 31, (23,), generator=draw), Vocabulary(29, chunk_bytes=2000)
    ids = ids.clamp(max=28)
    states = made(23, 6)
    results = []
    logp = vocabulary.logp((teacher.states @ teacher.head.weight.T)[:, :29], teacher.head)
    given = TeacherLogps(logp.gather(-1, ids[:, None])[:, 0])
    targets = tuple(
        Target(torch.rand(23, generator=torch.Generator().manual_seed(i)), None, torch.full((23,), -3.0))
        for i, _ in enumerate(method.terms)
    )
    if not all(term.local() for term in method.terms):
        pytest.skip("scored on the whole batch: see the training test")
    for heard in (teacher, given):
        s, w = states.clone().requires_grad_(), weight.clone().requires_grad_()
        student = Hidden(s, Head(w, softcap=softcap))
        loss, seen = head_pass(method, student, FrozenOutputs(heard), ids, targets, vocabulary)
        loss.backward()
        results.append((loss.detach(), s.grad, w.grad, seen.student_logp, seen.teacher_logp, seen.student_entropy))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# Training


@pytest.mark.parametrize("name", ["vopd", "gkd", "fire"])
def test_training_through_opd_serve_is_training_with_the_local_teacher(pair, server, tmp_path, name):
    changes = {"method": METHODS[name](), "eval_prompts": "embedded:ledger-short", "eval_limit": 4}
    there = opd.train(config(pair, tmp_path / "there", server, **changes))
    here = opd.train(config(pair, tmp_path / "here", **changes))
    same(there, here)
    wire = [row for row in logged(there, "perf") if "teacher_received_mb" in row]
    assert len(wire) == 3 and all(row["teacher_received_mb"] > 0 < row["teacher_requests"] for row in wire)


SOME = {
    "vopd-topk": METHODS["vopd-topk"](k=5),
    "opd-topk": METHODS["opd-topk"](k=5),
    "opd-topk renormalised": METHODS["opd-topk"](k=5, tail="renorm"),
    "opd-topk of the teacher": METHODS["opd-topk"](k=5, support="teacher"),
    "mopd": METHODS["opd-topk"](k=5, support="teacher", tail="generalised"),
    "several drawn": METHODS["async-opd"](samples=4),
}


@pytest.mark.parametrize("name", SOME)
def test_training_on_the_top_k_of_a_plain_server_is_training_with_the_local_teacher(pair, server, tmp_path, name):
    """The student's own k where the server scores named ids; the teacher's own through any that has prompt_logprobs."""
    hide, changes = (OLD if SOME[name].supports().keys() == {"teacher"} else PLAIN), {"method": SOME[name]}
    with Proxy(server, lambda path, n: None, hide) as proxy:
        there = opd.train(config(pair, tmp_path / "there", proxy.url, **changes))
    here = opd.train(config(pair, tmp_path / "here", **changes))
    same(there, here, WHOLE)
    assert all("reverse_kl" not in row and row["grad_norm"] > 1e-3 for row in logged(there))


def test_the_top_k_of_the_student_with_a_merged_stop_class(pair, tmp_path):
    other = tiny(tmp_path / "other", seed=2, width=48)
    GenerationConfig(eos_token_id=[2, 6]).save_pretrained(other)
    how, changes = replace(QUICK, teacher_tokenizer=str(other)), {"method": METHODS["vopd-topk"](k=5)}
    with serving(other) as (url, _), Proxy(url, lambda path, n: None, PLAIN) as proxy:
        there = opd.train(config(pair, tmp_path / "there", proxy.url, remote=how, **changes))
        with pytest.raises(opd.Refusal, match="--stop-token mask"):
            teachers = {"method": METHODS["opd-topk"](k=5, support="teacher")}
            opd.train(config(pair, tmp_path / "no", proxy.url, remote=how, **teachers))
    same(there, opd.train(config(pair, tmp_path / "here", str(other), **changes)), WHOLE)


@pytest.mark.parametrize("name", ["opd", "reopold", "opd-zscore"])
def test_training_through_a_plain_server_is_training_with_the_local_teacher(pair, plain, tmp_path, name):
    changes = {"method": METHODS[name](), "eval_prompts": "embedded:ledger-short", "eval_limit": 4}
    there = opd.train(config(pair, tmp_path / "there", plain, **changes))
    here = opd.train(config(pair, tmp_path / "here", **changes))
    kl = ("eval_reverse_kl", "eval_reverse_kl_se", "eval_log_ratio", "eval_log_ratio_se")
    same(there, here, (*WHOLE, *kl))
    assert all("reverse_kl" not in row for row in logged(there))
    assert [row["step"] for row in logged(there) if "eval_log_ratio" in row] == [0, 3]


def test_a_teacher_that_writes_part_of_the_rollouts_writes_them_there(pair, server, tmp_path):
    method = METHODS["gkd"](share=0.5)
    run = opd.train(config(pair, tmp_path / "run", server, method=method, steps=6))
    again = opd.train(config(pair, tmp_path / "again", server, method=method, steps=6))
    assert (run / "metrics.jsonl").read_bytes() == (again / "metrics.jsonl").read_bytes()  # seeds, not luck
    assert all(row["grad_norm"] > 0 for row in logged(run))


def test_what_the_server_writes_is_sampled_from_its_model(server, teacher):
    """Greedy text is the local engine's; at temperature 1 the log-probs are those of the local model."""
    writer = ServerEngine(connect(server, QUICK), 145, (2,))
    prompts = [[5, 6, 7, 8], [9, 10, 11]]
    greedy = Sampling(temperature=0.0, max_new_tokens=6)
    here = HFEngine(teacher.model, 145, (2,)).generate(GenerateRequest(prompts, greedy, seed=0, step=0, index=[0, 1]))
    there = writer.generate(GenerateRequest(prompts, greedy, seed=0, step=0, index=[0, 1]))
    assert [x.ids for x in there] == [x.ids for x in here]
    (drawn,) = writer.generate(
        GenerateRequest([[5, 6]], Sampling(max_new_tokens=6), seed=1, step=2, index=[3], prefixes=[[7]])
    )
    assert len(drawn.ids) <= 5
    with torch.no_grad():
        whole = teacher.model(input_ids=torch.tensor([[5, 6, 7, *drawn.ids]])).logits[0].log_softmax(-1)
    wanted = [float(whole[2 + t, i]) for t, i in enumerate(drawn.ids)]
    assert list(drawn.logp) == pytest.approx(wanted, abs=1e-4)


# Faults


def scripted(*faults: str) -> Callable[[str, int], str | None]:
    """One fault for each of the first scoring requests, every other of them."""
    plan = {2 * i: fault for i, fault in enumerate(faults)}
    scored = ("/opd/hidden", "/v1/completions")
    return lambda path, n: plan.get(n) if path in scored else None


@pytest.mark.parametrize("hide", [(), OLD], ids=["hidden", "prompted"])
def test_faults_on_the_way_lose_nothing(pair, server, tmp_path, hide):
    method = METHODS["opd"]()
    faults = scripted("500", "malformed", "drop", "429", "short", "slow", "other", "500")
    here = opd.train(config(pair, tmp_path / "here", method=method))
    with Proxy(server, faults, hide) as proxy:
        hasty = replace(QUICK, teacher_timeout=3.0, teacher_retries=6)
        there = opd.train(config(pair, tmp_path / "there", proxy.url, method=method, remote=hasty))
        asked = sum(n + 1 for path, n in proxy.asked.items() if path in ("/opd/hidden", "/v1/completions"))
    but = WHOLE if hide else ()
    same(there, here, but)
    wire = logged(there, "perf")
    assert sum(row["teacher_retries"] for row in wire) >= 5
    assert asked > sum(row["teacher_requests"] for row in wire) - 20  # what failed was asked again, alone


def test_tries_wait_longer_each_time(monkeypatch):
    """0.5, 1, 2, ... 30 s, each shortened by up to a half so that clients do not come back together."""
    waited: list[float] = []
    monkeypatch.setattr(threading.Event, "wait", lambda self, seconds: waited.append(seconds))
    client = Client(f"http://127.0.0.1:{free_port()}", Remote(teacher_retries=9))
    with pytest.raises(opd.Refusal, match="failed 10 times, last with ConnectError"):
        client.get("/health", lambda r: None)
    wanted = [0.5, 1, 2, 4, 8, 16, 30, 30, 30]
    assert all(w / 2 <= x <= w for w, x in zip(wanted, waited, strict=True)) and client.traffic.retries == 9


def test_no_more_requests_at_once_than_were_allowed(server):
    now, most, lock = 0, 0, threading.Lock()

    def fault(path: str, n: int) -> None:
        nonlocal now, most
        if path != "/inference/v1/generate":
            return
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.1)
        with lock:
            now -= 1

    with Proxy(server, fault, PLAIN) as proxy:
        remote = open_teacher(connect(proxy.url, QUICK), to=CPU, stop=())
        remote.hidden(*rollouts(count=9))
    assert most == QUICK.teacher_concurrency == 3


def test_a_server_killed_in_the_middle_of_a_batch_comes_back(pair, tmp_path):
    port = free_port()
    with contextlib.ExitStack() as stack:
        url, first = stack.enter_context(serving(pair[1], "--name", "big", port=port))

        def fault(path: str, n: int) -> str | None:
            if path == "/opd/hidden" and n == 1:
                first.send_signal(signal.SIGKILL)
                threading.Thread(
                    target=lambda: stack.enter_context(serving(pair[1], "--name", "big", port=port))
                ).start()
            return None

        with Proxy(url, fault) as proxy:
            patient = replace(QUICK, teacher_retries=12)
            there = opd.train(config(pair, tmp_path / "there", proxy.url, remote=patient))
        assert first.wait(10) == -signal.SIGKILL
    same(there, opd.train(config(pair, tmp_path / "here")))
    assert sum(row["teacher_retries"] for row in logged(there, "perf")) > 0


def test_after_the_last_retry_the_run_can_be_resumed(pair, server, tmp_path, monkeypatch):
    """One line that names server, status and the way on; what was trained before is kept; nobody asks any more."""
    ended, close = [], Client.close
    monkeypatch.setattr(Client, "close", lambda self: ended.append(self.url) or close(self))
    whole = opd.train(config(pair, tmp_path / "whole", server, steps=4))
    down = threading.Event()

    def fault(path: str, n: int) -> str | None:
        scored = tmp_path / "cut" / "checkpoints" / "step-000002"
        if path == "/opd/hidden" and scored.exists() and not down.is_set():
            return "500"
        return None

    with Proxy(server, fault) as proxy:
        once = replace(QUICK, teacher_retries=1)
        cut = config(pair, tmp_path / "cut", proxy.url, steps=4, remote=once)
        with pytest.raises(opd.Refusal) as caught:
            opd.train(cut)
        told = str(caught.value)
        assert proxy.url in told and "HTTP 500" in told and "--resume" in told and "\n" not in told
        assert ended == [server, proxy.url]
        down.set()
        opd.train(replace(cut, resume=True, remote=QUICK))
    same(tmp_path / "cut", whole)


def test_other_weights_behind_the_same_address_are_refused(pair, server, tmp_path):
    other = tiny(tmp_path / "other", seed=7, width=48)
    remote = open_teacher(connect(server, QUICK), to=CPU, stop=())
    with serving(other) as (url, _):
        remote.client.url = url
        with pytest.raises(opd.Refusal, match="other weights answer"):
            remote.hidden(*rollouts())


@pytest.mark.parametrize("hide", [(), PLAIN], ids=["by their hash", "by their name"])
def test_a_run_does_not_go_on_with_other_weights(pair, server, tmp_path, hide):
    """What a resumed run learns from is what it learnt from: the checkpoint says who taught."""
    begun = tmp_path / "run" / "checkpoints" / "step-000002"
    scored = ("/opd/hidden", "/inference/v1/generate")
    fault = lambda path, n: "500" if path in scored and begun.exists() else None
    with Proxy(server, fault, hide) as proxy:
        once = replace(QUICK, teacher_retries=0)
        cut = config(pair, tmp_path / "run", proxy.url, remote=once, method=METHODS["opd"]())
        with pytest.raises(opd.Refusal, match="HTTP 500"):
            opd.train(cut)
        proxy.fault = lambda path, n: None
        other = tiny(tmp_path / "other", seed=7, width=48)
        with serving(other, "--name", "small") as (url, _):
            proxy.target = url
            with pytest.raises(opd.Refusal, match=r"other weights answer there now \(small\)"):
                opd.train(replace(cut, resume=True))
        proxy.target = server
        opd.train(replace(cut, resume=True))
    assert logged(tmp_path / "run")[-1]["step"] == 3


def test_two_teachers_of_which_some_are_served(pair, server, tmp_path):
    """Bytes are counted whoever comes first; --teacher-local is of --teacher alone; averages have their own place."""
    prompts = tmp_path / "prompts.jsonl"
    asked = [{"prompt": f"{i} + 1", "answer": f"{i + 1}", "teacher": "x" * (i % 2)} for i in range(24)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in asked))
    other = tiny(tmp_path / "other", seed=7, width=48)
    changes = {"prompts": str(prompts), "steps": 2}
    with serving(other) as (url, _):
        mixed = opd.train(config(pair, tmp_path / "mixed", route=(f"x={url}",), **changes))
        how = replace(QUICK, teacher_local=str(pair[1]))
        both = opd.train(config(pair, tmp_path / "both", server, route=(f"x={url}",), remote=how, **changes))
    here = opd.train(config(pair, tmp_path / "here", route=(f"x={other}",), **changes))
    same(mixed, here)
    same(both, here)
    for run in (mixed, both):
        assert all(row["teacher_received_mb"] > 0 < row["teacher_requests"] for row in logged(run, "perf"))
    context = {"context": "answer", "teacher": "ema:0.1", "route": ("x=ema:0.9",)}
    saved = opd.train(config(pair, tmp_path / "averages", **context, **changes)) / "checkpoints" / "step-000002"
    slow, fast = (load_file(saved / "training_state" / place / "teacher.safetensors") for place in (".", "teacher-1"))
    assert slow.keys() == fast.keys() and any(not slow[name].equal(fast[name]) for name in slow)


def test_the_traffic_of_every_process_is_counted(pair, server, tmp_path):
    with Proxy(server, lambda path, n: None) as proxy:
        flags = ["--prompts", "embedded:ledger-short", "--steps", "2", "--batch", "8", "--max-new-tokens", "8"]
        models = ["--student", str(pair[0]), "--teacher", proxy.url, "--out", str(tmp_path / "run")]
        started(["train", *models, *flags, "--quiet", "vopd"], 2)
        asked = sum(n + 1 for n in proxy.asked.values())
    assert sum(row["teacher_requests"] for row in logged(tmp_path / "run", "perf")) == asked


# Who is there


def test_a_token_is_asked_for_and_never_written_down(pair, tmp_path, monkeypatch, capfd):
    with serving(pair[1], "--token-env", "SECRET_OF_TEST", SECRET_OF_TEST="s3cret-value") as (url, _):
        assert httpx.get(url + "/health").status_code == 200
        for path in ("/v1/models", "/opd/identity", "/opd/head"):
            assert httpx.get(url + path).status_code == 401
            assert httpx.get(url + path, headers={"Authorization": "Bearer wrong"}).status_code == 401
        monkeypatch.delenv("OPD_TOKEN", raising=False)
        with pytest.raises(opd.Refusal, match="OPD_TOKEN") as caught:
            opd.train(config(pair, tmp_path / "no", url))
        assert "\n" not in str(caught.value)
        monkeypatch.setenv("MY_TOKEN", "s3cret-value")
        run = opd.train(config(pair, tmp_path / "run", url, remote=replace(QUICK, teacher_token_env="MY_TOKEN")))
    files = [path for path in run.rglob("*") if path.is_file()]
    assert len(files) > 5 and not any(b"s3cret-value" in path.read_bytes() for path in files)
    assert "s3cret-value" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--host", "0.0.0.0"], "no token is asked"),
        (["--host", "some.name"], "no token is asked"),
        (["--token-env", "NOT_SET_ANYWHERE"], "the variable is not set"),
        (["--port", "70000"], "[0, 65535]"),
        (["--takes-weights"], "--takes-weights: anyone who reaches the port"),
        (["--client-connections", "0"], "above 0"),
        (["--drain-seconds", "-1"], "at least 0"),
        (["--max-logprobs", "0"], "above 0"),
        (["--device", "nowhere"], "no such device"),
    ],
)
def test_what_cannot_be_served_is_one_line(pair, capsys, flags, told):
    assert main(["serve", str(pair[1]), "--port", "0", *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line


def test_a_port_in_use_and_a_missing_extra_are_one_line(pair, server, capsys, monkeypatch):
    assert main(["serve", str(pair[1]), "--port", server.rpartition(":")[2]]) == 2
    assert "Address already in use" in capsys.readouterr().err
    monkeypatch.delitem(sys.modules, "opd.teachers.serve.draining", raising=False)  # imported by an earlier test
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", str(pair[1]), "--port", "0"]) == 2
    assert "pip install 'opd[serve]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("url", "changes", "told"),
    [
        ("{server}", {"method": METHODS["kat"](), "per_prompt": 1}, "needs more of the teacher (decoding): load"),
        ("{server}", {"method": METHODS["oprd"]()}, "needs more of the teacher (layers): load"),
        ("http://127.0.0.1:1", {"remote": replace(QUICK, teacher_retries=0)}, "failed 1 times"),
        ("http://user:word@127.0.0.1:1", {}, "no secrets in an address"),
        ("http://", {}, "not the address of a server"),
        ("{plain}", {"method": METHODS["vopd"]()}, "use one of vopd-topk, poweropd, opd, "),
        (
            "{old}",
            {"method": METHODS["opd-topk"]()},
            "needs more of the teacher (chosen): serve it by `opd serve`",
        ),
        ("{plain}", {"method": METHODS["vopd-topk"](k=40)}, "43 ids in a row; this server gives 1 to 20"),
        ("{old}", {"method": METHODS["opd-topk"](k=40, support="teacher")}, "prompt_logprobs: 40 requested"),
        ("{plain}", {"method": METHODS["opd"](), "loss_temperature": 2.0}, "--loss-temperature 2.0"),
        ("{plain}#absent", {"method": METHODS["opd"]()}, "it serves big"),
        ("{plain}", {"method": METHODS["opd"](), "route": ("x={teacher}",)}, "leave out --route"),
        ("openai:gpt", {}, "gives text and no log-probs"),
    ],
)
def test_teachers_that_cannot_be_used_are_one_line(pair, server, plain, old, tmp_path, url, changes, told):
    fill = lambda x: x.format(server=server, plain=plain, old=old, teacher=pair[1])
    changes = {**changes, "route": tuple(map(fill, changes.get("route", ())))}
    with pytest.raises(opd.Refusal) as caught:
        opd.train(config(pair, tmp_path / "run", fill(url), **changes))
    assert told in str(caught.value) and "\n" not in str(caught.value) and "word@" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_another_vocabulary_is_noticed(pair, server, plain, tmp_path):
    """By the server's own tokenizer, or by the text of probed ids where it hands out none."""
    text = AutoTokenizer.from_pretrained(pair[0])
    moved = json.loads(text.backend_tokenizer.to_str())
    vocab = moved["model"]["vocab"]
    a, b = [k for k, v in vocab.items() if v in (30, 31)]
    order = sorted(vocab, key=vocab.get)
    shifted = order[:30] + order[31:] + order[30:31]
    moved["model"]["vocab"] = {token: i for i, token in enumerate(shifted)}
    assert a != b
    other = tiny(tmp_path / "other", seed=1)
    (other / "tokenizer.json").write_text(json.dumps(moved))
    for url in (server, plain):
        with pytest.raises(opd.Refusal, match="id"):
            opd.train(config((other, pair[1]), tmp_path / "run", url, method=METHODS["opd"]()))


def test_a_server_is_compared_with_a_local_copy_on_request(pair, server, plain, teacher, tmp_path):
    texts = [[5, 6, 7, 8, 9], [20, 30, 40]]
    for url in (server, plain):
        remote = open_teacher(connect(url, QUICK), to=CPU, stop=())
        apart = compare(remote, teacher, texts)
        assert apart.shape == (6,) and apart.max() < 1e-4
    good = replace(QUICK, teacher_local=str(pair[1]))
    assert logged(opd.train(config(pair, tmp_path / "good", server, remote=good, steps=1)))
    wrong = replace(QUICK, teacher_local=str(pair[0]))
    with pytest.raises(opd.Refusal, match="nats apart on average"):
        opd.train(config(pair, tmp_path / "wrong", server, remote=wrong))


# The protocol


@pytest.fixture(scope="module")
def http_(server):
    with httpx.Client(base_url=server, timeout=60) as client:
        yield client


def test_prompt_logprobs_are_the_models(http_, teacher):
    """vLLM's shape: null, then per token a map of ids to logprob, rank and text; against torch's log_softmax."""
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12], [13]]
    asked = {"prompt": prompts, "max_tokens": 0, "prompt_logprobs": 3}
    choices = http_.post("/v1/completions", json=asked).json()["choices"]
    assert [c["index"] for c in choices] == [0, 1, 2]
    for ids, choice in zip(prompts, choices, strict=True):
        with torch.no_grad():
            whole = teacher.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        first, *rest = choice["prompt_logprobs"]
        assert first is None and len(rest) == len(ids) - 1
        for t, (i, told) in enumerate(zip(ids[1:], rest, strict=True)):
            best = whole[t].topk(3)
            assert set(map(int, told)) == {i, *best.indices.tolist()}
            for j, entry in told.items():
                assert entry["logprob"] == pytest.approx(float(whole[t, int(j)]), abs=1e-4)
                assert entry["rank"] == 1 + int((whole[t] > whole[t, int(j)]).sum())


def test_completions_and_chat_write_text(http_, teacher, pair):
    text = AutoTokenizer.from_pretrained(pair[1])
    asked = {"prompt": "Ann has 3 coins.", "max_tokens": 8, "temperature": 0, "logprobs": 2, "n": 2}
    told = http_.post("/v1/completions", json=asked).json()
    ids = text("Ann has 3 coins.")["input_ids"]
    greedy = Sampling(temperature=0.0, max_new_tokens=8)
    (sample,) = HFEngine(teacher.model, 145, (2,)).generate(GenerateRequest([ids], greedy, seed=0, step=0, index=[0]))
    written = sample.ids[:-1] if sample.stopped else sample.ids
    assert [c["text"] for c in told["choices"]] == [text.decode(list(written), skip_special_tokens=True)] * 2
    assert told["usage"]["prompt_tokens"] == len(ids)
    assert len(told["choices"][0]["logprobs"]["token_logprobs"]) == len(sample.ids)
    cut = http_.post("/v1/completions", json={**asked, "stop": told["choices"][0]["text"][3:5]}).json()["choices"][0]
    assert (
        cut["finish_reason"] == "stop" and told["choices"][0]["text"].startswith(cut["text"]) and len(cut["text"]) <= 3
    )
    turns = {"messages": [{"role": "user", "content": [{"type": "text", "text": "2 + 3?"}]}], "max_tokens": 5}
    chat = [http_.post("/v1/chat/completions", json={**turns, "seed": 4, "n": 3}).json() for _ in range(2)]
    said = [[c["message"]["content"] for c in x["choices"]] for x in chat]
    assert said[0] == said[1] and len(set(said[0])) > 1
    seeds = [http_.post("/v1/chat/completions", json={**turns, "seed": s}).text for s in range(4)]
    assert len({json.loads(x)["choices"][0]["message"]["content"] for x in seeds}) > 1


@pytest.mark.parametrize(
    ("path", "body", "status", "told"),
    [
        ("/v1/completions", {"prompt": []}, 400, "prompt"),
        ("/v1/completions", {"prompt": [1], "logit_bias": {"5": 1}}, 400, "logit_bias: not served by opd"),
        ("/v1/completions", {"prompt": [145]}, 400, "out of vocabulary"),
        ("/v1/completions", {"prompt": [-1]}, 400, "greater than or equal to 0"),
        ("/v1/completions", {"prompt": [1] * 500, "max_tokens": 13}, 400, "maximum context length is 512"),
        ("/v1/completions", {"prompt": [1], "model": "small"}, 404, "does not exist"),
        ("/v1/completions", {"prompt": [1, 2], "prompt_logprobs": 21}, 400, "at most 20"),
        ("/v1/completions", {"prompt": [1], "stream": True}, 400, "stream"),
        ("/v1/completions", {"prompt": [[1]] * 600, "n": 2}, 400, "at most 1024"),
        ("/v1/chat/completions", {"messages": []}, 400, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "2 " * 600}]}, 400, "context length is 512"),
        ("/v1/chat/completions", {"messages": [{"role": "assistant", "content": "5"}]}, 400, "last turn"),
        ("/opd/hidden", {"rows": [{"ids": [1, 2], "at": [2]}]}, 400, "positions must ascend"),
        ("/opd/hidden", {"rows": [{"ids": [1, 2, 3], "at": [2, 1]}]}, 400, "positions must ascend"),
        ("/inference/v1/generate", {"token_ids": [1, 2], "sampling_params": {}}, 400, "prompt_logprob_token_ids"),
        (
            "/inference/v1/generate",
            {"token_ids": [1, 2], "sampling_params": {"prompt_logprob_token_ids": [[1], [2]]}},
            400,
            "has 1",
        ),
        ("/nowhere", {}, 404, "Not Found"),
    ],
)
def test_mistakes_are_named(http_, path, body, status, told):
    answer = http_.post(path, json=body)
    error = answer.json()["error"]
    assert answer.status_code == status == error["code"] and told in error["message"]


def test_large_requests_are_cut_off(pair):
    with serving(pair[1], "--max-request-mb", "1") as (url, _):
        body = json.dumps({"prompt": [[1] * 400] * 1000}).encode()
        assert len(body) > 1 << 20
        assert httpx.post(url + "/v1/completions", content=body).status_code == 413

        def pieces() -> Iterator[bytes]:  # no length is said
            yield from (body[i : i + 65536] for i in range(0, len(body), 65536))

        with contextlib.suppress(httpx.WriteError):  # the answer may come while the body is still on its way
            assert httpx.post(url + "/v1/completions", content=pieces()).status_code == 413
        assert httpx.get(url + "/health").status_code == 200


def test_the_openai_client_speaks_with_it(server):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=server + "/v1", api_key="none", max_retries=0)
    assert [m.id for m in client.models.list()] == ["big"]
    turns = [{"role": "user", "content": "What is 2 + 3?"}]
    told = client.chat.completions.create(model="big", messages=turns, max_tokens=4, seed=1)
    assert told.choices[0].message.role == "assistant" and told.usage.completion_tokens <= 4
    scored = client.completions.create(model="big", prompt=[5, 6, 7], max_tokens=1, extra_body={"prompt_logprobs": 0})
    assert set(scored.choices[0].prompt_logprobs[1]) == {"6"}
    with pytest.raises(openai.BadRequestError, match="not served by opd"):
        client.completions.create(model="big", prompt="x", best_of=3)


def test_requests_at_once_do_not_mix(server, teacher):
    """Forty requests from ten threads: every answer is that of its own question."""
    client = Client(server, replace(QUICK, teacher_concurrency=10))
    asked = [[3 + i, 40 + i, 80 + i] for i in range(40)]
    out: dict[int, float] = {}

    def ask(i: int) -> None:
        body = {"prompt": asked[i], "max_tokens": 1, "prompt_logprobs": 0}
        told = client.post("/v1/completions", body, lambda r: r.json())
        out[i] = told["choices"][0]["prompt_logprobs"][2][str(asked[i][2])]["logprob"]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    with torch.no_grad():
        whole = teacher.model(input_ids=torch.tensor(asked)).logits.log_softmax(-1)
    assert [out[i] for i in range(40)] == pytest.approx([float(whole[i, 1, asked[i][2]]) for i in range(40)], abs=1e-4)


def test_a_server_whose_threads_all_wait_is_healthy():
    """More requests than the pool has threads, none of which is answered yet."""
    waits, held = threading.Event(), threading.Semaphore(0)

    class Busy(Served):
        def __init__(self) -> None:
            pass

        def identity(self) -> dict:
            held.release()
            waits.wait(60)
            return {}

    async def ask() -> int:
        whole = httpx.ASGITransport(build(Busy(), Serve(model="busy"), token=""))
        async with httpx.AsyncClient(transport=whole, base_url="http://localhost") as client:
            others = [asyncio.create_task(client.get("/opd/identity")) for _ in range(60)]
            await asyncio.to_thread(lambda: [held.acquire(timeout=10) for _ in range(40)])
            try:
                return (await asyncio.wait_for(client.get("/health"), 10)).status_code
            finally:
                waits.set()
                await asyncio.gather(*others)

    assert asyncio.run(ask()) == 200


def test_a_stopped_server_leaves_nothing(pair):
    with serving(pair[1]) as (url, process):
        assert httpx.get(url + "/health").status_code == 200
        children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
        assert not children.stdout.split()  # one process, threads inside
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(url + "/health")


def test_stop_ids_of_the_server_are_compared(pair, tmp_path):
    """A teacher with another EOS: the merged class over the wire is the one of the local teacher."""
    other = tiny(tmp_path / "other", seed=2, width=48)
    GenerationConfig(eos_token_id=[2, 6]).save_pretrained(other)
    with serving(other) as (url, _):
        there = opd.train(config(pair, tmp_path / "there", url))
        with Proxy(url, lambda path, n: None, PLAIN) as proxy:
            # A plain server does not say its stop ids: with the tokenizer named, they are known.
            how = replace(QUICK, teacher_tokenizer=str(other))
            told = config(pair, tmp_path / "told", proxy.url, remote=how, method=METHODS["opd"]())
            told = opd.train(told)
    same(there, opd.train(config(pair, tmp_path / "here", str(other))))
    local = opd.train(config(pair, tmp_path / "local", str(other), method=METHODS["opd"]()))
    same(told, local, WHOLE)
