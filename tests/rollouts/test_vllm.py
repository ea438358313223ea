"""vLLM: our calls against its signatures, requests and samples by hand, weights under a checkpoint's names.

Where vLLM is installed the engine samples, and its log-probs are the trainer's before and after a step; elsewhere
`vllm_contract.json`, read from its sources, says what may be called.
"""

import ast
import contextlib
import importlib.util
import json
import math
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import opd
from opd.analysis.exact import measure
from opd.config import checks
from opd.config.engine import Speaker
from opd.config.plan import resolved
from opd.config.train import Train
from opd.core.sampling import Sampling
from opd.losses.estimators import Full, Stratified
from opd.losses.surrogates import Clipped, Reinforce, TruncatedRatio
from opd.losses.terms import PolicyGradient, Positions
from opd.losses.token_weights import TruncatedImportance
from opd.methods import METHODS
from opd.methods.method import Method
from opd.models.source import EMBEDDED, ModelSource
from opd.rollouts.engines.base import GenerateRequest, Sample
from opd.rollouts.engines.vllm import VLLMEngine, WeightsLost, WeightSyncedEngine, grouped, parameters, sample
from opd.rollouts.engines.vllm_connection import VLLMConnection
from opd.rollouts.engines.vllm_server import VLLMServer
from opd.rollouts.weight_sync.stream import WeightStream
from opd.rollouts.weight_sync.vllm_plugin import Update, weights
from opd.training.metrics import mismatch
from scripts.soak import Proxy, free_port, serving
from tests.tiny_models import logged, tiny

ROOT = Path(__file__).parents[2]
CONTRACTS = json.loads((ROOT / "tests" / "vllm_contract.json").read_text())
REAL = importlib.util.find_spec("vllm") is not None
real = pytest.mark.skipif(not REAL, reason="vLLM is not installed")
FREE = Sampling(max_new_tokens=12)
PHASES = ("rollout", "weights", "measure", "look", "save", "update", "snapshot")


