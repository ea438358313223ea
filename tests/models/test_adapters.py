"""Adapters wherever a model is named: merged into their base, trained further, saved to load from anywhere."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import opd
from opd import cli
from opd.config.commands import Serve
from opd.core.errors import Refusal
from opd.methods import METHODS
from opd.models import adapters
from opd.models import load as models
from opd.models.checkpoints import newest_checkpoint
from opd.models.source import EMBEDDED, ModelSource, locate
from opd.models.verify import verify_head
from opd.teachers.serve.server import _open
from scripts import fake_hub
from tests.tiny_models import interrupted_at, logged, small, started, tiny

CPU = torch.device("cpu")
IDS = torch.arange(3, 15)[None]


def located(name: object) -> ModelSource:
    return locate(str(name), field="model")


def loaded(name: object, dtype: torch.dtype = torch.float32):
    return models.load(located(name), field="model", dtype=dtype, device=CPU)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(input_ids=IDS, use_cache=False).logits


def checkpoint(run: Path) -> Path:
    found, _ = newest_checkpoint(run)
    assert found is not None
    return found


def settings(run: Path) -> dict:
    return json.loads((checkpoint(run) / "adapter_config.json").read_text())


def adapter(folder: Path, base: Path, **options: object) -> Path:
    """An adapter that peft saved, with numbers that matter."""
    torch.manual_seed(5)
    plain = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(**{"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options})
    model = get_peft_model(plain, config)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(pair, tmp_path_factory) -> Path:
    """A LoRA run of two steps from local folders."""
    out = tmp_path_factory.mktemp("lora") / "run"
    return opd.train(small(pair, out, steps=2, lora_rank=4))


def test_a_run_is_its_merged_weights(run, pair):
    """As peft computes base plus adapter; a plain model, whose layers and head are plain."""
    merged, peft = loaded(run), AutoPeftModelForCausalLM.from_pretrained(checkpoint(run))
    torch.testing.assert_close(logits(merged), logits(peft), rtol=1e-4, atol=1e-4)
    assert (logits(merged) - logits(loaded(pair[0]))).abs().max() > 0.01  # the adapter has learnt
    assert not isinstance(merged, PeftModel) and not any("lora" in name for name, _ in merged.named_modules())
    assert all(p.requires_grad for p in merged.parameters())
    verify_head(merged, field="model")
    assert loaded(checkpoint(run), torch.bfloat16).dtype == torch.bfloat16


def test_the_base_is_recorded_as_an_absolute_path(pair, tmp_path, monkeypatch):
    """Named from its own folder, loaded from another."""
    monkeypatch.chdir(pair[0].parent)
    out = opd.train(small(("student", pair[1]), tmp_path / "run", steps=1, lora_rank=2))
    monkeypatch.chdir(tmp_path)
    assert settings(out)["base_model_name_or_path"] == str(pair[0]) and settings(out)["revision"] is None
    torch.testing.assert_close(
        logits(AutoPeftModelForCausalLM.from_pretrained(checkpoint(out))), logits(loaded(out)), rtol=1e-4, atol=1e-4
    )


def test_the_embedded_base_is_recorded_as_its_folder(tmp_path):
    pair = ("embedded:student", "embedded:teacher")
    out = opd.train(small(pair, tmp_path / "run", steps=1, lora_rank=2))
    assert settings(out)["base_model_name_or_path"] == str(EMBEDDED / "student")
    AutoPeftModelForCausalLM.from_pretrained(checkpoint(out))


def test_a_base_of_the_hub_is_recorded_with_its_commit(pair, tmp_path, monkeypatch):
    """Its main branch moves on; the adapter stays with the weights that it was trained on, for peft too."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    commit = fake_hub.add(tmp_path / "hf", "Qwen/Qwen3-0.6B", pair[0])
    out = opd.train(small(("Qwen/Qwen3-0.6B", pair[1]), tmp_path / "run", steps=1, lora_rank=2))
    fake_hub.add(tmp_path / "hf", "Qwen/Qwen3-0.6B", tiny(tmp_path / "other", seed=9))
    assert (settings(out)["base_model_name_or_path"], settings(out)["revision"]) == ("Qwen/Qwen3-0.6B", commit)
    base = located(out).base
    assert base is not None and Path(base.folder).name == commit
    torch.testing.assert_close(
        logits(AutoPeftModelForCausalLM.from_pretrained(checkpoint(out))), logits(loaded(out)), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("rank", [0, 2])
def test_a_student_goes_on_from_its_merged_weights(run, pair, tmp_path, rank):
    """All weights, or a new adapter over them, whose base is written once: the run of a student saved merged."""
    out = opd.train(small((run, pair[1]), tmp_path / "run", steps=2, lora_rank=rank))
    plain = tmp_path / "plain"
    loaded(run).save_pretrained(plain)
    models.tokenizer(located(run), field="model").save_pretrained(plain)
    again = opd.train(small((plain, pair[1]), tmp_path / "again", steps=2, lora_rank=rank))
    assert logged(out) == logged(again)
    assert (out / "base").is_dir() == (rank > 0) and not (again / "base").exists()
    assert (logits(loaded(out)) - logits(loaded(run))).abs().max() > 1e-3
    if rank:
        assert settings(out)["base_model_name_or_path"] == str(out / "base")
        wanted, saved = load_file(plain / "model.safetensors"), load_file(out / "base" / "model.safetensors")
        assert wanted.keys() == saved.keys() and all(torch.equal(wanted[name], saved[name]) for name in wanted)
        torch.testing.assert_close(logits(loaded(out / "base")), logits(loaded(run)))
        torch.testing.assert_close(
            logits(AutoPeftModelForCausalLM.from_pretrained(checkpoint(out))), logits(loaded(out)), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_over_merged_weights_resumes_bitwise(run, pair, tmp_path, precision):
    """Although the student's folder has a newer checkpoint by then, and a worker process writes the rollouts."""
    student = tmp_path / "student"
    shutil.copytree(run, student)
    changes = {"steps": 4, "lora_rank": 2, "save_every": 1, "precision": precision, "worker": True}
    whole = opd.train(small((student, pair[1]), tmp_path / "whole", **changes))
    cut = small((student, pair[1]), tmp_path / "cut", **changes)
    with pytest.raises(KeyboardInterrupt), interrupted_at(3):
        opd.train(cut)
    newer = student / "checkpoints" / "step-000009"
    shutil.copytree(checkpoint(student), newer)
    file = newer / "adapter_model.safetensors"
    save_file({name: 2 * x for name, x in load_file(file).items()}, file)
    assert logged(opd.train(replace(cut, resume=True))) == logged(whole)
    one, two = (load_file(checkpoint(out) / "adapter_model.safetensors") for out in (whole, tmp_path / "cut"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_two_processes_write_one_base(run, pair, tmp_path):
    """The numbers of one process, up to the order of sums."""
    flags = f"--student {run} --teacher {pair[1]} --prompts embedded:ledger-short --batch 8 --max-new-tokens 16"
    found = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        command = ["train", *flags.split(), "--lora-rank", "2", "--steps", "2", "--out", str(out)]
        started([*command, "vopd"], processes)
        assert settings(out)["base_model_name_or_path"] == str(out / "base")
        found.append((logged(out), load_file(out / "base" / "model.safetensors")))
    for one, two in zip(found[0][0], found[1][0], strict=True):
        assert one == pytest.approx(two, rel=1e-3, abs=1e-4)
    assert all(torch.equal(found[0][1][name], x) for name, x in found[1][1].items())


def test_a_refused_run_and_the_doctor_write_no_base(run, pair, tmp_path, capsys):
    args = ["--student", str(run), "--prompts", "embedded:ledger-short", "--batch", "4", "--max-new-tokens", "8"]
    out = ["--out", str(tmp_path / "out"), "--lora-rank", "2"]
    cli.main(["doctor", *args, *out, "--teacher", str(pair[1]), "vopd"])
    assert cli.main(["train", *args, *out, "--teacher", str(tmp_path / "none"), "vopd"]) == 2
    assert not (tmp_path / "out").exists()


def test_a_run_folder_may_move_with_its_base(run, pair, tmp_path):
    out = opd.train(small((run, pair[1]), tmp_path / "run", steps=1, lora_rank=2))
    before = logits(loaded(out))
    moved = Path(shutil.move(out, tmp_path / "moved"))
    assert torch.equal(logits(loaded(moved)), before)


def test_a_checkpoint_with_a_relative_base_still_loads_where_it_did(run, pair, tmp_path, monkeypatch):
    """As opd wrote them before it recorded absolute paths."""
    old = tmp_path / "old"
    shutil.copytree(checkpoint(run), old)
    file = old / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": pair[0].name}))
    monkeypatch.chdir(pair[0].parent)
    assert torch.equal(logits(loaded(old)), logits(loaded(run)))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        Refusal, match=f"--model {old}: the base model of this adapter, student, is missing: "
    ) as caught:
        located(old)
    assert "\n" not in str(caught.value) and str(file) in str(caught.value)


@pytest.mark.parametrize("base", ["/none/at-all", "Qwen/Qwen3-0.6B", ""])
def test_a_missing_base_is_named(run, tmp_path, capsys, monkeypatch, base):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = tmp_path / "adapter"
    shutil.copytree(checkpoint(run), folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": base}))
    pair = ["--teacher", "embedded:teacher", "--prompts", "embedded:ledger-short", "--out", str(tmp_path / "out")]
    for args in (["train", "--student", str(folder), *pair, "vopd"], ["serve", str(folder), "--port", "0"]):
        assert cli.main(args) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert (f"the base model of this adapter, {base}, is missing" if base else "names no base model") in line
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_every_frozen_role(run, pair, tmp_path):
    """Teacher, one of several, reference and judge: the numbers of its merged weights."""
    plain, rows_of_x = tmp_path / "plain", tmp_path / "rows.jsonl"
    loaded(run).save_pretrained(plain)
    models.tokenizer(located(run), field="model").save_pretrained(plain)
    rows_of_x.write_text('{"prompt": "Jan: +1", "answer": "1", "teacher": "x"}\n' * 8)
    roles = {
        "teacher": lambda m: {"teacher": str(m)},
        "route": lambda m: {"route": (f"x={m}",), "prompts": str(rows_of_x)},
        "reference": lambda m: {"reference": str(m), "method": METHODS["g-opd"]()},
        "text": lambda m: {"teacher": str(m), "method": METHODS["omniopd"]()},
    }
    for role, changes in roles.items():
        rows = [
            logged(opd.train(small(pair, tmp_path / role / name, steps=1, doctor=False, **changes(model))))
            for name, model in (("adapter", run), ("plain", plain))
        ]
        assert rows[0] == rows[1], role


def test_an_adapter_is_evaluated_served_and_pruned(run, pair, tmp_path, capsys):
    more = ["--prompts", "embedded:ledger-short", "--limit", "2", "--max-new-tokens", "8"]
    assert cli.main(["eval", "--model", str(run), "--against", str(checkpoint(run)), *more]) == 0
    served = _open(Serve(model=str(run)))
    assert torch.equal(logits(served.model), logits(loaded(run)))
    assert cli.main(["prune", "--model", str(run), "--keep", "0-1", "--out", str(tmp_path / "pruned")]) == 0
    torch.testing.assert_close(logits(loaded(tmp_path / "pruned")), logits(loaded(run)))
    assert cli.main(["prune", "--model", str(run), "--keep", "1", "--out", str(tmp_path / "half")]) == 0
    assert not located(tmp_path / "half").base


def test_rock_and_variance_take_adapters(run, pair, tmp_path):
    both = ["--student", str(run), "--teacher", str(pair[1]), "--prompts", "embedded:ledger-short"]
    before = ["--context-filter", "--before", str(run)]
    short = ["--max-new-tokens", "8"]
    assert cli.main(["rock", *both, *short, "--rollouts", "4", *before, "--out", str(tmp_path / "r.json")]) == 0
    assert cli.main(["variance", *both, *short, "--rollouts", "8", "--methods", "vopd"]) == 0


def test_an_adapter_of_peft_without_tokenizer_or_over_an_adapter(pair, tmp_path):
    """The tokenizer, configuration and stop ids are the base's; a base may be an adapter itself."""
    folder = adapter(tmp_path / "first", pair[0])
    peft = AutoPeftModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits(loaded(folder)), logits(peft), rtol=1e-4, atol=1e-4)
    source, base = located(folder), located(pair[0])
    vocabulary = lambda s: models.tokenizer(s, field="model").get_vocab()
    assert vocabulary(source) == vocabulary(base)
    text = models.tokenizer(base, field="model")
    assert models.stop_ids(source, text) == models.stop_ids(base, text)
    second = adapter(tmp_path / "second", pair[0])
    file = second / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": str(folder)}))
    plain = PeftModel.from_pretrained(loaded(folder), second)
    torch.testing.assert_close(logits(loaded(second)), logits(plain), rtol=1e-4, atol=1e-4)


def test_an_adapter_on_the_hub(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    folder = adapter(tmp_path / "adapter", pair[0])
    fake_hub.add(tmp_path / "hf", "me/adapter.v2@v1", folder)
    assert torch.equal(logits(loaded("me/adapter.v2@v1")), logits(loaded(folder)))


def test_an_adapter_on_an_untied_head_is_merged_and_on_a_tied_one_refused(pair, tmp_path):
    folder = adapter(tmp_path / "untied", pair[0], target_modules=["lm_head", "q_proj"])
    peft = AutoPeftModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits(loaded(folder)), logits(peft), rtol=1e-4, atol=1e-4)
    tied = tiny(tmp_path / "tied", seed=1, tied=True)
    with pytest.raises(Refusal, match="share one weight in its base"):
        loaded(adapter(tmp_path / "a", tied, target_modules=["lm_head", "q_proj"]))


def test_what_cannot_be_merged_is_refused(pair, tmp_path):
    plain = AutoModelForCausalLM.from_pretrained(pair[0])
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(plain, config).save_pretrained(tmp_path / "prefix")
    with pytest.raises(Refusal, match="a PREFIX_TUNING adapter has no weights to merge"):
        loaded(tmp_path / "prefix")
    shorter = tiny(tmp_path / "one", seed=1, layers=1)
    for name, (base, wrong) in {"fewer": (shorter, pair[0]), "more": (pair[0], shorter)}.items():
        folder = adapter(tmp_path / name, base, target_modules=["q_proj", "v_proj"])
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": str(wrong)}))
        with pytest.raises(Refusal, match="the adapter does not fit its base"):
            loaded(folder)
    other = adapter(tmp_path / "wide", pair[0])
    file = other / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": str(pair[1])}))
    with pytest.raises(Refusal, match="its weights do not load") as caught:
        loaded(other)
    assert "\n" not in str(caught.value)
    (other / "adapter_model.safetensors").rename(other / "adapter_model.bin")
    with pytest.raises(Refusal, match=r"a pickle \(adapter_model\.bin\)"):
        loaded(other)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_named(pair, tmp_path, value):
    folder = adapter(tmp_path / "a", pair[0], target_modules=["q_proj"])
    weights = load_file(folder / "adapter_model.safetensors")
    name = sorted(weights)[-1]
    weights[name][0, 0] = value
    save_file(weights, folder / "adapter_model.safetensors")
    with pytest.raises(Refusal, match=f"{re.escape(name)} holds numbers that are not finite"):
        loaded(folder)


def test_more_rows_of_embeddings_than_the_base_has_are_refused(pair, tmp_path):
    plain = AutoModelForCausalLM.from_pretrained(pair[0])
    plain.resize_token_embeddings(len(plain.get_input_embeddings().weight) + 3)
    model = get_peft_model(plain, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    with pytest.raises(Refusal, match=r"the adapter has \d+ rows of embeddings and its base \d+"):
        loaded(tmp_path / "a")


def test_saving_the_base_restores_every_name(pair, tmp_path):
    plain = AutoModelForCausalLM.from_pretrained(pair[0])
    wanted = {name: x.clone() for name, x in plain.state_dict().items()}
    model = get_peft_model(plain, LoraConfig(r=2, target_modules=["lm_head", "q_proj", "embed_tokens"]))
    adapters.save_base(model, model.state_dict(), models.tokenizer(located(pair[0]), field="model"), tmp_path / "base")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "base").state_dict()
    assert wanted.keys() == saved.keys() and all(torch.equal(wanted[name], saved[name]) for name in wanted)
