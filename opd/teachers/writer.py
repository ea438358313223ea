"""A teacher behind a server as it writes: for methods whose rollouts are partly the teacher's."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from opd.engines.hf import Sample
from opd.noise import uniform
from opd.teachers.client import read_json
from opd.teachers.reach import Server, logprobs
from opd.types import Sampling


@dataclass(frozen=True)
class ServerEngine:
    """A server that writes responses."""

    server: Server
    vocabulary: int
    stop: tuple[int, ...]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        seed: int,
        step: int,
        index: Sequence[int],
        prefixes: Sequence[Sequence[int]] = (),
    ) -> list[Sample]:
        """One response per prompt, after its prefix; rollout `index[i]` has a seed, the server's noise is its own."""

        def draw(prompt: Sequence[int], prefix: Sequence[int], i: int) -> Sample:
            body = {
                "model": self.server.model,
                "prompt": [*prompt, *prefix],
                "max_tokens": sampling.max_new_tokens - len(prefix),
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k,
                "seed": int(uniform(seed, step, i, -2) * 2**53),
                "stop_token_ids": list(self.stop),
                "logprobs": 0,
                "return_token_ids": True,
            }
            return self.server.client.post("/v1/completions", body, read_json(self._read))

        pool = ThreadPoolExecutor(self.server.client.how.teacher_concurrency, "teacher")
        try:
            return list(pool.map(draw, prompts, prefixes or [()] * len(prompts), index))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # where one failed, nobody waits for the others

    def _read(self, told: dict) -> Sample:
        (choice,) = told["choices"]
        said = torch.tensor(choice["logprobs"]["token_logprobs"], dtype=torch.float64)
        ids, logp = tuple(choice["token_ids"]), tuple(logprobs(said).tolist())
        if not ids or len(ids) != len(logp) or max(ids) >= self.vocabulary:
            raise ValueError(f"{len(ids)} tokens with {len(logp)} log-probs, or an id beyond {self.vocabulary}")
        return Sample(ids, logp, ids[-1] in self.stop)