def script():
    spec = importlib.util.spec_from_file_location("vllm_contract", ROOT / "scripts" / "vllm_contract.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# The contract


@pytest.fixture(params=CONTRACTS)
def contract(request):
    return CONTRACTS[request.param]


def calls(module: str) -> list[ast.Call]:
    tree = ast.parse((ROOT / "opd" / "rollouts" / f"{module}.py").read_text())
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def keywords(module: str, name: str) -> set[str]:
    """The keyword arguments of every call of a name."""
    found = [c for c in calls(module) if isinstance(c.func, ast.Name) and c.func.id == name]
    assert found, name
    return {k.arg for c in found for k in c.keywords}


def test_everything_imported_from_vllm_is_there(contract):
    assert contract["imports"] == script().imported()
    assert {"LLM", "SamplingParams"} <= set(contract["imports"]["vllm"])


def test_the_engine_is_opened_with_arguments_that_it_has(contract):
    known = {*contract["callables"]["LLM.__init__"], *contract["classes"]["EngineArgs"]}
    assert keywords("engines/vllm", "LLM") <= known
    assert contract["classes"]["WeightTransferConfig"] == ["backend"]


def test_the_methods_of_the_engine_are_called_as_they_are_written(contract):
    named = {name.split(".")[1]: p for name, p in contract["callables"].items() if name.split(".")[0] in OFFLINE}
    used = [
        c
        for c in calls("engines/vllm")
        if isinstance(c.func, ast.Attribute) and ast.unparse(c.func.value) == "self.llm" and c.func.attr in named
    ]
    assert {c.func.attr for c in used} == named.keys() - {"__init__"}
    for call in used:
        assert {k.arg for k in call.keywords} <= set(named[call.func.attr]), ast.unparse(call)
        assert len(call.args) <= len(named[call.func.attr]), ast.unparse(call)


OFFLINE = ("LLM", "RLOfflineMixin")


def test_sampling_parameters_are_vllms(contract):
    (one,) = grouped(GenerateRequest([[1, 2]], FREE, seed=0, step=1, index=[0]))
    asked = parameters(one, FREE, (2, 9), range(5))
    assert {*asked, "flat_logprobs"} <= set(contract["classes"]["SamplingParams"])
    assert {"index", "token_ids", "logprobs"} <= set(contract["classes"]["CompletionOutput"])
    flat = {"start_indices", "end_indices", "token_ids", "logprobs"}
    assert flat <= set(contract["classes"]["FlatLogprobs"])


def test_what_is_sent_and_read_over_http_are_fields_of_the_protocol(contract):
    source = (ROOT / "opd" / "rollouts" / "engines" / "vllm_connection.py").read_text()
    classes, routes = contract["classes"], contract["routes"]
    assert {"model", "token_ids", "sampling_params"} <= set(classes["GenerateRequest"])
    assert {"index", "token_ids", "logprobs", "weight_versions"} <= set(classes["GenerateTokensChoice"])
    assert {"token_id", "logprob", "top_logprobs"} <= set(classes["GenerateLogProbsContent"])
    assert "version" in classes["WeightVersionSpan"] and "choices" in classes["GenerateTokensResponse"]
    posted = {p for p in ast.walk(ast.parse(source)) if isinstance(p, ast.Constant) and str(p.value).startswith("/")}
    paths = {str(p.value).partition("?")[0] for p in posted} - {"/v1/models"}
    assert paths <= {route.split()[1] for route in routes}
    assert "mode" in routes["POST /pause"] and "new_version" in routes["POST /update_weight_version"]
    assert (
        "update_info" in routes["POST /update_weights"] and "init_info" in routes["POST /init_weight_transfer_engine"]
    )
    teacher = {"model", "prompt", "max_tokens", "temperature", "prompt_logprobs", "seed", "stop_token_ids", "logprobs"}
    assert teacher | {"top_p", "top_k", "return_token_ids"} <= set(classes["CompletionRequest"])
    assert {"index", "token_ids", "prompt_logprobs"} <= set(classes["CompletionResponseChoice"])


def test_the_receiver_has_the_methods_that_vllm_calls_with_their_parameters(contract):
    tree = ast.parse((ROOT / "opd" / "rollouts" / "weight_sync" / "receiver.py").read_text())
    (receiver,) = [x for x in tree.body if isinstance(x, ast.ClassDef)]
    ours = {f.name: script().parameters(f) for f in receiver.body if isinstance(f, ast.FunctionDef)}
    theirs = {k.split(".")[1]: v for k, v in contract["callables"].items() if k.startswith("WeightTransferEngine.")}
    assert ours == theirs


def test_the_senders_are_opened_with_fields_that_they_have(contract):
    for name in ("NCCLTrainerInitInfo", "IPCTrainerInitInfo"):
        assert keywords("weight_sync/sender", name) <= set(contract["classes"][name]), name
    # Positional: address, port, world size.
    assert contract["classes"]["NCCLTrainerInitInfo"][2:5] == ["master_address", "master_port", "world_size"]
    assert contract["callables"]["ModuleSource.__init__"] == ["module"]
    assert contract["callables"]["HTTPVLLMWeightSyncClient.__init__"][0] == "base_url"
    assert contract["callables"]["WeightTransferTrainerFactory.trainer_init"] == ["init_info", "client", "source"]


@real
def test_the_installed_vllm_is_one_of_the_contracts():
    made = script()
    assert made.contract(made.installed()) in CONTRACTS.values()


# Requests and samples


def test_rollouts_of_a_prompt_are_one_request_and_seeds_do_not_depend_on_it():
    a, b = (1, 2), (3,)
    asked = grouped(GenerateRequest([a, a, a, b, a], FREE, seed=7, step=3, index=[4, 5, 6, 7, 8]))
    assert [(x.ids, x.first, x.n) for x in asked] == [(a, 0, 3), (b, 3, 1), (a, 4, 1)]
    start = asked[0].seed - 4
    seeds = [x.seed + j for x in asked for j in range(x.n)]  # vLLM gives the j-th of n the seed plus j
    assert seeds == [start + i for i in (4, 5, 6, 7, 8)]
    alone = grouped(GenerateRequest([a], FREE, seed=7, step=3, index=[6]))
    assert alone[0].seed == seeds[2]
    assert grouped(GenerateRequest([a], FREE, seed=7, step=4, index=[6]))[0].seed != seeds[2]
    assert 0 <= alone[0].seed < 2**53
    apart = grouped(GenerateRequest([a, a], FREE, seed=7, step=3, index=[0, 2]))
    assert [x.n for x in apart] == [1, 1]  # the seeds of one request are neighbours


class WrittenServer(VLLMConnection):
    """A connection without a server: it answers with the name of the weights that it was sent last."""

    def __init__(self, name, asked, sending=lambda: None):
        self.name, self.asked, self.sending = name, asked, sending
        self.client, self.link, self.versions = SimpleNamespace(url=name), None, [{"version": "default"}]

    def reset(self):
        pass

    def wait(self):
        pass

    def send(self, weights, files, version):
        self.sending()
        self.link, self.versions = print, [{"version": version}]

    def generate(self, ids, parameters, read):
        self.asked.append((self.name, tuple(ids), parameters["n"]))
        logprobs = {"content": [{"token_id": 2, "logprob": 0.0, "top_logprobs": []}]}
        choice = {"token_ids": [2], "logprobs": logprobs, "weight_versions": self.versions}
        return read({"choices": [choice | {"index": i} for i in range(parameters["n"])]})


@pytest.fixture
def two_servers(tmp_path, monkeypatch):
    """An engine of two servers without processes, and the list of what they are asked: name, prompt, n."""
    asked: list[tuple[str, tuple[int, ...], int]] = []
    monkeypatch.setattr("opd.rollouts.engines.vllm_server.VLLMConnection", lambda url, *_: WrittenServer(url, asked))
    model = AutoModelForCausalLM.from_pretrained(tiny(tmp_path / "model", seed=0))
    how = Speaker(engine="http://a,http://b", engine_concurrency=1)
    return VLLMServer(model, 145, (2,), how, 0, folder=tmp_path, dtype=torch.float32), asked


def test_the_server_of_a_prompt_depends_on_its_place_in_the_batch_alone(two_servers):
    """On whichever process it is: prompts 0, 2, ... and 1, 3, ... of the batch, also where two of them are equal."""
    engine, asked = two_servers
    prompts, groups = [[5], [5], [5], [6], [7], [7]], [3, 3, 4, 5, 6, 6]
    engine.generate(GenerateRequest(prompts, FREE, seed=0, step=1, index=range(6, 12), groups=groups))
    assert sorted(asked) == [
        ("http://a", (5,), 1),
        ("http://a", (7,), 2),
        ("http://b", (5,), 2),
        ("http://b", (6,), 1),
    ]


def test_the_weights_behind_an_answer_are_known_while_they_are_on_their_way(two_servers):
    """The first server may answer with new weights before the second has them, and the second with the old ones."""
    engine, _ = two_servers
    first, second = engine.connections
    ask = lambda: engine.generate(GenerateRequest([[5], [5]], FREE, seed=0, step=1, index=[0, 1], groups=[0, 1]))
    found = []
    second.sending = lambda: found.append([x.version for x in ask()]) if engine.arrived else None
    for step in (3, 4):
        engine.step, engine.stale = step, True
        engine.sync()
    assert found == [[4, 3]] and [x.version for x in ask()] == [4, 4]
    # Old weights of this run, those of another, and none that are named: all are lost.
    for versions in ([{"version": f"{engine.prefix}-1"}], [{"version": "opd-0-9"}], [], None):
        first.versions = versions
        with pytest.raises(WeightsLost, match="--engine http://a: it has weights of somebody else"):
            ask()


def test_a_prefix_is_read_as_part_of_the_prompt_and_counts_as_written():
    asked = grouped(
        GenerateRequest([(1,), (1,), (1,)], FREE, seed=0, step=1, index=[0, 1, 2], prefixes=[(5, 6), (5, 6), ()])
    )
    assert [(x.ids, x.room, x.n) for x in asked] == [((1, 5, 6), 10, 2), ((1,), 12, 1)]


def test_a_stop_token_has_the_log_prob_of_its_class():
    free, cold = Sampling(), Sampling(temperature=0.0)
    last = {2: math.log(0.2), 9: math.log(0.3), 7: math.log(0.1)}
    found = sample([5, 2], [-1.0, math.log(0.2)], last, free, (2, 9))
    assert found.ids == (5, 2) and found.stopped and found.logp == pytest.approx((-1.0, math.log(0.5)))
    apart = sample([5, 2], [-1.0, math.log(0.2)], last, free, (2, 9), ())  # the loss has each by itself, too
    assert apart.stopped and apart.logp == (-1.0, math.log(0.2)) != found.logp
    assert sample([5, 6], [-1.0, -2.0], {}, free, (2, 9)) == Sample((5, 6), (-1.0, -2.0), False)
    assert sample([5, 2], [-1.0, -3.0], {2: -3.0}, cold, (2,)).logp == (0.0, 0.0)  # greedy draws with certainty


def test_padded_rows_are_never_drawn(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny(tmp_path / "wide", seed=0, rows=160))

    assert (
        WeightSyncedEngine(model, 145, (2,), 4).allowed == range(145)
        and WeightSyncedEngine(model, 160, (2,), 4).allowed is None
    )


# Weights


@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_those_that_a_checkpoint_has(tmp_path, tied):
    from safetensors.torch import load_file

    folder = tiny(tmp_path / "model", seed=0, tied=tied)
    model, kept = AutoModelForCausalLM.from_pretrained(folder), load_file(folder / "model.safetensors")
    found = dict(weights(model))
    assert found.keys() == kept.keys() and ("lm_head.weight" in found) is not tied
    assert all(torch.equal(found[name], kept[name]) for name in kept)


def test_adapters_are_merged_in_copies(tmp_path):
    folder = tiny(tmp_path / "model", seed=0)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder), LoraConfig(r=4, lora_alpha=16, target_modules="all-linear")
    )
    for name, p in model.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(p.data, std=0.1)
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = dict(weights(model))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert found.keys() == dict(weights(plain)).keys()
    merged = dict(weights(model.merge_and_unload()))
    assert any(not torch.equal(found[name], p) for name, p in weights(plain))
    for name, p in merged.items():
        torch.testing.assert_close(found[name], p, rtol=1e-6, atol=1e-6)


