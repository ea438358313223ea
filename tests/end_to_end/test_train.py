"""The main job on real (small) models: it learns, it resumes bitwise, it refuses what cannot work in one line."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._dynamo.utils import counters

import opd
from opd.core.errors import Refusal, Stopped
from opd.head.sweep import ModelLogits
from opd.methods import METHODS
from opd.methods.constructors import constructors
from opd.methods.method import Method
from opd.models.checkpoints import seal
from opd.training.run_folder import Run, plain
from opd.training.train import FREE
from opd.training.trainer import Trainer
from tests.tiny_models import interrupted_at, logged, small


def config(pair, out, **changes):
    return small(pair, out, **{"steps": 4, "save_every": 2, "micro_batch_tokens": 256, **changes})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(sorted((folder / "checkpoints").glob("step-*"))[-1] / "model.safetensors")


# Those on hidden states or texts alone measure no divergence as they train: test_representation, test_text_teachers.
@pytest.mark.parametrize("name", [n for n, make in METHODS.items() if not (make().headless() or make().asks)])
def test_every_method_lowers_the_divergence_to_the_teacher(pair, tmp_path, name):
    batch = 32 if name in ("entropy", "fire") else 8  # they leave tokens or rollouts out, and few of 8 would be noise
    run = config(pair, tmp_path / "run", method=METHODS[name](), steps=12, save_every=100, batch=batch)
    run = replace(run, context="response") if name == "sdpo" else run  # no response of a random model is right
    rows = logged(opd.train(run))
    assert all(row["grad_norm"] > 0 and row["refused"] == 0 for row in rows)
    # Of a pool the teacher's top k is kept, which gives a forward KL, and no KL over the whole vocabulary.
    distance = "loss" if METHODS[name]().keeps_scores() else "reverse_kl"
    assert sum(r[distance] for r in rows[-3:]) < 0.97 * sum(r[distance] for r in rows[:3])


@pytest.mark.parametrize("name", ["opd-zscore", "fire", "iw-opd"])
def test_known_advantages_are_trained_on_without_the_teacher(pair, tmp_path, name, monkeypatch):
    """Its logits are swept once a token, not twice; every number is as if it had been asked again."""
    rows, final, asked = [], [], []
    fill = ModelLogits.fill
    for out in ("twice", "once"):
        count = {}

        def counted(side, at, count=count):
            count[side.weight.shape[1]] = count.get(side.weight.shape[1], 0) + at.stop - at.start
            return fill(side, at)

        monkeypatch.setattr(ModelLogits, "fill", counted)
        if out == "twice":
            plain = Method.advised
            monkeypatch.setattr(Method, "advised", lambda self: None)
        else:
            monkeypatch.setattr(Method, "advised", plain)
        run = opd.train(config(pair, tmp_path / out, method=METHODS[name](), steps=2, rollouts_every=100, doctor=False))
        rows.append(logged(run))
        final.append(weights(run))
        asked.append(count)
    for one, other in zip(*rows, strict=True):
        assert one.keys() == other.keys()
        assert other == pytest.approx(one, rel=1e-4, abs=1e-5, nan_ok=True)
    for key, x in final[0].items():
        torch.testing.assert_close(final[1][key], x, rtol=1e-3, atol=1e-4)
    twice, once = asked
    assert once[32] == twice[32] and once[48] < twice[48]  # the student's width, and the teacher's


def test_run_folder(pair, tmp_path):
    folder = opd.train(config(pair, tmp_path / "run", eval_prompts="embedded:ledger-short", eval_limit=4, eval_every=2))
    assert {p.name for p in folder.iterdir()} == {
        "config.json", "method.txt", "environment.json", "metrics.jsonl", "perf.jsonl", "evals", "rollouts",
        "checkpoints",
    }  # fmt: skip
    assert eval((folder / "method.txt").read_text(), constructors()) == METHODS["vopd"]()
    assert [r["step"] for r in logged(folder) if "eval_accuracy" in r] == [0, 2, 4]
    columns = load_file(folder / "rollouts" / "step-000001.safetensors")
    texts = logged(folder / "rollouts", "step-000001")
    assert len(texts) == 8 and columns["reverse_kl"].shape == columns["ids"].shape
    assert [p.name for p in sorted((folder / "checkpoints").iterdir())] == ["step-000002", "step-000004"]
    # The sampler's log-probs and the trainer's are two computations of one number.
    assert all(r["sampler_gap"] < 1e-3 for r in logged(folder) if "sampler_gap" in r)


KAT = METHODS["kat"](window=3, floor=2, ready=4, after=1, patience=2)
# One pass; two; and with statistics of the batch, of groups, of the run so far.
BATCH = {
    name: METHODS[name]() for name in ("vopd", "opd-zscore", "fire", "entropy", "eopd", "iw-opd", "scope", "tropd")
}


@pytest.mark.parametrize("method", [*BATCH.values(), KAT], ids=[*BATCH, "kat"])
def test_micro_batches_do_not_change_the_run(pair, tmp_path, method):
    runs = [opd.train(config(pair, tmp_path / str(n), method=method, micro_batch_tokens=n)) for n in (100, 100_000)]
    for a, b in zip(*map(logged, runs), strict=True):
        assert a["reverse_kl"] == pytest.approx(b["reverse_kl"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_packed_rows_do_not_change_the_run(pair, tmp_path):
    """Student, teacher and evaluations; `--compile` would not fit."""
    settings = dict(method=METHODS["opd-zscore"](), micro_batch_tokens=100)
    runs = [opd.train(config(pair, tmp_path / str(packs), **settings, packing=packs)) for packs in (False, True)]
    for a, b in zip(*map(logged, runs), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)
    with pytest.raises(Refusal, match="--packing: --compile would compile"):
        opd.train(config(pair, tmp_path / "compiled", packing=True, compile=True))


def command(pair, out, *more: str) -> list[str]:
    student, teacher = pair
    flags = f"--student {student} --teacher {teacher} --prompts embedded:ledger-short --out {out} --steps 8 --batch 8"
    rest = "--max-new-tokens 16 --lr 1e-2 --save-every 2 --eval-limit 4 --eval-every 3"
    rest += " --eval-prompts embedded:ledger-short"
    return [sys.executable, "-m", "opd", "train", *flags.split(), *rest.split(), *more]


def launch(args: list[str], **options) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(args, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, **options)


def wait_for(path: Path, run: subprocess.Popen, seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert run.poll() is None, run.stderr.read()
        assert time.monotonic() < end, f"{path} never came"
        time.sleep(0.02)


MEMORY = "kat --window 4 --floor 2 --ready 8 --buffer 20 --after 2 --eta 0.1 --patience 2"
RESUMED = [["vopd"], ["--lora-rank", "4", "opd-zscore"], ["gkd", "--share", "0.5"], MEMORY.split()]


@pytest.mark.parametrize("method", RESUMED)
def test_killed_and_resumed_is_bitwise_the_uninterrupted_run(pair, tmp_path, method):
    whole = launch(command(pair, tmp_path / "whole", *method))
    assert whole.wait(300) == 0, whole.stderr.read()
    cut = launch(command(pair, tmp_path / "cut", *method))
    wait_for(tmp_path / "cut" / "checkpoints" / "step-000004", cut)
    cut.send_signal(signal.SIGKILL)
    cut.wait(30)
    again = launch(command(pair, tmp_path / "cut", "--resume", *method))
    assert again.wait(300) == 0, again.stderr.read()
    assert (tmp_path / "cut/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
    final = [sorted((tmp_path / n / "checkpoints").glob("step-*"))[-1] for n in ("whole", "cut")]
    for file in ("model.safetensors", "adapter_model.safetensors", "training_state/optimizer.safetensors"):
        files = [folder / file for folder in final if (folder / file).exists()]
        assert len(files) != 1
        if files:
            a, b = map(load_file, files)
            assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# What transformers, its tokenizers and peft write and read; a server takes any other *.safetensors file for weights.
MODEL_FILES = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
MODEL_FILES |= {"chat_template.jinja", "special_tokens_map.json"}
ADAPTER_FILES = MODEL_FILES - {"config.json", "generation_config.json", "model.safetensors"}
ADAPTER_FILES |= {"adapter_config.json", "adapter_model.safetensors", "README.md"}


@pytest.mark.parametrize(("rank", "files"), [(0, MODEL_FILES), (4, ADAPTER_FILES)], ids=["full", "LoRA"])
def test_a_checkpoint_holds_beside_its_training_state_only_what_a_model_folder_does(pair, tmp_path, rank, files):
    umask = os.umask(0o027)
    try:
        changes = {"steps": 2, "lora_rank": rank, "teacher": "ema:0.1", "context": "answer", "worker": True}
        run = opd.train(config(pair, tmp_path / "run", **changes))
    finally:
        os.umask(umask)
    checkpoint = run / "checkpoints" / "step-000002"
    found = {path.name for path in checkpoint.iterdir()}
    assert found <= files | {"training_state"} and {"training_state", "tokenizer.json"} < found
    assert {"optimizer.safetensors", "teacher.safetensors", "state.json"} <= set(
        os.listdir(checkpoint / "training_state")
    )
    modes = {path.name: path.stat().st_mode & 0o777 for path in run.rglob("*") if path.is_file()}
    assert set(modes.values()) == {0o640}, modes


def test_a_checkpoint_of_an_older_version_resumes(pair, tmp_path):
    """Training state lay beside the model's files; the numbers after resuming are those of the uninterrupted run."""
    method = METHODS["gkd"](share=0.5)
    whole = opd.train(config(pair, tmp_path / "whole", method=method))
    with interrupted_at(4), pytest.raises(KeyboardInterrupt):
        opd.train(config(pair, tmp_path / "cut", method=method))
    old = tmp_path / "cut" / "checkpoints" / "step-000002"
    for file in (old / "training_state").iterdir():
        file.rename(old / file.name)
    (old / "training_state").rmdir()
    (old / "state.json").write_text('{"step": 2}')  # without digests
    opd.train(config(pair, tmp_path / "cut", method=method, resume=True))
    assert logged(tmp_path / "cut") == logged(whole)
    assert all(x.equal(weights(whole)[name]) for name, x in weights(tmp_path / "cut").items())


