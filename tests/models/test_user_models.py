"""Models as users bring them: weights that are not there, unknown types, contexts by other names, multimodal models."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BloomConfig,
    GPT2Config,
    LlamaConfig,
    LlamaModel,
    MambaConfig,
    MptConfig,
    Phi3Config,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

import opd
from benchmarks.tiny_models import save_tiny
from opd.cli import main
from opd.core.errors import Refusal
from opd.models import load as models
from opd.models.context import UNLIMITED, context_of
from opd.models.source import EMBEDDED, locate
from tests.models.test_load import run
from tests.tiny_models import started, tiny

LAYER = "model.layers.1.mlp.up_proj.weight"
CPU = torch.device("cpu")


def rewritten(folder, change):
    """Change the tensors of a saved model."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return folder


def without(*names):
    return lambda tensors: {name: x for name, x in tensors.items() if name not in names}


FAULTS = {
    "missing": (without(LAYER), rf"lack {LAYER};"),
    "several missing": (
        lambda tensors: {name: x for name, x in tensors.items() if ".layers.1." not in name},
        r"lack model\.layers\.1\.input_layernorm\.weight, .* and 6 more;",
    ),
    "no head": (without("lm_head.weight"), r"lack lm_head\.weight;"),
    "unexpected": (
        lambda tensors: {**tensors, LAYER.replace("1", "2"): torch.zeros(4)},
        r"hold what the model has no place for, model\.layers\.2\.mlp\.up_proj\.weight;",
    ),
    "shape": (
        lambda tensors: {**tensors, "model.norm.weight": torch.zeros(5)},
        r"have another shape of model\.norm\.weight \[5\] for \[32\];",
    ),
    "prefix": (
        lambda tensors: {f"module.{name}": x for name, x in tensors.items()},
        r"lack lm_head\.weight, .* more and hold what the model has no place for, module\.lm_head\.weight, .* more;",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_files_that_do_not_hold_the_models_tensors_are_refused(tmp_path, fault):
    change, says = FAULTS[fault]
    folder = rewritten(tiny(tmp_path / "m", seed=1), change)
    with pytest.raises(Refusal, match=f"--teacher {folder}: its weights do not load: its files {says}") as caught:
        models.load(locate(str(folder), field="teacher"), field="teacher", dtype=torch.float32, device=CPU)
    assert "\n" not in str(caught.value)


def damaged(number):
    """Put a number into an embedding row that no probe reads."""

    def change(tensors):
        tensors["model.embed_tokens.weight"][120] = number
        return tensors

    return change


UNREADABLE = {
    "truncated": (lambda file: file.write_bytes(file.read_bytes()[:-9]), r"model\.safetensors is not a complete"),
    "empty": (lambda file: file.write_bytes(b""), r"model\.safetensors is not a complete safetensors file"),
    "pointer": (lambda file: file.write_text("version https://git-lfs"), r"model\.safetensors is not a complete"),
    "index": (
        lambda file: file.with_name("model.safetensors.index.json").write_text("{}"),
        r"its model\.safetensors\.index\.json is no index of weights",
    ),
    "shard": (
        lambda file: file.with_name("model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {LAYER: "model-00001-of-00002.safetensors"}})
        ),
        r"there is no model-00001-of-00002\.safetensors in it, beside model\.safetensors: download it again",
    ),
    "gguf": (
        lambda file: file.rename(file.with_name("model-Q4.gguf")),
        r"there is no model\.safetensors in it, beside model-Q4\.gguf: .* name a \.gguf file itself",
    ),
    "int8": (
        lambda file: rewritten(file.parent, lambda tensors: {**tensors, LAYER: tensors[LAYER].to(torch.int8)}),
        rf"holds 1 weights that are no floats, such as {LAYER} \(I8\), and config\.json has no quantization_config",
    ),
    "fp8": (
        lambda file: rewritten(file.parent, lambda tensors: {**tensors, LAYER: tensors[LAYER].to(torch.float8_e4m3fn)}),
        r"holds 1 weights that are no floats, such as .* \(F8_E4M3\)",
    ),
    "nan": (lambda file: rewritten(file.parent, damaged(float("nan"))), r"embed_tokens\.weight holds numbers that"),
    "inf": (lambda file: rewritten(file.parent, damaged(float("inf"))), r"embed_tokens\.weight holds numbers that"),
}


@pytest.mark.parametrize("fault", UNREADABLE)
def test_damaged_files_are_refused(tmp_path, fault):
    folder = tiny(tmp_path / "m", seed=1)
    change, says = UNREADABLE[fault]
    change(folder / "model.safetensors")
    with pytest.raises(Refusal, match=f"--model {folder}: its weights do not load: .*{says}") as caught:
        models.load(locate(str(folder), field="model"), field="model", dtype=torch.float32, device=CPU)
    assert "\n" not in str(caught.value)


SMALL = {
    "vocab_size": 145,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 32,
}
NO_LANGUAGE_MODELS = {
    "T5": lambda: T5ForConditionalGeneration(T5Config(vocab_size=145, d_model=32, d_kv=8, d_ff=32, num_layers=1)),
    "BERT": lambda: BertForMaskedLM(BertConfig(**SMALL)),
    "ViT": lambda: ViTModel(ViTConfig(**SMALL, image_size=16, patch_size=8)),
    "embedding": lambda: Qwen3Model(Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True)),
}


@pytest.mark.parametrize("kind", NO_LANGUAGE_MODELS)
def test_models_that_do_not_predict_the_next_token_are_refused(tmp_path, kind):
    model = NO_LANGUAGE_MODELS[kind]()
    model.save_pretrained(tmp_path)
    says = f"{type(model).__name__} is no language model that predicts the next token"
    with pytest.raises(Refusal, match=f"--teacher {tmp_path}: its .* do(es)? not load: {says}"):
        models.load(locate(str(tmp_path), field="teacher"), field="teacher", dtype=torch.float32, device=CPU)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["[]", "{", "null", '"text"'])