def test_an_update_gives_tensors_or_what_the_files_hold(tmp_path):
    from safetensors.torch import save_file

    made = {"a": torch.arange(3.0), "b": torch.ones(2, 2)}
    save_file(made, tmp_path / "w.safetensors")
    for update in (Update(weights=list(made.items())), Update(files=[str(tmp_path / "w.safetensors")])):
        assert {name: x.tolist() for name, x in update} == {name: x.tolist() for name, x in made.items()}


# What another engine changes in a method


def told(method, **changes) -> Method:
    whole = Train(student="a", teacher="b", prompts="c", method=method, speaker=Speaker(engine="vllm"))
    return resolved(replace(whole, **changes)).method


def test_policy_gradients_are_weighed_where_another_engine_writes():
    for name in ("vopd", "opd", "vopd-topk", "poweropd"):
        made = METHODS[name]()
        assert told(made, speaker=Speaker()) == made
        assert told(made).terms[0].surrogate == TruncatedRatio(2.0) and told(made).local() == made.local()
    assert told(METHODS["opd"](), importance_cap=5.0).terms[0].surrogate == TruncatedRatio(5.0)
    assert told(METHODS["opd-full"]()) == METHODS["opd-full"]()  # a divergence draws nothing
    stratified = PolicyGradient(estimator=Stratified(4))
    assert told(Method((stratified,))).terms[0] == replace(stratified, surrogate=TruncatedRatio(2.0))
    full = PolicyGradient(estimator=Full())
    assert told(Method((full,))).terms[0] == full
    ratio = PolicyGradient(surrogate=Clipped())
    assert told(Method((ratio,))).terms[0] == replace(ratio, weights=(TruncatedImportance(2.0),))
    own = PolicyGradient(weights=(TruncatedImportance(3.0),))
    assert told(Method((own,))).terms[0] == own


