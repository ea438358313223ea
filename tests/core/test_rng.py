"""Counter-based noise: golden values, uniformity, independence of keys."""

import numpy as np
import pytest

from opd.core.rng import uniform

MASK = (1 << 64) - 1


def reference(*key: int) -> float:
    """The same generator in Python integers."""

    def mix(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
        return z ^ (z >> 31)

    gamma, state = 0x9E3779B97F4A7C15, 0
    for part in key:
        state = mix((state + gamma & MASK) ^ mix((part & MASK) + gamma & MASK))
    return (state >> 11) / 2**53


def test_golden():
    """Values that a run's log depends on: they never change."""
    assert uniform(0).item() == 0.01403302919427496
    assert uniform(0, 0, 0, 0).item() == 0.1826605802663317
    assert uniform(1, 2, 3, 4).item() == 0.9593390931752429
    assert uniform(7, 0, 5, -1).item() == 0.5301388884194964


@pytest.mark.parametrize("key", [(0,), (1, 2, 3, 4), (2**40, 3, -1), (-5, 0, 0, -1), (2**63 - 1, -(2**63))])
def test_equals_the_integer_reference(key):
    assert uniform(*key) == reference(*key)


def test_broadcasting_equals_scalar_calls():
    steps, tokens = np.arange(3)[:, None], np.arange(-1, 4)
    got = uniform(11, steps, 2, tokens)
    assert got.shape == (3, 5)
    assert got.tolist() == [[uniform(11, s, 2, t).item() for t in range(-1, 4)] for s in range(3)]


def test_a_million_keys_are_uniform_and_distinct():
    x = uniform(3, np.arange(10)[:, None, None], np.arange(100)[:, None], np.arange(-1, 999)).ravel()
    n = len(x)
    assert ((x >= 0) & (x < 1)).all()
    assert len(np.unique(x)) == n == 10**6
    assert abs(x.mean() - 1 / 2) < 4 * (12 * n) ** -0.5  # standard error of the mean: 1/sqrt(12 n)
    assert abs(x.var() - 1 / 12) < 4 * (180 * n) ** -0.5  # of the variance: 1/sqrt(180 n)
    ranks = np.arange(n) / n
    ordered = np.sort(x)
    distance = max(abs(ordered - ranks).max(), abs(ordered - ranks - 1 / n).max())
    assert distance < 1.95 / n**0.5  # Kolmogorov-Smirnov, one in a thousand


@pytest.mark.parametrize("part", range(4))
def test_neighbouring_keys_are_uncorrelated(part):
    n = 100_000
    key, nearby = [5, 6, 7, 8], [5, 6, 7, 8]
    key[part], nearby[part] = np.arange(n), np.arange(1, n + 1)
    assert abs(np.corrcoef(uniform(*key), uniform(*nearby))[0, 1]) < 4 / n**0.5


def test_the_place_of_a_key_matters():
    keys = [(1, 2, 3), (3, 2, 1), (2, 1, 3), (1, 2), (1, 2, 3, 0), (0, 1, 2, 3)]
    assert len({uniform(*key).item() for key in keys}) == len(keys)
