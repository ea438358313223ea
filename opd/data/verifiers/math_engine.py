"""Equality of two mathematical expressions, by math-verify and sympy; used only in the child processes of `sandbox`.

math-verify parses, and compares what is no number.  Numbers are compared here, because math-verify compares them to six
decimals or 15 digits.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import sympy
from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify
from sympy import Basic, FiniteSet, Interval, MatrixBase, Rational, Tuple, Union
from sympy.core.relational import Relational

from opd.data.verifiers.extract import same_number

DIGITS = 80  # significant digits of a numerical comparison; 50 of them must agree
_CONFIG = LatexExtractionConfig(
    boxed_match_priority=0,
    # Units are compared before: math-verify would drop them, and reads 3 + 2t as 3 + 2 tons.
    normalization_config=NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True),
)


def equal(first: str, second: str) -> bool:
    """Return whether two expressions in LaTeX are mathematically equal; False if one of them cannot be parsed."""
    a, b = _parsed(first), _parsed(second)
    return a is not None and b is not None and _same(a, b)


def _parsed(text: str) -> Any:
    expressions = parse(rf"\boxed{{{text}}}", [_CONFIG], extraction_mode="first_match", parsing_timeout=None)
    return expressions[0] if expressions and isinstance(expressions[0], Basic | MatrixBase) else None


def _same(a: Any, b: Any) -> bool:
    if any(x.expr.free_symbols.isdisjoint(x.variables) for y in (a, b) for x in y.atoms(sympy.Derivative)):
        return bool(a == b)  # sympy says that dy/dx is 0
    if isinstance(a, MatrixBase) and isinstance(b, MatrixBase):
        return a.shape == b.shape and all(map(_same, a.flat(), b.flat()))
    if isinstance(a, Relational) and isinstance(b, Relational):
        return _same_relation(a, b)
    if isinstance(a, Interval) and isinstance(b, Interval):
        ends = _same(a.start, b.start) and _same(a.end, b.end)
        return ends and (a.left_open, a.right_open) == (b.left_open, b.right_open)
    for kind in (Tuple, FiniteSet, Union, sympy.And):
        if isinstance(a, kind) and isinstance(b, kind):
            matching = _ordered if kind is Tuple else _unordered
            return matching(a.args, b.args)
    if isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr):
        return _same_expression(*(x.subs({s: sympy.I for s in x.free_symbols if s.name == "i"}).doit() for x in (a, b)))
    if isinstance(a, sympy.Set) or isinstance(b, sympy.Set):  # x >= 2 and [2, oo)
        return all(verify(x, y, allow_set_relation_comp=True, timeout_seconds=None) for x, y in ((a, b), (b, a)))
    return bool(a == b)


def _ordered(first: Sequence[Any], second: Sequence[Any]) -> bool:
    return len(first) == len(second) and all(map(_same, first, second))


def _unordered(first: Sequence[Any], second: Sequence[Any]) -> bool:
    remaining = list(second)
    for a in first:
        match = next((i for i, b in enumerate(remaining) if _same(a, b)), None)
        if match is None:
            return False
        remaining.pop(match)
    return not remaining


def _same_expression(a: sympy.Expr, b: sympy.Expr) -> bool:
    if any(x.has(sympy.nan, sympy.zoo) for x in (a, b)):
        return False
    if a == b:
        return True
    if a.free_symbols or b.free_symbols:
        return sympy.simplify(a - b) == 0
    if isinstance(a, Rational) and isinstance(b, Rational):
        return same_number(_fraction(a), _fraction(b))
    if not (a.is_number and b.is_number):
        return False
    x, y = a.evalf(DIGITS), b.evalf(DIGITS)
    if not (x.is_finite and y.is_finite):
        return False
    if abs(x - y) <= 10**-50 * max(abs(x), abs(y)):
        return True
    # A decimal of a real number: 4.123105625617661 for sqrt(17).
    for decimal, other in ((a, y), (b, x)):
        if isinstance(decimal, Rational) and other.is_real:
            return same_number(_fraction(decimal), _fraction(Rational(other)))
    return bool(sympy.simplify(a - b) == 0)


def _fraction(x: Rational) -> Fraction:
    return Fraction(int(x.p), int(x.q))


def _same_relation(a: Relational, b: Relational) -> bool:
    """Return whether two relations say the same: their sides differ by the same expression, up to a factor."""
    flipped = {sympy.Lt: sympy.Gt, sympy.Le: sympy.Ge}
    (a_difference, a_kind), (b_difference, b_kind) = (
        (x.rhs - x.lhs, flipped[x.func]) if x.func in flipped else (x.lhs - x.rhs, x.func) for x in (a, b)
    )
    if a_kind is not b_kind:
        return False
    ratio = sympy.simplify(a_difference / b_difference) if b_difference != 0 else sympy.nan
    if not (ratio.is_number and ratio.is_finite) or ratio == 0:
        return bool(a_difference == b_difference)
    return bool(a_kind in (sympy.Eq, sympy.Ne) or ratio.is_positive)