@pytest.mark.parametrize("cap", [1.25, math.inf])
@pytest.mark.parametrize("k", [0, 2, 6])
def test_what_is_summed_exactly_has_no_ratio(float64, k, cap):
    """All draws of two tokens by another engine: the top k at their full weight, the rest at min(p, cap mu)."""
    p, mu = torch.randn(2, 6)
    p.requires_grad_()
    teacher = torch.randn(6)
    method, total = told(Method((PolicyGradient(estimator=Stratified(k)),)), importance_cap=cap), 0
    for y in range(6):
        at = Positions(torch.tensor([[y]]), p.log_softmax(-1)[None, None], teacher.log_softmax(-1)[None, None])
        drew = mu.log_softmax(-1)[None, [y]]
        total = total + drew.exp() * method.loss(at, method.prepare(measure(method, at, sampler_logp=drew)))
    (found,) = torch.autograd.grad(total.sum(), p)
    logp, probability = p.log_softmax(-1), p.softmax(-1).detach()
    weight = probability.minimum(cap * mu.softmax(-1))
    weight[probability.topk(k).indices] = probability[probability.topk(k).indices]
    (wanted,) = torch.autograd.grad((weight * (logp - teacher.log_softmax(-1)).detach() * logp).sum(), p)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    if cap == math.inf or k == 6:
        (exact,) = torch.autograd.grad((p.softmax(-1) * (p.log_softmax(-1) - teacher.log_softmax(-1))).sum(), p)
        torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cap", [1.5, math.inf])
