"""The beginnings of the teacher's responses, for rollouts that the student continues (TrOPD)."""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np

from opd.core.rng import NoiseStep
from opd.core.sampling import Sampling
from opd.data.prompts import Rendered
from opd.rollouts.engines.base import GenerateRequest, ResponseGenerator

MAX_TOKENS = 1 << 24  # limit of the cache, 4 bytes per token


@dataclass(frozen=True)
class Prefix:
    """The beginning of a teacher's response."""

    ids: Sequence[int] = ()
    stopped: bool = False  # the response is complete: it ends with this prefix

    def reaches(self, limit: int) -> bool:
        """Return whether the prefix has `limit` tokens or the complete response."""
        return self.stopped or len(self.ids) >= limit

    def first(self, limit: int) -> "Prefix":
        """Return the first `limit` tokens."""
        return Prefix(tuple(self.ids[:limit]), self.stopped and len(self.ids) <= limit)


@dataclass(frozen=True)
class PrefixCache:
    """The prefixes that teachers have generated so far, by route name and teacher prompt; the oldest is first."""

    prefixes: dict[tuple[str, tuple[int, ...]], Prefix] = field(default_factory=dict)

    def get(
        self, teachers: Mapping[str, ResponseGenerator], prompts: Sequence[Rendered], sampling: Sampling, seed: int
    ) -> list[Prefix]:
        """Return the first `max_new_tokens` tokens of the teacher's response to each prompt, the same at every step."""
        limit = sampling.max_new_tokens
        if not limit:
            return [Prefix()] * len(prompts)
        for name, teacher in teachers.items():
            prompt_ids = dict.fromkeys(p.teacher_ids for p in prompts if p.teacher == name)
            new = [x for x in prompt_ids if not self.prefixes.get((name, x), Prefix()).reaches(limit)]
            # The noise is keyed by the prompt, so that a resumed run regenerates the same prefixes without saving them.
            keys = [int.from_bytes(blake2b(np.array(x).tobytes(), digest_size=8).digest()) >> 1 for x in new]
            request = GenerateRequest(new, sampling, seed=seed, step=NoiseStep.TEACHER_PREFIX, index=keys)
            samples = teacher.generate(request)
            for ids, sample in zip(new, samples, strict=True):
                self.prefixes[name, ids] = Prefix(array("i", sample.ids), sample.stopped)
        prefixes = [self.prefixes[p.teacher, p.teacher_ids].first(limit) for p in prompts]
        while sum(len(p.ids) for p in self.prefixes.values()) > MAX_TOKENS:
            del self.prefixes[next(iter(self.prefixes))]
        return prefixes
