"""Judges that use the task's verifier instead of a model.

Their rubrics consist of fixed rules and of the lines that right answers share.  `VerifierJudge` grades whole answers,
`VerifierStageJudge` grades stages.  Both are deterministic and need no request.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from opd.core.sampling import Prompt
from opd.core.types import RIGHT
from opd.data.verifiers.extract import marked, number, stated
from opd.teachers.judges.rubric_judge import Criterion, Group, Met, Rubric, question
from opd.teachers.judges.rubrics import MOST, Buffer, Marks
from opd.teachers.judges.rubrics import Criterion as OfStage
from opd.teachers.judges.stage_judge import FEW, MANY, Contrast, Reflected, Staged, Weighed
from opd.teachers.text.text_teacher import Failed

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

    Its rubric has four fixed criteria: the final answer is right, an answer exists, the question's numbers are used,
    and no line is repeated three times.  Further criteria are the lines that most right references contain; if no
    reference is right, those of the student's right answers.  Lines that about half of the student's answers contain
    come first.
    """

    verify: Callable[[str, Prompt], float]

    def rubrics(self, groups: Sequence[Group], least: int, most: int, seed: int) -> list[Rubric | Failed]:
        """Return a rubric for each group, made from the lines of its answers."""
        return [self._rubric(g, least, most) for g in groups]

    def _rubric(self, group: Group, least: int, most: int) -> Rubric | Failed:
        base = [(RIGHT_ANSWER, 5), (CLOSES, 1), (NUMBERS, 1), (ONCE, 1)][:most]
        right = [x for x in group.references if self.verify(x, group.prompt) > RIGHT]
        right = right or [x for x in group.answers if self.verify(x, group.prompt) > RIGHT]
        counts = Counter(line for text in right for line in dict.fromkeys(lines(text)))
        shared = [line for line, n in counts.items() if 2 * n > len(right)]
        of = [set(lines(text)) for text in group.answers]
        apart = lambda line: abs(sum(line in said for said in of) / max(1, len(of)) - 0.5)
        steps = sorted(shared, key=apart)[: most - len(base)]  # stable: ties keep their order
        found = [*base, *((STATES + line, 2) for line in steps)]
        rubric = Rubric(criteria=tuple(Criterion(criterion=text, points=points) for text, points in found))
        return rubric if len(found) >= least else Failed(f"{len(found)} criteria, and --least is {least}")

    def grades(self, groups: Sequence[Group], rubrics: Sequence[Rubric], seed: int) -> list[Met | Failed]:
        """Return which criteria each answer meets, by fixed rules."""
        return [
            tuple(tuple(self._meets(c.criterion, x, g.prompt) for c in r.criteria) for x in (*g.references, *g.answers))
            for g, r in zip(groups, rubrics, strict=True)
        ]

    def _meets(self, criterion: str, text: str, prompt: Prompt) -> bool:
        if criterion.startswith(STATES):
            return criterion.removeprefix(STATES) in lines(text)
        question = prompt.text + " ".join(turn["content"] for turn in prompt.messages)
        rules: Mapping[str, Callable[[], bool]] = {
            RIGHT_ANSWER: lambda: self.verify(text, prompt) > RIGHT,
            CLOSES: lambda: bool(marked(text) or stated(text)) or number(text.rpartition("\n")[2]) is not None,
            NUMBERS: lambda: set(re.findall(r"\d+", question)) <= set(re.findall(r"\d+", text)),
            ONCE: lambda: max(Counter(lines(text)).values(), default=0) < 3,
        }
        return rules[criterion]()

    def traffic(self) -> dict[str, float]:
        """Return nothing: this judge sends no request."""
        return {}


