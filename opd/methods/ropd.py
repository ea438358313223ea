"""ROPD: a judge's rubric, drawn from the teacher's answers and the student's, pays each response.  arXiv:2605.07396."""

from opd.judged import GroupAdvantage
from opd.method import Method, PolicyGradient
from opd.questions import Grade
from opd.rewards import One
from opd.rollouts import OnPolicy
from opd.surrogates import Clipped


def ropd(
    references: int = 4,
    per_prompt: int = 8,
    least: int = 4,
    most: int = 12,
    norm_std: bool = False,
    low: float = 0.2,
    high: float = 0.28,
) -> Method:
    """Group advantage of a rubric's score, from a teacher that only writes.  ROPD, arXiv:2605.07396, Eq. 6-8.

    --judge writes one rubric for all answers to a prompt, then checks them blind; the teacher's own scores do not
    enter.  Where it fails the group has no advantage.  As in the released settings: the mean alone is subtracted, and
    no KL to the reference is added (the paper's Eq. 6 also divides by the deviation: --norm-std).  Their dual clip (c =
    3 for negative advantages) is left out; the teacher answers at temperature 1, not 0, or all its answers were one.

    Args:
        references: answers of the teacher to each prompt.
        per_prompt: rollouts of a prompt.
        least: fewest criteria of a rubric.
        most: most criteria of a rubric.
        norm_std: divide by the group's standard deviation.
        low: the ratio to the sampling policy is clipped below 1 - low, with several --updates.
        high: and above 1 + high.
    """
    term = PolicyGradient(One(), transforms=(GroupAdvantage(norm_std),), surrogate=Clipped(low, high))
    return Method((term,), rollouts=OnPolicy(per_prompt), asks=Grade(references, least, most))
