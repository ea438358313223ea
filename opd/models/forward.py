"""The forward pass of a model up to the hidden states that predict the trained tokens."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from opd.core.types import Rollout
from opd.head.inputs import Hidden, TeacherLogps
from opd.head.token_scores import scores
from opd.head.vocabulary import Vocabulary
from opd.losses.hidden_states import Lens
from opd.models.batching import Rows
from opd.models.load import backbone
from opd.models.packing import PackedRow, is_packing

Body = Callable[..., Any]  # the forward function of a model's backbone, below the LM head


def compiled(model: PreTrainedModel | PeftModel) -> Body:
    """Compile the backbone below the LM head, for any batch size and length; generation stays uncompiled."""
    return torch.compile(backbone(model).forward, dynamic=True)


def states(
    model: PreTrainedModel | PeftModel, rows: Rows, lens: Lens | None = None, body: Body | None = None
) -> tuple[Float[Tensor, "N H"], tuple[Float[Tensor, "N D"], ...]]:
    """Return the final hidden states that predict the trained tokens, row by row, and a lens's views of other layers.

    Padding is on the right, where causal attention never looks.  No attention mask is needed, so attention uses its
    fastest kernel.  A model whose rows are packed gets them without padding.  `body` replaces the backbone, for example
    by its compiled version.
    """
    inputs, trained = {"input_ids": rows.ids}, rows.trained
    if is_packing(model):
        packed = PackedRow.of(rows)
        inputs = {"input_ids": packed.ids, "position_ids": packed.positions, "attention_mask": packed.lengths}
        trained = packed.trained
    out = (body or backbone(model))(**inputs, use_cache=False, output_hidden_states=lens is not None)
    final = predictors(out.last_hidden_state, trained)
    if lens is None:
        return final, ()
    with torch.autocast(final.device.type, enabled=False):
        return final, lens([predictors(out.hidden_states[layer], trained) for layer in lens.layers])


def final_states(model: PreTrainedModel | PeftModel, rows: Rows) -> Float[Tensor, "N H"]:
    """Return the final hidden states that predict the trained tokens, row by row, [N, H]."""
    return states(model, rows)[0]


def unprompted(rollouts: Sequence[Rollout]) -> tuple[list[Rollout], list[list[bool]]]:
    """Return the rollouts without prompts, and masks of all response tokens but the first, which has no context."""
    plain = [replace(r, prompt_ids=(), teacher_prompt_ids=()) for r in rollouts]
    return plain, [[i > 0 for i in range(len(r.ids))] for r in rollouts]


def cross_entropies(hidden: Hidden | TeacherLogps, rollouts: Sequence[Rollout], vocabulary: Vocabulary) -> list[float]:
    """Return -mean log p(y_t | y_<t) of each response without its prompt, in nats per token.  arXiv:2308.12032.

    The mean starts at the second token; a response with a single token gets 0.  `hidden` is computed from the rows and
    masks that `unprompted` returns.
    """
    ids = torch.tensor([x for r in rollouts for x in r.ids[1:]], dtype=torch.long)
    logp = token_logps(hidden, ids, vocabulary, 0)[1][:, 0]
    parts = logp.double().split([max(0, len(r.ids) - 1) for r in rollouts])
    return [-float(part.mean()) if len(part) else 0.0 for part in parts]


def token_logps(
    hidden: Hidden | TeacherLogps, ids: Int[Tensor, " N"], vocabulary: Vocabulary, k: int
) -> tuple[Int[Tensor, "N K"], Float[Tensor, "N K"]]:
    """Return each token and the model's k most probable tokens at its position, and their log-probs in nats.

    A teacher without an LM head may name more tokens than k.
    """
    if isinstance(hidden, TeacherLogps):
        ids, logp = ids.to(hidden.logp.device)[:, None], hidden.logp[:, None]
        if hidden.ids is None or hidden.others is None:
            return ids, logp
        return torch.cat((ids, hidden.ids), -1), torch.cat((logp, hidden.others), -1)
    tokens = vocabulary.canonical(ids.to(hidden.states.device))[:, None]
    found = scores(hidden, tokens, vocabulary, k)
    return torch.cat((tokens, found.top_ids), -1), torch.cat((found.logp, found.top_logp), -1)


def predictors(hidden: Float[Tensor, "B L H"], trained: Bool[Tensor, "B L"]) -> Float[Tensor, "N H"]:
    """Return the hidden states that predicted the marked tokens: one position to their left, the only shift in opd.

    A mask in main memory is searched there, without synchronising with the device of the states.
    """
    row, column = trained[:, 1:].nonzero(as_tuple=True)
    return hidden[row.to(hidden.device), column.to(hidden.device)]