def test_a_checkpoint_without_some_optimizer_state_is_refused(pair, tmp_path):
    out = opd.train(config(pair, tmp_path / "run", steps=2))
    file = out / "checkpoints" / "step-000002" / "training_state/optimizer.safetensors"
    state = load_file(file)
    save_file({k: x for k, x in state.items() if "embed_tokens" not in k}, file)
    seal(file.parents[1], {"step": 2})
    with pytest.raises(Refusal, match=r"lacks the state of 1 trained parameters, .*embed_tokens") as error:
        opd.train(config(pair, out, steps=2, resume=True))
    assert "\n" not in str(error.value)


def test_what_may_change_when_a_run_resumes(tmp_path):
    run, free = Run(tmp_path), FREE
    written = lambda **changes: {
        "lr": 1e-3,
        "remote": {"teacher_timeout": 5},
        "speaker": plain(replace(opd.Speaker(engine="http://here:1"), **changes)),
    }
    run.start(written(), "vopd", 0)
    moved = {"engine": "http://there:2", "engine_timeout": 9.0, "engine_concurrency": 8, "max_mismatch": 0.5}
    run.matches(written(**moved) | {"remote": {"teacher_timeout": 9}}, free)
    with pytest.raises(Refusal, match=r"--resume: speaker\.engine was 'http://here:1' .* and is 'vllm' now"):
        run.matches(written(engine="vllm"), free)
    with pytest.raises(Refusal, match=r"--resume: speaker\.engine_kv_gb was 4\.0"):
        run.matches(written(engine_kv_gb=2.0), free)
    with pytest.raises(Refusal, match=r"--resume: lr was 0\.001"):
        run.matches(written() | {"lr": 2e-3}, free)


