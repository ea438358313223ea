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


def rank(counts: Int[Tensor, " V"], score: Float[Tensor, " V"], *, top: int, least: int) -> tuple[int, ...]:
    """Return up to `top` types with the highest scores among those with at least `least` occurrences, best first."""
    score = score.where(counts >= least, -torch.inf)
    best = score.argsort(descending=True, stable=True)[:top]
    return tuple(best[score[best] > -torch.inf].tolist())


def stability(corpus: Corpus, *, top: int, least: int, seed: int, draws: int = 10) -> dict[float, float]:
    """Return the Jaccard index of the list from a random share of the rollouts with the full list, by share.

    Each value is the mean over `draws` random subsets.  A subset is part of the whole corpus, so disjoint halves would
    agree less.
    """
    ranked = lambda part: set(rank(*part.tally(), top=top, least=least))
    whole, rollouts = ranked(corpus), corpus.rollout.unique()
    generator, out = torch.Generator().manual_seed(seed), {}
    for share in SHARES:
        size = max(1, round(share * len(rollouts)))
        parts = [ranked(corpus.part(rollouts[torch.randperm(len(rollouts), generator=generator)[:size]]))
                 for _ in range(draws)]  # fmt: skip
        out[share] = sum(len(p & whole) / max(1, len(p | whole)) for p in parts) / draws
    return out


def matched(counts: Int[Tensor, " V"], types: Sequence[int]) -> tuple[int, ...]:
    """Return other types with as many occurrences in total as `types`, and with similar frequencies if possible.

    For each of `types`, from the most frequent down, take the unused type nearest in log frequency that fits into the
    remaining number of occurrences.  Then fill up with the most frequent types that fit.  The total never exceeds that
    of `types`; it is smaller if the rest of the corpus is too small.
    """
    at = list(types)
    left, free = int(counts[at].sum()), counts.clone()
    free[at] = 0
    wanted, out = counts[at].sort(descending=True).values.double().log(), list[int]()
    while bool((fits := (free > 0) & (free <= left)).any()):
        size = free.double().log()
        distance = (size - wanted[len(out)]).abs() if len(out) < len(wanted) else -size
        best = int(distance.where(fits, torch.inf).argmin())
        out.append(best)
        left -= int(free[best])
        free[best] = 0
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
    kept = torch.zeros_like(counts)
    for token in ids.unique().tolist():
        same = unit[ids == token]
        if len(same) > 1:
            near = torch.cat([((part @ same.T) >= similar).sum(1) for part in same.split(BLOCK)]) - 1  # minus itself
            kept[token] = (near >= share * (len(same) - 1)).sum()
    return kept.double() / counts.clamp(min=1)


def above(kl: Float[Tensor, " N"], quantile: float) -> Bool[Tensor, " N"]:
    """Return a mask of the occurrences at or above a quantile (in [0, 1)) of the KL."""
    return kl >= kl.sort().values[min(len(kl) - 1, int(quantile * len(kl)))]  # torch.quantile is limited to 2^24 values
