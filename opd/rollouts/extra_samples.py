"""Tokens sampled beside those of finished responses, by the student in this process: `with_others(rollouts, ...)`.

vLLM samples one token at each position.  A forward pass over its responses gives the distribution at each of their
contexts, from which the other tokens of `OnPolicy.samples` are drawn.  They are draws of the weights of the forward
pass, whose log-probs they carry, so that an importance ratio corrects them exactly, however old the responses are.
"""

from array import array
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from opd.core.rng import uniform
from opd.core.sampling import Sampling
from opd.core.types import Others, Rollout
from opd.head.sweep import blocks
from opd.head.vocabulary import Vocabulary
from opd.models.batching import FORWARD_TOKENS, micro_batches, rows
from opd.models.forward import final_states
from opd.models.load import head
from opd.rollouts.engines.base import Engine
from opd.rollouts.engines.sampling import draw


@torch.no_grad()
def with_others(
    rollouts: Sequence[Rollout], engine: Engine, sampling: Sampling, count: int, key: tuple[int, int]
) -> list[Rollout]:
    """Return the rollouts with `count` - 1 more tokens at each position, with the noise of `key` (seed, step).

    The noise is that of `HFEngine`, which samples these tokens as it generates.
    """
    others: dict[int, Others] = {}
    widths = {i: len(r.prompt_ids) + len(r.ids) for i, r in enumerate(rollouts)}
    for indices in micro_batches(widths, FORWARD_TOKENS):
        part = [rollouts[i] for i in indices]
        for i, r, tokens in zip(indices, part, _drawn(part, engine, sampling, count, key), strict=True):
            assert len(tokens.ids) == len(r.ids) * (count - 1)
            others[i] = tokens
    return [replace(r, others=others[i]) for i, r in enumerate(rollouts)]


def _drawn(
    rollouts: Sequence[Rollout], engine: Engine, sampling: Sampling, count: int, key: tuple[int, int]
) -> list[Others]:
    """Return the tokens drawn at the positions of each rollout."""
    model, vocabulary = engine.model, Vocabulary(engine.vocabulary)
    lm_head, masks = head(model), [[True] * len(r.ids) for r in rollouts]
    states = final_states(model, rows(rollouts, masks, teacher=False, device=model.device))
    merged = torch.tensor(
        engine.stop if engine.merged is None else engine.merged, dtype=torch.long, device=model.device
    )
    place = np.array([(r.index, t) for r in rollouts for t in range(len(r.ids))], dtype=np.int64).reshape(-1, 2)
    noise = np.asarray(uniform(*key, place[:, :1], place[:, 1:], 2, np.arange(1, count)))
    ids, logps = [], []
    for at in blocks(max(1, len(states)), vocabulary.chunk(len(states), 4 * vocabulary.size)):
        raw = torch.nn.functional.linear(states[at], lm_head.weight[: vocabulary.size])
        logits = vocabulary.logits(raw.float(), lm_head)
        token_ids, logp = draw(logits, sampling, torch.from_numpy(noise[at]).to(logits.device), merged)
        ids.append(token_ids.cpu())
        logps.append(logp.cpu())
    lengths = [len(r.ids) for r in rollouts]
    parts = zip(torch.cat(ids).split(lengths), torch.cat(logps).split(lengths), strict=True)
    return [Others(array("i", x.flatten().tolist()), array("f", y.flatten().tolist())) for x, y in parts]
