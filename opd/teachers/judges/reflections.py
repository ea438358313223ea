"""Prompts that ask for reflections on rollouts, and prompts with the notes of them.  RubricEM, arXiv:2605.10899."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from opd.core.rng import uniform
from opd.core.sampling import Prompt
from opd.core.types import Rollout
from opd.data import prompts
from opd.data.prompt_stream import Prompts
from opd.data.prompts import Rendered, digest
from opd.data.verifiers import response_text
from opd.methods.questions import Reflect
from opd.teachers.judges.annotator import TeacherTexts, rows_by_group

ATTEMPT_CHOICE = -4  # random-number key in place of a token's position: the choice of the rollout to reflect on


def with_notes(
    rendered_prompts: Sequence[Rendered], notes: Mapping[str, str], template: str, prompt_stream: Prompts
) -> list[Rendered]:
    """Return the prompts, each with the note of its question if it has one and does not become too long by it."""
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
) -> tuple[list[Rollout], list[Rendered]]:
    """Choose one rollout of each group, uniformly at random, and return them with the prompts that ask to reflect.

    A group is left out if the request for a reflection on its rollout would be too long.
    """
    attempts, requests = [], []
    for rows in rows_by_group(rollouts).values():
        draw = float(uniform(texts.seed, step, rollouts[rows[0]].index, ATTEMPT_CHOICE))
        rollout = rollouts[rows[int(draw * len(rows))]]
        response = response_text.decode(texts.tokenizer, rollout.ids, texts.think_end)
        prompt = prompts.fill_template(_without_system(rollout.prompt), reflect.template, response=response)
        ids = prompt_stream.student_ids(prompt)
        if len(ids) <= prompt_stream.room:
            attempts.append(rollout)
            requests.append(Rendered(prompt, ids, ids, rollout.teacher))
    return attempts, requests


def _without_system(prompt: Prompt) -> Prompt:
    """Return a prompt without its system turn, which may tell the student to write stages; a reflection has none."""
    return replace(prompt, messages=tuple(turn for turn in prompt.messages if turn["role"] != "system"))
