"""The annotator of `Grade`: a judge scores each response by a rubric of its prompt.  ROPD, arXiv:2605.07396."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from opd.core.types import Batch, Rollout
from opd.data.verifiers.extract import without_thinking
from opd.methods.questions import Grade
from opd.methods.rollout_policies.base import Memory
from opd.teachers.judges.annotator import Annotator, TeacherTexts, TrainingStep, rows_by_group
from opd.teachers.judges.rubric_judge import AnswerGroup, ModelJudge
from opd.teachers.judges.verifier_judge import VerifierJudge
from opd.teachers.text.text_models import Failure
from opd.teachers.text.text_teacher import FailureLimit


@dataclass(frozen=True)
class RubricAnnotator(Annotator):
    """Scores each response by a rubric for all answers to its prompt."""

    question: Grade
    texts: TeacherTexts
    judge: ModelJudge | VerifierJudge
    failure_limit: FailureLimit  # of the judge, counted over groups

    def annotate(
        self, batch: Batch, rollouts: Sequence[Rollout], memory: Memory, step: TrainingStep
    ) -> tuple[Batch, Memory]:
        with step.clock("ask"):
            columns = self.texts.on_main(lambda: self._columns(batch, rollouts))
        return replace(batch, **columns), memory

    def _columns(self, batch: Batch, rollouts: Sequence[Rollout]) -> dict[str, Any]:
        """Return the columns of the judge's scores: `verdict` [B], and `judged` [B].

        If the teacher or the judge failed for a group, its responses have no score and `judged` is false.
        """
        question, texts, seed = self.question, self.texts, self.texts.seed
        rows = rows_by_group(rollouts)
        prompt_of = {key: rollouts[members[0]] for key, members in rows.items()}
        references = texts.references(prompt_of, question.references, question.temperature)
        answered = {key: tuple(filter(None, map(without_thinking, answers))) for key, answers in references.items()}
        groups = {
            key: AnswerGroup(prompt_of[key].prompt, answered[key], tuple(texts.response(rollouts[i]) for i in members))
            for key, members in rows.items()
            if answered[key]
        }
        written = self.judge.rubrics(list(groups.values()), question.least, question.most, seed)
        rubric_or_failure = dict(zip(groups, written, strict=True))
        rubrics = {key: rubric for key, rubric in rubric_or_failure.items() if not isinstance(rubric, Failure)}
        graded = self.judge.grades([groups[key] for key in rubrics], list(rubrics.values()), seed)
        grades = dict(zip(rubrics, graded, strict=True))
        verdict, judged = torch.zeros(len(rollouts)), torch.zeros(len(rollouts), dtype=torch.bool)
        reference_verdict = torch.full((len(rollouts),), torch.nan)
        no_reference = Failure("the teacher gave no answer to compare with")
        for key, members in rows.items():
            met = grades.get(key, rubric_or_failure.get(key, no_reference))
            self.failure_limit.note(met)
            if isinstance(met, tuple):
                scores = [rubrics[key].score(criteria) for criteria in met]
                first = len(groups[key].references)  # the references' scores come first
                verdict[members] = torch.tensor(scores[first:])
                judged[members] = True
                reference_verdict[members] = min(scores[:first])
        notes = {**batch.notes, "reference_verdict": reference_verdict}
        return {"verdict": verdict, "judged": judged, "notes": notes}

    def metrics(self, batch: Batch, extra: Batch) -> dict[str, float]:
        """Return the mean verdict, and its comparison with the verdict of the teacher's worst answer to each prompt."""
        if batch.verdict is None or batch.judged is None:
            return {}
        metrics = {"unjudged": float(1 - batch.judged.float().mean())}  # share of rollouts without a verdict
        if batch.judged.any():
            verdict, reference = (x[batch.judged] for x in (batch.verdict, batch.notes["reference_verdict"]))
            metrics |= {"verdict": float(verdict.mean()), "reference_verdict": float(reference.mean())}
            metrics["above_reference"] = float((verdict > reference).float().mean())
        return metrics
