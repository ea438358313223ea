"""Ask text-only teachers and judges about a batch: `asked(question, batch, rollouts, panel, episode) -> columns`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opd.core.types import Batch, Rollout
from opd.data.verifiers.extract import without_thinking
from opd.methods.questions import Continue, Grade, Question, Stages
from opd.teachers.judges.annotate_stages import staged
from opd.teachers.judges.panel import Panel
from opd.teachers.judges.reflections import Episode
from opd.teachers.text.text_teacher import Begun, Failed, needed


def asked(
    question: Question, batch: Batch, rollouts: Sequence[Rollout], panel: Panel, episode: Episode
) -> tuple[dict[str, Any], Episode]:
    """Ask a question about a batch.  Return the columns that the answers fill, by name, and the updated episode."""
    match question:
        case Continue():
            return continued(question, batch, rollouts, panel), episode
        case Grade():
            return graded(question, batch, rollouts, panel), episode
        case Stages():
            return staged(question, batch, rollouts, panel, episode)


@dataclass(frozen=True)
class Place:
    """A chunk of a response: row of the batch, number of the chunk in the row, and token range [start, end)."""

    row: int
    number: int
    start: int
    end: int


def places(chunk: Tensor) -> list[Place]:
    """Return the chunks of a batch [B, T], ordered by row and number."""
    out = []
    for row, numbers in enumerate(chunk):
        for number in range(1, int(numbers.max()) + 1):
            at = (numbers == number).nonzero()[:, 0]
            out.append(Place(row, number, int(at[0]), int(at[-1]) + 1))
    return out


def continued(question: Continue, batch: Batch, rollouts: Sequence[Rollout], panel: Panel) -> dict[str, Tensor]:
    """Compare the teacher's continuations with the student's text, chunk by chunk.

    Return the columns `chunk` [B, T], the chunk number of each token, and `agreement` [B, T], the summed similarity of
    the continuations.  A chunk without an answer is removed: its number becomes 0.
    """
    likeness = needed("rapidfuzz.distance", "omniopd").Levenshtein.normalized_similarity
    assert batch.student_entropy is not None, "a method that asks for continuations is measured before"
    chunk = question.chosen(batch.student_entropy, batch.mask)
    agreement = torch.zeros(chunk.shape)
    for name, teacher in panel.teachers.items():
        here = [p for p in places(chunk) if rollouts[p.row].teacher == name]
        begun = [Begun(rollouts[p.row].prompt, panel.part(rollouts[p.row], 0, p.start)) for p in here]
        found = teacher.continue_(begun, question.texts, question.length, panel.seed, question.temperature)
        for p, texts in zip(here, found, strict=True):
            own = panel.part(rollouts[p.row], p.start, p.end)
            at = (p.row, slice(p.start, p.end))
            if texts:
                agreement[at] = sum(likeness(own, text) for text in texts)
            else:
                chunk[at] = 0
    return {"chunk": chunk, "agreement": agreement}


def graded(question: Grade, batch: Batch, rollouts: Sequence[Rollout], panel: Panel) -> dict[str, Any]:
    """Return the judge's score of each response: the columns `verdict` [B] and `judged` [B].

    If the teacher or the judge failed for a group, its responses have no score and `judged` is false.
    """
    from opd.teachers.judges.rubric_judge import Group, Judge

    judge, seed = panel.judge, panel.seed
    assert isinstance(judge, Judge), "a session opens a judge for a method that asks one"
    rows: dict[int, list[int]] = {}
    for i, r in enumerate(rollouts):
        rows.setdefault(r.group, []).append(i)
    own = {key: rollouts[some[0]] for key, some in rows.items()}
    references = panel.references(own, question.references, question.temperature)
    words = {key: tuple(filter(None, map(without_thinking, texts))) for key, texts in references.items()}
    groups = {
        key: Group(own[key].prompt, words[key], tuple(panel.whole(rollouts[i]) for i in some))
        for key, some in rows.items()
        if words[key]
    }
    rubrics = dict(zip(groups, judge.rubrics(list(groups.values()), question.least, question.most, seed), strict=True))
    there = {key: rubric for key, rubric in rubrics.items() if not isinstance(rubric, Failed)}
    sheets = dict(zip(there, judge.grades([groups[key] for key in there], list(there.values()), seed), strict=True))
    verdict, judged = torch.zeros(len(rollouts)), torch.zeros(len(rollouts), dtype=torch.bool)
    theirs = torch.full((len(rollouts),), torch.nan)
    for key, some in rows.items():
        met = sheets.get(key, rubrics.get(key, Failed("the teacher gave no answer to compare with")))
        panel.gate.note(str(met) if isinstance(met, Failed) else "")
        if isinstance(met, tuple):
            scores, first = [there[key].score(x) for x in met], len(groups[key].references)
            verdict[some], judged[some] = torch.tensor(scores[first:]), True
            theirs[some] = min(scores[:first])
    return {"verdict": verdict, "judged": judged, "notes": {**batch.notes, "reference_verdict": theirs}}
