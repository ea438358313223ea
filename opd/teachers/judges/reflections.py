"""Reflections of the student on its rollouts, and the notes that they leave for the next time a question is asked.

RubricEM, arXiv:2605.10899.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from opd.core.rng import uniform
from opd.core.types import Rollout
from opd.data import prompts
from opd.data.prompt_stream import Prompts
from opd.data.prompts import Rendered, digest
from opd.data.verifiers import response_text
from opd.methods.questions import Reflect
from opd.teachers.judges.annotator import TeacherTexts, rows_by_group
from opd.teachers.judges.rubric_memory import DeferredReflection
from opd.teachers.judges.stage_judge import Reflection, StageJudge
from opd.teachers.text.text_teacher import Failure, FailureLimit

ATTEMPT_CHOICE = -4  # random-number key in place of a token's position: the choice of the rollout to reflect on


@dataclass(frozen=True)
class Attempt:
    """A rollout to reflect on, with the prompt that requests the reflections."""

    rollout: Rollout
    request: Rendered


def with_notes(
    rendered_prompts: Sequence[Rendered], notes: Mapping[str, str], template: str, prompt_stream: Prompts
) -> list[Rendered]:
    """Return the prompts, each with the note of its question if it has one.

    A prompt that would become too long stays without its note.
    """
    result = []
    for rendered in rendered_prompts:
        note = notes.get(digest(rendered.prompt))
        if note is not None:
            ids = prompt_stream.student_ids(prompts.fill_template(rendered.prompt, template, reflection=note))
            rendered = replace(rendered, ids=ids) if len(ids) <= prompt_stream.room else rendered
        result.append(rendered)
    return result


def choose_attempts(
    rollouts: Sequence[Rollout], reflect: Reflect, prompt_stream: Prompts, texts: TeacherTexts, step: int
) -> list[Attempt]:
    """Choose one rollout of each group, uniformly at random, to reflect on.

    A group is left out if the request for a reflection on its rollout would be too long.
    """
    attempts = []
    for rows in rows_by_group(rollouts).values():
        draw = float(uniform(texts.seed, step, rollouts[rows[0]].index, ATTEMPT_CHOICE))
        rollout = rollouts[rows[int(draw * len(rows))]]
        response = response_text.decode(texts.tokenizer, rollout.ids, texts.think_end)
        prompt = prompts.fill_template(rollout.prompt, reflect.template, response=response)
        ids = prompt_stream.student_ids(prompt)
        if len(ids) <= prompt_stream.room:
            attempts.append(Attempt(rollout, Rendered(prompt, ids, ids, rollout.teacher)))
    return attempts


def judge_reflections(
    attempts: Sequence[Attempt],
    reflections: Sequence[Rollout],
    logp: Tensor,
    judge: StageJudge,
    failure_limit: FailureLimit,
    texts: TeacherTexts,
) -> tuple[dict[str, str], list[DeferredReflection]]:
    """Return the notes that reflections give, by question, and the reflections to train on.

    `reflections` holds equally many for each attempt, in order; `logp` has a row per reflection.  The best reflection
    on an attempt becomes the note of its question.  A reflection is dropped if the judge failed on it.
    """
    samples = len(reflections) // len(attempts)
    attempt_of = [attempts[i // samples].rollout for i in range(len(reflections))]
    pairs = [
        Reflection(attempt.prompt, texts.response(attempt), texts.response(reflection))
        for attempt, reflection in zip(attempt_of, reflections, strict=True)
    ]
    worths = judge.worth(pairs, texts.seed)
    notes: dict[str, str] = {}
    best: dict[int, float] = {}  # worth of the best reflection by attempt
    deferred = []
    for i, (reflection, pair, worth) in enumerate(zip(reflections, pairs, worths, strict=True)):
        failure_limit.note(str(worth) if isinstance(worth, Failure) else "")
        if isinstance(worth, Failure):
            continue
        group = i // samples
        if worth > best.get(group, -1.0):
            best[group], notes[digest(pair.prompt)] = worth, pair.text
        deferred.append(
            DeferredReflection(
                messages=reflection.prompt.messages,
                text=reflection.prompt.text,
                teacher=reflection.teacher,
                group=group,
                prompt_ids=reflection.prompt_ids,
                ids=reflection.ids,
                logp=tuple(logp[i][: len(reflection.ids)].tolist()),
                stopped=reflection.stopped,
                worth=worth,
            )
        )
    return notes, deferred
