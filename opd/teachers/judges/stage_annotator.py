"""The annotator of `Stages`: a judge scores each stage of a response by criteria that it revises at each step.

The student also reflects on its rollouts.  Criteria, notes and reflections go from step to step in a `RubricMemory`.
RubricEM, arXiv:2605.10899.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from opd.core.errors import Refusal
from opd.core.sampling import Prompt
from opd.core.types import Batch, Rollout, pad
from opd.data.prompts import Rendered, digest
from opd.data.verifiers.extract import without_thinking
from opd.methods.questions import Reflect, Stages
from opd.methods.rollout_policies.base import Memory
from opd.teachers.judges import stage_tags
from opd.teachers.judges.annotator import Annotator, TeacherTexts, TrainingStep, rows_by_group
from opd.teachers.judges.reflections import choose_attempts, with_notes
from opd.teachers.judges.rubric_memory import (
    Criteria,
    DeferredReflection,
    Marks,
    RubricMemory,
    StageCriterion,
    extended,
    pruned,
    stage_scores,
)
from opd.teachers.judges.stage_judge import Contrast, ModelStageJudge, Reflection, StagedResponse
from opd.teachers.judges.verifier_judge import VerifierStageJudge
from opd.teachers.text.text_models import Failure
from opd.teachers.text.text_teacher import FailureLimit


@dataclass(frozen=True)
class StageAnnotator(Annotator):
    """Scores the stages of each response, and lets the student reflect on its rollouts."""

    question: Stages
    texts: TeacherTexts
    judge: ModelStageJudge | VerifierStageJudge
    failure_limit: FailureLimit  # of the judge, counted over rollouts and reflections

    def check(self, sample: Callable[[], Sequence[Rollout]]) -> None:
        """Raise Refusal if no rollout has a stage before the answer."""
        rollouts, tags = sample(), self.question.tags
        stages = [stage_tags.numbered(self.texts.tokenizer, rollout.ids, tags) for rollout in rollouts]
        if all(number == len(tags) for numbers in stages for number in numbers):
            raise Refusal(
                f"--tags {' '.join(map(repr, tags))}: 0 of {len(rollouts)} rollouts (0%) have a stage before the "
                "answer, so only scores of answers would train the student; let --system tell it to write these tags, "
                "as --preset paper does, or name the tags that it writes"
            )

    def prompts(self, step: int, count: int, memory: Memory) -> list[Rendered]:
        """Return the prompts of a step.  With reflections, prompts return and have the notes on earlier attempts."""
        reflect = self.question.reflect
        if reflect is None:
            return self.prompt_stream.batch(step, count)
        rendered_prompts = self.prompt_stream.batch(reflect.prompt_batch(step), count)
        return with_notes(rendered_prompts, RubricMemory.load(memory).notes, reflect.remember, self.prompt_stream)

    def extra_rollouts(self, memory: Memory, first: int) -> list[Rollout]:
        return [d.rollout(first + i, first) for i, d in enumerate(RubricMemory.load(memory).deferred)]

    def annotate(
        self, batch: Batch, rollouts: Sequence[Rollout], memory: Memory, step: TrainingStep
    ) -> tuple[Batch, Memory]:
        """Fill the columns `stage`, `stage_scores` and `judged`, then collect the student's reflections.

        The last rows of the batch are the reflections of the previous step.
        """
        rubric_memory = RubricMemory.load(memory)
        with step.clock("ask"):
            columns, rubrics = self.texts.on_main(lambda: self._columns(batch, rollouts, rubric_memory))
        batch = replace(batch, **columns)
        rubric_memory = rubric_memory.with_rubrics(rubrics, self.question.questions)
        with step.clock("reflect"):
            if self.question.reflect is not None:
                notes, deferred = self._reflections(self.question.reflect, batch, rollouts, rubric_memory, step)
                rubric_memory = rubric_memory.with_reflections(notes, deferred, self.question.questions)
        return batch, rubric_memory.dump()

    def _columns(
        self, batch: Batch, rollouts: Sequence[Rollout], memory: RubricMemory
    ) -> tuple[dict[str, Any], dict[str, Criteria]]:
        """Return the batch columns of the judge's marks, and the criteria to keep by question.

        A reflection of the previous step consists only of the last stage, and it was scored in that step.
        """
        tags, last, deferred = self.question.tags, len(self.question.tags), memory.deferred
        count = len(rollouts) - len(deferred)
        stages = [stage_tags.numbered(self.texts.tokenizer, r.ids, tags) for r in rollouts[:count]]
        responses = [self._staged(r, numbers) for r, numbers in zip(rollouts, stages, strict=False)]
        rows = rows_by_group(rollouts[:count])
        marks_by_row, criteria_by_group = self._marks(rollouts, responses, rows, memory.rubrics)
        scores = torch.full((len(rollouts), last), torch.nan)
        rubrics: dict[str, Criteria] = {}
        for group, members in rows.items():
            criteria = criteria_by_group[group]
            marked = {i: marks_by_row[i] for i in members if i in marks_by_row}
            for i, marks in marked.items():
                pairs = zip(stage_scores(criteria, marks, last), responses[i].stages, strict=True)
                scores[i] = torch.tensor([value if text else torch.nan for value, text in pairs])
            if marked:
                key = digest(rollouts[members[0]].prompt)
                rubrics[key] = pruned(criteria, list(marked.values()), self.question.caps)
        assert batch.student_logp is not None, "a method that asks for scores of stages is measured before"
        logp = batch.student_logp.clone()
        for i, reflection in enumerate(deferred, count):
            scores[i, -1] = reflection.worth
            stages.append([last] * len(reflection.ids))
            # The importance ratio is to the student that generated the reflection.
            logp[i, : len(reflection.ids)] = torch.tensor(reflection.logp)
        columns = {
            "stage": pad([torch.tensor(numbers) for numbers in stages], 0),
            "stage_scores": scores,
            "judged": torch.tensor([i in marks_by_row for i in range(count)] + [True] * len(deferred)),
            "student_logp": logp,
        }
        return columns, rubrics

    def _marks(
        self,
        rollouts: Sequence[Rollout],
        responses: Sequence[StagedResponse],
        rows: Mapping[int, Sequence[int]],
        rubrics: Mapping[str, Criteria],
    ) -> tuple[dict[int, Marks], dict[int, Criteria]]:
        """Return the judge's marks by row, without failures, and the criteria of each group, new ones included."""
        question, seed = self.question, self.texts.seed
        rollout_by_group = {group: rollouts[members[0]] for group, members in rows.items()}
        references = self.texts.references(rollout_by_group, question.references, 1.0)
        contrasts = {}
        for group, rollout in rollout_by_group.items():
            prompt = rollout.prompt
            by_stage = [stage_tags.texts(without_thinking(text), question.tags) for text in references[group]]
            contrasts[group] = Contrast(
                prompt,
                tuple(responses[i] for i in rows[group]),
                tuple(StagedResponse(prompt, tuple(stages)) for stages in by_stage),
                rubrics.get(digest(prompt)) or column_criteria(prompt, question.column, len(question.tags)),
            )
        evolved = dict(zip(contrasts, self.judge.evolve(list(contrasts.values()), seed), strict=True))
        criteria = {
            group: extended(contrasts[group].criteria, () if isinstance(new, Failure) else new)
            for group, new in evolved.items()
        }
        to_mark = [i for group, members in rows.items() if criteria[group] for i in members]
        marked = self.judge.marks([responses[i] for i in to_mark], [criteria[rollouts[i].group] for i in to_mark], seed)
        marks_or_failure = dict(zip(to_mark, marked, strict=True))
        for i in range(len(responses)):
            new = evolved[rollouts[i].group]
            without_criteria = new if isinstance(new, Failure) else Failure("no criteria")
            self.failure_limit.note(marks_or_failure.get(i, without_criteria))
        return {i: marks for i, marks in marks_or_failure.items() if not isinstance(marks, Failure)}, criteria

    def _staged(self, rollout: Rollout, stage_numbers: Sequence[int]) -> StagedResponse:
        """Return the text of a rollout by stage.  `stage_numbers` has the stage of each token."""
        stages = range(len(self.question.tags) + 1)
        ends = [sum(n <= stage for n in stage_numbers) for stage in stages]  # stages come in order
        return StagedResponse(rollout.prompt, tuple(self.texts.span(rollout, a, b) for a, b in pairwise(ends)))

    def _reflections(
        self, reflect: Reflect, batch: Batch, rollouts: Sequence[Rollout], memory: RubricMemory, step: TrainingStep
    ) -> tuple[dict[str, str], list[DeferredReflection]]:
        """Let the student reflect on one judged rollout per prompt; return notes by question, and the reflections."""
        assert batch.judged is not None
        count = len(rollouts) - len(memory.deferred)
        judged = [r for r, is_judged in zip(rollouts[:count], batch.judged.tolist(), strict=False) if is_judged]
        attempts, requests = choose_attempts(judged, reflect, self.prompt_stream, self.texts, step.number)
        written = step.generate(requests, reflect.samples, reflect.temperature, len(batch.ids))
        if not written:
            return {}, []
        logp = step.measure(written).student_logp
        assert logp is not None
        return self.texts.on_main(lambda: self._judged_reflections(attempts, written, logp))

    def _judged_reflections(
        self, attempts: Sequence[Rollout], reflections: Sequence[Rollout], logp: Tensor
    ) -> tuple[dict[str, str], list[DeferredReflection]]:
        """Return the notes that reflections give, by question, and the reflections to train on.

        `reflections` holds equally many for each attempt, in order; `logp` has a row per reflection.  The best
        reflection on an attempt becomes the note of its question.  One on which the judge failed is dropped.
        """
        samples = len(reflections) // len(attempts)
        pairs = [
            Reflection(attempt.prompt, self.texts.response(attempt), self.texts.response(reflection))
            for k, attempt in enumerate(attempts)
            for reflection in reflections[k * samples : (k + 1) * samples]
        ]
        notes: dict[str, str] = {}
        best: dict[int, float] = {}  # worth of the best reflection by attempt
        deferred = []
        worths = self.judge.worth(pairs, self.texts.seed)
        for i, (reflection, pair, worth) in enumerate(zip(reflections, pairs, worths, strict=True)):
            self.failure_limit.note(worth)
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

    def metrics(self, batch: Batch, extra: Batch) -> dict[str, float]:
        """Return the mean score and the share of tokens of each stage, and the scores of the reflections."""
        if batch.stage is None or batch.stage_scores is None or batch.judged is None:
            return {}
        staged = ((batch.stage > 0) & (batch.stage < batch.stage_scores.shape[1])).any(1)
        metrics = {
            "unjudged": float(1 - batch.judged.float().mean()),
            "unstaged": float(1 - staged.float().mean()),  # share of rollouts that consist only of the answer
        }
        for k, column in enumerate(batch.stage_scores[batch.judged].unbind(1), 1):
            scores = column[column.isfinite()]
            if scores.numel():
                metrics[f"stage_{k}"] = float(scores.mean())  # over the rollouts with this stage
            tokens = (batch.mask & (batch.stage == k)).sum()
            metrics[f"staged_{k}"] = float(tokens / batch.mask.sum().clamp(min=1))  # share of trained tokens
        if len(extra.ids) and extra.stage_scores is not None:
            worth = extra.stage_scores[:, -1]
            metrics |= {"reflections": float(len(extra.ids)), "reflection_tokens": float(extra.mask.sum())}
            metrics |= {"reflection": float(worth.mean()), "reflection_std": float(worth.std(correction=0))}
        return metrics


def column_criteria(prompt: Prompt, column: str, last: int) -> Criteria:
    """Parse the answer's criteria in a prompt's row, texts or {criterion, weight, negative}, or raise Refusal."""
    raw: Any = prompt.columns.get(column) or ()
    try:
        rows = json.loads(raw) if isinstance(raw, str) else raw
        forms: list[dict[str, Any]] = [{"criterion": row} if isinstance(row, str) else row for row in rows]
        return tuple(
            StageCriterion(last, row["criterion"], row.get("weight", 1), row.get("negative", False), persistent=True)
            for row in forms
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise Refusal(
            f"--column {column}: {str(raw)[:80]!r} holds no criteria ({type(error).__name__}: {error}); write a list "
            'of texts, or of {"criterion": "...", "weight": 1 to 3, "negative": false}'
        ) from error
