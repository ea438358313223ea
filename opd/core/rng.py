"""Counter-based noise: one uniform number per (seed, step, rollout, token), the same on any process and in any order.

The generator is splitmix64's finaliser, folded over the key.  Steele, Lea & Flood, "Fast splittable pseudorandom number
generators", 2014.
"""

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

_GAMMA = np.uint64(0x9E3779B97F4A7C15)


class NoiseStep(IntEnum):
    """A number in place of the training step, which counts from 1, in the keys of rollouts that no step trains on."""

    BRIDGE = 0  # rollouts on which the hidden-state bridge is fitted
    EVALUATION = -1  # held-out prompts: every evaluation samples with the same noise
    TEACHER_PREFIX = -2  # the beginnings of responses that the teacher generates
    REHEARSAL = -3  # the doctor's trial step


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