def test_the_truncated_ratio_is_the_weight(cap):
    """Value and gradient of the surrogate are those of `Reinforce` under `TruncatedImportance`, in float64."""
    draw = torch.Generator().manual_seed(0)
    new, sampler, advantage = torch.randn(3, 4, 5, generator=draw, dtype=torch.float64)
    mask = torch.ones(4, 5, dtype=torch.bool)
    a, b = new.clone().requires_grad_(), new.clone().requires_grad_()
    one = TruncatedRatio(cap)(a, advantage, sampler)
    two = TruncatedImportance(cap)(new, sampler, mask) * Reinforce()(b, advantage)
    torch.testing.assert_close(one, two, rtol=1e-12, atol=0)
    one.sum().backward()
    two.sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=0)


def test_mismatch_by_enumeration():
    """k3 under mu is KL(mu || p): summed over a small vocabulary, in float64."""
    draw = torch.Generator().manual_seed(0)
    p, mu = torch.randn(2, 7, generator=draw, dtype=torch.float64).log_softmax(-1)
    k3 = sum(float(mu[i].exp()) * mismatch((p - mu)[i : i + 1])["sampler_kl"] for i in range(7))
    assert k3 == pytest.approx(float((mu.exp() * (mu - p)).sum()), rel=1e-12)
    found = mismatch(torch.tensor([0.5, -0.25, 0.0]))
    assert found["sampler_gap_mean"] == pytest.approx(0.25) and found["sampler_ratio_max"] == pytest.approx(math.e**0.5)


# Refusals

SERVER = Speaker(engine="http://127.0.0.1:1", engine_transfer="opd")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"speaker": Speaker(engine="sglang")}, "choose hf, vllm, or"),
        ({"speaker": Speaker(engine="vllm", engine_kv_gb=0.0)}, "--engine-kv-gb 0.0: must be above 0"),
        ({"speaker": Speaker(engine="vllm", max_mismatch=0.0)}, "--max-mismatch 0.0: must be above 0"),
        ({"speaker": Speaker(engine="vllm"), "method": METHODS["kat"]()}, "which hf alone does: add --no-online after"),
        ({"speaker": Speaker(engine="vllm"), "method": METHODS["trb"]()}, "which hf alone does"),
        ({"speaker": Speaker(engine="vllm"), "staleness": 1}, "--engine vllm: shares the process and the GPU"),
        ({"speaker": SERVER, "worker": True, "method": METHODS["npd"]()}, "npd --no-filtered"),
        ({"speaker": SERVER, "worker": True, "worker_device": "cpu"}, "there is no worker; add"),
        ({"speaker": Speaker(engine="hf", engine_sleep=True)}, "--engine-sleep"),
        ({"speaker": Speaker(engine="http://a:1,hf", engine_transfer="opd")}, "of several with commas between them"),
        ({"speaker": Speaker(engine="http://a:1,http://a:1", engine_transfer="opd")}, "names http://a:1 twice"),
        ({"speaker": Speaker(engine="http://127.0.0.1:1")}, "--engine-transfer nccl: sends from a GPU"),
    ],
)
def test_what_another_engine_cannot_do_is_refused(changes, words):
    with pytest.raises(opd.Refusal) as caught:
        checks.check(resolved(replace(Train(student="a", teacher="b", prompts="c"), **changes)))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_without_vllm_it_is_one_line(tmp_path, monkeypatch):
    folder = tiny(tmp_path / "model", seed=0)
    model = AutoModelForCausalLM.from_pretrained(folder)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(opd.Refusal, match=r"pip install 'opd\[vllm\]'"):
        how = Speaker(engine="vllm")
        VLLMEngine(model, ModelSource(str(folder)), 145, (2,), how, dtype=torch.float32, rows=4)


