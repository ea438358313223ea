"""Rollouts as rows of token ids, in micro-batches of similar length, or of as many tokens as fit if rows are packed."""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from opd.core.types import Rollout, pad

FORWARD_TOKENS = 8192  # padded tokens of a forward pass of the rollouts' side: the default of --micro-batch-tokens


@dataclass(frozen=True)
class Rows:
    """Prompts and responses as a model's input ids, padded on the right."""

    ids: Int[Tensor, "B L"]
    trained: Bool[Tensor, "B L"]  # response tokens that train; stays in main memory
    lengths: tuple[int, ...]  # in tokens, without padding


def rows(rollouts: Sequence[Rollout], masks: Sequence[Sequence[bool]], *, teacher: bool, device: torch.device) -> Rows:
    """Concatenate each prompt with its response, for the teacher or the student.

    Without rollouts, returns a dummy row without trained tokens, so that every rank runs a forward pass.
    """
    prompts = [r.teacher_prompt_ids if teacher else r.prompt_ids for r in rollouts]
    pairs = list(zip(prompts, rollouts, masks, strict=True))
    ids = [torch.tensor([*prompt, *r.ids]) for prompt, r, _ in pairs] or [torch.zeros(2, dtype=torch.long)]
    trained = [torch.tensor([False] * len(prompt) + list(mask)) for prompt, _, mask in pairs]
    trained = trained or [torch.zeros(2, dtype=torch.bool)]
    return Rows(pad(ids, 0).to(device), pad(trained, False), tuple(map(len, ids)))


def micro_batches(widths: Mapping[int, int], budget: int, ranks: int = 1) -> list[list[int]]:
    """Split rows into micro-batches of similar length, longest first, at minimal cost (dynamic programming).

    The rows of a micro-batch are shared by `ranks` processes.  It costs the padded tokens of the process with most
    rows, at most `budget`, plus budget / 64 for the overhead of its calls.  A row longer than the budget is all that a
    process has of a micro-batch.  `widths` has each row's length in tokens, by row number.
    """
    order = sorted(widths, key=lambda i: (-widths[i], i))
    # For the first `end` rows: the least cost, and the start of the last micro-batch at that cost.
    lowest_cost, last_start = [0] * (len(order) + 1), [0] * (len(order) + 1)
    for end in range(1, len(order) + 1):
        first = end - 1
        lowest_cost[end], last_start[end] = lowest_cost[first] + widths[order[first]], first
        while first and ((rows := -(-(end - first + 1) // ranks)) == 1 or rows * widths[order[first - 1]] <= budget):
            first -= 1
            cost = lowest_cost[first] + rows * widths[order[first]]
            if cost < lowest_cost[end]:
                lowest_cost[end], last_start[end] = cost, first
        lowest_cost[end] += budget // 64
    out, end = [], len(order)
    while end:
        out.append(order[last_start[end] : end])
        end = last_start[end]
    return out[::-1]


def shares(widths: Mapping[int, int], budget: int, loads: list[int], *, packed: bool) -> list[list[list[int]]]:
    """Return the part of each process in each micro-batch; `loads` is that of `deal`.

    Packed rows have no padding, so a part need not have rows of similar length: the longest row that is left goes to
    the part with fewest tokens.  The parts are as few as the budget allows.
    """
    if not packed:
        return deal(micro_batches(widths, budget, len(loads)), widths, loads)
    order = sorted(widths, key=lambda i: (-widths[i], i))
    count = -(-sum(widths.values()) // (budget * len(loads)))  # micro-batches
    while True:
        parts: list[list[int]] = [[] for _ in range(count * len(loads))]
        emptiest_first = [(0, k) for k in range(len(parts))]
        for row in order:
            tokens, k = emptiest_first[0]
            parts[k].append(row)
            heapq.heapreplace(emptiest_first, (tokens + widths[row], k))
        if all(tokens <= budget or len(parts[k]) == 1 for tokens, k in emptiest_first):
            break
        count += 1
    tokens_of = {k: tokens for tokens, k in emptiest_first}
    fullest_first = sorted(tokens_of, key=lambda k: (-tokens_of[k], k))
    groups = [fullest_first[i : i + len(loads)] for i in range(0, len(parts), len(loads))]
    return [[parts[k] for (k,) in dealt] for dealt in deal(groups, tokens_of, loads)]


def deal(groups: Sequence[Sequence[int]], widths: Mapping[int, int], loads: list[int]) -> list[list[list[int]]]:
    """Return the part of each process in each micro-batch, with at most one row more than that of any other.

    Longer rows go to processes with fewer tokens so far, `loads`, to which the rows' tokens are added.
    """
    dealt = []
    for group in groups:
        parts: list[list[int]] = [[] for _ in loads]
        for start in range(0, len(group), len(loads)):
            lightest_first = sorted(range(len(loads)), key=loads.__getitem__)
            for rank, row in zip(lightest_first, group[start : start + len(loads)], strict=False):
                parts[rank].append(row)
                loads[rank] += widths[row]
        dealt.append(parts)
    return dealt
