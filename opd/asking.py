"""A batch taken to those who write: `asked(question, batch, rollouts, ...) -> columns by name`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer

from opd import prompts
from opd.questions import Continue, Grade, Question
from opd.tasks.answers import spoken
from opd.teachers.text import Begun, TextTeacher, needed
from opd.types import Batch, Rollout

if TYPE_CHECKING:
    from opd.teachers.judge import Judge


def asked(
    question: Question,
    batch: Batch,
    rollouts: Sequence[Rollout],
    teachers: Mapping[str, TextTeacher],
    judge: "Judge | None",
    tokenizer: Tokenizer,
    *,
    most: int,
    seed: int,
) -> dict[str, Any]:
    """The columns that a question fills; `most` tokens is the longest answer of a teacher."""
    match question:
        case Continue():
            return continued(question, batch, rollouts, teachers, tokenizer, seed)
        case Grade():
            assert judge is not None, "a session opens a judge for a method that asks one"
            return graded(question, batch, rollouts, teachers, judge, tokenizer, most=most, seed=seed)


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


def graded(
    question: Grade,
    batch: Batch,
    rollouts: Sequence[Rollout],
    teachers: Mapping[str, TextTeacher],
    judge: "Judge",
    tokenizer: Tokenizer,
    *,
    most: int,
    seed: int,
) -> dict[str, Any]:
    """The judge's score of each response; a group whose teacher or judge failed has none."""
    from opd.teachers.judge import Group

    rows: dict[int, list[int]] = {}
    for i, r in enumerate(rollouts):
        rows.setdefault(r.group, []).append(i)
    own = {key: rollouts[some[0]] for key, some in rows.items()}
    references: dict[int, list[str]] = {}
    for name, teacher in teachers.items():
        here = [key for key, r in own.items() if r.teacher == name]
        found = teacher.chat(
            [own[key].prompt for key in here],
            n=question.references,
            max_tokens=most,
            seed=seed,
            temperature=question.temperature,
        )
        references |= dict(zip(here, found, strict=True))
    groups = {
        key: Group(
            own[key].prompt,
            tuple(map(spoken, references[key])),
            tuple(spoken(_text(tokenizer, rollouts[i], 0, len(rollouts[i].ids))) for i in some),
        )
        for key, some in rows.items()
        if references[key]
    }
    rubrics = judge.rubrics(list(groups.values()), question.least, question.most, seed)
    there = {key: rubric for key, rubric in zip(groups, rubrics, strict=True) if rubric is not None}
    sheets = judge.grades([groups[key] for key in there], list(there.values()), seed)
    verdict, judged = torch.zeros(len(rollouts)), torch.zeros(len(rollouts), dtype=torch.bool)
    theirs = torch.full((len(rollouts),), torch.nan)
    for (key, rubric), met in zip(there.items(), sheets, strict=True):
        if met is None:
            continue
        scores, first = [rubric.score(x) for x in met], len(groups[key].references)
        verdict[rows[key]], judged[rows[key]] = torch.tensor(scores[first:]), True
        theirs[rows[key]] = min(scores[:first])
    return {"verdict": verdict, "judged": judged, "notes": {**batch.notes, "reference_verdict": theirs}}


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
            verdict, theirs = (x[batch.judged] for x in (batch.verdict, batch.notes["reference_verdict"]))
            out["verdict"] = float(verdict.mean())
            out["reference_verdict"] = float(theirs.mean())  # of the worst of the teacher's answers to each prompt
            out["above_reference"] = float((verdict > theirs).float().mean())
    return out


def _text(tokenizer: Tokenizer, rollout: Rollout, start: int, end: int) -> str:
    """A part of a response as a reader sees it."""
    return prompts.after(tokenizer, (*rollout.prompt_ids, *rollout.ids[:start]), rollout.ids[start:end])
