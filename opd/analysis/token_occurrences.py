"""Statistics of token occurrences and their KL over a corpus of rollouts, as pure functions.

An occurrence is a response position with the token *predicted* there; a type is a token of the vocabulary.  Rock
Tokens, arXiv:2605.09253.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

SHARES = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)  # shares of the rollouts: the paper's 50 to 400 of 500, and all
BLOCK = 1024  # occurrences compared at a time, which bounds memory


@dataclass(frozen=True)
class Corpus:
    """A corpus of token occurrences, in flat tensors [N]."""

    ids: Int[Tensor, " N"]
    kl: Float[Tensor, " N"]  # KL(student || teacher) of the full distributions at the position, nats
    rollout: Int[Tensor, " N"]

    def part(self, rollouts: Int[Tensor, " R"]) -> "Corpus":
        """Return the occurrences in the given rollouts."""
        inside = torch.isin(self.rollout, rollouts)
        return Corpus(self.ids[inside], self.kl[inside], self.rollout[inside])

    def tally(self) -> tuple[Int[Tensor, " V"], Float[Tensor, " V"]]:
        """Return the count and the summed KL of each type, up to the largest id.

        The summed KL is the rock score R(v) = mean KL x frequency.
        """
        return self.ids.bincount(), self.ids.bincount(self.kl)


def rank(counts: Int[Tensor, " V"], score: Float[Tensor, " V"], *, top: int, min_count: int) -> tuple[int, ...]:
    """Return up to `top` types with the highest scores and at least `min_count` occurrences, best first."""
    score = score.where(counts >= min_count, -torch.inf)
    best = score.argsort(descending=True, stable=True)[:top]
    return tuple(best[score[best] > -torch.inf].tolist())


def stability(corpus: Corpus, *, top: int, min_count: int, seed: int, draws: int = 10) -> dict[float, float]:
    """Return the Jaccard index of the list from a random share of the rollouts with the full list, by share.

    Each value is the mean over `draws` random subsets.  A subset is part of the whole corpus, so disjoint halves would
    agree less.
    """
    ranked = lambda part: set(rank(*part.tally(), top=top, min_count=min_count))
    full_list, rollouts = ranked(corpus), corpus.rollout.unique()
    generator, out = torch.Generator().manual_seed(seed), {}
    for share in SHARES:
        size = max(1, round(share * len(rollouts)))
        parts = [ranked(corpus.part(rollouts[torch.randperm(len(rollouts), generator=generator)[:size]]))
                 for _ in range(draws)]  # fmt: skip
        out[share] = sum(len(p & full_list) / max(1, len(p | full_list)) for p in parts) / draws
    return out


def control_types(counts: Int[Tensor, " V"], types: Sequence[int]) -> tuple[int, ...]:
    """Return other types with as many occurrences in total as `types`, and with similar frequencies if possible.

    For each of `types`, from the most frequent down, take the unused type nearest in log frequency that fits into the
    remaining number of occurrences.  Then fill up with the most frequent types that fit.  The total never exceeds that
    of `types`; it is smaller if the rest of the corpus is too small.
    """
    type_ids = list(types)
    budget, unused_counts = int(counts[type_ids].sum()), counts.clone()
    unused_counts[type_ids] = 0
    log_counts, out = counts[type_ids].sort(descending=True).values.double().log(), list[int]()
    while bool((fits := (unused_counts > 0) & (unused_counts <= budget)).any()):
        size = unused_counts.double().log()
        distance = (size - log_counts[len(out)]).abs() if len(out) < len(log_counts) else -size
        best = int(distance.where(fits, torch.inf).argmin())
        out.append(best)
        budget -= int(unused_counts[best])
        unused_counts[best] = 0
    return tuple(out)


def consistency(
    ids: Int[Tensor, " M"],
    contexts: Float[Tensor, "M H"],
    counts: Int[Tensor, " V"],
    *,
    similar: float,
    share: float,
) -> Float[Tensor, " V"]:
    """Return the paper's CCR: for each type, the share of its occurrences whose KL persists in recurring contexts.

    `ids` and `contexts` describe the persistent occurrences.  An occurrence recurs if at least `share` of the other
    occurrences of its type have a context with cosine `similar` or more.  A single occurrence does not recur.
    """
    unit = torch.nn.functional.normalize(contexts, dim=-1)
    persistent = torch.zeros_like(counts)
    for token in ids.unique().tolist():
        same = unit[ids == token]
        if len(same) > 1:
            num_similar = torch.cat([((part @ same.T) >= similar).sum(1) for part in same.split(BLOCK)])
            persistent[token] = (num_similar - 1 >= share * (len(same) - 1)).sum()  # not counting itself
    return persistent.double() / counts.clamp(min=1)


def is_above_quantile(kl: Float[Tensor, " N"], quantile: float) -> Bool[Tensor, " N"]:
    """Return a mask of the occurrences at or above a quantile (in [0, 1)) of the KL."""
    return kl >= kl.sort().values[min(len(kl) - 1, int(quantile * len(kl)))]  # torch.quantile is limited to 2^24 values
