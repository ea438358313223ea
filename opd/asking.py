"""A batch taken to those who write: `asked(question, batch, rollouts, panel) -> columns by name`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer

from opd import prompts, stages
from opd.episode import Deferred, Episode
from opd.questions import Continue, Grade, Question, Stages
from opd.rubrics import Buffer, Criterion, added, kept, stage_scores
from opd.runs import digest
from opd.tasks.answers import spoken
from opd.teachers.text import Begun, Failed, Gate, How, TextTeacher, needed
from opd.types import Batch, Prompt, Refusal, Rollout, pad

if TYPE_CHECKING:
    from opd.teachers.judge import Judge
    from opd.teachers.stages import Staged, StageJudge


@dataclass(frozen=True)
class Panel:
    """Who is asked in a run, and how: the same in every step."""

    teachers: Mapping[str, TextTeacher]  # by the names of --route; "" is --teacher
    judge: "Judge | StageJudge | None"  # for the methods that ask one
    gate: Gate  # of what a judge is asked for: groups, rollouts, reflections
    tokenizer: Tokenizer  # the student's
    most: int  # tokens of a teacher's longest answer
    seed: int


def asked(
    question: Question, batch: Batch, rollouts: Sequence[Rollout], panel: Panel, episode: Episode
) -> tuple[dict[str, Any], Episode]:
    """The columns that a question fills, and the episode after it."""
    match question:
        case Continue():
            return continued(question, batch, rollouts, panel), episode
        case Grade():
            return graded(question, batch, rollouts, panel), episode
        case Stages():
            return staged(question, batch, rollouts, panel, episode)


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


def continued(question: Continue, batch: Batch, rollouts: Sequence[Rollout], panel: Panel) -> dict[str, Tensor]:
    """How the teacher of each rollout would go on, against what the student said; chunks without an answer are none."""
    likeness = needed("rapidfuzz.distance", "omniopd").Levenshtein.normalized_similarity
    assert batch.student_entropy is not None, "a method that asks for continuations is measured before"
    chunk = question.chosen(batch.student_entropy, batch.mask)
    agreement = torch.zeros(chunk.shape)
    for name, teacher in panel.teachers.items():
        here = [p for p in places(chunk) if rollouts[p.row].teacher == name]
        begun = [Begun(rollouts[p.row].prompt, _text(panel.tokenizer, rollouts[p.row], 0, p.start)) for p in here]
        found = teacher.continue_(begun, question.texts, question.length, panel.seed, question.temperature)
        for p, texts in zip(here, found, strict=True):
            own = _text(panel.tokenizer, rollouts[p.row], p.start, p.end)
            at = (p.row, slice(p.start, p.end))
            if texts:
                agreement[at] = sum(likeness(own, text) for text in texts)
            else:
                chunk[at] = 0
    return {"chunk": chunk, "agreement": agreement}


def graded(question: Grade, batch: Batch, rollouts: Sequence[Rollout], panel: Panel) -> dict[str, Any]:
    """The judge's score of each response; a group whose teacher or judge failed has none."""
    from opd.teachers.judge import Group, Judge

    judge, seed = panel.judge, panel.seed
    assert isinstance(judge, Judge), "a session opens a judge for a method that asks one"
    rows: dict[int, list[int]] = {}
    for i, r in enumerate(rollouts):
        rows.setdefault(r.group, []).append(i)
    own = {key: rollouts[some[0]] for key, some in rows.items()}
    references = _references(own, panel, question.references, question.temperature)
    words = {key: tuple(filter(None, map(spoken, texts))) for key, texts in references.items()}
    groups = {
        key: Group(
            own[key].prompt,
            words[key],
            tuple(spoken(_text(panel.tokenizer, rollouts[i], 0, len(rollouts[i].ids))) for i in some),
        )
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


def _references(own: Mapping[int, Rollout], panel: Panel, count: int, temperature: float) -> dict[int, list[str]]:
    """The answers of the teacher of each group, by the group; none where it failed."""
    out: dict[int, list[str]] = {key: [] for key in own}
    how = How(count, panel.most, temperature, "--max-new-tokens")
    for name, teacher in panel.teachers.items() if count else ():
        here = [key for key, r in own.items() if r.teacher == name]
        found = teacher.chat([own[key].prompt for key in here], how, panel.seed)
        out |= dict(zip(here, found, strict=True))
    return out


def staged(
    question: Stages, batch: Batch, rollouts: Sequence[Rollout], panel: Panel, episode: Episode
) -> tuple[dict[str, Any], Episode]:
    """The stages of each rollout and the judge's scores of them, by the criteria of its question.

    The last rows of a batch may be the reflections of the step before: all answer, and scored then.
    """
    from opd.teachers.stages import Contrast, Staged, StageJudge

    judge, tokenizer, seed = panel.judge, panel.tokenizer, panel.seed
    assert isinstance(judge, StageJudge), "a session opens a judge for a method that asks one"
    tags, last = question.tags, len(question.tags)
    fresh = len(rollouts) - len(episode.deferred)
    number = [stages.numbered(tokenizer, r.ids, tags) for r in rollouts[:fresh]]
    answers = [_by_stage(tokenizer, r, n, last) for r, n in zip(rollouts, number, strict=False)]
    rows: dict[int, list[int]] = {}
    for i, r in enumerate(rollouts[:fresh]):
        rows.setdefault(r.group, []).append(i)
    own = {key: rollouts[some[0]] for key, some in rows.items()}
    references = _references(own, panel, question.references, 1.0)
    groups = {
        key: Contrast(
            own[key].prompt,
            tuple(answers[i] for i in some),
            tuple(Staged(own[key].prompt, tuple(stages.texts(spoken(x), tags))) for x in references[key]),
            episode.rubrics.get(digest(own[key].prompt)) or given(own[key].prompt, question.column, last),
        )
        for key, some in rows.items()
    }
    new = dict(zip(groups, judge.evolve(list(groups.values()), seed), strict=True))
    more = {key: () if isinstance(found, Failed) else found for key, found in new.items()}
    criteria = {key: added(g.kept, more[key]) for key, g in groups.items()}
    marked = [i for key, some in rows.items() if criteria[key] for i in some]
    asked_by = [criteria[rollouts[i].group] for i in marked]
    sheets = dict(zip(marked, judge.marks([answers[i] for i in marked], asked_by, seed), strict=True))
    paid = {i: sheet for i, sheet in sheets.items() if not isinstance(sheet, Failed)}
    for i in range(fresh):
        why = sheets.get(i, new[rollouts[i].group])  # without a criterion nothing is marked
        panel.gate.note("" if i in paid else str(why) if isinstance(why, Failed) else "no criteria")
    scores = torch.full((len(rollouts), last), torch.nan)
    buffers: dict[str, Buffer] = {}
    for key, some in rows.items():
        there = {i: paid[i] for i in some if i in paid}
        for i, sheet in there.items():
            found = stage_scores(criteria[key], sheet, last)
            scores[i] = torch.tensor(
                [x if text else torch.nan for x, text in zip(found, answers[i].stages, strict=True)]
            )
        if there:
            buffers[digest(own[key].prompt)] = kept(criteria[key], list(there.values()), question.caps)
    judged = torch.tensor([i in paid for i in range(fresh)] + [True] * len(episode.deferred))
    logp = batch.student_logp
    assert logp is not None, "a method that asks for scores of stages is measured before"
    logp = logp.clone()
    for i, d in enumerate(episode.deferred, fresh):
        scores[i, -1] = d.worth
        number.append([last] * len(d.ids))
        logp[i, : len(d.ids)] = torch.tensor(d.logp)  # a ratio is to the student that wrote it
    columns = {
        "stage": pad([torch.tensor(n) for n in number], 0),
        "stage_scores": scores,
        "judged": judged,
        "student_logp": logp,
    }
    return columns, episode.keeping(buffers, question.questions)


def _by_stage(tokenizer: Tokenizer, rollout: Rollout, number: Sequence[int], last: int) -> "Staged":
    """A rollout's text by stage."""
    from opd.teachers.stages import Staged

    ends = [sum(n <= stage for n in number) for stage in range(last + 1)]  # stages come in order
    parts = [_text(tokenizer, rollout, a, b) for a, b in pairwise(ends)]
    return Staged(rollout.prompt, tuple(parts))


def given(prompt: Prompt, column: str, last: int) -> Buffer:
    """The criteria of the answer that come with a question: a list of texts or of {criterion, weight, negative}."""
    raw: Any = prompt.columns.get(column) or ()
    try:
        rows = json.loads(raw) if isinstance(raw, str) else raw
        made: list[dict[str, Any]] = [{"criterion": row} if isinstance(row, str) else row for row in rows]
        return tuple(
            Criterion(last, row["criterion"], row.get("weight", 1), row.get("negative", False), persistent=True)
            for row in made
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise Refusal(
            f"--column {column}: {str(raw)[:80]!r} holds no criteria ({type(error).__name__}: {error}); write a list "
            'of texts, or of {"criterion": "...", "weight": 1 to 3, "negative": false}'
        ) from error


def reflections(
    written: Sequence[tuple[Rollout, Sequence[Rollout]]],
    logp: Tensor,
    panel: Panel,
) -> tuple[dict[str, str], list[Deferred]]:
    """The notes that reflections give, and the reflections to be trained on; each attempt stands before those on it.

    The best of an attempt's becomes the note of its question; one that the judge failed on counts for nothing.
    """
    from opd.teachers.stages import Reflected, StageJudge

    assert isinstance(panel.judge, StageJudge)
    said = lambda r: spoken(_text(panel.tokenizer, r, 0, len(r.ids)))
    pairs = [(group, attempt, r) for group, (attempt, some) in enumerate(written) for r in some]
    worth = panel.judge.worth([Reflected(a.prompt, said(a), said(r)) for _, a, r in pairs], panel.seed)
    notes: dict[str, str] = {}
    best: dict[int, float] = {}
    deferred = []
    for (group, attempt, r), row, value in zip(pairs, logp, worth, strict=True):
        panel.gate.note(str(value) if isinstance(value, Failed) else "")
        if isinstance(value, Failed):
            continue
        if value > best.get(group, -1.0):
            best[group], notes[digest(attempt.prompt)] = value, said(r)
        deferred.append(
            Deferred(
                messages=r.prompt.messages,
                text=r.prompt.text,
                teacher=r.teacher,
                group=group,
                prompt_ids=r.prompt_ids,
                ids=r.ids,
                logp=tuple(row[: len(r.ids)].tolist()),
                stopped=r.stopped,
                worth=value,
            )
        )
    return notes, deferred


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
    if batch.stage is not None and batch.stage_scores is not None and batch.judged is not None:
        out["unjudged"] = float(1 - batch.judged.float().mean())
        for k, column in enumerate(batch.stage_scores[batch.judged].unbind(1), 1):
            if (some := column[column.isfinite()]).numel():
                out[f"stage_{k}"] = float(some.mean())  # of the rollouts that have it
            out[f"staged_{k}"] = float((mask & (batch.stage == k)).sum() / mask.sum().clamp(min=1))  # of their tokens
    return out


def reflected(batch: Batch) -> dict[str, float]:
    """Reflections of the step before that are trained on: how many, their tokens, and what a judge found them worth."""
    if not len(batch.ids) or batch.stage_scores is None:
        return {}
    worth = batch.stage_scores[:, -1]
    tokens = {"reflections": float(len(batch.ids)), "reflection_tokens": float(batch.mask.sum())}
    return tokens | {"reflection": float(worth.mean()), "reflection_std": float(worth.std(correction=0))}


def _text(tokenizer: Tokenizer, rollout: Rollout, start: int, end: int) -> str:
    """A part of a response as a reader sees it."""
    return prompts.after(tokenizer, (*rollout.prompt_ids, *rollout.ids[:start]), rollout.ids[start:end])
