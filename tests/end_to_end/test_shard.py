"""`--shard`: shares of the weights, shards in checkpoints, other numbers of processes, kills, export."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

import opd
from opd.cli import main
from opd.config.commands import Export
from opd.models.checkpoints import checkpoints, has_weights, newest_checkpoint
from opd.teachers.local import LocalTeacher
from opd.training import trainer
from opd.training.export import export
from tests.campaigns.commands import MODELS, start_ranks
from tests.end_to_end.test_equal_processes import LIMIT, assert_equal, trained
from tests.models.test_adapters import loaded, logits
from tests.tiny_models import logged

STEPS = "--steps 4 --save-every 2 --keep 4"


def files_of(run: Path) -> dict[str, object]:
    """What a resumed run must reproduce: bytes, and of shards the content, because their metadata have no order."""
    found: dict[str, object] = {"metrics.jsonl": (run / "metrics.jsonl").read_bytes()}
    for path in (run / "checkpoints").rglob("*"):
        name = str(path.relative_to(run))
        if path.parent.name == "shards":
            with safe_open(path, "pt") as file:
                found[name] = file.metadata(), [(key, file.get_tensor(key).tolist()) for key in sorted([*file.keys()])]
        elif path.is_file() and path.name != "state.json":  # it holds digests of the shards
            found[name] = path.read_bytes()
    return found


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("sharded") / "calm", f"--shard {STEPS} vopd", 2)


@pytest.mark.parametrize(
    "flags", ["vopd", "--lora-rank 4 --teacher base --context answer opd", "--teacher ema:0.1 opd"]
)
def test_a_process_holds_its_share_of_every_layer(tmp_path, monkeypatch, flags):
    """Bytes of weights, of the optimizer and of the teacher's layers: half of the whole, with a row of padding."""

    def measure(self, *arguments):
        session, count = self.session, lambda tensors: sum(x.numel() for x in tensors)
        held = lambda tensors: count(x.to_local() if isinstance(x, DTensor) else x for x in tensors)
        student = [*session.student.parameters()]
        states = [x for row in session.optimizer.state.values() for x in row.values() if x.dim()]
        layers = [p for t in session.teachers.values() if isinstance(t, LocalTeacher) for p in _layers(t.model)]
        (tmp_path / f"rank-{os.environ['RANK']}.json").write_text(
            json.dumps([[held(part), count(part)] for part in (student, states, layers)])
        )
        return save(self, *arguments)

    save = trainer.Trainer.save
    monkeypatch.setattr(trainer.Trainer, "save", measure)
    trained(tmp_path / "run", f"--shard --steps 1 {flags}", 2)
    for rank in range(2):
        for held, whole in json.loads((tmp_path / f"rank-{rank}.json").read_text()):
            assert whole and held == pytest.approx(whole / 2, rel=0.02)


def _layers(model: torch.nn.Module) -> list[torch.Tensor]:
    return [p for name, p in model.named_parameters() if ".layers." in name]


@pytest.mark.parametrize("after", [2, 1, 4])
def test_a_run_resumes_from_shards_on_any_number_of_processes(calm, tmp_path, after):
    out = shutil.copytree(calm, tmp_path / "run")
    shutil.rmtree(out / "checkpoints/step-000004")
    trained(out, f"--shard {STEPS} --resume vopd", after)
    if after == 2:
        assert files_of(out) == files_of(calm)
    assert_equal(calm, out, 1e-4)


@pytest.mark.parametrize("after", [1, 2])
def test_a_sharded_run_goes_on_without_shards(calm, tmp_path, after):
    out = shutil.copytree(calm, tmp_path / "run")
    shutil.rmtree(out / "checkpoints/step-000004")
    trained(out, f"{STEPS} --resume vopd", after)
    assert_equal(calm, out, 1e-4)
    assert not (out / "checkpoints/step-000004/training_state/shards").exists()


