"""Models and settings at the edge of numbers: the run ends with finite numbers and weights, or is refused in a line.

Each attempt draws a vocabulary, sizes of logits, a dtype, lengths and a method, or one damaged tensor of a model.
"""

import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from opd.models.source import EMBEDDED
from tests.campaigns import Counts
from tests.campaigns.commands import MODELS, run_command

LIMIT = 400.0  # seconds after which a run hangs
METHODS = "vopd opd opd-full gkd kat topd opd-zscore reopold entropy scope fire tropd trb eopd iw-opd opd-clip".split
VOCABULARIES = (145, 145, 1000, 32_768, 262_144)  # the embedded tokenizer has 145 ids
SCALES = (1e-30, 1.0, 1e3, 1e4, 1e20, 1e38)
VALUES = (math.nan, math.inf, -math.inf)
SETTINGS = (
    "--lr 1e3", "--lr 1e30", "--weight-decay 1e30", "--max-grad-norm 1e-300", "--temperature 1e-6", "--temperature 1e6",
    "--loss-temperature 1e-6", "--loss-temperature 1e30", "--top-k 1", "--top-p 1e-9", "--lora-rank 4096",
    "--lora-rank 2 --lora-alpha 1e30", "--micro-batch-tokens 1 --decode-rows 1 --chunk-mb 1", "--seed 4294967295",
    "--max-new-tokens 1", "--max-new-tokens 3 --truncated drop", "--batch 1", "--stop-token mask", "--precision bf16",
    "--chunk-mb 1", "--logit-precision bf16",
)  # fmt: skip


def run(folder: Path, count: int, seed: int) -> Counts:
    """Train `count` runs of two steps, one of them with 16,000 generated tokens."""
    draw, counts = random.Random(seed), Counts()
    for number in range(count):
        place = folder / "attempt"
        place.mkdir()
        what, words = _long(place) if number == 10 else draw.choice(_KINDS)(place, draw)
        outcome = run_command(["train", *words, "--out", str(place / "run"), "--quiet", "--no-doctor"], LIMIT)
        # SIGILL cannot be told from a fault of ours, so it is one.
        fault = outcome.fault() or ("" if outcome.code else _not_finite(place / "run"))
        counts.tried += 1
        counts.survived += not fault and outcome.code == 0
        counts.refused += not fault and outcome.code == 2
        if fault:
            counts.lost += 1
            counts.details.append(f"{what}: {fault}: {outcome.last_line()}")
        shutil.rmtree(place)
    return counts


def _not_finite(run: Path) -> str:
    """Return what a finished run saved that is not finite."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    bad = {name for row in rows for name in ("loss", "reverse_kl") if not math.isfinite(row.get(name, 0.0))}
    if bad and not any(row["refused"] for row in rows):
        return f"{', '.join(sorted(bad))} not finite, and no step refused"
    for path in run.rglob("checkpoints/*/*.safetensors"):
        if any(not x.isfinite().all() for x in load_file(path).values()):
            return f"{path.parent.name} holds numbers that are not finite"
    return ""


def _sizes(draw: random.Random) -> list[str]:
    return [*MODELS[4:], "--batch", "4", "--steps", "2", "--max-new-tokens", str(draw.choice((1, 8, 24)))]


def _model(folder: Path, vocabulary: int, seed: int, scale: float, context: int = 512) -> str:
    """Save a random model of one layer with the embedded tokenizer, its logits multiplied by `scale`."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / "student")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Qwen2Config(
        vocab_size=vocabulary, num_key_value_heads=1, max_position_embeddings=context, tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **sizes,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
        model.model.norm.weight.mul_(scale)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def _large(place: Path, draw: random.Random) -> tuple[str, list[str]]:
    """Draw vocabularies and sizes of logits."""
    vocabulary, scales = draw.choice(VOCABULARIES), [draw.choice(SCALES) for _ in range(2)]
    method, precision = draw.choice(METHODS()), draw.choice(("fp32", "fp32", "bf16"))
    student, teacher = (_model(place / str(i), vocabulary, i, scales[i]) for i in range(2))
    words = ["--student", student, "--teacher", teacher, "--precision", precision, *_sizes(draw)]
    return f"{method}, {vocabulary} ids, logits x {scales}, {precision}", [*words, method]


def _damaged(place: Path, draw: random.Random) -> tuple[str, list[str]]:
    """Draw a model, a tensor of it, and a value that some of its numbers get."""
    role = draw.choice(("student", "teacher"))
    shutil.copytree(EMBEDDED / role, place / role)
    weights = load_file(place / role / "model.safetensors")
    name, value = draw.choice(sorted(weights)), draw.choice(VALUES)
    weights[name].view(-1)[draw.randrange(weights[name].numel())] = value
    save_file(weights, place / role / "model.safetensors", metadata={"format": "pt"})
    models = {"student": "embedded:student", "teacher": "embedded:teacher"} | {role: str(place / role)}
    method = draw.choice(METHODS())
    words = ["--student", models["student"], "--teacher", models["teacher"], *_sizes(draw), method]
    return f"{method}, {value} in {name} of the {role}", words


def _setting(place: Path, draw: random.Random) -> tuple[str, list[str]]:
    """Draw a setting at the edge of its range."""
    method, setting = draw.choice(METHODS()), draw.choice(SETTINGS)
    return f"{method}, {setting}", [
        *MODELS,
        "--batch",
        "4",
        "--steps",
        "6",
        "--max-new-tokens",
        "12",
        *setting.split(),
        method,
    ]


def _long(place: Path) -> tuple[str, list[str]]:
    """Return a run in which a model that never stops generates 16,000 tokens."""
    student, teacher = (_model(place / str(i), 145, i, 1e-30, context=20_000) for i in range(2))
    words = ["--student", student, "--teacher", teacher, *MODELS[4:], "--batch", "1", "--steps", "1"]
    return "16,000 tokens", [*words, "--max-new-tokens", "16000", "vopd"]


_KINDS: tuple[Callable[[Path, random.Random], tuple[str, list[str]]], ...] = (_large, _damaged, _setting)