def test_a_folder_is_empty_that_holds_what_a_refused_run_left(tmp_path):
    run = Run(tmp_path / "run")
    assert run.empty()
    for name in ("engine", ".worker-0-7"):
        (run.folder / name).mkdir(parents=True)
    for name in ("answers.sqlite", "answers.sqlite-wal"):
        (run.folder / name).touch()
    assert run.empty() and not run.exists()
    (run.folder / "notes.txt").touch()
    assert not run.empty()


def test_saved_rollouts_appear_whole(pair, tmp_path, monkeypatch):
    def killed(tensors, path, metadata):
        save_file(dict(list(tensors.items())[:1]), path)
        raise KeyboardInterrupt

    monkeypatch.setattr("opd.core.tensors.save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        opd.train(config(pair, tmp_path / "run", doctor=False))
    assert not list((tmp_path / "run" / "rollouts").glob("*.safetensors"))
    assert (tmp_path / "run" / "rollouts" / "step-000001.jsonl").exists()


def test_ctrl_c_in_an_evaluation_saves_that_step(pair, tmp_path, monkeypatch, capsys):
    evaluate = Trainer.evaluate

    def interrupted(loop, step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return evaluate(loop, step)

    monkeypatch.setattr(Trainer, "evaluate", interrupted)
    told = config(pair, tmp_path / "run", steps=9, save_every=9, eval_prompts="embedded:ledger-short", quiet=False)
    with pytest.raises(Stopped) as stop:
        opd.train(replace(told, eval_every=2, eval_limit=4))
    assert stop.value.code == 130 and "stopped: step 2 of 9 is saved" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step-000002"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 75)])
def test_a_signal_saves_says_how_to_go_on_and_is_in_the_exit_code(pair, tmp_path, number, code):
    run = launch(command(pair, tmp_path / "run", "--save-every", "100", "--steps", "500", "vopd"))
    wait_for(tmp_path / "run" / "rollouts" / "step-000001.jsonl", run)
    run.send_signal(number)
    assert run.wait(120) == code
    assert "--resume" in run.stderr.read()
    step = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))[-1]
    assert json.loads((step / "training_state/state.json").read_text())["step"] == logged(tmp_path / "run")[-1]["step"]


