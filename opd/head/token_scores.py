"""Log-probs of chosen tokens, and the most probable tokens of both models, chunk by chunk."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from opd.head.inputs import Hidden, TeacherLogps
from opd.head.matmul import matmul_dtype, wide
from opd.head.outputs import Alternatives
from opd.head.sweep import ModelLogits, blocks
from opd.head.vocabulary import Vocabulary


@torch.no_grad()
def alternatives(
    student: Hidden, teacher: Hidden | TeacherLogps | None, k: int, vocabulary: Vocabulary
) -> Alternatives:
    """Return the k most probable tokens of each model that has a head, with both models' log-probs of them."""
    hidden = [x for x in (student, teacher) if isinstance(x, Hidden)]
    sides = [ModelLogits.from_hidden(x, matmul_dtype(x.states), vocabulary) for x in hidden]
    n, v, num_top = len(student.states), vocabulary.size, min(k, vocabulary.size)
    rows = vocabulary.chunk(n, 8 * v * 4)  # fp32 of both models, with the temporaries of log_softmax
    sides = [replace(side, logits=side.logits.new_empty(rows, v)) for side in sides]
    like = sides[0].logits.new_empty(0, dtype=wide(sides[0].logits.dtype))
    out = Alternatives(
        like.new_empty(n, len(sides) * num_top, dtype=torch.int32),
        *like.new_full((2, n, len(sides) * num_top), torch.nan),
    )
    with torch.autocast(like.device.type, enabled=False):
        for tokens in blocks(n, rows):
            logp = [vocabulary.logp(side.fill(tokens).to(like.dtype), side.hidden.head) for side in sides]
            ids = torch.cat([x.topk(num_top).indices for x in logp], -1)
            out.ids[tokens] = ids
            for logp_column, x in zip((out.student_logp, out.teacher_logp), logp, strict=False):
                logp_column[tokens] = x.gather(-1, ids)
    return out


@dataclass(frozen=True)
class TokenScores:
    """Log-probs that a model gives to chosen tokens, in nats, and the most probable tokens of each position."""

    logp: Float[Tensor, "N k"]
    rank: Int[Tensor, " N"]  # of the first chosen token; 1 is the most probable
    top_ids: Int[Tensor, "N K"]
    top_logp: Float[Tensor, "N K"]


@torch.no_grad()
def scores(hidden: Hidden, ids: Int[Tensor, "N k"], vocabulary: Vocabulary, top: int) -> TokenScores:
    """Return the log-probs of chosen tokens at each position, -inf for an id of -1 (padding)."""
    weight = hidden.head.weight.detach()[: vocabulary.size]
    out = []
    for rows in blocks(max(1, len(ids)), vocabulary.chunk(len(ids), 4 * vocabulary.size)):
        raw = torch.nn.functional.linear(hidden.states[rows], weight).to(wide(weight.dtype))
        logp, token_ids = vocabulary.logp(raw, hidden.head), ids[rows]
        chosen = logp.gather(-1, token_ids.clamp(min=0)).where(token_ids >= 0, -torch.inf)
        top_tokens = logp.topk(min(top, vocabulary.size), -1)
        out.append((chosen, 1 + (logp > chosen[:, :1]).sum(-1), top_tokens.indices, top_tokens.values))
    return TokenScores(*map(torch.cat, zip(*out, strict=True)))
