"""Micro-batches waste little padding, and no model sees what is left of it."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from opd.core.errors import Refusal
from opd.core.types import Rollout
from opd.models.batching import deal, micro_batches, rows
from opd.models.forward import states
from opd.models.verify import verify_head

FAMILIES = ["llama", "qwen2", "gemma2", "phi", "gpt2", "bloom", "mamba"]


def opened(family: str):
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    more = {
        "gemma2": {"head_dim": 8, "num_key_value_heads": 2, "sliding_window": 8},  # one layer of two looks no further
        "llama": {"num_key_value_heads": 2},
        "qwen2": {"num_key_value_heads": 2},
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
        "mamba": {"state_size": 4},
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes | more.get(family, {}))).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)  # attention of fresh weights hardly tells one token from another
    return model


def rollouts(lengths: list[int]) -> list[Rollout]:
    g = torch.Generator().manual_seed(1)
    draw = lambda n: tuple(torch.randint(3, 64, (n,), generator=g).tolist())
    return [
        Rollout(
            prompt_ids=(own := draw(3 + i)), teacher_prompt_ids=own, ids=draw(n), sampler_logp=(0.0,) * n,
            index=i, group=i, stopped=True,
        )
        for i, n in enumerate(lengths)
    ]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_beside_longer_ones_has_the_states_and_gradients_it_has_alone(family):
    """Sliding windows, ALiBi, learned positions, a recurrent state: nothing looks to the right."""
    model, some, cpu = opened(family), rollouts([30, 4, 17]), torch.device("cpu")
    masks = [[True] * len(r.ids) for r in some]
    verify_head(model, field="student")
    together, _ = states(model, rows(some, masks, teacher=False, device=cpu))
    weights = torch.randn(together.shape, generator=torch.Generator().manual_seed(2))
    (together * weights).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    alone = [states(model, rows([r], [m], teacher=False, device=cpu))[0] for r, m in zip(some, masks, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)
    (torch.cat(alone) * weights).sum().backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            size = float(p.grad.abs().max())
            torch.testing.assert_close(found[name], p.grad, rtol=1e-3, atol=1e-5 * max(1.0, size), msg=name)


def test_attention_builds_no_mask(monkeypatch):
    """[B, L, L] of it would be the largest tensor of a long micro-batch, and rule out the fast kernels."""
    plain, asked = torch.nn.functional.scaled_dot_product_attention, []

    def attention(*args, attn_mask=None, is_causal=False, **more):
        asked.append((attn_mask, is_causal))
        return plain(*args, attn_mask=attn_mask, is_causal=is_causal, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    some = rollouts([9, 4])
    states(opened("llama"), rows(some, [[True] * 9, [True] * 4], teacher=False, device=torch.device("cpu")))
    assert asked == [(None, True)] * 2


def test_a_model_that_looks_ahead_is_refused():
    model = opened("llama")
    model.config.is_causal = False
    with pytest.raises(Refusal, match="--teacher: LlamaForCausalLM looks at tokens to the right"):
        verify_head(model, field="teacher")


def cost(groups: list[list[int]], widths: dict[int, int], budget: int, ranks: int) -> int:
    return sum(math.ceil(len(g) / ranks) * max(widths[i] for i in g) + budget // 64 for g in groups)


def fits(group: list[int], widths: dict[int, int], budget: int, ranks: int) -> bool:
    rows = math.ceil(len(group) / ranks)
    return rows == 1 or rows * max(widths[i] for i in group) <= budget


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("seed", range(20))
def test_no_other_cut_of_the_sorted_rows_costs_less(seed, ranks):
    rng = np.random.default_rng(seed)
    widths, budget = dict(enumerate(rng.integers(1, 90, size=9).tolist())), 256 // ranks
    found = micro_batches(widths, budget, ranks)
    order = [i for group in found for i in group]
    assert sorted(order) == list(range(9)) and all(widths[a] >= widths[b] for a, b in pairwise(order))
    assert all(fits(g, widths, budget, ranks) for g in found)
    every = []
    for cuts in range(1 << 8):
        ends = [i + 1 for i in range(8) if cuts >> i & 1] + [9]
        groups = [order[a:b] for a, b in zip([0, *ends], ends, strict=False)]
        if all(fits(g, widths, budget, ranks) for g in groups):
            every.append(cost(groups, widths, budget, ranks))
    assert cost(found, widths, budget, ranks) == min(every)


def test_processes_get_every_row_once_and_equally_many_tokens():
    """Lognormal lengths up to 8k tokens, 64 responses on 8 processes: by turns, the slowest has 1.5 times the mean."""
    lengths = np.random.default_rng(0).lognormal(np.log(1500), 0.8, size=64).clip(64, 8192).astype(int).tolist()
    widths, loads = dict(enumerate(lengths)), [0] * 8
    groups = micro_batches(widths, 8192, ranks=8)
    dealt = deal(groups, widths, loads)
    assert [sorted(i for part in parts for i in part) for parts in dealt] == [sorted(group) for group in groups]
    assert all(max(map(len, parts)) - min(map(len, parts)) <= 1 for parts in dealt)
    assert loads == [sum(widths[i] for parts in dealt for i in parts[rank]) for rank in range(8)]
    by_turns = [sum(lengths[rank::8]) for rank in range(8)]
    mean = sum(lengths) / 8
    assert max(loads) < 1.1 * mean < 1.3 * mean < max(by_turns)


def test_a_process_without_a_row_has_an_empty_part():
    loads = [5, 0, 9]
    assert deal([[4, 2], [7]], {4: 5, 2: 1, 7: 3}, loads) == [[[2], [4], []], [[], [7], []]]


def test_the_edges_of_a_budget():
    assert micro_batches({}, 100) == []
    assert micro_batches({0: 500, 1: 40, 2: 400}, 100) == [[0], [2], [1]]
    assert micro_batches(dict.fromkeys(range(5), 20), 100) == [[0, 1, 2, 3, 4]]


def test_little_padding_is_left_of_ragged_lengths():
    """Lognormal lengths, sigma 0.8: one padded batch holds 2.3 times the tokens."""
    lengths = np.random.default_rng(0).lognormal(np.log(110), 0.8, size=64).clip(20, 330).astype(int).tolist()
    widths = dict(enumerate(lengths))
    padded = sum(len(g) * widths[g[0]] for g in micro_batches(widths, 8192))
    assert padded < 1.08 * sum(lengths) < 2 * sum(lengths) < 64 * max(lengths)
