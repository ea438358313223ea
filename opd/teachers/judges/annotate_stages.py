"""Ask a judge about stages and reflections: `staged(question, batch, rollouts, panel, episode) -> columns, episode`."""

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from opd.core.errors import Refusal
from opd.core.sampling import Prompt
from opd.core.types import Batch, Rollout, pad
from opd.data.prompts import digest
from opd.data.verifiers.extract import without_thinking
from opd.methods.questions import Stages
from opd.teachers.judges import stage_tags as stages
from opd.teachers.judges.panel import Panel
from opd.teachers.judges.reflections import Deferred, Episode
from opd.teachers.judges.rubrics import Buffer, Criterion, added, kept, stage_scores
from opd.teachers.text.text_teacher import Failed

if TYPE_CHECKING:
    from opd.teachers.judges.stage_judge import Staged


def staged(
    question: Stages, batch: Batch, rollouts: Sequence[Rollout], panel: Panel, episode: Episode
) -> tuple[dict[str, Any], Episode]:
    """Return the stages of each rollout, with the judge's scores by the criteria of its question, and the new episode.

    The last rows of a batch may be the reflections of the previous step.  A reflection consists only of the last stage,
    and it was scored in the previous step.
    """
    from opd.teachers.judges.stage_judge import Contrast, Staged, StageJudge

    judge, tokenizer, seed = panel.judge, panel.tokenizer, panel.seed
    assert isinstance(judge, StageJudge), "a session opens a judge for a method that asks one"
    tags, last = question.tags, len(question.tags)
    fresh = len(rollouts) - len(episode.deferred)
    number = [stages.numbered(tokenizer, r.ids, tags) for r in rollouts[:fresh]]
    answers = [_by_stage(panel, r, n, last) for r, n in zip(rollouts, number, strict=False)]
    rows: dict[int, list[int]] = {}
    for i, r in enumerate(rollouts[:fresh]):
        rows.setdefault(r.group, []).append(i)
    own = {key: rollouts[some[0]] for key, some in rows.items()}
    references = panel.references(own, question.references, 1.0)
    groups = {
        key: Contrast(
            own[key].prompt,
            tuple(answers[i] for i in some),
            tuple(Staged(own[key].prompt, tuple(stages.texts(without_thinking(x), tags))) for x in references[key]),
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
        why = sheets.get(i, new[rollouts[i].group])  # a rollout without criteria gets no marks
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
        logp[i, : len(d.ids)] = torch.tensor(d.logp)  # the importance ratio is to the student that generated it
    columns = {
        "stage": pad([torch.tensor(n) for n in number], 0),
        "stage_scores": scores,
        "judged": judged,
        "student_logp": logp,
    }
    return columns, episode.keeping(buffers, question.questions)


def _by_stage(panel: Panel, rollout: Rollout, number: Sequence[int], last: int) -> "Staged":
    """Return the text of a rollout by stage."""
    from opd.teachers.judges.stage_judge import Staged

    ends = [sum(n <= stage for n in number) for stage in range(last + 1)]  # stages come in order
    parts = [panel.part(rollout, a, b) for a, b in pairwise(ends)]
    return Staged(rollout.prompt, tuple(parts))


def given(prompt: Prompt, column: str, last: int) -> Buffer:
    """Parse the answer's criteria in a prompt's row: a list of texts or of {criterion, weight, negative}.

    Raises Refusal if the column holds anything else.
    """
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
    """Return the notes that reflections give, by question, and the reflections to train on.

    `written` pairs each attempt with the reflections on it; `logp` has a row per reflection.  The best reflection on an
    attempt becomes the note of its question.  A reflection is dropped if the judge failed on it.
    """
    from opd.teachers.judges.stage_judge import Reflected, StageJudge

    assert isinstance(panel.judge, StageJudge)
    said = lambda r: panel.whole(r)
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
