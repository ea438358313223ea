"""Small random models with the embedded tokenizer, runs of them, and what they wrote: real files, real classes."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from opd.config.train import Train
from opd.core.sampling import Sampling
from opd.core.types import Rollout
from opd.models.source import EMBEDDED
from opd.training.trainer import Trainer


def started(command: list[str], processes: int) -> subprocess.CompletedProcess:
    """`python -m opd ...` in some processes on the CPU; refuses to take one for many."""
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([*start, "-m", "opd", *command], capture_output=True, text=True, env=env, timeout=600)
    assert done.returncode == 0, done.stderr
    out = command[command.index("--out") + 1]
    assert done.stdout.count(out) == 1, done.stdout  # the main process says where the run is
    assert json.loads((Path(out) / "environment.json").read_text())["processes"] == processes
    return done


def tiny(
    folder: Path, *, seed: int, width: int = 32, layers: int = 2, rows: int | None = None, tied: bool = False
) -> Path:
    """A random Llama in a folder, as save_pretrained writes it."""
    text = AutoTokenizer.from_pretrained(EMBEDDED / "teacher")
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=rows or len(text),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        tie_word_embeddings=tied,
        pad_token_id=text.pad_token_id,
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id)
    model.save_pretrained(folder)
    text.save_pretrained(folder)
    return folder


TURNS = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def tiny_bytes(folder: Path, context: int = 2048) -> Path:
    """A random Llama that knows all bytes, in a folder; llguidance knows its kind of tokenizer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    whole = Tokenizer(models.BPE({c: i for i, c in enumerate([*alphabet, "<eos>", "<pad>"])}, []))
    whole.pre_tokenizer, whole.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    text = PreTrainedTokenizerFast(tokenizer_object=whole, eos_token="<eos>", pad_token="<pad>", chat_template=TURNS)
    torch.manual_seed(0)
    how = dict(vocab_size=len(text), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    how |= dict(max_position_embeddings=context, eos_token_id=256, initializer_range=0.3)
    model = LlamaForCausalLM(LlamaConfig(**how))
    model.generation_config = GenerationConfig(eos_token_id=256, pad_token_id=257)
    model.save_pretrained(folder)
    text.save_pretrained(folder)
    return folder


def small(pair: tuple[Path, Path], out: Path, **changes) -> Train:
    """A run of a student and a teacher from their folders, 8 short rollouts a step."""
    whole = Train(
        student=str(pair[0]),
        teacher=str(pair[1]),
        prompts="embedded:ledger-short",
        out=out,
        batch=8,
        sampling=Sampling(max_new_tokens=16),
        lr=1e-2,
        quiet=True,
    )
    return replace(whole, **changes)


@contextlib.contextmanager
def interrupted_at(number: int) -> Iterator[None]:
    """Ctrl-C as a step begins."""
    real = Trainer.step

    def step(self, at, memory):
        if at == number:
            raise KeyboardInterrupt
        return real(self, at, memory)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        yield


def logged(folder: Path, name: str = "metrics") -> list[dict]:
    """The lines of one of a run's logs."""
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def rollout(i: int, prompt: int, length: int) -> Rollout:
    """Random ids, the same for the same `i`."""
    g = torch.Generator().manual_seed(i)
    draw = lambda n: tuple(torch.randint(3, 100, (n,), generator=g).tolist())
    return Rollout(
        prompt_ids=draw(prompt), teacher_prompt_ids=draw(prompt + 2), ids=draw(length), sampler_logp=(0.0,) * length,
        index=i, group=i, stopped=True,
    )  # fmt: skip


ROLLOUTS = [rollout(0, 4, 7), rollout(1, 2, 3), rollout(2, 6, 5)]
MASKS = [[True] * 7, [True, False, True], [True] * 5]