def test_a_run_without_shards_goes_on_sharded(tmp_path):
    plain = trained(tmp_path / "plain", f"{STEPS} vopd", 1)
    out = shutil.copytree(plain, tmp_path / "run")
    shutil.rmtree(out / "checkpoints/step-000004")
    trained(out, f"--shard {STEPS} --resume vopd", 2)
    assert_equal(plain, out, 1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_a_rank_that_is_killed_as_a_checkpoint_is_written(calm, tmp_path, seed):
    draw, out = random.Random(seed), tmp_path / "run"
    words = [
        "train",
        *MODELS,
        *["--batch", "8", "--max-new-tokens", "24", "--lr", "1e-3", "--rollouts-every", "3", "--no-doctor", "--quiet"],
    ]
    words += [*f"--out {out} --shard {STEPS} --resume vopd".split()]
    ranks = start_ranks(words, 2)
    part, end = out / "checkpoints/.part-000004", time.monotonic() + LIMIT
    while not part.exists() and time.monotonic() < end and not ranks[0].ended():
        time.sleep(0.0005)
    ranks[0].ended(draw.uniform(0, 0.02))
    ranks[draw.randrange(2)].kill(signal.SIGKILL)
    for rank in ranks:  # as torchrun does
        rank.kill(group=True)
    ends = [rank.outcome(LIMIT) for rank in ranks]
    assert -signal.SIGKILL in [end.code for end in ends]
    assert newest_checkpoint(out)[0] is not None
    trained(out, f"--shard {STEPS} --resume vopd", 2)
    assert files_of(out) == files_of(calm)


def test_a_damaged_shard_is_passed_over(calm, tmp_path):
    out = shutil.copytree(calm, tmp_path / "run")
    (shard, *_) = (out / "checkpoints/step-000004/training_state/shards").glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    folder, (line,) = newest_checkpoint(out)
    assert folder.name == "step-000002" and shard.name in line


@pytest.mark.parametrize("flags", ["vopd", "--lora-rank 4 vopd"])
def test_a_model_folder_is_written_when_it_is_wanted(tmp_path, capsys, flags):
    every, last, never = (
        trained(tmp_path / x, f"--shard --export {x} --steps 4 --save-every 2 {flags}", 2)
        for x in ("every", "last", "never")
    )
    exports = lambda run: [step for step, folder in checkpoints(run).items() if has_weights(folder)]
    assert (exports(every), exports(last), exports(never)) == ([2, 4], [4], [])
    assert main(["eval", "--model", str(never), "--prompts", "embedded:ledger-short", "--limit", "2"]) == 2
    assert f"opd export {never}" in capsys.readouterr().err
    weights = lambda folder: {n: x for path in folder.glob("*.safetensors") for n, x in load_file(path).items()}
    for step in (2, 4):
        found = export(Export(run=never, step=step, out=tmp_path / f"model-{step}"))
        wanted = weights(checkpoints(every)[step])
        assert found == tmp_path / f"model-{step}" and weights(found).keys() == wanted.keys()
        assert all(torch.equal(x, wanted[name]) for name, x in weights(found).items())
    out = shutil.copytree(never, tmp_path / "run")
    shutil.rmtree(out / "checkpoints/step-000004")
    trained(out, f"--shard --export never --steps 4 --save-every 2 --resume {flags}", 2)
    assert files_of(out) == files_of(never)


def test_the_adapter_of_a_run_is_merged_on_the_way_out(tmp_path):
    run = trained(tmp_path / "run", "--lora-rank 4 vopd", 1)
    whole = export(Export(run=run, out=tmp_path / "whole", merge=True))
    apart = export(Export(run=run, out=tmp_path / "apart"))
    assert (apart / "adapter_config.json").is_file() and not (whole / "adapter_config.json").exists()
    torch.testing.assert_close(logits(loaded(whole)), logits(loaded(run)), rtol=1e-5, atol=1e-5)
    with pytest.raises(opd.Refusal, match="--merge: this run trains no adapter"):
        export(Export(run=trained(tmp_path / "full", "vopd", 1), out=tmp_path / "x", merge=True))


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("--export last vopd", "--export last: without --shard every checkpoint is a model folder"),
        ("--shard --staleness 1 vopd", "--shard: a worker process reads whole weights"),
        ("--shard --compile vopd", "--shard: --compile"),
        ("--shard --teacher-device cpu vopd", "--shard: --teacher-device cpu"),
    ],
)
def test_what_shards_cannot_do_is_refused(capsys, tmp_path, words, why):
    assert main(["train", *MODELS, "--out", str(tmp_path / "run"), *words.split()]) == 2
    assert why in capsys.readouterr().err


def test_layers_compute_in_bf16_over_fp32_weights(tmp_path):
    """With the doctor, whose estimates run sharded models too."""
    run = trained(tmp_path / "run", "--shard --precision bf16 --teacher-precision bf16 --doctor vopd", 2)
    exact = trained(tmp_path / "exact", "--shard vopd", 2)
    weights = load_file(newest_checkpoint(run)[0] / "model.safetensors")
    assert {x.dtype for x in weights.values()} == {torch.float32}
    assert any((x.bfloat16().float() != x).any() for x in weights.values())
    assert logged(run)[0]["reverse_kl"] == pytest.approx(logged(exact)[0]["reverse_kl"], rel=0.1)


def test_one_process_has_nothing_to_shard(tmp_path):
    one = trained(tmp_path / "one", f"{STEPS} vopd", 1)
    sharded = trained(tmp_path / "sharded", f"--shard {STEPS} vopd", 1)
    assert files_of(one) == files_of(sharded)
