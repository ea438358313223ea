"""From prompts to a batch: who speaks, generation, verification, collation."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer

from opd.engines.hf import HFEngine, Sample
from opd.noise import uniform
from opd.rollouts import Rollouts
from opd.types import DATA, STUDENT, TEACHER, Batch, Prompt, Refusal, Rollout, Sampling, StopToken, Truncated, pad
from opd.vocabulary import Columns


@dataclass(frozen=True)
class Rendered:
    """A prompt, and its ids as each model reads it."""

    prompt: Prompt
    ids: tuple[int, ...]
    teacher_ids: tuple[int, ...]
    teacher: str = ""  # who scores the responses: a name of --route; "" is --teacher


@dataclass(frozen=True)
class Collector:
    """Everything that turns prompts into finished rollouts, for one process."""

    student: HFEngine
    teachers: Mapping[str, HFEngine]  # by the name of the teacher
    tokenizer: Tokenizer

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
    ) -> list[Rollout]:
        """`who.per_prompt` verified rollouts of each prompt; `first` is the batch index of the first of them."""
        wanted = [(p, i) for i, p in enumerate(prompts) for _ in range(who.per_prompt)]
        index = list(range(first, first + len(wanted)))
        source = [who.source(step, i, seed) for i in index]
        samples: dict[int, Sample] = {}
        speakers = [(STUDENT, "", self.student), *((TEACHER, name, engine) for name, engine in self.teachers.items())]
        for speaker, name, engine in speakers:
            mine = [i for i, s in enumerate(source) if s == speaker and (s == STUDENT or wanted[i][0].teacher == name)]
            asked = [wanted[i][0].ids if speaker == STUDENT else wanted[i][0].teacher_ids for i in mine]
            drawn = engine.generate(asked, sampling, seed=seed, step=step, index=[index[i] for i in mine])
            samples |= dict(zip(mine, drawn, strict=True))
        for i, s in enumerate(source):
            if s == DATA:
                samples[i] = self._written(wanted[i][0], sampling.max_new_tokens)
        out = []
        for i, (rendered, group) in enumerate(wanted):
            text = self.text(samples[i].ids)
            out.append(
                Rollout(
                    prompt_ids=rendered.ids,
                    teacher_prompt_ids=rendered.teacher_ids,
                    ids=samples[i].ids,
                    sampler_logp=samples[i].logp,
                    index=index[i],
                    group=first // who.per_prompt + group,
                    stopped=samples[i].stopped,
                    source=source[i],
                    outcome=verify(text, rendered.prompt),
                    teacher=rendered.teacher,
                    prompt=rendered.prompt,
                )
            )
        return out

    def text(self, ids: Sequence[int]) -> str:
        """A response as a reader sees it."""
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


def collate(rollouts: Sequence[Rollout], *, stop_token: StopToken, truncated: Truncated, seed: int, step: int) -> Batch:
    """The columns known before any scoring; tokens never trained are masked here, once."""
    rows = []
    for r in rollouts:
        mask = torch.tensor(r.mask or [True] * len(r.ids), dtype=torch.bool)
        if not r.stopped and truncated == "drop":
            mask = torch.zeros_like(mask)
        if r.stopped and stop_token == "mask":
            mask = torch.cat((mask[:-1], torch.tensor([False])))
        rows.append(mask)
    return Batch(
        ids=pad([torch.tensor(r.ids) for r in rollouts], 0),
        mask=pad(rows, False),
        group=torch.tensor([r.group for r in rollouts]),
        source=torch.tensor([r.source for r in rollouts]),
        stopped=torch.tensor([r.stopped for r in rollouts]),
        outcome=torch.tensor([r.outcome for r in rollouts]),
        sampler_logp=pad([torch.tensor(r.sampler_logp) for r in rollouts], 0.0),
        # A key of five: that of four drew the token itself.
        coin=pad([torch.from_numpy(uniform(seed, step, r.index, np.arange(len(r.ids)), 1)) for r in rollouts], 0.0),
    )


def masks(batch: Batch, rollouts: Sequence[Rollout]) -> list[list[bool]]:
    """The trained tokens of each rollout, unpadded."""
    return [row[: len(r.ids)].tolist() for row, r in zip(batch.mask, rollouts, strict=True)]


def assemble(batch: Batch, parts: Sequence[tuple[Sequence[int], Columns]]) -> Batch:
    """The batch with the flat columns of its trained tokens, measured for some rows at a time, put back in place."""
    found: dict[str, Tensor] = {}
    for at, columns in parts:
        rows = torch.tensor(at, dtype=torch.long)
        for name, flat in columns.named():
            whole = found.setdefault(name, torch.zeros(batch.mask.shape, dtype=flat.dtype))
            whole[rows] = torch.zeros_like(whole[rows]).masked_scatter(batch.mask[rows], flat)
    scores = tuple(found.pop(f"scores.{i}", None) for i in range(len(parts[0][1].scores)))
    return replace(batch, **found, scores=scores)
