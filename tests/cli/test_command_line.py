"""The command line: what a person types, and one clear line with exit code 2 where it cannot work."""

import json
import os
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from importlib import import_module

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


@pytest.mark.parametrize("command", ["report x --out", "inspect", "train", "prune --out", "nosuch"])
@pytest.mark.parametrize("word", ["a\0b", "\ud800"])
def test_characters_that_no_shell_passes(capsys, command, word):
    assert refused(capsys, *command.split(), word).startswith(f"opd: {word!a}: ")


def test_unknown_method(capsys, tmp_path):
    assert "did you mean vopd-topk?" in train(capsys, tmp_path, method=("vopd-tokp",))
    assert "METHOD (`opd methods` lists them) must be given" in train(capsys, tmp_path, method=())
    assert "no_such_module" in train(capsys, tmp_path, method=("no_such_module:f",))
    assert "has no nothing" in train(capsys, tmp_path, method=("opd.methods:nothing",))
    assert "return an opd.Method" in train(capsys, tmp_path, method=("opd.losses.rewards:LogRatio",))
    assert "return an opd.Method" in train(capsys, tmp_path, method=("math:inf",))


def test_code_of_the_user_that_cannot_be_used(capsys, tmp_path, monkeypatch, rows):
    (tmp_path / "broken_code.py").write_text("def f(:\n")
    monkeypatch.chdir(tmp_path)
    file = ["--prompts", rows({"prompt": "1+1?", "answer": "2"})]
    assert "broken_code cannot be imported: SyntaxError" in train(capsys, tmp_path, method=("broken_code:f",))
    for verifier, says in (("broken_code:f", "cannot be imported: SyntaxError"), ("math:inf", "is a float")):
        assert says in train(capsys, tmp_path, "--verifier", verifier, prompts=file)
    assert "File name too long" in refused(capsys, "report", "x" * 5000)


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


def answered(capsys, tmp_path, rows, *args: str, columns: list[object], teacher: tuple[str, ...] = ()) -> str:
    """Train on rows with these values in the column `who`; the refusal."""
    file = rows(*({"prompt": "1+1?", "answer": "2", "who": value} for value in columns))
    models = ["--student", "embedded:student", *teacher]
    line = train(capsys, tmp_path, "--route-column", "who", *args, models=models, prompts=["--prompts", file])
    assert file in line
    return line


DEFAULT = ("--teacher", "embedded:teacher")


def test_a_route_that_no_row_has(capsys, tmp_path, rows):
    ask = partial(answered, capsys, tmp_path, rows)
    for teacher in ((), DEFAULT):
        line = ask("--route", "Math=embedded:teacher", columns=["math", "code"], teacher=teacher)
        assert "--route Math: no row of --prompts" in line and "in --route-column who (did you mean math?)" in line
        assert "the column has 'code', 'math'" in line
    line = ask("--route", "a=embedded:teacher", "--route-column", "whom", columns=["a"], teacher=DEFAULT)
    assert "--route-column whom: " in line and "(did you mean who?); there are who" in line
    line = ask("--route", "x=embedded:teacher", columns=[None, None], teacher=DEFAULT)
    assert "the column has nothing" in line


def test_a_row_without_a_route_needs_a_default_teacher(capsys, tmp_path, rows):
    ask = partial(answered, capsys, tmp_path, rows, "--route", "1=embedded:teacher")
    assert "1 of 2 rows" in (line := ask(columns=[1, 2])) and "have '2' there, and no --route has that name" in line
    assert "add --route 2=MODEL, or --teacher MODEL" in line
    assert "1 of 3 rows" in (line := ask(columns=["1", None, 1.0])) and "have nothing there" in line
    assert "--judge must be given" in train(
        capsys, tmp_path, "--route", "a=embedded:teacher", models=MODELS[:2], method=("ropd",)
    )
    held_out = ["--eval-prompts", "embedded:ledger-short"]
    line = train(
        capsys,
        tmp_path,
        *("--route", "1=embedded:teacher", "--route-column", "who", *held_out),
        models=MODELS[:2],
        prompts=["--prompts", rows({"prompt": "1+1?", "answer": "2", "who": 1})],
    )
    assert "rows of --eval-prompts embedded:ledger-short have nothing there" in line


