"""LM heads and the shared vocabulary: comparable logits of two models from W h, differentiably or in place."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from opd.head.backend import uses_triton
from opd.head.matmul import wide

MERGED_LOGIT = -1e30  # logit of an id that is merged into another: its probability is 0, and the logit is finite


@dataclass(frozen=True)
class Head:
    """An LM head, which maps a final hidden state to logits: z = softcap(scale * (W h + b))."""

    weight: Float[Tensor, "V H"]
    bias: Float[Tensor, " V"] | None = None
    scale: float = 1.0
    softcap: float = 0.0  # 0: none; else z -> softcap * tanh(z / softcap), Gemma 2, arXiv:2408.00118
    temperature: float | None = None  # divides the logits in the loss; None: the vocabulary's temperature


@dataclass(frozen=True)
class Vocabulary:
    """The settings that make the logits of both models comparable distributions."""

    size: int  # number of ids that both models have; further rows are cut from both
    temperature: float = 1.0  # divides the logits of all models without their own; affects the gradient
    stop: tuple[int, ...] = ()  # ids merged into one class, at every position, under the first id
    chunk_bytes: int = 256 << 20  # budget for both models' logits of a chunk, in bytes
    rounded: bool = False  # keep logits in at most bf16: halves memory traffic, changes the KL by some percent

    def chunk(self, tokens: int, token_bytes: int) -> int:
        """Return the tokens of a chunk at `token_bytes` of logits per token: even chunks that fit `chunk_bytes`."""
        max_tokens = max(1, self.chunk_bytes // token_bytes)
        return -(-tokens // max(1, -(-tokens // max_tokens)))

    def tile(self, low: torch.dtype, device: torch.device) -> torch.dtype:
        """Return the dtype of a chunk of W h with factors of dtype `low`; matmuls on a GPU can return it unrounded."""
        if self.rounded:
            return torch.bfloat16 if low == torch.float32 else low
        return wide(low) if device.type == "cuda" or uses_triton(device) else low

    def canonical(self, ids: Int[Tensor, "*N"]) -> Int[Tensor, "*N"]:
        """Return ids in which every member of the stop class is replaced by the class's id."""
        if len(self.stop) < 2:
            return ids
        return torch.where(torch.isin(ids, torch.tensor(self.stop, device=ids.device)), self.stop[0], ids)

    def bias(self, head: Head) -> Float[Tensor, " V"] | None:
        """Return b for the common ids, detached, or None."""
        return None if head.bias is None else head.bias.detach()[: self.size]

    def temperature_of(self, head: Head) -> float:
        """Return the value that divides the logits of a head."""
        return self.temperature if head.temperature is None else head.temperature

    def curve(self, head: Head) -> tuple[float, float | None]:
        """Return (inner, outer): logits are inner (W h + b), or outer tanh(inner (W h + b)) under a softcap."""
        temperature = self.temperature_of(head)
        if head.softcap:
            return head.scale / head.softcap, head.softcap / temperature
        return head.scale / temperature, None

    def logits(
        self, raw: Float[Tensor, "N V"], head: Head, ids: Int[Tensor, " V"] | None = None
    ) -> Float[Tensor, "N V"]:
        """Return the logits of W h, or of some of its columns, before stop ids are merged; differentiable."""
        bias, (inner, outer) = self.bias(head), self.curve(head)
        if bias is not None:
            raw = raw + (bias if ids is None else bias[ids])
        z = raw if inner == 1 else raw * inner
        return z if outer is None else outer * torch.tanh(z)

    def logp(self, raw: Float[Tensor, "N V"], head: Head) -> Float[Tensor, "N V"]:
        """Return the normalised log-probs of W h, stop ids merged; differentiable."""
        z = self.logits(raw, head)
        if len(self.stop) > 1:
            members = torch.tensor(self.stop, device=z.device)
            class_logit = z[:, members].logsumexp(-1, keepdim=True)
            z = z.index_fill(-1, members[1:], MERGED_LOGIT).index_copy(-1, members[:1], class_logit)
        return z.log_softmax(-1)

    def logits_(self, raw: Float[Tensor, "N V"], head: Head) -> Float[Tensor, "N M"] | None:
        """Compute the logits that `logp` normalises, in place and without softcap.

        Returns the share [N, M] of each member in the stop class, or None if nothing is merged.
        """
        bias, (inner, _) = self.bias(head), self.curve(head)
        if bias is not None:
            raw.add_(bias)
        if inner != 1:
            raw.mul_(inner)
        if len(self.stop) < 2:
            return None
        members = torch.tensor(self.stop, device=raw.device)
        inside = raw[:, members]
        raw.index_fill_(-1, members[1:], MERGED_LOGIT).index_copy_(-1, members[:1], inside.logsumexp(-1, keepdim=True))
        return inside.softmax(-1)

    def spread_(self, gradient: Float[Tensor, "N V"], shares: Float[Tensor, "N M"] | None) -> None:
        """Backpropagate through `logits_`, except for the scale, in place: members share the stop class's gradient."""
        if shares is not None:
            members = torch.tensor(self.stop, device=gradient.device)
            gradient.index_copy_(-1, members, gradient[:, members[:1]] * shares)