@pytest.mark.parametrize("command", ["train", "eval"])
def test_settings_that_are_no_settings_are_refused_by_their_file(tmp_path, capsys, file, text, command):
    folder = tiny(tmp_path / "m", seed=1)
    (folder / file).write_text(text)
    options = f"--prompts embedded:ledger-short --max-new-tokens 8 --out {tmp_path / 'out'}"
    flags = f"--student {folder} --teacher embedded:teacher vopd" if command == "train" else f"--model {folder}"
    assert main([command, *options.split(), *flags.split()]) == 2
    error = capsys.readouterr().err
    assert file in error and "Traceback" not in error and len(error.strip().splitlines()) == 1


def test_the_stop_ids_of_a_config_are_used_where_no_other_file_has_any(tmp_path):
    folder = tiny(tmp_path / "m", seed=1)
    (folder / "generation_config.json").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    settings_of(folder, eos_token_id=[5, 2])
    source = locate(str(folder), field="model")
    assert models.stop_ids(source, models.tokenizer(source, field="model")) == (2, 5)


def test_a_prompt_of_tokens_without_embeddings_is_refused(tmp_path, capsys):
    folder = tiny(tmp_path / "m", seed=1, rows=100)
    assert main(["eval", "--model", str(folder), "--prompts", "embedded:ledger-short"]) == 2
    assert "the model has 100 rows of embeddings: use the tokenizer" in capsys.readouterr().err


def test_a_reference_reads_prompts_within_its_context(tmp_path, capsys):
    folder = settings_of(tiny(tmp_path / "m", seed=1), max_position_embeddings=20)
    options = f"--prompts embedded:ledger-short --max-new-tokens 16 --out {tmp_path / 'out'} --no-doctor"
    models = f"--student embedded:student --teacher embedded:teacher --reference {folder} g-opd"
    assert main(["train", *options.split(), *models.split()]) == 2
    assert "20 tokens" in capsys.readouterr().err


def test_an_adapter_of_itself_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path)}))
    with pytest.raises(Refusal, match=r"--student .*: it is its own base; correct base_model_name_or_path"):
        locate(str(tmp_path), field="student")


def test_a_model_saved_without_its_head_is_refused(tmp_path):
    folder = tiny(tmp_path / "m", seed=1)
    LlamaModel(LlamaConfig.from_pretrained(folder)).save_pretrained(folder)
    with pytest.raises(Refusal, match=r"its files lack lm_head\.weight"):
        models.load(locate(str(folder), field="model"), field="model", dtype=torch.float32, device=CPU)


def test_tied_heads_and_buffers_of_old_versions_load(tmp_path):
    """A head that is stored although it is tied, and rotary frequencies, which old versions of transformers saved."""
    folder = tiny(tmp_path / "m", seed=1, tied=True)
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    rewritten(folder, lambda x: {**x, "lm_head.weight": x["model.embed_tokens.weight"].clone(), **old})
    models.load(locate(str(folder), field="model"), field="model", dtype=torch.float32, device=CPU)


COMMANDS = {
    "train student": ("train", "--student BAD --teacher GOOD vopd", "--student"),
    "train teacher": ("train", "--student GOOD --teacher BAD vopd", "--teacher"),
    "train reference": ("train", "--student GOOD --teacher OTHER --reference BAD g-opd", "--reference"),
    "doctor student": ("doctor", "--student BAD --teacher GOOD vopd", "--student"),
    "doctor teacher": ("doctor", "--student GOOD --teacher BAD vopd", "--teacher"),
    "eval": ("eval", "--model BAD", "--model"),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_every_command_names_the_tensor(tmp_path, capsys, case):
    command, flags, flag = COMMANDS[case]
    bad = rewritten(tiny(tmp_path / "bad", seed=1), without(LAYER))
    flags = flags.replace("OTHER", str(tiny(tmp_path / "other", seed=3)))
    flags = flags.replace("GOOD", str(tiny(tmp_path / "good", seed=2))).replace("BAD", str(bad))
    options = ["--prompts", "embedded:ledger-short", "--max-new-tokens", "8"]
    options += ["--out", str(tmp_path / "run"), "--steps", "1", "--batch", "2"] if command == "train" else []
    assert main([command, *options, *flags.split()]) == 2
    output = capsys.readouterr()
    assert f"{flag} {bad}: its weights do not load: its files lack {LAYER};" in output.out + output.err
    assert "Traceback" not in output.err and not (tmp_path / "run").exists()


def settings_of(folder, **changes):
    """Change the config.json of a saved model; None removes a setting."""
    file = folder / "config.json"
    settings = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in settings.items() if value is not None}))
    return folder


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "nonesuch"}, r"transformers [\d.]+ has no model_type 'nonesuch'; a newer one may"),
        ({"model_type": None}, r"it names no model_type; save the model with transformers' save_pretrained"),
        (
            {"model_type": "nonesuch", "auto_map": {"AutoConfig": "own.Own"}},
            r"its model_type 'nonesuch' comes with Python code of its own; read it, then add --trust-remote-code",
        ),
    ],
)
def test_a_type_that_transformers_does_not_know_is_one_line(tmp_path, changes, says):
    folder = settings_of(tiny(tmp_path / "m", seed=1), **changes)
    with pytest.raises(Refusal, match=f"--student {folder}: its config.json does not load: {says}"):
        models.config(locate(str(folder), field="student"), field="student")


