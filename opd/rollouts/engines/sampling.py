"""Sampling of tokens from logits: temperature, top-k, nucleus, stop classes."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from opd.core.sampling import Sampling
from opd.head.kernels.quantile import quantile


def draw(
    logits: Float[Tensor, "B V"], sampling: Sampling, noise: Float[Tensor, "B k"], merged: Int[Tensor, " S"]
) -> tuple[Int[Tensor, "B k"], Float[Tensor, "B k"]]:
    """Return the tokens at the quantiles `noise` of the tempered, truncated distribution, and their log-probs in nats.

    The log-prob of one of the `merged` ids, such as the stop ids, is the log-prob of all of them.
    """
    if sampling.temperature == 0:
        ids = logits.argmax(-1, keepdim=True).expand(-1, noise.shape[1])
        return ids, torch.zeros_like(ids, dtype=logits.dtype)
    temperature = sampling.temperature
    if sampling.top_k or sampling.top_p < 1:
        logits, temperature = truncate((logits / temperature).log_softmax(-1), sampling), 1.0
    ids, log_total = quantile(logits, noise, temperature)
    token_logits = logits.gather(-1, ids).double() / temperature
    merged_logits = (logits[:, merged].double() / temperature).logsumexp(-1, keepdim=True)
    return ids, (torch.where(torch.isin(ids, merged), merged_logits, token_logits) - log_total[:, None]).float()


def truncate(logp: Float[Tensor, "B V"], sampling: Sampling) -> Float[Tensor, "B V"]:
    """Apply top-k, then nucleus truncation (the fewest tokens that reach top_p), and renormalise."""
    if sampling.top_k and sampling.top_k < logp.shape[-1]:
        kth = logp.topk(sampling.top_k, -1).values[:, -1:]
        logp = logp.masked_fill(logp < kth, -torch.inf).log_softmax(-1)
    if sampling.top_p < 1:
        ordered, ids = logp.sort(-1, descending=True)
        mass_above = ordered.exp().cumsum(-1) - ordered.exp()
        removed = torch.zeros_like(logp, dtype=torch.bool).scatter(-1, ids, mass_above >= sampling.top_p)
        logp = logp.masked_fill(removed, -torch.inf).log_softmax(-1)
    return logp