def test_a_server_that_takes_no_weights_is_refused(tmp_path):
    folder = tiny(tmp_path / "model", seed=0)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with serving(folder) as (url, _), pytest.raises(opd.Refusal, match="it takes no weights: start it as") as caught:
        VLLMServer(model, 145, (2,), Speaker(engine=url), 0, folder=tmp_path, dtype=torch.float32)
    assert "\n" not in str(caught.value)


# A server that takes weights: `opd serve --takes-weights` has vLLM's routes for them

TAKES_WEIGHTS = ("--takes-weights", "--token-env", "OPD_ENGINE_TOKEN")
TOKEN = {"Authorization": "Bearer of-the-engine"}


@pytest.fixture
def engine_token(monkeypatch):
    """The token of the server and of its client, both of which inherit it."""
    monkeypatch.setenv("OPD_ENGINE_TOKEN", TOKEN["Authorization"].removeprefix("Bearer "))


def ready(folder, url, **changes) -> tuple[torch.nn.Module, VLLMServer]:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    how = Speaker(engine=url, engine_transfer="opd", **changes)
    return model, VLLMServer(model, 145, (2,), how, 0, folder=Path(folder).parent, dtype=torch.float32)


def close(model, prompts, samples):
    """The log-probs that came back are the model's own."""
    for prompt, one in zip(prompts, samples, strict=True):
        with torch.no_grad():
            logp = model(input_ids=torch.tensor([[*prompt, *one.ids]])).logits[0].log_softmax(-1)
        wanted = logp[len(prompt) - 1 : -1].gather(-1, torch.tensor(one.ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(one.logp), wanted, rtol=1e-4, atol=1e-4)


def test_a_server_writes_with_the_weights_that_it_was_sent(tmp_path, engine_token):
    folder = tiny(tmp_path / "model", seed=0)
    prompts = [[5, 6, 7]] * 3 + [[8, 9, 10, 11]]
    with serving(tiny(tmp_path / "other", seed=5), *TAKES_WEIGHTS) as (url, _):
        model, engine = ready(folder, url)
        asked = lambda *rest, **how: engine.run(lambda: engine.generate(GenerateRequest(*rest, seed=1, step=2, **how)))
        drawn = lambda: asked(prompts, FREE, index=range(4))
        first = drawn()
        close(model, prompts, first)
        assert first == drawn() and len({x.ids for x in first[:3]}) > 1
        (alone,) = asked(prompts[2:3], FREE, index=[2])
        assert alone.ids == first[2].ids and alone.logp == pytest.approx(first[2].logp, abs=1e-5)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.05 * torch.randn_like(p))
        engine.follow()
        after = drawn()
        close(model, prompts, after)
        assert after != first and not (tmp_path / "engine").exists()
        cold = asked(prompts, Sampling(temperature=0.0, max_new_tokens=4), index=range(4))
        assert len({x.ids for x in cold[:3]}) == 1 and engine.processed()
        # Somebody else's weights: noticed by their name, and replaced.
        httpx.post(
            f"{url}/update_weight_version", json={"new_version": "of another run"}, headers=TOKEN
        ).raise_for_status()
        assert drawn() == after
        small = AutoModelForCausalLM.from_pretrained(tiny(tmp_path / "small", seed=0, width=16))
        how = Speaker(engine=url, engine_transfer="opd")
        wrong = VLLMServer(small, 145, (2,), how, 0, folder=tmp_path, dtype=torch.float32)
        with pytest.raises(opd.Refusal, match="the weights of another model"):
            wrong.sync()


