"""Log-probs of given tokens, and the likeliest tokens of both models, chunk by chunk."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from opd.head.inputs import Given, Hidden
from opd.head.matmul import matmul_dtype, wide
from opd.head.outputs import Alternatives
from opd.head.sweep import _Side, blocks
from opd.head.vocabulary import Vocabulary


@torch.no_grad()
def alternatives(student: Hidden, teacher: Hidden | Given | None, k: int, vocabulary: Vocabulary) -> Alternatives:
    """Each model's k likeliest tokens with the log-probs of both, some rows at a time; A = k for each with a head."""
    sides = [_Side.of(x, matmul_dtype(x.states), vocabulary) for x in (student, teacher) if isinstance(x, Hidden)]
    n, v, most = len(student.states), vocabulary.size, min(k, vocabulary.size)
    rows = vocabulary.chunk(n, 8 * v * 4)  # fp32 of both models, and what log_softmax needs on the way
    sides = [replace(side, logits=side.logits.new_empty(rows, v)) for side in sides]
    like = sides[0].logits.new_empty(0, dtype=wide(sides[0].logits.dtype))
    out = Alternatives(
        like.new_empty(n, len(sides) * most, dtype=torch.int32), *like.new_full((2, n, len(sides) * most), torch.nan)
    )
    with torch.autocast(like.device.type, enabled=False):
        for part in blocks(n, rows):
            logp = [vocabulary.logp(side.fill(part).to(like.dtype), side.hidden.head) for side in sides]
            ids = torch.cat([x.topk(most).indices for x in logp], -1)
            out.ids[part] = ids
            for kept, x in zip((out.student_logp, out.teacher_logp), logp, strict=False):
                kept[part] = x.gather(-1, ids)
    return out


@dataclass(frozen=True)
class Scores:
    """What one model says of chosen tokens, in nats; the position's most probable ones beside them, best first."""

    logp: Float[Tensor, "N k"]
    rank: Int[Tensor, " N"]  # of the first chosen token, 1 the most probable
    top_ids: Int[Tensor, "N K"]
    top_logp: Float[Tensor, "N K"]


@torch.no_grad()
def scores(hidden: Hidden, ids: Int[Tensor, "N k"], vocabulary: Vocabulary, top: int) -> Scores:
    """Log-probs of any tokens at each position, -inf where an id is -1 (padding), a chunk at a time."""
    weight = hidden.head.weight.detach()[: vocabulary.size]
    out = []
    for rows in blocks(len(ids), vocabulary.chunk(len(ids), 4 * vocabulary.size)):
        raw = torch.nn.functional.linear(hidden.states[rows], weight).to(wide(weight.dtype))
        logp, asked = vocabulary.logp(raw, hidden.head), ids[rows]
        chosen = logp.gather(-1, asked.clamp(min=0)).where(asked >= 0, -torch.inf)
        best = logp.topk(min(top, vocabulary.size), -1)
        out.append((chosen, 1 + (logp > chosen[:, :1]).sum(-1), best.indices, best.values))
    empty = ids.new_empty(0, min(top, vocabulary.size))
    parts = zip(*out, strict=True) if out else ([ids.float()], [ids[:, 0]], [empty], [empty.float()])
    return Scores(*(torch.cat(list(x)) for x in parts))
