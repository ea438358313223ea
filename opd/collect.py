"""Rollout collection: generate responses with student or teacher, verify them, and collate them into a `Batch`."""

import math
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from opd.engines.hf import Beside, Blended, HFEngine, Sample, Watched
from opd.errors import Refusal
from opd.heard import Columns, Hidden
from opd.models import head
from opd.noise import uniform
from opd.rollouts import NOTHING, Blend, Memory, OnPolicy, Rollouts, StopOnAgreement, TeacherPrefix, source_of
from opd.sampling import Prompt, Sampling, StopToken, Truncated
from opd.student import cross_entropies, final_states, rows, unprompted
from opd.types import ALONE, DATA, STUDENT, TEACHER, Batch, Rollout, pad
from opd.vocabulary import Vocabulary

KEPT = 1 << 24  # tokens: limit of the cache of teacher prefixes, 4 bytes per token


@dataclass(frozen=True)
class Rendered:
    """A prompt with its token ids for the student and for the teacher."""

    prompt: Prompt
    ids: tuple[int, ...]
    teacher_ids: tuple[int, ...]
    teacher: str = ""  # name of the teacher that scores the responses: a --route, or "" for --teacher


@runtime_checkable
class Writer(Protocol):
    """A generator of responses: an engine or a server."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        seed: int,
        step: int,
        index: Sequence[int],
    ) -> list[Sample]:
        """Generate a response for each prompt.

        The noise of a response depends only on (seed, step, its entry of `index`).
        """


@runtime_checkable
class Engine(Writer, Protocol):
    """An engine that samples from the student.

    It shares the student's weights, or receives them before it generates.
    """

    @property
    def model(self) -> PreTrainedModel | PeftModel:
        """The student model."""

    @property
    def rows(self) -> int:
        """Responses generated at the same time."""

    @property
    def vocabulary(self) -> int:
        """Vocabulary size: ids 0 .. vocabulary - 1 may be sampled."""

    @property
    def stop(self) -> tuple[int, ...]:
        """Ids that end a response."""

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
        """Generate a response for each prompt, as the continuation of its prefix."""

    def follow(self) -> None:
        """Note that an optimizer step changed the student's weights."""

    def close(self) -> None:
        """Release the engine's resources."""


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
            for ids, sample in zip(new, engine.generate(new, told, seed=seed, step=-2, index=key), strict=True):
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


def collate(rollouts: Sequence[Rollout], *, stop_token: StopToken, truncated: Truncated, seed: int, step: int) -> Batch:
    """Return a batch with the columns that are known before scoring; all tokens that never train are masked here."""
    rows = []
    for r in rollouts:
        mask = torch.tensor(r.mask or [True] * len(r.ids), dtype=torch.bool)
        if not r.stopped and not r.notes.get("cut") and truncated == "drop":
            mask = torch.zeros_like(mask)
        if r.stopped and stop_token == "mask":
            mask = torch.cat((mask[:-1], torch.tensor([False])))
        rows.append(mask)
    found = {name: [torch.tensor(r.notes[name]) for r in rollouts] for name in (rollouts[0].notes if rollouts else ())}
    given: dict[str, Any] = {name: torch.stack(found.pop(name)) for name in ALONE & found.keys()}
    more = [(r.others, len(r.ids)) for r in rollouts if r.others is not None]
    if more and len(more) == len(rollouts):
        given["others"] = pad([torch.tensor(x.ids, dtype=torch.long).view(n, -1) for x, n in more], 0)
        given["others_logp"] = pad([torch.tensor(x.logp).view(n, -1) for x, n in more], 0.0)
    return Batch(
        ids=pad([torch.tensor(r.ids) for r in rollouts], 0),
        mask=pad(rows, False),
        group=torch.tensor([r.group for r in rollouts]),
        source=torch.tensor([r.source for r in rollouts]),
        stopped=torch.tensor([r.stopped for r in rollouts]),
        outcome=torch.tensor([r.outcome for r in rollouts]),
        sampler_logp=pad([torch.tensor(r.sampler_logp) for r in rollouts], 0.0),
        prefix=torch.tensor([r.prefix for r in rollouts]),
        **given,
        notes={name: pad(x, 0.0) if x[0].ndim else torch.stack(x) for name, x in found.items()},
        # The fifth key, 1, separates this noise from the sampling noise, which has only the first four.
        coin=pad([torch.from_numpy(uniform(seed, step, r.index, np.arange(len(r.ids)), 1)) for r in rollouts], 0.0),
    )


def masks(batch: Batch, rollouts: Sequence[Rollout]) -> list[list[bool]]:
    """Return for each rollout which of its tokens are trained, without padding."""
    return [row[: len(r.ids)].tolist() for row, r in zip(batch.mask, rollouts, strict=True)]


def assemble(batch: Batch, parts: Sequence[tuple[Sequence[int], Columns]]) -> Batch:
    """Scatter flat per-token columns, measured for some rows at a time, into the batch as [B, T] columns.

    Rows that are in no part keep their previous values.
    """
    before = vars(batch) | {f"scores.{i}": x for i, x in enumerate(batch.scores)}
    found: dict[str, Any] = {}
    for at, columns in parts:
        rows = torch.tensor(at, dtype=torch.long)
        for name, flat in columns.named():
            had = before.get(name)
            empty = torch.zeros(batch.mask.shape, dtype=flat.dtype)
            whole = found.setdefault(name, empty if had is None else had.to(flat.dtype, copy=True))
            whole[rows] = torch.zeros_like(whole[rows]).masked_scatter(batch.mask[rows], flat)
    scores = tuple(found.pop(f"scores.{i}", None) for i in range(len(parts[0][1].scores)))
    return replace(batch, **found, scores=scores)
