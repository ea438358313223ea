"""Judges that use the task's verifier instead of a model.

Their rubrics consist of fixed rules and of the lines that right answers share.  `VerifierJudge` grades responses,
`VerifierStageJudge` grades their stages.  Both are deterministic and send no request.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from opd.core.sampling import Prompt
from opd.core.types import RIGHT
from opd.data.verifiers.extract import marked, number, stated
from opd.teachers.judges.judge_requests import question_text
from opd.teachers.judges.rubric_judge import AnswerGroup, Criterion, Met, Rubric
from opd.teachers.judges.rubric_memory import MAX_MARK, Criteria, Marks, StageCriterion
from opd.teachers.judges.stage_judge import (
    ANSWER_CRITERIA,
    STAGE_CRITERIA,
    Contrast,
    Reflection,
    StagedResponse,
    Weighed,
)
from opd.teachers.text.text_models import Failure

RIGHT_ANSWER = "The final answer is right."
CLOSES = "It closes with an answer."
NUMBERS = "Every number of the question occurs in it."
ONCE = "No line stands in it three times."
STATES = "It states: "
SUMS = "Every sum in it is right."
ROUND = "A line stands in it three times."
_SUM = re.compile(r"(?<![\w.^])(\d+)\s*([-+*])\s*(\d+)\s*=\s*(\d+)(?![\w.])")


@dataclass(frozen=True)
class VerifierJudge:
    """A judge of answers that uses the task's verifier.

    Its rubric has four fixed criteria (the constants above), and the lines that most right references contain; if no
    reference is right, most right answers of the student.  Lines that half of the student's answers contain come first.
    """

    verify: Callable[[str, Prompt], float]

    def rubrics(self, groups: Sequence[AnswerGroup], minimum: int, maximum: int, seed: int) -> list[Rubric | Failure]:
        """Return a rubric for each group, made from the lines of its answers."""
        return [self._rubric(group, minimum, maximum) for group in groups]

    def _rubric(self, group: AnswerGroup, minimum: int, maximum: int) -> Rubric | Failure:
        fixed = [(RIGHT_ANSWER, 5), (CLOSES, 1), (NUMBERS, 1), (ONCE, 1)][:maximum]
        is_right = lambda text: self.verify(text, group.prompt) > RIGHT
        right = list(filter(is_right, group.references)) or list(filter(is_right, group.answers))
        lines_by_answer = [set(lines(text)) for text in group.answers]

        def distance_from_half(line: str) -> float:
            count = sum(line in answer_lines for answer_lines in lines_by_answer)
            return abs(count / max(1, len(lines_by_answer)) - 0.5)

        # The sort is stable: lines of equal distance keep their order.
        steps = sorted(_shared_lines(right), key=distance_from_half)[: maximum - len(fixed)]
        criteria = [*fixed, *((STATES + line, 2) for line in steps)]
        if len(criteria) < minimum:
            return Failure(f"{len(criteria)} criteria, and --least is {minimum}")
        return Rubric(criteria=tuple(Criterion(criterion=text, points=points) for text, points in criteria))

    def grades(self, groups: Sequence[AnswerGroup], rubrics: Sequence[Rubric], seed: int) -> list[Met | Failure]:
        return [
            tuple(
                tuple(self._meets(c.criterion, text, group.prompt) for c in rubric.criteria)
                for text in group.all_answers()
            )
            for group, rubric in zip(groups, rubrics, strict=True)
        ]

    def _meets(self, criterion: str, text: str, prompt: Prompt) -> bool:
        if criterion.startswith(STATES):
            return criterion.removeprefix(STATES) in lines(text)
        rules: Mapping[str, Callable[[], bool]] = {
            RIGHT_ANSWER: lambda: self.verify(text, prompt) > RIGHT,
            CLOSES: lambda: bool(marked(text) or stated(text)) or number(text.rpartition("\n")[2]) is not None,
            NUMBERS: lambda: _numbers(question_text(prompt)) <= _numbers(text),
            ONCE: lambda: not _repeats(text),
        }
        return rules[criterion]()


@dataclass(frozen=True)
class VerifierStageJudge:
    """A judge of stages that uses the task's verifier and checks sums.

    Its criteria are fixed (the constants above), and the lines of a stage that most right references contain; if no
    reference is right, most right answers of the student.  Criteria whose marks vary most over the student's answers
    come first.  A good reflection reaches the right answer with the question's numbers and copies no wrong attempt.
    """

    verify: Callable[[str, Prompt], float]

    def evolve(self, groups: Sequence[Contrast], seed: int) -> list[Criteria | Failure]:
        """Return new criteria for each question, made from the lines of its responses."""
        return [self._new_criteria(group) for group in groups]

    def _new_criteria(self, group: Contrast) -> Criteria:
        right = list(filter(self._right, group.references)) or list(filter(self._right, group.answers))
        existing = {(c.stage, c.text) for c in group.criteria}
        new: list[StageCriterion] = []
        last = len(group.answers[0].stages)
        for stage in range(1, last + 1):
            right_texts = [response.stages[stage - 1] for response in right]
            candidates = [StageCriterion(stage, RIGHT_ANSWER, 3)] if stage == last else []
            if right and all(_right_sums(text) == 1.0 for text in right_texts):
                candidates.append(StageCriterion(stage, SUMS, 2))
            candidates.append(StageCriterion(stage, ROUND, 1, negative=True))
            candidates += [StageCriterion(stage, STATES + line, 2) for line in _shared_lines(right_texts)]
            candidates = [c for c in candidates if (c.stage, c.text) not in existing]
            # The sort is stable: criteria of equal spread keep their order.
            by_spread = sorted(candidates, key=lambda c: -_spread([self._mark(c, x) for x in group.answers]))
            new += by_spread[: (ANSWER_CRITERIA if stage == last else STAGE_CRITERIA)[1]]
        return tuple(new)

    def marks(
        self, answers: Sequence[StagedResponse], criteria: Sequence[Criteria], seed: int
    ) -> list[Marks | Failure]:
        return [tuple(self._mark(c, x) for c in listed) for x, listed in zip(answers, criteria, strict=True)]

    def _mark(self, criterion: StageCriterion, response: StagedResponse) -> int:
        text = response.stages[criterion.stage - 1]
        if criterion.text.startswith(STATES):
            return MAX_MARK * (criterion.text.removeprefix(STATES) in lines(text))
        if criterion.text == RIGHT_ANSWER:
            return MAX_MARK * self._right(response)
        if criterion.text == ROUND:
            return MAX_MARK * _repeats(text)
        return _mark_of_share(_right_sums(text) if criterion.text == SUMS else 0.0)  # others' criteria are not met

    def _right(self, response: StagedResponse) -> bool:
        return self.verify(response.text(), response.prompt) > RIGHT

    def worth(self, reflections: Sequence[Reflection], seed: int) -> list[float | Failure]:
        return [self.weigh(reflection).worth() for reflection in reflections]

    def weigh(self, reflection: Reflection) -> Weighed:
        """Return the marks of a reflection."""
        is_right, attempt_is_right = (
            self.verify(text, reflection.prompt) > RIGHT for text in (reflection.text, reflection.attempt)
        )
        numbers = _numbers(question_text(reflection.prompt))
        share = len(numbers & _numbers(reflection.text)) / max(1, len(numbers))
        is_copy = reflection.text.strip() == reflection.attempt.strip()
        is_useless = _repeats(reflection.text) or (is_copy and not attempt_is_right)
        marks = {"accuracy": MAX_MARK * is_right, "specificity": _mark_of_share(share)}
        return Weighed.model_validate(
            {"reason": "by what it comes to", **marks, "scope": 0 if is_useless else MAX_MARK}
        )


def lines(text: str) -> list[str]:
    """Return the lines of a text, split into sentences and stripped."""
    return [part.strip() for part in re.split(r"\n+|(?<=[.!?])\s+", text) if part.strip()]


def _shared_lines(texts: Sequence[str]) -> list[str]:
    """Return the lines that more than half of the texts contain."""
    counts = Counter(line for text in texts for line in dict.fromkeys(lines(text)))
    return [line for line, n in counts.items() if 2 * n > len(texts)]


def _repeats(text: str) -> bool:
    """Return whether a line stands in the text three times."""
    return max(Counter(lines(text)).values(), default=0) >= 3


def _numbers(text: str) -> set[str]:
    return set(re.findall(r"\d+", text))


def _mark_of_share(share: float) -> int:
    """Return the mark for the share of right parts: 2 for all, 1 for half or more, else 0."""
    return MAX_MARK if share == 1 else int(share >= 0.5)


def _right_sums(text: str) -> float:
    """Return the share of right sums (`a + b = c`, also - and *) in a text; 0 if it has none."""
    operations = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
    right = [operations[sign](int(a), int(b)) == int(c) for a, sign, b, c in _SUM.findall(text)]
    return sum(right) / len(right) if right else 0.0


def _spread(marks: Sequence[int]) -> float:
    """Return the sum of squared deviations from the mean."""
    mean = sum(marks) / max(1, len(marks))
    return sum((mark - mean) ** 2 for mark in marks)
