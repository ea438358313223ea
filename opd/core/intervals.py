"""Confidence intervals: of a mean over prompts, of a ratio of sums, and of a difference paired by prompt."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch
from jaxtyping import Float

DRAWS = 4000  # bootstrap resamples
CONFIDENCE = 0.95  # confidence level of all intervals


@dataclass(frozen=True)
class Estimate:
    """A share with its confidence interval."""

    value: float
    low: float
    high: float


def interval(values: Sequence[float]) -> Estimate:
    """Return the mean of per-prompt shares with Wilson's interval at the effective number of prompts.

    The interval is over prompts, not samples: samples of one prompt are not independent.  Unlike the bootstrap it
    does not collapse when every share is 0 or 1.  Wilson, JASA 1927.
    """
    x = torch.tensor(values, dtype=torch.float64)
    n: float = len(x)
    m = float(x.mean())
    spread = float(x.var(correction=1)) if n > 1 else 0.0
    # Shares inside (0, 1) vary less than 0/1 outcomes of the same mean, which counts as more prompts.
    n = max(n, m * (1 - m) / spread * n) if spread > 0 else n
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    centre, half_width = m + z * z / (2 * n), z * math.sqrt(m * (1 - m) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return Estimate(
        m,
        max(0.0, (centre - half_width) / scale) if m > 0 else 0.0,
        min(1.0, (centre + half_width) / scale) if m < 1 else 1.0,
    )


def bootstrapped(values: Sequence[float]) -> Estimate:
    """Return the mean of per-prompt shares with the percentile bootstrap over prompts.

    Use it to compare with papers that report this interval.  Its coverage is below 95 % if shares are near 0 or 1:
    docs/LOG.md.
    """
    x, tail = np.array(values, dtype=np.float64), (1 - CONFIDENCE) / 2
    resamples = np.random.default_rng(0).multinomial(len(x), np.full(len(x), 1 / len(x)), DRAWS) / len(x)
    return Estimate(float(x.mean()), *map(float, np.quantile(resamples @ x, (tail, 1 - tail))))


INTERVALS: dict[str, Callable[[Sequence[float]], Estimate]] = {"wilson": interval, "bootstrap": bootstrapped}


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """Return sum(numerators) / sum(denominators) of independent pairs, with Student's t interval by linearisation.

    Cochran, Sampling Techniques (1977), Eq. 6.13.
    """
    a, b = torch.tensor(numerators, dtype=torch.float64), torch.tensor(denominators, dtype=torch.float64)
    if not b.sum() > 0:
        return Estimate(math.nan, math.nan, math.nan)
    n, value = len(a), float(a.sum() / b.sum())
    error = math.sqrt(n / (n - 1) * float((a - value * b).square().sum())) / float(b.sum())
    half_width = t_quantile((1 + CONFIDENCE) / 2, n - 1) * error
    return Estimate(value, max(0.0, value - half_width), value + half_width)


def t_quantile(p: float, freedom: int) -> float:
    """Return Student's t p-quantile with 5 or more degrees of freedom, to 0.3 %: Abramowitz and Stegun, 26.7.5."""
    z = NormalDist().inv_cdf(p)
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


@dataclass(frozen=True)
class Paired:
    """A mean difference `a - b` over shared prompts, with its 95 % confidence interval."""

    a: str
    b: str
    prompts: int
    value: float
    low: float
    high: float
    better: int  # prompts on which a is above b
    worse: int


def paired(a: Float[np.ndarray, "R N"], b: Float[np.ndarray, "S N"], names: tuple[str, str] = ("", "")) -> Paired:
    """Return the mean difference with a 95 % percentile bootstrap over prompts, and over runs if there are several.

    Rows are runs; columns are prompts, the same ones in both.  Prompts are resampled jointly for both sides, because
    a hard prompt is hard for both.  Runs are resampled separately on each side, because their seeds are not paired.
    """
    n = a.shape[1]
    noise = np.random.default_rng(0)
    resamples = noise.multinomial(n, np.full(n, 1 / n), DRAWS) / n
    weights = [noise.multinomial(len(x), np.full(len(x), 1 / len(x)), DRAWS) / len(x) for x in (a, b)]
    means = [((resamples @ x.T) * w).sum(1) for x, w in zip((a, b), weights, strict=True)]
    low, high = np.quantile(means[0] - means[1], (0.025, 0.975))
    gaps = a.mean(0) - b.mean(0)
    return Paired(*names, n, float(gaps.mean()), float(low), float(high), int((gaps > 0).sum()), int((gaps < 0).sum()))