def test_compiled_layers_train_alike(pair, tmp_path):
    counters.clear()
    runs = [
        opd.train(config(pair, tmp_path / str(x), steps=2, compile=x, lr=1e-3, doctor=False)) for x in (False, True)
    ]
    assert counters["stats"]["unique_graphs"] >= 2 and not counters["graph_break"]  # of student and teacher, each whole
    for eager, compiled in zip(*map(logged, runs), strict=True):
        for name in ("tokens", "loss", "grad_norm", "reverse_kl", "teacher_logp"):
            assert compiled[name] == pytest.approx(eager[name], rel=1e-4, abs=1e-6), name
    for name, eager in weights(runs[0]).items():
        # Adam's first steps are of the size of lr whatever the gradient's: signs of tiny ones may differ.
        assert (weights(runs[1])[name] - eager).abs().mean() < 2e-5, name


@pytest.mark.parametrize("how", ["canonical", "train"])
@pytest.mark.parametrize("alike", [True, False])
def test_sampler_and_trainer_agree_where_many_tokens_stop(pair, tmp_path, how, alike):
    """Stop ids are one class where the models name different ones, and each its own token else."""
    folders = []
    for i, folder in enumerate(pair):
        folders.append(shutil.copytree(folder, tmp_path / folder.name))
        told = folders[i] / "generation_config.json"
        ends = [2, *range(20, 40 if alike or i else 30)]
        told.write_text(json.dumps(json.loads(told.read_text()) | {"eos_token_id": ends}))
    run = opd.train(config(folders, tmp_path / "run", steps=2, stop_token=how, rollouts_every=1))
    stopped = load_file(run / "rollouts/step-000001.safetensors")["stopped"]
    assert stopped.sum() > 2 and all(row["sampler_gap"] < 1e-3 for row in logged(run))


