"""The command line: what a person types, and one clear line with exit code 2 where it cannot work."""

import json
import os
import resource
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from transformers import AutoTokenizer

from opd.cli import main
from opd.cli.method_names import add_terms
from opd.config.presets import PAPER, settings
from opd.core.sampling import Sampling
from opd.methods import METHODS
from opd.methods.method import Method
from opd.models.source import EMBEDDED
from tests.test_docs import parse
from tests.tiny_models import tiny

MODELS = ["--student", "embedded:student", "--teacher", "embedded:teacher"]
LEDGER = ["--prompts", "embedded:ledger-short"]


def refused(capsys, *args: str) -> str:
    """Run; the one line on stderr."""
    assert main([str(a) for a in args]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("opd: ") and "Traceback" not in err
    return err


def train(capsys, tmp_path, *args: str, models=MODELS, prompts=LEDGER, method=("vopd",)) -> str:
    line = refused(
        capsys, "train", *models, *prompts, "--out", tmp_path / "run", "--max-new-tokens", 32, *args, *method
    )
    assert not (tmp_path / "run").exists(), "a refused run leaves nothing behind"
    return line


@pytest.fixture
def rows(tmp_path):
    def write(*rows: dict) -> str:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def test_missing_file(capsys, tmp_path):
    assert "nowhere.jsonl" in train(capsys, tmp_path, prompts=["--prompts", str(tmp_path / "nowhere.jsonl")])


def test_wrong_column(capsys, tmp_path, rows):
    file = rows({"question": "1+1?", "answer": "2"})
    line = train(capsys, tmp_path, "--prompt-column", "problem", prompts=["--prompts", file])
    assert "problem" in line and "question" in line


def test_empty_prompts(capsys, tmp_path, rows):
    assert "empty" in train(capsys, tmp_path, prompts=["--prompts", rows({"prompt": "", "answer": "2"})])
    (tmp_path / "none.jsonl").write_text("")
    assert "none.jsonl" in train(capsys, tmp_path, prompts=["--prompts", str(tmp_path / "none.jsonl")])


def test_differing_vocabularies(capsys, tmp_path):
    other = tiny(tmp_path / "other", seed=0)
    map_ = json.loads((other / "tokenizer.json").read_text())
    vocabulary = map_["model"]["vocab"]
    a, b = sorted(vocabulary, key=vocabulary.get)[20:22]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (other / "tokenizer.json").write_text(json.dumps(map_))
    line = train(capsys, tmp_path, models=["--student", other, "--teacher", "embedded:teacher"])
    assert "tokens" in line and repr(a)[1:-1] in line


def test_unknown_method(capsys, tmp_path):
    assert "did you mean vopd-topk?" in train(capsys, tmp_path, method=("vopd-tokp",))
    assert "METHOD (`opd methods` lists them) must be given" in train(capsys, tmp_path, method=())
    assert "no_such_module" in train(capsys, tmp_path, method=("no_such_module:f",))
    assert "has no nothing" in train(capsys, tmp_path, method=("opd.methods:nothing",))
    assert "return an opd.Method" in train(capsys, tmp_path, method=("opd.losses.rewards:LogRatio",))


@pytest.mark.parametrize(
    ("method", "says"),
    [
        (("vopd-topk", "--k", "-1"), "k=-1"),
        (("opd-stratified", "--k", "-1"), "k=-1"),
        (("opd-topk", "--k", "1", "--tail", "renorm"), "k=1"),
        (("gkd", "--beta", "1"), "gkd-forward"),
        (("gkd", "--share", "2"), "share=2"),
        (("opd", "--gamma", "2"), "gamma=2"),
        (("poweropd", "--alpha", "0"), "alpha=0"),
        (("opd-clip", "--low", "1"), "low=1"),
    ],
)
def test_impossible_method_settings(capsys, tmp_path, method, says):
    assert says in train(capsys, tmp_path, method=method)


def test_text_only_teacher(capsys, tmp_path):
    line = train(capsys, tmp_path, models=["--student", "embedded:student", "--teacher", "openai:some-model"])
    assert "no log-probs" in line


def test_teacher_that_is_the_student(capsys, tmp_path):
    line = train(capsys, tmp_path, models=["--student", "embedded:teacher", "--teacher", "embedded:teacher"])
    assert "KL" in line


def test_a_prompt_longer_than_the_context(capsys, tmp_path, rows):
    file = rows({"prompt": "1+1?", "answer": "2"}, {"prompt": "9" * 600, "answer": "2"})
    line = train(capsys, tmp_path, prompts=["--prompts", file])
    assert "row 1" in line and "context" in line
    assert "--max-new-tokens 512" in train(capsys, tmp_path, "--max-new-tokens", "512")


@pytest.mark.parametrize(
    "flags",
    ["--steps 0", "--batch 0", "--lr -1", "--warmup -1", "--temperature 0", "--top-p 0", "--top-k -1", "--keep 0",
     "--updates 3", "--per-prompt 7", "--lora-rank -2"],
)  # fmt: skip
def test_impossible_run_settings(capsys, tmp_path, flags):
    name, value = flags.split()
    line = train(capsys, tmp_path, name, value)
    assert value in line or name in line


def test_models_that_do_not_exist(capsys, tmp_path):
    assert "embedded:teacher" in train(capsys, tmp_path, models=["--student", "embedded:no", "--teacher", "x"])
    line = train(capsys, tmp_path, models=["--student", tmp_path / "no", "--teacher", "embedded:teacher"])
    assert "no such folder" in line
    (tmp_path / "empty").mkdir()
    assert "config.json" in train(capsys, tmp_path, models=["--student", tmp_path / "empty", "--teacher", "x"])
    (tmp_path / "bad.gguf").write_text("not one")
    assert "GGUF" in train(capsys, tmp_path, models=["--student", tmp_path / "bad.gguf", "--teacher", "x"])
    broken = tiny(tmp_path / "broken", seed=0)
    (broken / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    assert "do not load" in train(capsys, tmp_path, models=["--student", broken, "--teacher", "embedded:teacher"])


def test_pickled_weights_are_not_read(capsys, tmp_path):
    folder = tiny(tmp_path / "pickled", seed=0)
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    line = train(capsys, tmp_path, models=["--student", folder, "--teacher", "embedded:teacher"])
    assert "do not load" in line


def test_a_folder_that_holds_a_run(capsys, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("precious\n")
    line = refused(capsys, "train", *MODELS, *LEDGER, "--out", tmp_path / "run", "vopd")
    assert "--resume" in line and (tmp_path / "run" / "metrics.jsonl").read_text() == "precious\n"


def test_resuming_with_other_settings(capsys, tmp_path):
    flags = ["train", *MODELS, *LEDGER, "--out", tmp_path / "run", "--batch", 2, "--max-new-tokens", 8, "--quiet"]
    assert main([str(f) for f in (*flags, "--steps", 1, "vopd")]) == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    assert "lr was 1e-05" in refused(capsys, *flags, "--steps", 1, "--resume", "--lr", 1e-3, "vopd")
    assert "method was" in refused(capsys, *flags, "--steps", 1, "--resume", "opd")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_disk_full_at_a_checkpoint_keeps_the_one_before(tmp_path):
    """A limit on file size stands in for a full disk: the write fails in the kernel, in the middle of a checkpoint."""
    out = tmp_path / "run"
    flags = [*MODELS, *LEDGER, "--out", str(out), "--batch", "2", "--max-new-tokens", "8", "--save-every", "1"]
    command = [sys.executable, "-m", "opd", "train", *flags]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    assert subprocess.run([*command, "--steps", "2", "vopd"], env=env, capture_output=True).returncode == 0
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    other = [x if x != str(out) else str(tmp_path / "full") for x in command]
    done = subprocess.run([*other, "--steps", "1", "vopd"], env=env, capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("opd: checkpoint ") and "--resume" in done.stderr
    assert not list((tmp_path / "full" / "checkpoints").iterdir())  # nothing half-written
    assert (tmp_path / "full" / "metrics.jsonl").read_text().count("\n") == 1  # nothing lost


def test_methods_lists_every_method_with_its_source(capsys):
    assert main(["methods", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in listed] == list(METHODS)
    wanted = {"vopd": "2605.07865", "vopd-topk": "2605.07865", "poweropd": "2606.17199", "gkd": "2306.13649"}
    found = {row["name"]: row["source"] for row in listed}
    assert all(number in found[name] for name, number in wanted.items())
    assert all(row["source"] and row["what"] and row["value"].startswith("Method(") for row in listed)
    assert main(["methods", "vopd-topk"]) == 0
    page = " ".join(capsys.readouterr().out.split())
    assert "2605.07865" in page and "--k (20) Number of tokens in the baseline" in page and "--lora-rank 64" in page
    assert "did you mean vopd?" in refused(capsys, "methods", "vopdd")


def test_version_usage_and_unknown_commands(capsys):
    assert main(["--version"]) == 0 and capsys.readouterr().out.startswith("opd 0.")
    assert main([]) == 0 and "opd train" in capsys.readouterr().out
    assert "did you mean train?" in refused(capsys, "trian")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["eval", "--modle", "x"], "--modle: unknown flag (did you mean --model?)"),
        (
            ["eval", "--model", "x", "--prompts", "y", "--sampels", "3"],
            "--sampels: unknown flag (did you mean --samples",
        ),
        (["eval", "--model", "x", "--prompts", "y", "z"], "z: belongs to no flag; `opd eval --help`"),
        (["train", *MODELS, *LEDGER, "vopd", "--k", "3"], "--k: unknown flag; `opd train vopd --help`"),
        (["eval"], "--model and --prompts must be given; for example: opd eval --model "),
    ],
)
def test_a_flag_that_is_not_there(capsys, args, said):
    assert said in refused(capsys, *args)


def test_a_reader_that_leaves_is_no_fault():
    read, write = os.pipe()
    os.close(read)
    for args in (["methods"], ["eval", "--help"]):
        done = subprocess.run([sys.executable, "-m", "opd", *args], stdout=write, stderr=subprocess.PIPE, text=True)
        assert (done.returncode, done.stderr) == (1, "")
    os.close(write)


def test_a_run_folder_that_is_not_there_is_not_looked_up_on_the_hub(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs/first").mkdir(parents=True)
    (tmp_path / "outputs/first/method.txt").touch()
    line = refused(capsys, "eval", "--model", "outputs/frist", *LEDGER)
    assert "no such folder" in line and "did you mean outputs/first?" in line


def test_eval_prints_json(capsys):
    flags = ["--model", "embedded:teacher", *LEDGER, "--limit", "6", "--max-new-tokens", "64"]
    assert main(["eval", *flags, "--samples", "4", "--temperature", "1", "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert table["prompts"] == 6 and table["samples"] == 4
    assert table["avg@4"]["low"] <= table["avg@4"]["value"] <= table["pass@4"]["value"] <= 1
    assert table["pass@1"]["value"] == pytest.approx(table["avg@4"]["value"])
    assert "--temperature" in refused(capsys, "eval", *flags, "--samples", "4")


@pytest.mark.parametrize(("preset", "name"), [*(("paper", name) for name in PAPER), ("embedded", "sdft")])
def test_presets_hold_for_what_the_user_does_not_set(preset, name, monkeypatch):
    words = ["train", *MODELS, *LEDGER, "--preset", preset]
    run, chosen = parse([*words, name], monkeypatch), settings(preset, name)
    assert {field: getattr(run, field) for field in chosen} == chosen
    run = parse([*words, "--lr", "3", "--top-k", "7", "--trackers", "wandb", name], monkeypatch)
    assert (run.lr, run.sampling.top_k, run.trackers) == (3, 7, ("wandb",))
    kept = chosen.get("sampling", Sampling())
    assert run.batch == chosen.get("batch", 64) and run.sampling == replace(kept, top_k=7)


def test_also_adds_terms_at_a_weight():
    both = add_terms(METHODS["vopd"](), "gkd-forward:0.25")
    assert both == Method(
        (*METHODS["vopd"]().terms, *(type(t)(t.divergence, coef=0.25) for t in METHODS["gkd-forward"]().terms))
    )


def test_embedded_tokenizer_is_the_tokenizer_of_every_embedded_model():
    maps = [AutoTokenizer.from_pretrained(p).get_vocab() for p in EMBEDDED.iterdir() if (p / "config.json").exists()]
    assert all(m == maps[0] for m in maps)
