"""Heads and vocabularies: how W h becomes logits that two models share, differentiably or in place."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from opd.kernels.choice import fuses
from opd.kernels.matmul import wide

GONE = -1e30  # logit of an id that a merged class stands for: probability 0, and still finite


@dataclass(frozen=True)
class Head:
    """What turns a final hidden state into logits: z = softcap(scale * (W h + b))."""

    weight: Float[Tensor, "V H"]
    bias: Float[Tensor, " V"] | None = None
    scale: float = 1.0
    softcap: float = 0.0  # 0: none; else z -> softcap * tanh(z / softcap), Gemma 2, arXiv:2408.00118


@dataclass(frozen=True)
class Vocabulary:
    """How both models' logits become comparable distributions."""

    size: int  # ids both models have: rows beyond are cut from both
    temperature: float = 1.0  # divides both models' logits, gradient included
    stop: tuple[int, ...] = ()  # ids merged into one class, at every position, under the first of them
    chunk_bytes: int = 256 << 20  # of both models' logits, bytes
    rounded: bool = False  # logits are kept in no more than bf16: half the traffic, and a KL that is off by percents

    def chunk(self, tokens: int, token_bytes: int) -> int:
        """Tokens of a chunk: as even as they come within the budget, `token_bytes` of logits each."""
        most = max(1, self.chunk_bytes // token_bytes)
        return -(-tokens // max(1, -(-tokens // most)))

    def tile(self, low: torch.dtype, device: torch.device) -> torch.dtype:
        """The dtype of a chunk of W h whose factors are `low`: a GPU's products can leave it unrounded."""
        if self.rounded:
            return torch.bfloat16 if low == torch.float32 else low
        return wide(low) if device.type == "cuda" or fuses(device) else low

    def canonical(self, ids: Int[Tensor, "*N"]) -> Int[Tensor, "*N"]:
        """Ids with every member of the stop class under the class's id."""
        if len(self.stop) < 2:
            return ids
        return torch.where(torch.isin(ids, torch.tensor(self.stop, device=ids.device)), self.stop[0], ids)

    def bias(self, head: Head) -> Float[Tensor, " V"] | None:
        """b of the common ids."""
        return None if head.bias is None else head.bias.detach()[: self.size]

    def curve(self, head: Head) -> tuple[float, float | None]:
        """(inner, outer): the logits are inner (W h + b), or outer tanh(inner (W h + b)) under a softcap."""
        if head.softcap:
            return head.scale / head.softcap, head.softcap / self.temperature
        return head.scale / self.temperature, None

    def logits(
        self, raw: Float[Tensor, "N V"], head: Head, ids: Int[Tensor, " V"] | None = None
    ) -> Float[Tensor, "N V"]:
        """Those of W h, or of some columns of it, before any class is merged; differentiable."""
        bias, (inner, outer) = self.bias(head), self.curve(head)
        if bias is not None:
            raw = raw + (bias if ids is None else bias[ids])
        z = raw if inner == 1 else raw * inner
        return z if outer is None else outer * torch.tanh(z)

    def logp(self, raw: Float[Tensor, "N V"], head: Head) -> Float[Tensor, "N V"]:
        """Normalised log-probs of W h; differentiable."""
        z = self.logits(raw, head)
        if len(self.stop) > 1:
            members = torch.tensor(self.stop, device=z.device)
            whole = z[:, members].logsumexp(-1, keepdim=True)
            z = z.index_fill(-1, members[1:], GONE).index_copy(-1, members[:1], whole)
        return z.log_softmax(-1)

    def logits_(self, raw: Float[Tensor, "N V"], head: Head) -> Float[Tensor, "N M"] | None:
        """What `logp` normalises, without softcap and in place; the share of each member in the stop class."""
        bias, (inner, _) = self.bias(head), self.curve(head)
        if bias is not None:
            raw.add_(bias)
        if inner != 1:
            raw.mul_(inner)
        if len(self.stop) < 2:
            return None
        members = torch.tensor(self.stop, device=raw.device)
        inside = raw[:, members]
        raw.index_fill_(-1, members[1:], GONE).index_copy_(-1, members[:1], inside.logsumexp(-1, keepdim=True))
        return inside.softmax(-1)

    def spread_(self, gradient: Float[Tensor, "N V"], shares: Float[Tensor, "N M"] | None) -> None:
        """The way back through `logits_`, but for the scale: the gradient of the stop class to its members."""
        if shares is not None:
            members = torch.tensor(self.stop, device=gradient.device)
            gradient.index_copy_(-1, members, gradient[:, members[:1]] * shares)
