"""Models and settings at the edge of numbers: the run ends with finite numbers and weights, or is refused in a line.

Half of the attempts are cells of a matrix: precision, size of the logits, vocabulary, length of the responses.  The
others draw one damaged tensor of a model, or a setting at the edge of its range.
"""

import itertools
import json
import math
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from opd.models.source import EMBEDDED
from tests.campaigns import Counts
from tests.campaigns.commands import MODELS, run_command

LIMIT = 400.0  # seconds after which a run hangs
METHODS = "vopd opd opd-full gkd kat topd opd-zscore reopold entropy scope fire tropd trb eopd iw-opd opd-clip".split
PRECISIONS = ("fp32", "bf16")
SCALES = (1e-30, 1.0, 1e3, 1e4, 1e20, 1e38)
VOCABULARIES = (2, 145, 1000, 32_768, 262_144)  # the embedded tokenizer has 145 ids
LENGTHS = (0, 1, 24)  # tokens that are trained on: with 0 a response is a stop token, which is masked
LONG = 16_000  # tokens of the one long response
STORED = (torch.float32, torch.float32, torch.bfloat16, torch.float16)  # dtypes of model files
VALUES = (math.nan, math.inf, -math.inf)
SETTINGS = (
    "--lr 1e3", "--lr 1e30", "--weight-decay 1e30", "--max-grad-norm 1e-300", "--temperature 1e-6", "--temperature 1e6",
    "--loss-temperature 1e-6", "--loss-temperature 1e30", "--top-k 1", "--top-p 1e-9", "--lora-rank 4096",
    "--lora-rank 2 --lora-alpha 1e30", "--micro-batch-tokens 1 --decode-rows 1 --chunk-mb 1", "--seed 4294967295",
    "--max-new-tokens 1", "--max-new-tokens 3 --truncated drop", "--batch 1", "--stop-token mask", "--precision bf16",
    "--chunk-mb 1", "--logit-precision bf16",
)  # fmt: skip


def run(folder: Path, count: int, seed: int) -> Counts:
    """Train `count` runs of a few steps, one of them with a response of 16,000 tokens."""
    draw, counts = random.Random(seed), Counts()
    cells = _cells(draw)
    for number in range(count):
        place = folder / "attempt"
        place.mkdir()
        if number == 10:
            what, words = _long(place)
        elif number % 2:
            what, words = draw.choice((_damaged, _setting))(place, draw)
        else:
            what, words = _matrix(place, draw, *next(cells))
        outcome = run_command(["train", *words, "--out", str(place / "run"), "--quiet", "--no-doctor"], LIMIT)
        # SIGILL cannot be told from a fault of ours, so it is one.
        fault = outcome.fault() or ("" if outcome.code else _wrong(place / "run", LONG if number == 10 else 0))
        counts.add(f"{what}: {outcome.last_line()}", fault, refused=outcome.code == 2)
        shutil.rmtree(place)
    return counts


def _wrong(run: Path, length: int) -> str:
    """Return what a finished run saved that is not finite, or that its longest response had another length."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    bad = ["loss" for row in rows if not math.isfinite(row.get("loss", 0.0))]
    # A KL may lie beyond the range of fp32, beside a bounded loss.
    bad += ["reverse_kl" for row in rows if math.isnan(row.get("reverse_kl", 0.0))]
    if length and rows[0]["length_max"] != length:
        return f"the response has {rows[0]['length_max']:.0f} tokens"
    if bad and not any(row["refused"] for row in rows):
        return f"{', '.join(sorted({*bad}))} not finite, and no step refused"
    for path in run.rglob("checkpoints/*/*.safetensors"):
        if any(not x.isfinite().all() for x in load_file(path).values()):
            return f"{path.parent.name} holds numbers that are not finite"
    return ""


def _cells(draw: random.Random) -> Iterator[tuple[str, float, int, int]]:
    """Return the cells of the matrix in a drawn order, again and again."""
    cells = list(itertools.product(PRECISIONS, SCALES, VOCABULARIES, LENGTHS))
    draw.shuffle(cells)
    return itertools.cycle(cells)


def _tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Return the embedded tokenizer, or one of two ids: each word is an `a`, and there is a stop token."""
    if vocabulary > 2:
        return AutoTokenizer.from_pretrained(EMBEDDED / "student")
    words = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    template = "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"
    special = {"unk_token": "a", "eos_token": "</s>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, chat_template=template, **special)


def _model(
    folder: Path,
    vocabulary: int,
    seed: int,
    scale: float,
    *,
    context: int = 512,
    stop: float = 0.0,
    stored: torch.dtype = torch.float32,
) -> str:
    """Save a random model of one layer, its logits multiplied by `scale`.

    A `stop` other than 0 decides every logit of the stop token: above 0 a response stops at once, below 0 never.
    """
    torch.manual_seed(seed)
    tokenizer = _tokenizer(vocabulary)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Qwen2Config(
        vocab_size=vocabulary, num_key_value_heads=1, max_position_embeddings=context, tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **sizes,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
        if stop:  # the first number of a hidden vector is 1 for every token, and only the stop token looks at it
            layer = model.model.layers[0]
            layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0
            model.model.embed_tokens.weight[:, 0] = 1
            model.lm_head.weight[:, 0] = 0
            model.lm_head.weight[tokenizer.eos_token_id, 0] = stop
        model.model.norm.weight.mul_(scale)
    model.to(stored).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def _matrix(
    place: Path, draw: random.Random, precision: str, scale: float, vocabulary: int, length: int
) -> tuple[str, list[str]]:
    """Make the models of a cell.  Method, dtypes of the files and the size of the teacher's logits are drawn."""
    scales, stored = (scale, draw.choice(SCALES)), [draw.choice(STORED) for _ in range(2)]
    student, teacher = (
        _model(place / str(i), vocabulary, i, scales[i], stop=0.0 if length else 1e3, stored=stored[i])
        for i in range(2)
    )
    method = draw.choice(METHODS())
    words = ["--student", student, "--teacher", teacher, *MODELS[4:], "--precision", precision, "--batch", "4"]
    words += ["--steps", "2", "--max-new-tokens", str(length or 8), *(() if length else ("--stop-token", "mask"))]
    what = f"{method}, {precision} of {stored}, logits x {scales}, {vocabulary} ids, {length} tokens"
    return what, [*words, method]


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
    words = [
        "--student",
        models["student"],
        "--teacher",
        models["teacher"],
        *MODELS[4:],
        "--batch",
        "4",
        "--steps",
        "2",
        method,
    ]
    return f"{method}, {value} in {name} of the {role}", words


def _setting(place: Path, draw: random.Random) -> tuple[str, list[str]]:
    """Draw a setting at the edge of its range."""
    method, setting = draw.choice(METHODS()), draw.choice(SETTINGS)
    sizes = ["--batch", "4", "--steps", "6", "--max-new-tokens", "12"]
    return f"{method}, {setting}", [*MODELS, *sizes, *setting.split(), method]


def _long(place: Path) -> tuple[str, list[str]]:
    """Return a run in which a model that never stops generates 16,000 tokens."""
    student, teacher = (_model(place / str(i), 145, i, 1.0, context=20_000, stop=-1e3) for i in range(2))
    words = ["--student", student, "--teacher", teacher, *MODELS[4:], "--batch", "1", "--steps", "1"]
    return f"{LONG} tokens", [*words, "--max-new-tokens", str(LONG), "vopd"]
