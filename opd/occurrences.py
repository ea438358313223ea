"""Where a corpus of rollouts says a token and at what KL, and which types that singles out: pure functions.

An occurrence is a response position under the token *predicted* there; a type is a token of the vocabulary.  Rock
Tokens, arXiv:2605.09253.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

SHARES = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)  # of the corpus; the paper's 50 to 400 of 500, and all
BLOCK = 1024  # occurrences compared at once


@dataclass(frozen=True)
class Corpus:
    """Occurrences, flat."""

    ids: Int[Tensor, " N"]
    kl: Float[Tensor, " N"]  # KL(student || teacher) of the whole distribution there, nats
    rollout: Int[Tensor, " N"]

    def part(self, rollouts: Int[Tensor, " R"]) -> "Corpus":
        """The occurrences in some rollouts."""
        inside = torch.isin(self.rollout, rollouts)
        return Corpus(self.ids[inside], self.kl[inside], self.rollout[inside])

    def tally(self) -> tuple[Int[Tensor, " V"], Float[Tensor, " V"]]:
        """Occurrences and summed KL of each type up to the largest id: the rock score R(v) = mean KL x frequency."""
        return self.ids.bincount(), self.ids.bincount(self.kl)


def rank(counts: Int[Tensor, " V"], score: Float[Tensor, " V"], *, top: int, least: int) -> tuple[int, ...]:
    """The types of highest score among those with `least` occurrences or more, best first."""
    score = score.where(counts >= least, -torch.inf)
    best = score.argsort(descending=True, stable=True)[:top]
    return tuple(best[score[best] > -torch.inf].tolist())


def stability(corpus: Corpus, *, top: int, least: int, seed: int, draws: int = 10) -> dict[float, float]:
    """Jaccard of the types ranked in a random share of the rollouts with those of all, by share, mean over draws.

    A share is part of the whole: disjoint halves agree less.
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
    """Other types with as many occurrences as these have together, of their frequencies as far as there are such.

    From the most frequent of `types` down, the free type nearest in log frequency that does not exceed what is left;
    then the most frequent ones that fit.  Never more in total; less where the rest of the corpus is smaller.
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
    """The paper's CCR: of each type, the share of its occurrences whose KL persists in contexts that recur.

    `ids` and `contexts` are those of the persistent occurrences.  One recurs where at least `share` of the others of
    its type have a context of cosine `similar` or more; one alone does not.
    """
    unit = torch.nn.functional.normalize(contexts, dim=-1)
    kept = torch.zeros_like(counts)
    for token in ids.unique().tolist():
        same = unit[ids == token]
        if len(same) > 1:
            near = torch.cat([((part @ same.T) >= similar).sum(1) for part in same.split(BLOCK)]) - 1  # less itself
            kept[token] = (near >= share * (len(same) - 1)).sum()
    return kept.double() / counts.clamp(min=1)


def above(kl: Float[Tensor, " N"], quantile: float) -> Bool[Tensor, " N"]:
    """The occurrences at or above a quantile of the KL, 0 inside [0, 1)."""
    return kl >= kl.sort().values[min(len(kl) - 1, int(quantile * len(kl)))]  # torch.quantile ends at 2^24
