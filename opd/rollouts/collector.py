"""Rollout collection: generate responses with student or teacher, verify them, and collate them into a `Batch`."""

import math
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase as Tokenizer

from opd.core.errors import Refusal
from opd.core.rng import NoiseStep
from opd.core.sampling import Prompt, Sampling
from opd.core.types import DATA, STUDENT, TEACHER, Rollout
from opd.data.prompts import Rendered
from opd.head.inputs import Hidden
from opd.head.vocabulary import Vocabulary
from opd.methods.rollout_policies.base import NOTHING, Memory
from opd.methods.rollout_policies.kl_ball import Blend
from opd.methods.rollout_policies.on_policy import OnPolicy
from opd.methods.rollout_policies.policies import Rollouts, source_of
from opd.methods.rollout_policies.stop_on_agreement import StopOnAgreement
from opd.methods.rollout_policies.teacher_prefix import TeacherPrefix
from opd.models.batching import rows
from opd.models.forward import cross_entropies, final_states, unprompted
from opd.models.load import head
from opd.rollouts.engines.base import Engine, Sample, Writer
from opd.rollouts.engines.hf import Beside, Blended, HFEngine, Watched

KEPT = 1 << 24  # tokens: limit of the cache of teacher prefixes, 4 bytes per token


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
class Collector:
    """Turns prompts into finished rollouts, for a single process."""

    student: Engine
    teachers: Mapping[str, Writer]  # by route name; "" is --teacher
    tokenizer: Tokenizer
    vocabulary: Vocabulary  # common ids, temperature and stop class for comparing student and teacher
    prefixes: dict[tuple[str, tuple[int, ...]], Prefix] = field(default_factory=dict)  # a cache, oldest first

    def collect(
        self,
        prompts: Sequence[Rendered],
        who: Rollouts,
        sampling: Sampling,
        verify: Callable[[str, Prompt], float],
        *,
        seed: int,
        step: int,
        first: int,
        total: int = 1,
        memory: Memory = NOTHING,
        alone: bool = False,
    ) -> list[Rollout]:
        """Generate and verify `who.per_prompt` rollouts per prompt.

        Args:
            prompts: this process's share of the prompts.
            who: the rollout policy.  A policy that changes over the run reads `step`, `total` and `memory`.
            sampling: temperature, top-p, top-k and the length limit.
            verify: the verifier, (response, prompt) -> score from 0 to 1.
            seed: the run's seed.
            step: the step that the noise is keyed by.
            first: batch index of the first rollout.
            total: number of steps in the run.
            memory: what the run carries from step to step.
            alone: also note the student's cross entropy of each response without its prompt (`student_alone`).
        """
        wanted = [(p, i) for i, p in enumerate(prompts) for _ in range(who.per_prompt)]
        index = list(range(first, first + len(wanted)))
        source = [source_of(who, step, i, seed) for i in index]
        room, does = sampling.max_new_tokens, self._does(who, step, memory)
        limit = who.limit(step, total, room) if isinstance(who, TeacherPrefix) else 0
        prefixes = self._prefixes([p for p, _ in wanted], sampling, limit, seed)
        # A prefix that is complete or reaches the length limit needs no continuation by the student.
        whole = {i: p.stopped for i, p in enumerate(prefixes) if p.stopped or len(p.ids) >= room}
        samples = {i: Sample((), (), stopped) for i, stopped in whole.items()}
        names = [[name] for name in self.teachers] if does else [list(self.teachers)]
        for speaker, among in (*((STUDENT, x) for x in names), *((TEACHER, [name]) for name in self.teachers)):
            mine = [i for i, s in enumerate(source) if s == speaker and wanted[i][0].teacher in among]
            mine = [i for i in mine if i not in whole]
            asked, key = [wanted[i][0] for i in mine], [index[i] for i in mine]
            if speaker == TEACHER:
                heard = [p.teacher_ids for p in asked]
                drawn = self.teachers[among[0]].generate(heard, sampling, seed=seed, step=step, index=key)
            else:
                drawn = self.student.generate(
                    [p.ids for p in asked],
                    sampling,
                    seed=seed,
                    step=step,
                    index=key,
                    prefixes=[prefixes[i].ids for i in mine],
                    **self._more(who, among[0], asked, does),
                )
            samples |= dict(zip(mine, drawn, strict=True))
        for i, s in enumerate(source):
            if s == DATA:
                samples[i] = self._written(wanted[i][0], sampling.max_new_tokens)
        noted, out = _noted(who, step, memory, limit), []
        for i, (rendered, group) in enumerate(wanted):
            ids, prefix = (*prefixes[i].ids, *samples[i].ids), len(prefixes[i].ids)
            out.append(
                Rollout(
                    prompt_ids=rendered.ids,
                    teacher_prompt_ids=rendered.teacher_ids,
                    ids=ids,
                    sampler_logp=(*(0.0,) * prefix, *samples[i].logp),
                    index=index[i],
                    group=first // who.per_prompt + group,
                    stopped=samples[i].stopped,
                    source=source[i],
                    outcome=verify(self.text(ids), rendered.prompt),
                    prefix=prefix,
                    others=samples[i].others,
                    notes={**samples[i].notes, **noted},
                    teacher=rendered.teacher,
                    prompt=rendered.prompt,
                )
            )
        return self._unprompted(out) if alone else out

    @torch.no_grad()
    def _unprompted(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """Add the note `student_alone`: the cross entropy of each response without its prompt, in nats per token.

        It is computed with the student's current weights.
        """
        assert isinstance(self.student, HFEngine), "a run refuses other engines here"
        model, out = self.student.model, list[Rollout]()
        for start in range(0, len(rollouts), self.student.rows):
            part = rollouts[start : start + self.student.rows]
            plain, told = unprompted(part)
            hidden = Hidden(final_states(model, rows(plain, told, teacher=False, device=model.device)), head(model))
            found = cross_entropies(hidden, part, self.vocabulary)
            out += [replace(r, notes={**r.notes, "student_alone": x}) for r, x in zip(part, found, strict=True)]
        return out

    def _does(self, who: Rollouts, step: int, memory: Memory) -> Blended | Watched | None:
        """Return how the teacher takes part in each decoding step of the student, or None if it does not."""
        match who:
            case Blend() if eps := who.radius(step):
                return Blended(eps)
            case StopOnAgreement(online=True):
                return Watched(who, who.threshold(step, memory), self.vocabulary)
        return None

    def _more(
        self, who: Rollouts, teacher: str, asked: Sequence[Rendered], does: Blended | Watched | None
    ) -> dict[str, Any]:
        """Return the arguments that only `HFEngine.generate` supports: a teacher at each decoding step, more samples.

        A run refuses these policies with any other engine.
        """
        if does is not None:
            engine = self.teachers[teacher]
            assert isinstance(engine, HFEngine), "a session refuses teachers that cannot read along"
            return {"beside": Beside(engine.model, [p.teacher_ids for p in asked], does)}
        return {"samples": who.samples} if isinstance(who, OnPolicy) and who.samples > 1 else {}

    def _prefixes(self, prompts: Sequence[Rendered], sampling: Sampling, limit: int, seed: int) -> list[Prefix]:
        """Return the first `limit` tokens of the teacher's response to each prompt.

        A prompt gets the same response at every step.
        """
        if not limit:
            return [Prefix()] * len(prompts)
        for name, engine in self.teachers.items():
            asked = dict.fromkeys(p.teacher_ids for p in prompts if p.teacher == name)
            new = [x for x in asked if (name, x) not in self.prefixes or not self.prefixes[name, x].reaches(limit)]
            # The noise is keyed by the prompt, so that a resumed run regenerates the same prefixes without saving them.
            key = [int.from_bytes(blake2b(np.array(x).tobytes(), digest_size=8).digest()) >> 1 for x in new]
            told = replace(sampling, max_new_tokens=limit)
            for ids, sample in zip(
                new, engine.generate(new, told, seed=seed, step=NoiseStep.TEACHER_PREFIX, index=key), strict=True
            ):
                self.prefixes[name, ids] = Prefix(array("i", sample.ids), sample.stopped)
        out = [self.prefixes[p.teacher, p.teacher_ids].first(limit) for p in prompts]
        while sum(len(p.ids) for p in self.prefixes.values()) > KEPT:
            del self.prefixes[next(iter(self.prefixes))]
        return out

    def text(self, ids: Sequence[int]) -> str:
        """Decode a response to text, without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def _written(self, rendered: Rendered, budget: int) -> Sample:
        prompt = rendered.prompt
        if not prompt.response:
            raise Refusal(
                "--response-column: this method trains on the data's responses, and a prompt has none "
                f"({self.tokenizer.decode(list(rendered.ids))[-60:]!r}); name the column, or --other teacher"
            )
        ids = [*self.tokenizer(prompt.response, add_special_tokens=False)["input_ids"], self.student.stop[0]]
        return Sample(tuple(ids[:budget]), (0.0,) * min(len(ids), budget), len(ids) <= budget)


def _noted(who: Rollouts, step: int, memory: Memory, limit: int) -> dict[str, float]:
    """Return the current state of a rollout policy that changes over the run, as notes for all rollouts of a step."""
    match who:
        case TeacherPrefix():
            return {"prefix_limit": float(limit)}
        case StopOnAgreement() if math.isfinite(threshold := who.threshold(step, memory)):
            return {"threshold": threshold}
    return {}
