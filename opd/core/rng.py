"""Counter-based noise: one uniform number per (seed, step, rollout, token), the same on any process and in any order.

The generator is splitmix64's finaliser, folded over the key.  Steele, Lea & Flood, "Fast splittable pseudorandom number
generators", 2014.
"""

import numpy as np
from numpy.typing import NDArray

_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def _mix(z: np.uint64 | NDArray[np.uint64]) -> np.uint64 | NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def uniform(*key: int | np.integer | NDArray[np.integer]) -> np.float64 | NDArray[np.float64]:
    """Return U[0, 1) numbers with 53 bits, for integer keys that broadcast together."""
    state: np.uint64 | NDArray[np.uint64] = np.uint64(0)
    with np.errstate(over="ignore"):  # the generator relies on arithmetic modulo 2^64
        for part in key:
            state = _mix((state + _GAMMA) ^ _mix(np.asarray(part, dtype=np.int64).astype(np.uint64) + _GAMMA))
    return (state >> np.uint64(11)) * np.float64(2.0**-53)
