"""The check that decoding with a cache gives the log-probs of a plain forward pass."""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from opd.core.errors import Refusal, foreign_errors
from opd.models.load import base, head
from opd.rollouts.engines.kv_cache import Stream

PROMPTS, TOKENS = (9, 4, 6), 9  # lengths of the prompts, and tokens decoded between two changes of the rows
EXACT, ROUNDED = 1e-3, 1.0  # nats: largest differences in fp32, and in lower precision


@torch.no_grad()
def verify_cache(model: PreTrainedModel | PeftModel, *, field: str) -> None:
    """Refuse a model whose decoding with a cache gives other log-probs than a plain forward: rollouts would be wrong.

    Rows of different lengths are decoded, one of them leaves, and another prompt takes its place, as in generation.
    """
    plain, name = base(model), f"--{field}: {type(base(model)).__name__}"
    remedy = "sample with --engine vllm if vLLM knows the model, or take another one"
    with foreign_errors(f"{name} cannot be decoded with its cache", remedy):
        gaps = torch.stack(list(_gaps(model)))
    is_exact = plain.dtype == torch.float32
    gap = float(gaps.max() if is_exact else gaps.median())  # in low precision, single tokens may take another expert
    if gap > (EXACT if is_exact else ROUNDED):
        raise Refusal(
            f"{name} decodes with its cache to log-probs that differ by {gap:.2g} nats from those of its plain "
            f"forward, so that rollouts would be of another model; {remedy}"
        )


def _gaps(model: PreTrainedModel | PeftModel) -> Iterator[Float[Tensor, ""]]:
    """Yield the largest difference over the vocabulary between decoding and a plain forward, in nats, of each token."""
    plain, stream = base(model), Stream.of(model)
    size = len(head(model).weight)
    total = 2 * TOKENS + max(PROMPTS)
    texts = [tuple((start + 7 * i) % size for i in range(total)) for start in (1, 3, 5)]
    ids = [torch.tensor([text], device=model.device) for text in texts]
    expected = [plain(input_ids=row, use_cache=False).logits[0].float().log_softmax(-1) for row in ids]
    lengths = PROMPTS if stream.rows.splices() else (PROMPTS[0],) * len(PROMPTS)

    def decode(rows: Sequence[int], ends: dict[int, int]) -> Iterator[Float[Tensor, ""]]:
        for _ in range(TOKENS):
            for row, logits in zip(rows, stream.read(), strict=True):
                gap = (logits.float().log_softmax(-1) - expected[row][ends[row] - 1]).abs()
                yield gap[gap.isfinite()].amax() if gap.isfinite().any() else gap.new_zeros(())
                ends[row] += 1
            stream.last = stream.last.new_tensor([texts[row][ends[row] - 1] for row in rows])

    ends = dict(enumerate(lengths))
    first, second, third = (text[:length] for text, length in zip(texts, lengths, strict=True))
    stream.change(torch.zeros(0, dtype=torch.long), [first, second], {third})
    yield from decode((0, 1), ends)
    if stream.rows.splices():
        stream.change(torch.ones(1, dtype=torch.long), [third], set())
        yield from decode((1, 2), ends)
