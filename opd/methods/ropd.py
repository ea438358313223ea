"""ROPD: a judge scores each response by a rubric derived from teacher and student answers.  arXiv:2605.07396."""

from opd.losses.advantages import GroupAdvantage
from opd.losses.rewards import One
from opd.losses.surrogates import Clipped
from opd.losses.terms import PolicyGradient
from opd.methods.method import Method
from opd.methods.questions import Grade
from opd.methods.rollout_policies.on_policy import OnPolicy


def ropd(
    references: int = 4,
    per_prompt: int = 8,
    least: int = 4,
    most: int = 12,
    norm_std: bool = False,
    low: float = 0.2,
    high: float = 0.28,
) -> Method:
    """Group advantage of a rubric score, with a teacher that only generates text.  ROPD, arXiv:2605.07396, Eq. 6-8.

    --judge writes one rubric for all answers to a prompt, then grades them without knowing their source.  The scores of
    the teacher's answers are not used.  If the judge fails, the group has no advantage.  As in the released settings,
    only the mean is subtracted and no KL to the reference is added (the paper's Eq. 6 also divides by the deviation:
    --norm-std).  The released dual clip (c = 3 for negative advantages) is left out.  The teacher answers at
    temperature 1, not 0, because at 0 all its answers would be equal.

    Args:
        references: Number of teacher answers per prompt.
        per_prompt: Number of rollouts per prompt.
        least: Smallest number of criteria in a rubric.
        most: Largest number of criteria in a rubric.
        norm_std: Divide by the group's standard deviation.
        low: Clip the ratio to the sampling policy below 1 - low.  Matters only with several --updates.
        high: Clip the ratio to the sampling policy above 1 + high.
    """
    term = PolicyGradient(One(), transforms=(GroupAdvantage(norm_std),), surrogate=Clipped(low, high))
    return Method((term,), rollouts=OnPolicy(per_prompt), asks=Grade(references, least, most))
