"""The soak in short: what is killed and what fails on the way leaves a run as it was, bit for bit; and it can tell."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from scripts.soak import Plan, _apart, account, settings, train
from tests.models_for_tests import tiny

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
    rows = [json.loads(line) for line in (hurt / "perf.jsonl").read_text().splitlines()]
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


def test_the_plan_of_the_whole_soak():
    plan = Plan.of(300, 9)
    assert (plan.server, plan.worker, plan.trainer) == ([30, 135, 240], [60, 165, 270], [90, 198])
    kinds = [plan.fault("/opd/hidden", n) for n in range(63)]
    assert [k for k in kinds if k] == ["500", "malformed", "drop", "slow", "429", "short", "other"]
    assert plan.fault("/opd/head", 8) is None and not any(Plan().fault("/opd/hidden", n) for n in range(30))