def test_routes_reach_their_teachers_without_a_default(tmp_path, rows):
    """A number, its text and a float name the same route; the first rows of a run have both teachers."""
    names = [1, "1", 1.0, "b"]
    file = rows(*({"prompt": f"{i}+1?", "answer": "2", "who": names[i % 4]} for i in range(8)))
    routes = ["--route", "1=embedded:teacher", "--route", "b=embedded:small", "--route-column", "who"]
    size = ["--steps", "1", "--batch", "8", "--max-new-tokens", "4", "--no-doctor", "--quiet"]
    words = ["train", "--student", "embedded:student", *routes, "--prompts", file, *size]
    assert main([*words, "--out", str(tmp_path / "run"), "opd-full"]) == 0
    (row,) = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert row["reverse_kl.1"] != row["reverse_kl.b"] and "reverse_kl." not in row
    assert main([*words, "--out", str(tmp_path / "run"), "--resume", "opd-full"]) == 0


def test_a_value_that_looks_like_a_route_is_reported_beside_a_default_teacher(capsys, tmp_path, rows):
    file = rows(*({"prompt": f"{i}+1?", "answer": "2", "who": ["code", "Code", "math"][i % 3]} for i in range(6)))
    words = ["train", *MODELS, "--route", "code=embedded:small", "--route-column", "who", "--prompts", file]
    size = ["--steps", "1", "--batch", "2", "--max-new-tokens", "4", "--no-doctor"]
    assert main([*words, *size, "--out", str(tmp_path / "run"), "opd"]) == 0
    assert "2 prompts have 'Code' in --route-column who (did you mean code?)" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--verifier", "--prompt-column", "--answer-column", "--choices-column", "--subset"])
@pytest.mark.parametrize("source", ["embedded:ledger-short", "reasoning-gym:basic_arithmetic"])
def test_a_name_that_the_source_does_not_read_is_refused(capsys, tmp_path, flag, source):
    assert f"{flag} nope: is not read" in train(capsys, tmp_path, flag, "nope", prompts=["--prompts", source])
    assert f"{flag} nope: is not read" in refused(
        capsys, "eval", "--model", "embedded:student", "--prompts", source, flag, "nope"
    )


def test_a_verifier_of_held_out_rows_is_read_beside_embedded_prompts(capsys, tmp_path, rows):
    held_out = rows({"prompt": "1+1?", "gold": "2"})
    line = train(capsys, tmp_path, "--eval-prompts", held_out, "--answer-column", "glod")
    assert "--answer-column glod" in line and "answer, gold" not in line and "gold" in line
    assert "--verifier mathh is not known" in train(
        capsys, tmp_path, "--eval-prompts", held_out, "--answer-column", "gold", "--verifier", "mathh"
    )


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--eval-prompts nope.parquet", "--eval-prompts nope.parquet does not exist"),
        ("--eval-prompts embedded:ledgr", "--eval-prompts embedded:ledgr is not known"),
        ("--judge ema:7", "--judge ema:7: write ema:RATE"),
        ("--route a=ema:7", "--route a=ema:7: write ema:RATE"),
        ("--reference nope", "--reference nope: the method reads no reference model"),
        ("--teacher-tokenizer nope", "--teacher-tokenizer nope: is that of a server"),
        ("--route-column who", "--route-column who: there is no --route"),
        ("--top-k 1000", "--top-k 1000: the vocabulary has 145 tokens"),
        ("--system x --no-chat", "--system 'x': "),
        ('--template-args {"thinking":1}', "--template-args thinking: "),
    ],
)
def test_a_refusal_names_the_flag_that_was_typed(capsys, tmp_path, flags, says):
    line = train(capsys, tmp_path, *flags.split())
    assert line.startswith(f"opd: {says}") and "--prompts" not in line.replace("--eval-prompts", "")


def test_a_row_is_named_with_its_file_and_text(capsys, tmp_path, rows):
    file = rows({"prompt": "1+1?", "answer": "2"}, {"prompt": "9" * 600, "answer": "2"})
    line = train(capsys, tmp_path, "--eval-prompts", file)
    assert f"--eval-prompts {file}: row 1 ('9999" in line
    line = refused(capsys, "eval", "--model", "embedded:student", "--prompts", file)
    assert f"--prompts {file}: row 1 ('9999" in line


