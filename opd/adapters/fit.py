"""Reasons why a method does not fit a trainer of another project, which has rollouts, prompts and data of its own."""

from collections.abc import Iterable, Iterator

from opd.core.errors import Refusal
from opd.methods.method import Method
from opd.methods.rollout_policies.on_policy import OnPolicy


def surroundings(method: Method, engine: str) -> Iterator[str]:
    """Yield the parts of a method, beside its loss, that only opd's trainer has."""
    if method.rollouts != OnPolicy(method.rollouts.per_prompt):
        yield f"its rollouts are {method.rollouts}, and in {engine} the student generates all tokens, for one update"
    if method.asks is not None:
        yield f"it asks a judge or a teacher for texts ({type(method.asks).__name__})"
    if method.teacher is not None:
        yield f"its teacher reads a context ({method.teacher.context}) that the student does not see"
    if method.filters:
        yield f"{method.filters} select rollouts by columns of the whole batch"


def refuse_misfit(reasons: Iterable[str], engine: str) -> None:
    """Refuse a method with its first reason, if any."""
    for reason in reasons:
        raise Refusal(f"this method does not fit {engine}: {reason}; take another method, or train with opd train")
