"""Sizes of the checks on a GPU and on a CPU, and random models of these sizes."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from benchmarks.case import Shape
from benchmarks.gpu.check import CheckRow
from opd.models.source import EMBEDDED

QWEN3_4B = {  # four of its 36 layers
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


@dataclass(frozen=True)
class CheckSize:
    """A model of some layers, a batch, and whether times are judged."""

    device: torch.device
    model: Mapping[str, int]
    batch: int
    new_tokens: int
    head: Shape
    judged: bool  # times, and the peak of the GPU's allocator

    @classmethod
    def of(cls, cpu: bool) -> "CheckSize":
        """Return four layers of Qwen3-4B on a GPU, or a tiny model on the CPU."""
        model = TINY if cpu else QWEN3_4B
        shape = Shape(vocabulary=model["vocab_size"], student=model["hidden_size"], teacher=model["hidden_size"])
        shape = replace(shape, memory=False)
        if cpu:
            shape = replace(shape, tokens=64, chunk=32, rounds=2, device="cpu", dtype="float32")
            return cls(torch.device("cpu"), model, 4, 16, shape, judged=False)
        shape = replace(shape, tokens=8192, chunk=2048, rounds=10)
        return cls(torch.device("cuda"), model, 16, 512, shape, judged=True)

    def timed(self, check: str, number: str, limit: str, what: str, *, fine: bool) -> CheckRow:
        """Return a row that depends on the machine's speed or its allocator, which says nothing at a tiny size."""
        if not self.judged:
            return CheckRow(check, number, "not judged", what=what)
        return CheckRow.judged(check, number, limit, what, fine=fine)


def random_model(folder: Path, size: CheckSize, *, seed: int) -> str:
    """Write a random model in bf16 with the embedded tokenizer, and return its folder.

    The tokenizer gets a token at the last id, so that the head pass covers all rows of the LM head.
    """
    torch.manual_seed(seed)
    values: dict[str, Any] = {**size.model, "tie_word_embeddings": True, "max_position_embeddings": 4096}
    config = Qwen3Config(**values, bos_token_id=1, eos_token_id=2)
    with size.device:
        model = Qwen3ForCausalLM(config).bfloat16()
    model.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=0)
    model.save_pretrained(folder)
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        shutil.copy(EMBEDDED / "teacher" / name, folder)
    tokenizer = json.loads((EMBEDDED / "teacher" / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["<last>"] = size.model["vocab_size"] - 1
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return str(folder)
