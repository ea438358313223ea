"""The one check of what a method needs against what a teacher provides: `require(...)`."""

from collections.abc import Callable

from opd.core.errors import Refusal
from opd.methods import METHODS
from opd.methods.method import Method

Needs = Callable[[Method], frozenset[str]]


def require(
    method: Method,
    provides: frozenset[str],
    *,
    flag: str,
    model: object,
    gives: str,
    remedy: str,
    needs: Needs = Method.needs,
) -> None:
    """Refuse a teacher that does not provide what a method needs.

    Args:
        method: the method of the run.
        provides: what the teacher can compute, in the terms of `Method.needs`.
        flag: the flag that names the teacher, without dashes.
        model: the teacher's name.
        gives: what the teacher returns, in words.
        remedy: what the user can do, beside taking one of the methods for which the teacher is enough.
        needs: how a method's needs of this kind of teacher are found.
    """
    missing = needs(method) - provides
    if missing:
        methods = [name for name, factory in METHODS.items() if needs(factory()) <= provides]
        raise Refusal(
            f"--{flag} {model}: it gives {gives}, and the method needs more of the teacher "
            f"({', '.join(sorted(missing))}): {remedy}, or use one of {', '.join(methods)}"
        )