def test_updates_on_one_rollout_batch(pair, tmp_path):
    from opd.losses.surrogates import Clipped
    from opd.losses.terms import PolicyGradient
    from opd.methods.method import Method
    from opd.methods.rollout_policies.on_policy import OnPolicy

    method = Method((PolicyGradient(surrogate=Clipped()),), rollouts=OnPolicy(per_prompt=2, updates=2))
    rows = logged(opd.train(config(pair, tmp_path / "run", method=method)))
    assert all(row["grad_norm"] > 0 for row in rows)


def test_a_gradient_that_is_not_finite_is_refused_and_leaves_the_weights(pair, tmp_path):
    from opd.losses.terms import PolicyGradient
    from opd.methods.method import Method

    broken = Method((PolicyGradient(coef=float("inf")),))
    with pytest.raises(opd.Refusal, match="not finite 5 steps in a row"):
        opd.train(config(pair, tmp_path / "run", method=broken, steps=8, save_every=2))
    start = load_file(Path(pair[0]) / "model.safetensors")
    assert all(torch.equal(start[k], x) for k, x in weights(tmp_path / "run").items())


def test_bf16_compute_keeps_fp32_weights_and_state(pair, tmp_path):
    run = opd.train(config(pair, tmp_path / "run", precision="bf16", teacher_precision="bf16", steps=8, lr=1e-4))
    assert all(x.dtype == torch.float32 for x in weights(run).values())
    state = load_file(run / "checkpoints" / "step-000008" / "training_state/optimizer.safetensors")
    assert all(x.dtype == torch.float32 for x in state.values())
    start = load_file(Path(pair[0]) / "model.safetensors")
    # In pure bf16 an update of 1e-4 would be lost on nearly all weights.
    moved = [(start[k] != x).float().mean() for k, x in weights(run).items()]
    assert sum(moved) / len(moved) > 0.9
    assert all(0 < row["sampler_gap"] < 1 for row in logged(run))


def test_trackers_hear_what_the_log_holds(pair, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = opd.train(config(pair, tmp_path / "run", trackers=("tensorboard",)))
    files = [EventAccumulator(str(p)).Reload() for p in run.rglob("events.out*")]
    (heard,) = [file.Scalars("reverse_kl") for file in files if "reverse_kl" in file.Tags()["scalars"]]
    assert [e.value for e in heard] == pytest.approx([r["reverse_kl"] for r in logged(run)], rel=1e-5)


def test_responses_of_the_data_train_a_mixture(pair, tmp_path):
    """gkd --share 0 --other response: the data speaks, and the gold answers become likelier."""
    method = METHODS["gkd-forward"](share=0.0, other="response")
    rows = logged(opd.train(config(pair, tmp_path / "run", method=method, steps=12, save_every=100)))
    assert all(row["stopped"] == 0 or row["length"] <= 16 for row in rows)
    assert sum(r["reverse_kl"] for r in rows[-3:]) < sum(r["reverse_kl"] for r in rows[:3])


@pytest.mark.parametrize(
    ("schedule", "least"), [("constant", 0.0), ("linear", 0.0), ("cosine", 0.0), ("linear", 0.1), ("cosine", 0.1)]
)
def test_learning_rate(schedule, least):
    c = opd.Train(student="s", teacher="t", prompts="p", lr=1.0, warmup=4, schedule=schedule, min_lr_ratio=least)
    rates = [c.learning_rate(i, 12) for i in range(1, 13)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    wanted = torch.optim.lr_scheduler.LambdaLR  # torch's own schedules from the end of the warm-up
    parameter = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    by = {
        "constant": lambda: wanted(optimizer, lambda _: 1.0),
        "linear": lambda: torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, least or 1e-12, total_iters=8),
        "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8, eta_min=least),
    }[schedule]()
    for rate in rates[4:]:
        assert rate == pytest.approx(by.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        by.step()
