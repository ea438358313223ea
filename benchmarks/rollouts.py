"""Benchmark of rollouts of unequal length against `model.generate`, in tokens per second.

The model is random, has SmolLM2's width, and gives the stop token the same probability at every position.  So lengths
are geometric, cut at the limit, and have the same distribution in all arms.  Only opd's arms return log-probs.
"""

import math
import statistics
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from benchmarks.result import Result, Timed, in_turn, spread, versions
from opd.core.sampling import Sampling
from opd.head.onednn import is_faster, use_onednn
from opd.rollouts.engines.base import GenerateRequest
from opd.rollouts.engines.hf import HFEngine

STOP = 2
LABELS = {
    "opd": "opd, with log-probs",
    "plain": "the same, torch's own products",
    "generate": "model.generate, without",
}


@dataclass(frozen=True)
class Ragged(Timed):
    """Settings of `python -m benchmarks rollouts`: the model, the requests, and the number of rounds."""

    requests: int = 64
    """Number of prompts, of 16 to 63 tokens each."""
    rows: int = 32
    """Responses decoded at the same time, in all arms."""
    mean: int = 42
    """Mean response length before the limit, in tokens."""
    max_new_tokens: int = 160
    """Length limit of a response, in tokens."""
    layers: int = 4
    """Number of layers of the model."""
    vocabulary: int = 49152
    """Vocabulary size of the model."""
    width: int = 576
    """Hidden width of the model, in heads of 64."""
    rounds: int = 5
    """Alternating rounds, after a warm-up round."""


def model(ragged: Ragged) -> LlamaForCausalLM:
    """Build a model with near-uniform logits, except for the stop token's."""
    torch.manual_seed(0)
    heads = ragged.width // 64
    config = LlamaConfig(
        hidden_size=ragged.width,
        intermediate_size=ragged.width * 8 // 3,
        num_hidden_layers=ragged.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 3 if heads % 3 == 0 else heads,
        vocab_size=ragged.vocabulary,
        initializer_range=1e-3,
        eos_token_id=STOP,
        pad_token_id=0,
        bos_token_id=1,
    )
    llama = LlamaForCausalLM(config).eval()
    biased = nn.Linear(ragged.width, ragged.vocabulary)
    biased.weight.data = llama.lm_head.weight.data
    biased.bias.data.zero_()
    biased.bias.data[STOP] = math.log((ragged.vocabulary - 1) / (ragged.mean - 1))
    llama.lm_head = biased
    return llama


def measured(ragged: Ragged) -> Result:
    """Measure the tokens per second of all arms, and the distribution of lengths."""
    torch.set_num_threads(ragged.threads)
    llama, g = model(ragged), torch.Generator().manual_seed(0)
    widths = torch.randint(16, 64, (ragged.requests,), generator=g).tolist()
    prompts = [torch.randint(3, ragged.vocabulary, (n,), generator=g).tolist() for n in widths]
    quick_model = deepcopy(llama)
    use_onednn(quick_model)  # as `models.load` does
    lengths: dict[str, list[list[int]]] = {name: [] for name in LABELS}

    def ours(name: str, of: LlamaForCausalLM) -> None:
        engine = HFEngine(of, ragged.vocabulary, (STOP,), ragged.rows)
        sampling = Sampling(max_new_tokens=ragged.max_new_tokens)
        samples = engine.generate(
            GenerateRequest(prompts, sampling, seed=0, step=len(lengths[name]), index=range(len(prompts)))
        )
        assert all(len(x.logp) == len(x.ids) for x in samples)
        lengths[name].append([len(x.ids) for x in samples])

    def plain() -> None:
        torch.manual_seed(len(lengths["generate"]))
        samples: list[int] = []
        for start in range(0, len(prompts), ragged.rows):
            samples += _generate(llama, prompts[start : start + ragged.rows], ragged.max_new_tokens)
        lengths["generate"].append(samples)

    arms: dict[str, Callable[[], object]] = {"opd": partial(ours, "opd", quick_model)}
    arms |= {"plain": partial(ours, "plain", llama)} if is_faster() else {}
    arms["generate"] = plain
    seconds = in_turn(arms, rounds=ragged.rounds, clock=ragged.clock)
    speed = {
        name: [sum(n) / s for n, s in zip(lengths[name][1:], seconds_by_round, strict=True)]
        for name, seconds_by_round in seconds.items()
    }
    rows, flat = [], {name: [x for n in by_round[1:] for x in n] for name, by_round in lengths.items() if by_round}
    for name in arms:
        ratios = [a / b for a, b in zip(speed["opd"], speed[name], strict=True)]
        about = f"{statistics.mean(flat[name]):.0f}, {max(flat[name])}"
        rows.append((LABELS[name], spread(speed[name], 0), about, spread(ratios) if name != "opd" else ""))
    shares = [
        statistics.mean(part) / max(part)
        for n in lengths["generate"][1:]
        for start in range(0, len(n), ragged.rows)
        if (part := n[start : start + ragged.rows])
    ]
    packages = versions("opd", "torch", "transformers")
    notes = (
        f"lengths are geometric with mean {ragged.mean}, cut at {ragged.max_new_tokens}: of a padded batch's row-steps "
        f"{statistics.mean(shares):.0%} write a token",
        f"medians [min, max] of {ragged.rounds} alternating rounds, {ragged.clock} clock; {ragged}; {packages}",
    )
    numbers = {
        "ragged": vars(ragged),
        "versions": packages,
        "seconds": seconds,
        "lengths": {name: lengths[name] for name in arms},
    }
    header = ("engine", "tokens/s", "length: mean, max", "ours faster by")
    return Result(f"ragged rollouts, {ragged.requests} requests", header, tuple(rows), notes, numbers)


def _generate(llama: Any, prompts: list[list[int]], max_new_tokens: int) -> list[int]:
    """Generate with transformers from left-padded prompts, and return the response lengths."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask: Tensor = torch.arange(width)[None] >= width - torch.tensor([len(p) for p in prompts])[:, None]
    config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=STOP,
        pad_token_id=0,
    )
    with torch.no_grad():
        out = llama.generate(ids, attention_mask=mask.long(), generation_config=config)
    ends = out[:, width:] == STOP
    return torch.where(ends.any(1), ends.long().argmax(1) + 1, ends.shape[1]).tolist()
