"""Checks of a loaded model before the first step: its head, its causality and its logits."""

import torch
from peft import PeftModel
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from opd.core.errors import Refusal, foreign_errors
from opd.head.vocabulary import Vocabulary
from opd.models.batching import Rows
from opd.models.context import context_of
from opd.models.forward import states
from opd.models.load import backbone, base, head
from opd.models.packing import PACKED, is_packing


@torch.no_grad()
def verify_head(model: PreTrainedModel | PeftModel, *, field: str) -> None:
    """Refuse an architecture whose logits our head does not reproduce: a wrong head trains silently wrong."""
    plain, model_head = base(model), head(model)
    ids = torch.arange(1, 9, device=plain.device)[None] % len(model_head.weight)
    with foreign_errors(f"--{field}: {type(plain).__name__} does not run on tokens alone"):
        hidden = backbone(model)(input_ids=ids, use_cache=False).last_hidden_state[0]
        shorter_hidden = backbone(model)(input_ids=ids[:, :5], use_cache=False).last_hidden_state[0]
        expected = plain(input_ids=ids, use_cache=False).logits[0].float()
    products = torch.nn.functional.linear(hidden, model_head.weight).float()
    logits = Vocabulary(len(model_head.weight)).logits(products, model_head)
    compared = logits.isfinite() & expected.isfinite()  # `verify_finite` checks the others
    gap, size = (logits - expected)[compared].abs(), expected[compared].abs()
    tolerance = 1e-3 if plain.dtype == torch.float32 else 5e-2
    if len(gap) and gap.max() > tolerance * size.max().clamp(min=1):
        raise Refusal(
            f"--{field}: {type(plain).__name__} computes its logits in a way opd does not know "
            f"(they differ by {gap.max():.3g}); please report the architecture"
        )
    if (hidden[:5] - shorter_hidden).abs().max() > tolerance * shorter_hidden.abs().max():
        raise Refusal(
            f"--{field}: {type(plain).__name__} looks at tokens to the right of the one it predicts, padding included; "
            "opd needs a causal model"
        )


@torch.no_grad()
def verify_finite(model: PreTrainedModel | PeftModel, tokenizer: Tokenizer, *, ids: int, field: str) -> None:
    """Refuse a token of the first `ids`, the common ones, without a finite logit: 0 * inf is nan in every KL."""
    probe_ids = torch.arange(1, 9, device=model.device)[None] % ids
    logits = base(model)(input_ids=probe_ids, use_cache=False).logits[0, :, :ids].float()
    rows, tokens = (~logits.isfinite()).nonzero(as_tuple=True)
    if len(tokens):
        token, num_others = int(tokens[0]), len(tokens.unique()) - 1
        raise Refusal(
            f"--{field}: the logit of token {token} ({str(tokenizer.decode([token]))!r}) is "
            f"{float(logits[rows[0], token])}{f', and so are {num_others} more' if num_others else ''}: KLs over the "
            "vocabulary need finite logits; where the model masks the token, write a large finite number instead, such "
            "as -1e4"
        )


@torch.no_grad()
def enable_packing(model: PreTrainedModel | PeftModel, low: torch.dtype, *, field: str) -> None:
    """Pack the rows of a model from now on.  Refuse a model whose rows then see each other, or that cannot do it.

    Two rows are compared with their own forward passes, the first longer than any window of the attention.  `low` is
    the autocast dtype of the model's passes.
    """
    plain, text = base(model), base(model).config.get_text_config()
    refused, remedy = f"--packing: --{field}: {type(plain).__name__}", "leave --packing out"
    if is_packing(model):
        return
    if (current := backbone(model).config._attn_implementation) != "sdpa":
        raise Refusal(f"{refused} has attention of the kind {current}, and rows are packed for sdpa; {remedy}")
    window = max(getattr(text, name, None) or 0 for name in ("sliding_window", "attention_chunk_size"))
    lengths = (min(window + 9, context_of(text).tokens), 5)
    ids = torch.arange(1, 1 + max(lengths), device=plain.device) % len(head(model).weight)
    trained = torch.tensor([[0 < i < n for i in range(lengths[0])] for n in lengths])
    rows = [Rows(ids[None, :n], line[None, :n], (n,)) for n, line in zip(lengths, trained, strict=True)]
    together = Rows(ids.expand(2, -1), trained, lengths)
    with (
        foreign_errors(f"{refused} does not run on packed rows", remedy),
        torch.autocast(plain.device.type, low, enabled=low != torch.float32),
    ):
        alone = torch.cat([states(model, row)[0] for row in rows]).float()
        plain.set_attn_implementation(PACKED)
        packed = states(model, together)[0].float()
    gap = float(((packed - alone).norm(dim=-1) / alone.norm(dim=-1)).max())
    tolerance = 1e-3 if min(low.itemsize, plain.dtype.itemsize) >= 4 else 0.1
    if not gap <= tolerance:
        raise Refusal(f"{refused} lets packed rows see each other (states differ by {gap:.2g}); {remedy}")