@dataclass(frozen=True)
class VerifierStageJudge:
    """A judge of stages that uses the task's verifier and checks sums.

    Its criteria: the final answer is right; the sums of a stage are right; a line of a stage is repeated three times
    (a fault); the stage states a line that most right references contain.  If no reference is right, the student's
    right answers take their place.  Criteria whose marks vary most over the student's answers come first.  A reflection
    is marked by three things: it reaches the right answer, it uses the question's numbers, and it is no copy of a wrong
    attempt.
    """

    verify: Callable[[str, Prompt], float]

    def evolve(self, groups: Sequence[Contrast], seed: int) -> list[Buffer | Failed]:
        """Return new criteria for each question, made from the lines of its responses."""
        return [self._evolved(g) for g in groups]

    def _evolved(self, group: Contrast) -> Buffer:
        right = [x for x in group.references if self._right(x)] or [x for x in group.answers if self._right(x)]
        known, out, last = {(c.stage, c.text) for c in group.kept}, [], len(group.answers[0].stages)
        for stage in range(1, last + 1):
            of = lambda some, k=stage - 1: [x.stages[k] for x in some]
            counts = Counter(line for text in of(right) for line in dict.fromkeys(lines(text)))
            shared = [line for line, n in counts.items() if 2 * n > len(right)]
            found = [OfStage(stage, RIGHT_ANSWER, 3)] if stage == last else []
            if right and all(_sums(text) == 1.0 for text in of(right)):
                found.append(OfStage(stage, SUMS, 2))
            found.append(OfStage(stage, ROUND, 1, negative=True))
            found += [OfStage(stage, STATES + line, 2) for line in shared]
            new = [c for c in found if (c.stage, c.text) not in known]
            marks = lambda c: [self._mark(c, x) for x in group.answers]
            apart = sorted(new, key=lambda c: -_spread(marks(c)))  # stable: ties keep their order
            out += apart[: (MANY if stage == last else FEW)[1]]
        return tuple(out)

    def marks(self, answers: Sequence[Staged], criteria: Sequence[Buffer], seed: int) -> list[Marks | Failed]:
        """Return the marks of each response, by fixed rules."""
        return [tuple(self._mark(c, x) for c in some) for x, some in zip(answers, criteria, strict=True)]

    def _mark(self, criterion: OfStage, response: Staged) -> int:
        text = response.stages[criterion.stage - 1]
        if criterion.text.startswith(STATES):
            return MOST * (criterion.text.removeprefix(STATES) in lines(text))
        if criterion.text == RIGHT_ANSWER:
            return MOST * self._right(response)
        if criterion.text == ROUND:
            return MOST * (max(Counter(lines(text)).values(), default=0) >= 3)
        share = _sums(text) if criterion.text == SUMS else 0.0  # a criterion of another judge is not met
        return MOST if share == 1 else int(share >= 0.5)

    def _right(self, response: Staged) -> bool:
        return self.verify(response.whole(), response.prompt) > RIGHT

    def worth(self, reflections: Sequence[Reflected], seed: int) -> list[float | Failed]:
        """Return the worth of each reflection, by fixed rules."""
        return [self._weighed(x).worth() for x in reflections]

    def _weighed(self, x: Reflected) -> Weighed:
        right = [self.verify(text, x.prompt) > RIGHT for text in (x.text, x.attempt)]
        wanted = set(re.findall(r"\d+", question(x.prompt)))
        share = len(wanted & set(re.findall(r"\d+", x.text))) / max(1, len(wanted))
        copied = x.text.strip() == x.attempt.strip()
        rounds = max(Counter(lines(x.text)).values(), default=0) >= 3
        found = {
            "accuracy": MOST * right[0],
            "specificity": MOST if share == 1 else int(share >= 0.5),
            "scope": 0 if rounds or (copied and not right[1]) else MOST,
        }
        return Weighed.model_validate({"reason": "by what it comes to", **found})

    def traffic(self) -> dict[str, float]:
        """Return nothing: this judge sends no request."""
        return {}


def lines(text: str) -> list[str]:
    """Return the lines of a text, split into sentences and stripped."""
    return [part.strip() for part in re.split(r"\n+|(?<=[.!?])\s+", text) if part.strip()]


def _sums(text: str) -> float:
    """Return the share of right sums (`a + b = c`, also - and *) in a text; 0 if it has none."""
    does = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
    right = [does[sign](int(a), int(b)) == int(c) for a, sign, b, c in _SUM.findall(text)]
    return sum(right) / len(right) if right else 0.0


def _spread(marks: Sequence[int]) -> float:
    mean = sum(marks) / max(1, len(marks))
    return sum((mark - mean) ** 2 for mark in marks)
