"""`python -m benchmarks architectures`: what it calls OK, refused, crashed and not built, and what it measures."""

import os
import subprocess
import sys
import time

import pytest
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

from benchmarks import architectures
from benchmarks.__main__ import main
from benchmarks.architectures import Examination, examined, largest_differences, two_steps
from benchmarks.tiny_models import TYPES, save_tiny, tiny_config
from opd.training.train import train


def test_a_sweep_of_three_types(tmp_path):
    page = tmp_path / "page.md"
    names = "gemma2,bert-generation,pix2struct"
    command = [sys.executable, "-m", "benchmarks", "architectures", "--only", names, "--jobs", "2", "--table", page]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(
        "3 types: 1 OK (0 of them above 0.001 nats), 1 refused, 0 crashed, 1 "
    )
    rows = [line.split(" | ") for line in page.read_text().splitlines() if line.startswith("| ")][2:]
    assert [row[0] for row in rows] == ["| gemma2", "| bert-generation", "| pix2struct"]
    assert rows[0][1:3] == ["Gemma2ForCausalLM", "OK"] and float(rows[0][3].split()[0]) < 1e-4
    assert rows[1][2].startswith("refused: --student: BertGenerationDecoder looks at tokens to the right")
    assert rows[2][2].startswith("not built: ValueError: You have to specify flattened_patches")


def test_a_process_that_dies_or_hangs_is_a_crash(monkeypatch):
    def examine(name, folder):
        print("noise")
        if name == "dies":
            os._exit(3)
        if name == "hangs":
            time.sleep(60)
        return Examination(name, "Model", "OK", "", 1e-6)

    monkeypatch.setattr(architectures, "examine", examine)
    findings = {f.model_type: f for f in examined(("dies", "hangs", "ends"), jobs=3, timeout=5)}
    assert findings["dies"].verdict() == "CRASH: exit code 3"
    assert findings["hangs"].verdict() == "CRASH: did not end in 5 s"
    assert findings["ends"] == Examination("ends", "Model", "OK", "", 1e-6)


@pytest.mark.parametrize(
    ("outcome", "difference", "fails"),
    [
        ("OK", 1e-5, False),
        ("OK", 2e-3, True),
        ("OK", float("nan"), True),
        ("CRASH", None, True),
        ("refused", None, False),
        ("not built", None, False),
    ],
)
def test_the_exit_code_tells_crashes_and_wrong_log_probs(outcome, difference, fails, monkeypatch, capsys):
    finding = Examination("llama", "LlamaForCausalLM", outcome, "", difference)
    monkeypatch.setattr(architectures, "examined", lambda types, jobs, timeout: iter([finding]))
    assert main(["architectures", "--only", "llama"]) == int(fails)
    assert outcome in capsys.readouterr().out


def test_the_differences_see_another_model(tmp_path):
    folders = {name: tmp_path / name for name in ("student", "teacher")}
    for seed, folder in enumerate(folders.values()):
        save_tiny("llama", folder, seed=seed)
    run = tmp_path / "run"
    train(two_steps(folders, run))
    student, teacher = (AutoModelForCausalLM.from_pretrained(folder) for folder in folders.values())
    tokenizer = AutoTokenizer.from_pretrained(folders["student"])
    right = largest_differences(run, {"student": student, "teacher": teacher}, tokenizer)
    assert right.keys() == {"student_logp", "sampler_logp", "teacher_logp"} and 0 < max(right.values()) < 1e-4
    wrong = largest_differences(run, {"student": teacher, "teacher": student}, tokenizer)
    assert min(wrong.values()) > 1


@pytest.mark.parametrize("name", ["gemma3_text", "qwen3_next", "deepseek_v3", "gpt2", "qwen2_5_vl", "kimi_linear"])
def test_a_small_configuration_has_every_kind_of_layer(name):
    small, default = (config.get_text_config() for config in (tiny_config(name), CONFIG_MAPPING[name]()))
    assert small.vocab_size == 145 and small.hidden_size == 32 and small.num_hidden_layers <= 8
    for kinds in ("layer_types", "mlp_layer_types"):
        assert set(getattr(small, kinds, ())) == set(getattr(default, kinds, ()))


def test_an_unknown_type_is_refused(capsys):
    assert main(["architectures", "--only", "llama,lama"]) == 2
    assert capsys.readouterr().err.startswith("benchmarks: --only lama: no type of transformers' language models")
    assert {"llama", "gemma3", "mistral3", "llama4", "llama4/image-text"} < set(TYPES)