def test_what_a_killed_trainer_left_is_undone_and_a_server_that_was_started_again_is_met_anew(tmp_path, engine_token):
    """A server with vLLM's refusals: an update in an update, one that nobody began, and no words while it is paused."""
    folder, prompts = tiny(tmp_path / "model", seed=0), [[5, 6, 7]] * 2
    state = {"met": True, "updating": True, "paused": True}

    def fault(path: str, n: int) -> str | None:
        match path.partition("?")[0]:
            case "/init_weight_transfer_engine":
                state["met"] = True
            case "/start_weight_update":
                if state["updating"] or not state["met"]:
                    return "500"
                state["updating"] = True
            case "/finish_weight_update":
                if not state["updating"]:
                    return "500"
                state["updating"] = False
            case "/resume" if n == 0:
                return "drop"
            case "/pause" | "/resume":
                state["paused"] = path.startswith("/pause")
            case "/inference/v1/generate" if state["paused"]:
                return "500"
        return None

    with serving(folder, *TAKES_WEIGHTS) as (url, _), Proxy(url, fault) as proxy:
        model, engine = ready(folder, proxy.url)
        assert engine.processed()
        request = GenerateRequest(prompts, FREE, seed=1, step=2, index=range(2))
        drawn = lambda: engine.run(lambda: engine.generate(request))
        close(model, prompts, drawn())
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.05 * torch.randn_like(p))
        state |= {"met": False, "updating": False, "paused": False}
        httpx.post(f"{url}/update_weight_version", json={"new_version": "default"}, headers=TOKEN).raise_for_status()
        engine.follow()
        close(model, prompts, drawn())

        def link(files) -> None:
            raise RuntimeError("NCCL error:\nunhandled system error")

        engine.connections[0].link = link
        engine.follow()
        with pytest.raises(opd.Refusal, match="the weights did not get there: RuntimeError: NCCL error: unhandled"):
            drawn()
    assert not (tmp_path / "engine").exists()


def run(root, url, out, sampling=FREE, **changes) -> list[dict]:
    told = Train(
        student=str(root / "student"),
        teacher=str(root / "teacher"),
        prompts="embedded:ledger-short",
        method=METHODS["vopd"](),
        out=root / out,
        steps=6,
        batch=8,
        per_prompt=4,
        sampling=sampling,
        lr=1e-2,
        quiet=True,
        speaker=Speaker(engine=url, engine_transfer="opd", **changes),
        remote=replace(opd.Remote(), teacher_retries=12),
        doctor=False,
    )
    folder = opd.train(told)
    return logged(folder)


def test_training_on_a_servers_rollouts_through_its_death(tmp_path, engine_token):
    """The weights of each step are sent: no gap.  One that is killed and comes back with old ones gets them again."""
    for i, name in enumerate(("student", "teacher")):
        tiny(tmp_path / name, seed=i)
    port, gone = free_port(), threading.Event()
    with contextlib.ExitStack() as stack:
        serve = lambda: stack.enter_context(serving(tmp_path / "student", *TAKES_WEIGHTS, port=port))
        url, first = serve()
        calm = run(tmp_path, url, "calm")
        assert all(row["sampler_gap"] < 1e-3 and row["grad_norm"] > 0 for row in calm)
        assert calm[0]["loss"] != calm[-1]["loss"]
        spent = [json.loads(line) for line in (tmp_path / "calm" / "perf.jsonl").read_text().splitlines()]
        assert all(row["weights_s"] > 0 and row["rollout_s"] > 0 for row in spent)
        assert all(row["seconds"] == pytest.approx(sum(row.get(f"{p}_s", 0) for p in PHASES)) for row in spent)
        with pytest.raises(opd.Refusal, match="--max-mismatch 1e-12") as caught:
            run(tmp_path, url, "strict", max_mismatch=1e-12)
        assert "\n" not in str(caught.value)
        # At another temperature they are not meant to be the trainer's.
        warm = run(tmp_path, url, "warm", max_mismatch=1e-12, sampling=Sampling(max_new_tokens=12, temperature=0.6))
        assert len(warm) == 6 and warm[0]["sampler_gap_mean"] > 0.1

        def fault(path: str, n: int) -> None:
            if path == "/inference/v1/generate" and n == 5 and not gone.is_set():
                gone.set()
                first.kill()
                threading.Thread(target=serve).start()

        with Proxy(url, fault) as proxy:
            assert run(tmp_path, proxy.url, "hurt") == calm
        assert gone.is_set() and first.wait(10) != 0


