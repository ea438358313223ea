"""The soak in short: what is killed and what fails on the way leaves a run as it was, bit for bit; and it can tell."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from scripts.soak import Plan, _apart, account, counted, judgements, settings, train
from tests.tiny_models import logged, tiny

STEPS = 8


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("soak")
    models = [str(tiny(root / name, seed=i, width=32 + 16 * i)) for i, name in enumerate(("student", "teacher"))]
    flags = ["--steps", str(STEPS), "--batch", "4", "--tokens", "12", "--save-every", "2", "--every", "3"]
    args = settings([*flags, "--student", models[0], "--teacher", models[1], "--out", str(root / "out")])
    plan = Plan(server=[2], worker=[3], trainer=[5], every=3)
    train(args, root / "out" / "faults", plan)
    train(args, root / "out" / "calm", Plan())
    return root / "out" / "faults", root / "out" / "calm", plan


def test_a_run_through_faults_is_the_run_without(runs):
    hurt, calm, plan = runs
    assert list(account(hurt, calm, STEPS, 4)) == []
    killed = {name: plan.happened[f"{name} killed"] for name in ("server", "worker", "trainer")}
    assert killed == {"server": 1, "worker": 1, "trainer": 1}
    assert sum(plan.happened.values()) - 3 >= 2  # answers that were spoilt
    rows = logged(hurt, "perf")
    assert sum(row["teacher_retries"] for row in rows) >= 1


def test_the_account_sees_what_is_not_so(runs, tmp_path):
    hurt, calm, _ = runs
    copy = tmp_path / "copy"

    def told(spoil):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(hurt, copy)
        spoil()
        return list(account(copy, calm, STEPS, 4))

    def twice():
        lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
        (copy / "metrics.jsonl").write_text("".join([*lines[:-1], lines[-2]]))

    def lost():
        path = copy / "rollouts" / "step-000003.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))

    def other():
        path = copy / "checkpoints" / f"step-{STEPS:06d}" / "model.safetensors"
        whole = load_file(path)
        name = next(iter(whole))
        save_file(whole | {name: whole[name] + 1e-7}, path)

    assert any("step 7 was logged 2 times" in x for x in told(twice))
    assert any("step 3 did not train on samples 0 to 3" in x for x in told(lost))
    assert [x.split(":")[0] for x in told(other)] == ["model.safetensors"]
    assert told(lambda: None) == []


def test_what_was_not_said_is_no_zero(tmp_path):
    for name, column in (("a", [torch.nan, 1.0]), ("b", [0.0, 1.0]), ("c", [torch.nan, 1.0])):
        save_file({"advantage": torch.tensor(column)}, tmp_path / name)
    assert list(_apart(tmp_path / "a", tmp_path / "b")) == ["a: advantage differs"]
    assert list(_apart(tmp_path / "a", tmp_path / "c")) == []


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """The embedded pair, for a judge that pays all alike pays nothing: server and trainer are killed once."""
    root = tmp_path_factory.mktemp("judged")
    flags = ["--method", "ropd", "--steps", "4", "--batch", "16", "--tokens", "64", "--save-every", "1"]
    plan = Plan(server=[1], trainer=[2], every=5)
    train(settings([*flags, "--every", "5", "--out", str(root)]), root / "faults", plan)
    return root / "faults", plan


def test_every_sample_is_judged_or_has_no_advantage(judged):
    run, plan = judged
    assert list(judgements(run, 4)) == []
    shares = counted(run, 4)
    assert shares["judged"] + shares["without advantage"] == 4 * 16 and min(shares.values()) >= 4
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and sum(row["grad_norm"] > 0 for row in rows) >= 3
    assert plan.happened["server killed"] == plan.happened["trainer killed"] == 1
    assert plan.happened["malformed json"] >= 1 and plan.happened["never right"] >= 2
    assert sum(plan.happened[kind] for kind in ("500", "drop", "slow", "429", "short")) >= 3


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("judged", lambda x: ~x, "trained on a rollout that was not judged"),
        ("judged", lambda x: x & (torch.arange(len(x)) > 0), "judged a part of group"),
        ("verdict", lambda x: x + torch.arange(len(x)) / 100, "something else than its scores"),
        ("advantage.0", lambda x: x * 1.01, "something else than its scores"),
    ],
)
def test_the_account_of_judgements_sees_what_is_not_so(judged, name, change, said, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(judged[0], copy)
    columns = {s: load_file(copy / f"rollouts/step-00000{s}.safetensors") for s in range(1, 5)}
    paid = next(s for s, x in columns.items() if (x["advantage.0"] != 0).any())
    save_file(columns[paid] | {name: change(columns[paid][name])}, copy / f"rollouts/step-00000{paid}.safetensors")
    assert any(said in line for line in judgements(copy, 4))


def test_the_plan_of_the_whole_soak():
    plan = Plan.of(300, 9)
    assert (plan.server, plan.worker, plan.trainer) == ([30, 135, 240], [60, 165, 270], [90, 198])
    kinds = [plan.fault("/opd/hidden", n) for n in range(63)]
    assert [k for k in kinds if k] == ["500", "malformed", "drop", "slow", "429", "short", "other"]
    texts = [Plan.of(300, 9, worker=False).fault("/v1/chat/completions", n) for n in range(45)]
    assert [k for k in texts if k] == ["500", "drop", "slow", "429", "short"]
    assert plan.fault("/opd/head", 8) is None and not any(Plan().fault("/opd/hidden", n) for n in range(30))