@pytest.mark.parametrize(
    "method", ["vopd-topk", "opd-topk", "opd-stratified", "eopd", "kat", "trb", "tropd", "npd", "sdpo"]
)
def test_more_tokens_than_the_vocabulary_has(capsys, tmp_path, method):
    line = train(capsys, tmp_path, method=(method, "--k", "146"))
    assert line == "opd: --k 146: the vocabulary has 145 tokens; lower it to 145 or less\n"


def test_listed_tokens_beyond_the_vocabulary(capsys, tmp_path):
    (tmp_path / "ids.json").write_text("[3, 145]")
    line = train(capsys, tmp_path, method=("rock-freeze", "--tokens", str(tmp_path / "ids.json")))
    assert "lists id 145, and the vocabulary ends at 144" in line
    words = ["variance", *MODELS, *LEDGER, "--rollouts", 6, "--methods", "vopd-topk:k=146"]
    assert "--methods vopd-topk:k=146: " in refused(capsys, *words)


def test_a_model_without_a_tokenizer(capsys, tmp_path):
    folder = tiny(tmp_path / "bare", seed=0)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    says = f"{folder}: its folder holds no tokenizer; copy the tokenizer files"
    assert says in train(capsys, tmp_path, models=["--student", folder, "--teacher", "embedded:teacher"])
    assert says in refused(capsys, "eval", "--model", folder, *LEDGER)


def test_evaluation_without_answers_leads_out(capsys, rows):
    words = ["eval", "--model", "embedded:student", "--prompts", rows({"prompt": "1+1?"})]
    assert "train without scores by --verifier none" in refused(capsys, *words)
    line = refused(capsys, *words, "--verifier", "none")
    assert "needs problems with answers" in line and "--answer-column" in line


def test_warnings_are_lines_without_a_place_in_the_code(tmp_path, rows):
    """In a process of its own, because libraries warn once."""
    answers = ({"answer": "2"}, {"answer": ""})
    file = rows(*({"prompt": f"{i}+1?", **answers[i % 2], "image": "x.png"} for i in range(4)))
    words = [*MODELS, "--prompts", file, "--out", str(tmp_path / "run"), "--lora-rank", "2", "--lora-targets", "q_proj"]
    size = ["--steps", "1", "--batch", "2", "--max-new-tokens", "4", "--no-doctor"]
    command = [sys.executable, "-m", "opd", "train", *words, *size, "vopd"]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0 and "Warning" not in done.stderr and ".py" not in done.stderr
    assert f"warning: 2 of 4 rows of {file} have no answer" in done.stderr
    assert f"warning: {file}: column 'image' is not used" in done.stderr


@pytest.mark.parametrize(("steps", "advice"), [(1, False), (2, True)])
def test_an_interrupted_run_is_resumed_unless_it_is_complete(capsys, tmp_path, monkeypatch, steps, advice):
    trainer = import_module("opd.training.trainer").Trainer
    step = trainer.step

    def interrupted(self, number, memory):
        os.kill(os.getpid(), signal.SIGINT)
        return step(self, number, memory)

    monkeypatch.setattr(trainer, "step", interrupted)
    words = ["train", *MODELS, *LEDGER, "--steps", steps, "--batch", 2, "--max-new-tokens", 4, "--no-doctor"]
    assert main([str(word) for word in (*words, "--out", tmp_path / "run", "vopd")]) == (130 if advice else 0)
    assert ("the same command with --resume continues" in capsys.readouterr().err) == advice
    assert (tmp_path / "run" / "checkpoints" / "step-000001").is_dir()


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
    assert "not empty; name another folder" in line
    (tmp_path / "run" / "config.json").write_text("{}")
    line = refused(capsys, "train", *MODELS, *LEDGER, "--out", tmp_path / "run", "vopd")
    assert "add --resume to go on" in line and (tmp_path / "run" / "metrics.jsonl").read_text() == "precious\n"


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
        (
            ["eval", "--model", "x", "--prompts", "y", "z"],
            "z: belongs to no flag (--prompts takes one value); `opd eval --help`",
        ),
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
    chosen = settings(preset, name)
    models = MODELS[:2] if "teacher" in chosen else MODELS
    words = ["train", *models, *LEDGER, "--preset", preset]
    run = parse([*words, name], monkeypatch)
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
