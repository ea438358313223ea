"""Who teaches: several teachers by a column, the student's own weights, a third model beside them."""

import dataclasses
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import opd
from opd.config.model_names import AveragedStudent, ModelFiles, parse
from opd.config.plan import CONTEXT, resolved
from opd.core.errors import Refusal
from opd.core.sampling import Prompt, Sampling
from opd.core.types import Rollout
from opd.data.prompt_stream import Prompts
from opd.data.prompts import fill_template
from opd.methods import METHODS
from opd.teachers.ema import Average
from opd.teachers.local import LocalTeacher, WithoutAdapter
from tests.tiny_models import logged, tiny

CPU = torch.device("cpu")
METHOD = {name: METHODS[name]() for name in ("vopd", "opd", "fire", "sdft", "opsd", "sdpo", "g-opd", "scope")}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    names = {"student": 32, "teacher": 48, "other": 40, "third": 32}
    return {name: str(tiny(root / name, seed=i, width=w)) for i, (name, w) in enumerate(names.items())}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """Questions in the alphabet of the embedded tokenizer, every third of another domain."""
    file = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    rows = [
        {"prompt": f"{i}+{i}", "answer": str(2 * i), "response": f"{2 * i}", "domain": "code" if i % 3 == 0 else "math"}
        for i in range(24)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def config(folders, prompts, out, method="vopd", **changes):
    whole = opd.Train(
        student=folders["student"],
        prompts=prompts,
        method=METHOD[method],
        out=out,
        steps=4,
        batch=8,
        sampling=Sampling(max_new_tokens=10),
        lr=1e-2,
        save_every=2,
        rollouts_every=1,
        quiet=True,
        context_template="{context} {prompt}",
    )
    return dataclasses.replace(whole, **changes)


def logp(model, prompt, ids):
    """Of a response after a prompt, by transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(model) if isinstance(model, str) else model
    with torch.no_grad():
        whole = model(torch.tensor([[*prompt, *ids]])).logits[0].log_softmax(-1)
    return whole[len(prompt) - 1 : -1].gather(-1, torch.tensor(ids)[:, None])[:, 0]


def saved(run, step):
    """Rows and columns of the rollouts saved at a step."""
    name = f"step-{step:06d}"
    return logged(run / "rollouts", name), load_file(run / "rollouts" / f"{name}.safetensors")


def heard(session_prompts, row, context=""):
    return session_prompts.teacher_ids(row, "", context)


def routed(folders, prompts, out, **changes):
    return config(
        folders, prompts, out, teacher=folders["teacher"], route=(f"code={folders['other']}",), route_column="domain",
        **changes,
    )  # fmt: skip


def opened(run, method):
    from opd.training.build import open_session

    return open_session(resolved(dataclasses.replace(run, method=method)))


def test_each_prompt_is_scored_by_its_own_teacher(folders, prompts, tmp_path):
    run = opd.train(routed(folders, prompts, tmp_path / "run"))
    first = logged(run)[0]
    assert first["reverse_kl.teacher"] != first["reverse_kl.code"]
    rows, columns = saved(run, 1)
    session = opened(routed(folders, prompts, tmp_path / "other"), METHOD["vopd"])
    domains = set()
    for i, row in enumerate(rows):
        (question,) = {turn["content"] for turn in row["prompt"]}
        domain = "code" if int(question.partition("+")[0]) % 3 == 0 else "math"
        domains.add(domain)
        prompt = Prompt(messages=({"role": "user", "content": question},))
        ids = columns["ids"][i][columns["mask"][i]].tolist()
        want = logp(
            folders["other" if domain == "code" else "teacher"], session.prompts.teacher_ids(prompt, "", ""), ids
        )
        torch.testing.assert_close(columns["teacher_logp"][i][columns["mask"][i]], want, atol=1e-4, rtol=1e-4)
    assert domains == {"math", "code"}


def test_scope_tempers_the_student_alone(folders, prompts, tmp_path):
    """Student's logits over the sampling temperature, the teacher's as they are; weights and mean from these."""
    sampled = Sampling(temperature=0.6, max_new_tokens=10)
    temperatures = {"sampling": sampled, "loss_temperature": 0.6, "teacher_loss_temperature": 1.0}
    run = opd.train(
        config(folders, prompts, tmp_path / "run", "scope", teacher=folders["teacher"], steps=1, **temperatures)
    )
    rows, columns = saved(run, 1)
    mask = columns["mask"]
    session = opened(config(folders, prompts, tmp_path / "other", teacher=folders["teacher"]), METHOD["scope"])
    student = AutoModelForCausalLM.from_pretrained(folders["student"])
    likelihoods = []
    for i, row in enumerate(rows):
        prompt = session.prompts.student_ids(Prompt(messages=tuple(row["prompt"])))
        ids = columns["ids"][i][mask[i]].tolist()
        with torch.no_grad():
            z = student(torch.tensor([[*prompt, *ids]])).logits[0][len(prompt) - 1 : -1]
        p = (z / 0.6).log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0]
        q = logp(folders["teacher"], prompt, ids)
        for name, want in (("student_logp", p), ("sampler_logp", p), ("teacher_logp", q)):
            torch.testing.assert_close(columns[name][i][mask[i]], want, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(columns["advantage.1"][i][mask[i]], q - p, atol=2e-4, rtol=1e-4)
        likelihoods.append(q.mean())
    assert not any(row["outcome"] for row in rows)  # all of the group are wrong: the teacher's perplexities weigh them
    share = torch.stack(likelihoods).softmax(0) * len(rows) / mask.sum()
    torch.testing.assert_close(columns["weight.1"].amax(1), share, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("method", ["vopd", "fire"])  # one pass, and statistics of the whole batch
def test_micro_batches_of_several_teachers_change_nothing(folders, prompts, tmp_path, method):
    runs = [
        logged(opd.train(routed(folders, prompts, tmp_path / str(n), method=method, micro_batch_tokens=n)))
        for n in (40, 100_000)
    ]
    for a, b in zip(*runs, strict=True):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
        assert a.get("reverse_kl.code", 0) == pytest.approx(b.get("reverse_kl.code", 0), rel=1e-3)


def test_the_live_student_told_the_answer_teaches_itself(folders, prompts, tmp_path):
    run = opd.train(config(folders, prompts, tmp_path / "run", "opsd"))
    rows, columns = saved(run, 1)
    session = opened(config(folders, prompts, tmp_path / "other", "opsd"), METHOD["opsd"])
    for i, row in enumerate(rows):
        (question,) = {turn["content"] for turn in row["prompt"]}
        prompt = Prompt(messages=({"role": "user", "content": question},))
        told = session.prompts.teacher_ids(prompt, "", str(2 * int(question.partition("+")[0])))
        ids = columns["ids"][i][columns["mask"][i]].tolist()
        torch.testing.assert_close(
            columns["teacher_logp"][i][columns["mask"][i]], logp(folders["student"], told, ids), atol=1e-4, rtol=1e-4
        )
    assert all(row["reverse_kl"] > 1e-3 and row["grad_norm"] > 0 for row in logged(run))
    # Live: at step 2 the teacher has the weights that step 1 left, which the base no longer has.
    base = opd.train(config(folders, prompts, tmp_path / "base", "opsd", teacher="base"))
    assert logged(base)[0]["reverse_kl"] == logged(run)[0]["reverse_kl"]
    assert logged(base)[1]["reverse_kl"] != logged(run)[1]["reverse_kl"]


def test_the_average_follows_and_is_resumed_bitwise(folders, prompts, tmp_path):
    of = lambda out, **changes: config(folders, prompts, tmp_path / out, "sdft", teacher="ema:0.5", **changes)
    whole, cut = opd.train(of("whole")), opd.train(of("cut", steps=2))
    (cut / "config.json").write_text((cut / "config.json").read_text().replace('"steps": 2', '"steps": 4'))
    opd.train(of("cut", resume=True))
    assert (cut / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    checkpoints = [
        load_file(whole / "checkpoints" / f"step-00000{i}" / "training_state/teacher.safetensors") for i in (2, 4)
    ]
    assert any(not torch.equal(checkpoints[0][k], checkpoints[1][k]) for k in checkpoints[0])
    again = load_file(cut / "checkpoints" / "step-000004" / "training_state/teacher.safetensors")
    assert all(torch.equal(again[k], checkpoints[1][k]) for k in again)


def test_the_average_is_the_recursion(folders):
    student = AutoModelForCausalLM.from_pretrained(folders["student"])
    teacher = Average(student, 0.1, to=CPU, low=torch.float32)
    want = {name: p.detach().clone() for name, p in student.named_parameters()}
    for _ in range(3):
        with torch.no_grad():
            for p in student.parameters():
                p.add_(torch.randn_like(p))
        teacher.follow()
        want = {name: 0.9 * want[name] + 0.1 * p.detach() for name, p in student.named_parameters()}
    for name, p in teacher.model.named_parameters():
        torch.testing.assert_close(p.detach(), want[name])
        assert not p.requires_grad


def test_the_base_under_an_adapter_is_the_model_without_it(folders):
    plain = AutoModelForCausalLM.from_pretrained(folders["student"])
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folders["student"]), LoraConfig(target_modules="all-linear")
    )
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.normal_()
    rollout = Rollout(
        prompt_ids=(5, 6), teacher_prompt_ids=(7, 8, 9), ids=(10, 11, 12), sampler_logp=(0.0,) * 3, index=0, group=0,
        stopped=True,
    )  # fmt: skip
    states = [
        teacher.hidden([rollout], [[True] * 3]).states
        for teacher in (
            LocalTeacher(plain, to=CPU), WithoutAdapter(adapted, to=CPU), LocalTeacher(adapted, to=CPU)
        )
    ]  # fmt: skip
    torch.testing.assert_close(states[0], states[1])
    assert (states[0] - states[2]).abs().max() > 1e-2


def test_peers_teach_each_other(folders, prompts, tmp_path):
    """The next right one of the group, never the rollout itself; none, and it is not trained."""
    run = config(folders, prompts, tmp_path / "run", "sdpo")
    text = opened(dataclasses.replace(run, batch=16), METHOD["sdpo"]).prompts
    assert isinstance(text, Prompts)
    make = lambda group, outcome: Rollout(
        prompt_ids=(5,), teacher_prompt_ids=(5,), ids=(6, 7), sampler_logp=(0.0, 0.0), index=0, group=group,
        stopped=True, outcome=outcome, prompt=Prompt(text="1+1"),
    )  # fmt: skip
    rollouts = [make(0, 0.0), make(0, 1.0), make(0, 1.0), make(1, 1.0), make(1, 0.0), make(2, 0.0), make(2, 0.0)]
    thoughts = lambda i: "<think>a guess</think>\n" if i == 1 else ""
    told = text.with_peers(rollouts, [thoughts(i) + str(i) for i in range(7)])
    want = [1, 2, 1, None, 3, None, None]
    for r, peer in zip(told, want, strict=True):
        if peer is None:
            assert r.mask == (False, False)
        else:
            assert r.mask == () and r.teacher_prompt_ids == text.teacher_ids(Prompt(text="1+1"), "", str(peer))


def test_a_context_is_written_into_the_last_turn():
    turns = ({"role": "system", "content": "s"}, {"role": "user", "content": "q"})
    got = fill_template(Prompt(messages=turns), CONTEXT, context="the {prompt} way")
    assert got.messages[0] == turns[0]
    assert got.messages[1]["content"].startswith("q\n\nHere is a correct solution:\n\nthe {prompt} way\n\n")
    assert fill_template(Prompt(text="q"), "{context}|{prompt}", context="c").text == "c|q"


def test_the_reference_is_the_student_before_training(folders, prompts, tmp_path):
    """At the first step log p = log b, so the reward of G-OPD is lambda times that of OPD; named, it is another."""
    of = lambda out, method, **changes: config(
        folders, prompts, tmp_path / out, method, teacher=folders["teacher"], max_grad_norm=1e9, **changes
    )
    plain, beyond, named = (
        logged(opd.train(run))
        for run in (of("a", "opd"), of("b", "g-opd"), of("c", "g-opd", reference=folders["third"]))
    )
    assert beyond[0]["grad_norm"] == pytest.approx(1.25 * plain[0]["grad_norm"], rel=1e-4)
    assert beyond[1]["advantage"] != pytest.approx(1.25 * plain[1]["advantage"], rel=1e-4)
    assert named[0]["advantage"] != pytest.approx(beyond[0]["advantage"], rel=1e-2)
    lora = logged(opd.train(of("d", "g-opd", lora_rank=2)))
    assert lora[0]["advantage"] == pytest.approx(beyond[0]["advantage"], rel=1e-4)


REFUSED = {
    "no teacher": ({}, "--teacher must be given"),
    "itself": ({"teacher": "self"}, "--teacher self: the student itself"),
    "a bad rate": ({"teacher": "ema:2", "context": "answer"}, "ema:RATE"),
    "a route without a model": ({"teacher": "x", "route": ("code",)}, "--route code: write NAME=MODEL"),
    "a route twice": ({"teacher": "x", "route": ("a=y", "a=z")}, "each name once"),
    "peers of one": ({"teacher": "base", "context": "peer"}, "--per-prompt to 2"),
    "a template without context": ({"teacher": "base", "context": "answer", "context_template": "{prompt}"}, "lacks"),
    "the same prompt": ({"teacher": "base", "context": "answer", "teacher_prompt": "same"}, "--teacher-prompt same"),
    "a column that is not there": ({"teacher": "base", "context": "hint"}, "--context hint: row"),
    "elsewhere": ({"teacher": "self", "context": "answer", "teacher_device": "meta"}, "lives where the student does"),
}


@pytest.mark.parametrize("changes, said", REFUSED.values(), ids=REFUSED)
def test_refusals(folders, prompts, tmp_path, changes, said):
    with pytest.raises(Refusal, match=said) as error:
        opd.train(config(folders, prompts, tmp_path / "run", **changes))
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_rates():
    assert parse("ema:0.2") == AveragedStudent("ema:0.2", 0.2) and parse("ema") == AveragedStudent("ema", 0.05)
    assert parse("a/model:1") == ModelFiles("a/model:1")
