"""A batch taken to those who write: `asked(question, batch, rollouts, ...) -> columns by name`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer

from opd import prompts
from opd.questions import Continue, Question
from opd.teachers.text import Begun, TextTeacher, needed
from opd.types import Batch, Rollout


def asked(
    question: Question,
    batch: Batch,
    rollouts: Sequence[Rollout],
    teachers: Mapping[str, TextTeacher],
    tokenizer: Tokenizer,
    seed: int,
) -> dict[str, Tensor]:
    """The columns that a question fills."""
    assert isinstance(question, Continue)
    return continued(question, batch, rollouts, teachers, tokenizer, seed)


@dataclass(frozen=True)
class Place:
    """One chunk: of which rollout, its number there, and its first and last tokens."""

    row: int
    number: int
    start: int
    end: int


def places(chunk: Tensor) -> list[Place]:
    """The chunks of a batch, in order of rollout and number."""
    out = []
    for row, numbers in enumerate(chunk):
        for number in range(1, int(numbers.max()) + 1):
            at = (numbers == number).nonzero()[:, 0]
            out.append(Place(row, number, int(at[0]), int(at[-1]) + 1))
    return out


def continued(
    question: Continue,
    batch: Batch,
    rollouts: Sequence[Rollout],
    teachers: Mapping[str, TextTeacher],
    tokenizer: Tokenizer,
    seed: int,
) -> dict[str, Tensor]:
    """How the teacher of each rollout would go on, against what the student said; chunks without an answer are none."""
    likeness = needed("rapidfuzz.distance", "omniopd").Levenshtein.normalized_similarity
    assert batch.student_entropy is not None, "a method that asks for continuations is measured before"
    chunk = question.chosen(batch.student_entropy, batch.mask)
    agreement = torch.zeros(chunk.shape)
    for name, teacher in teachers.items():
        here = [p for p in places(chunk) if rollouts[p.row].teacher == name]
        begun = [Begun(rollouts[p.row].prompt, _text(tokenizer, rollouts[p.row], 0, p.start)) for p in here]
        found = teacher.continue_(begun, question.texts, question.length, seed, question.temperature)
        for p, texts in zip(here, found, strict=True):
            own = _text(tokenizer, rollouts[p.row], p.start, p.end)
            at = (p.row, slice(p.start, p.end))
            if texts:
                agreement[at] = sum(likeness(own, text) for text in texts)
            else:
                chunk[at] = 0
    return {"chunk": chunk, "agreement": agreement}


def numbers(batch: Batch, question: Question | None) -> dict[str, float]:
    """What a text-only teacher or a judge said."""
    out, mask = {}, batch.mask
    if batch.chunk is not None and batch.agreement is not None and isinstance(question, Continue):
        audited = mask & (batch.chunk > 0)
        out["audited"] = float(audited.sum() / mask.sum().clamp(min=1))  # share of trained tokens
        if audited.any():
            out["agreement"] = float(batch.agreement[audited].mean() / question.texts)  # likeness of a text, 0 to 1
    if batch.verdict is not None and batch.judged is not None:
        out["unjudged"] = float(1 - batch.judged.float().mean())  # share of rollouts that a judge failed on
        if batch.judged.any():
            out["verdict"] = float(batch.verdict[batch.judged].mean())
    return out


def _text(tokenizer: Tokenizer, rollout: Rollout, start: int, end: int) -> str:
    """A part of a response as a reader sees it."""
    return prompts.after(tokenizer, (*rollout.prompt_ids, *rollout.ids[:start]), rollout.ids[start:end])
