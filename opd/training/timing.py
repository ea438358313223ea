"""Seconds of each phase of a step."""

import contextlib
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch


@dataclass
class Clock:
    """Measures the seconds of each phase of a step."""

    seconds: dict[str, float] = field(default_factory=dict)  # by phase

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add the time spent in the `with` block to a phase."""
        start = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def split(self, phase: str, part: str, seconds: float) -> None:
        """Move some seconds from a phase to a separate entry for a part of it."""
        self.seconds[phase] -= seconds
        self.seconds[part] = self.seconds.get(part, 0.0) + seconds

    def row(self, tokens: float, sampled: float = 0.0) -> dict[str, float]:
        """Return the line of perf.jsonl: seconds, tokens/s (of rollout: `sampled` tokens), and peak memory in MiB."""
        cuda = torch.cuda.is_available()
        peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        total = sum(self.seconds.values())
        phases = {f"{phase}_s": value for phase, value in self.seconds.items()}
        counts = {"rollout": sampled, "measure": tokens, "update": tokens}
        speeds = {f"tokens_per_s.{x}": n / self.seconds[x] for x, n in counts.items() if x in self.seconds}
        return {**phases, "seconds": total, "tokens_per_s": tokens / total, **speeds, "peak_mb": peak / 2**20}