@pytest.mark.parametrize(
    "changes",
    [
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"quantization_config": {"quant_method": "awq", "bits": 4}},
        {"quantization_config": {"quant_method": "nonesuch"}},
        {"attn_implementation": "flash_attention_2"},
        {"_attn_implementation": "nonesuch"},
        {"num_attention_heads": 5},
        {"hidden_act": "nonesuch"},
        {"rope_parameters": {"rope_type": "nonesuch", "rope_theta": 1e4}},
    ],
)
def test_a_model_that_a_library_cannot_build_is_one_line_or_loads(tmp_path, changes):
    folder = settings_of(tiny(tmp_path / "m", seed=1), **changes)
    try:
        models.load(locate(str(folder), field="student"), field="student", dtype=torch.float32, device=CPU)
    except Refusal as refusal:
        assert str(refusal).startswith((f"--student {folder}: its weights do", f"--student {folder}: its config.json"))
        assert "\n" not in str(refusal)


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        (LlamaConfig(max_position_embeddings=77), 77),
        (GPT2Config(n_positions=77), 77),
        (MptConfig(max_seq_len=77), 77),
        (BloomConfig(), UNLIMITED),
        (MambaConfig(), UNLIMITED),
    ],
)
def test_the_context_has_several_names(config, tokens):
    assert context_of(config).tokens == tokens


def test_rows_end_where_longrope_changes_its_factors():
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "rope_theta": 1e4}
    config = Phi3Config(
        hidden_size=32,
        num_attention_heads=4,
        max_position_embeddings=512,
        original_max_position_embeddings=64,
        rope_parameters={**rope, "original_max_position_embeddings": 64},
        pad_token_id=0,
    )
    assert context_of(config).tokens == 64
    assert str(context_of(config)) == "64 tokens (longrope changes its factors there, for the tokens before, too)"


MULTIMODAL = ("gemma3", "mistral3", "qwen2_5_vl", "qwen3_vl", "llama4")


@pytest.mark.parametrize("processes", [1, 2])
def test_parameters_without_gradients_train_and_resume(tmp_path, processes):
    """An indexer only selects tokens: nothing differentiates its scores."""
    for name, seed in (("s", 1), ("t", 2)):
        save_tiny("deepseek_v32", tmp_path / name, seed=seed)
    flags = f"--student {tmp_path}/s --teacher {tmp_path}/t --prompts embedded:ledger-short --batch 4 --no-doctor"
    whole = ["train", *f"{flags} --max-new-tokens 8 --steps 2 --save-every 1 --out {tmp_path}/a vopd".split()]
    start = main if processes == 1 else lambda command: started(command, processes)
    start(whole)
    last = tmp_path / "a" / "checkpoints" / "step-000002"
    straight = (last / "model.safetensors").read_bytes()
    shutil.rmtree(last)
    start([*whole, "--resume"])
    assert (last / "model.safetensors").read_bytes() == straight


@pytest.mark.parametrize("kind", MULTIMODAL)
def test_a_multimodal_model_trains_on_text_and_resumes(tmp_path, kind):
    """Parameters that text never reaches are frozen: their optimizer state would be missing from a checkpoint."""
    for name, seed in (("s", 1), ("t", 2)):
        save_tiny(kind, tmp_path / name, seed=seed)
        AutoTokenizer.from_pretrained(EMBEDDED / "teacher").save_pretrained(tmp_path / name)
    whole = replace(run(tmp_path / "s", tmp_path / "t", tmp_path / "a"), steps=2, save_every=1)
    straight = opd.train(whole)
    shutil.copytree(straight, tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "step-000002")
    opd.train(replace(whole, out=tmp_path / "b", resume=True))
    last = "checkpoints/step-000002/model.safetensors"
    assert (straight / last).read_bytes() == (tmp_path / "b" / last).read_bytes()
    before, after = load_file(tmp_path / "s" / "model.safetensors"), load_file(straight / last)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not [name for name in changed if "vision" in name or "visual" in name or "projector" in name]