# With vLLM


@real
def test_the_source_of_a_sender_says_what_it_sends(tmp_path):
    from opd.rollouts.weight_sync.sender import ModuleSource, NamedWeights

    model = AutoModelForCausalLM.from_pretrained(tiny(tmp_path / "model", seed=0))
    source = ModuleSource(NamedWeights(WeightStream(model, torch.float32)))
    metadata, sent = source.metadata, list(source.iter_full() if hasattr(source, "iter_full") else source)  # 0.33, 0.32
    said = [(m.name, m.dtype, m.shape) for m in (metadata() if callable(metadata) else metadata)]
    assert said == [(name, x.dtype, tuple(x.shape)) for name, x in sent] and len(said) > 10


@real
def test_the_engine_samples_from_the_student_before_and_after_a_step():
    folder = EMBEDDED / "student"  # vLLM's attention on a CPU has no heads as narrow as those of `tiny`
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    how = Speaker(engine="vllm", engine_kv_gb=0.05)
    engine = VLLMEngine(model, ModelSource(str(folder)), 145, (2, 9), how, dtype=torch.float32, rows=8)
    prompts = [[5, 6, 7]] * 4 + [[8, 9, 10, 11]] * 2

    def drawn(sampling=FREE, **changes):
        asked = {"seed": 1, "step": 2, "index": range(6), **changes}
        return generated(prompts[: len(asked["index"])], sampling, **asked)

    def generated(*asked, **how):
        return engine.run(lambda: engine.generate(GenerateRequest(*asked, **how)))

    def close(samples):
        for prompt, one in zip(prompts, samples, strict=True):
            with torch.no_grad():
                logp = model(input_ids=torch.tensor([[*prompt, *one.ids]])).logits[0].log_softmax(-1)
            at = logp[len(prompt) - 1 : -1]
            wanted = at.gather(-1, torch.tensor(one.ids)[:, None])[:, 0]
            if one.stopped and engine.merged is None:
                wanted[-1] = at[-1, engine.stop].logsumexp(-1)
            torch.testing.assert_close(torch.tensor(one.logp), wanted, rtol=1e-4, atol=1e-4)

    try:
        first = drawn()
        close(first)
        assert first == drawn() and len({x.ids for x in first[:4]}) > 1
        assert first[3:4] == generated(prompts[3:4], FREE, seed=1, step=2, index=[3])  # alone or in company
        assert first != drawn(step=3)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.05 * torch.randn_like(p))
        engine.follow()
        after = drawn()
        close(after)
        assert after != first
        cold = drawn(Sampling(temperature=0.0, max_new_tokens=5))
        assert len({x.ids for x in cold[:4]}) == 1 and set(cold[0].logp) == {0.0}
        prefixed = generated(prompts[:1], FREE, seed=1, step=2, index=[0], prefixes=[[7] * 10])
        assert len(prefixed[0].ids) <= 2
        many = torch.randint(10, 140, (60, 100), generator=torch.Generator().manual_seed(0)).tolist()
        assert len(generated(many, FREE, seed=1, step=2, index=range(60))) == 60  # more than it reads at once
        engine.stop = tuple({x.ids[1] for x in after})  # a class of several, all drawn at the second token
        ended = drawn()
        assert all(x.stopped and len(x.ids) <= 2 for x in ended) and len({x.ids[-1] for x in ended}) > 1
        close(ended)
        engine.merged = ()  # a loss that has each by itself
        apart = drawn()
        close(apart)
        assert [x.ids for x in apart] == [x.ids for x in ended] and apart != ended
    finally:
        engine.close()
