r"""Equality of two answers of mathematics: `same(gold, candidate, equal) -> bool`, the same in both directions.

An answer is a list of items with or without brackets, such as "(1, 2)" or "x = 2 or x = 3".  An item is a time or
ratio, a sequence with dots, words, a value with a unit, or an expression.  `equal` compares expressions: it is
`math_engine.equal`, and the rules here decide what it may compare.

Rules:
- Brackets must agree: (1, 2) is no set and no closed interval.  Without brackets, the order counts only if it counts in
  the other answer.
- A unit may be missing.  Two units must have the same name: nothing is converted, 5 m is not 500 cm.
- 50 and 50% are equal, and so are 0.5 and 50%.
- "x = 5" is 5; "x = 5" is not "y = 5".  An equation whose left side is no name is equal only to equations.
- Times and ratios are compared part by part; "a.m." may be missing.
- Words, and sequences with dots, are compared as text, without regard to case.  So are dates, Roman numerals, "3 by 4",
  version numbers, angles in minutes, lengths in feet and inches, and transposed matrices.
- "5 million" and "3 dozen" are numbers, 5000000 and 36.
- A base may be missing: 101_2 and 101 are equal.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from opd.data.verifiers.extract import plain
from opd.data.verifiers.math_units import NUMERIC, TEXT, Quantity, is_word
from opd.data.verifiers.math_writing import latex

Equal = Callable[[str, str], bool]

_COMMAND = re.compile(r"\\(?:begin|end)\s*\{[a-z]+\*?\}|\\[a-zA-Z]+")
_TIME = re.compile(r"(\d{1,2})((?::\d\d)*)\s*([ap])\.?\s?m\.?", re.IGNORECASE)
_BASE = re.compile(r"(\d[\dA-Fa-f]*)_\{?(\d+)\}?")
_NAME = re.compile(
    r"\\?[a-zA-Z]+(?:_\{?\w+\}?)?'*(?:\s*\([^()]*\))?|\(\s*[a-zA-Z](?:\s*,\s*[a-zA-Z])+\s*\)|\\frac\{d\w\}\{d\w\}"
)
_EQUALS = re.compile(r"(?<![<>!:])=(?!=)|\\(?:approx|in)(?![a-z])")
_INEQUALITY = re.compile(r"[<>]|\\(?:leq|geq|neq)(?![a-z])")
_BRACKETS = {"(": ")", "[": "]", r"\{": r"\}"}
_SEPARATOR = re.compile(r"[,;]|\\text\s*\{\s*,?\s*(?:and|or)\s*\}|(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])")
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d|,\d)")
_SHORT_WORD = re.compile(r"(?<![a-zA-Z\\])(?:so|is|it|we|to|as|at|by|of|if|be|no)(?![a-zA-Z])", re.IGNORECASE)
_LITERAL = re.compile(  # what math-verify would read as a product, a difference or the power of a variable
    r"(?i:yes|no)|\d{4}-\d{1,2}-\d{1,2}|\d{1,2}-\d{1,2}-\d{4}|\d{1,2}/\d{1,2}/\d{4}|[IVXL]{2,}|\d+(?:\.\d+){2,}"
    r"|.*(?:\d\s*['\"](?!\d{3})|\\degree\s*\d|\d\s+(?:by|to|of|in|at)\s+\d|\^\s*\{?\s*(?:T|\\top|\\dagger|\*)(?![a-zA-Z])).*"
)
_REALS = r"(-\infty ,\infty )"
_FUNCTIONS = set(
    re.findall(r"\w+", "sin cos tan cot sec csc log exp sqrt frac max min gcd lcm mod det deg arg inf sup lim")
)


def has_words(answer: str) -> bool:
    """Return whether an answer is more than mathematics and units, such as a sentence."""
    text = latex(answer)
    return _SHORT_WORD.search(text) is not None or any(map(_has_words, _split(text, _SEPARATOR)))


def same(gold: str, candidate: str, equal: Equal) -> bool:
    """Return whether two answers are equal."""
    texts = (re.sub(r'^"([^"]*)"$', r"\1", latex(x).replace("''", '"')) for x in (gold, candidate))
    a, b = sorted(texts)  # a fixed order: the verdict is symmetric
    return bool(a and b) and _same_answer(a, b, equal)


# ---- lists ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _List:
    """An answer as its items; `opening` and `closing` are "" without brackets."""

    opening: str
    items: tuple[str, ...]
    closing: str

    @classmethod
    def of(cls, text: str) -> "_List":
        """Read an answer.  Commas between digits separate thousands unless they are in brackets."""
        text = text.strip()
        opening = next((x for x in _BRACKETS if text.startswith(x)), "")
        closing = next((x for x in _BRACKETS.values() if text.endswith(x)), "")
        if opening and closing and _end_of_group(text, len(opening)) == len(text):
            inner = text[len(opening) : len(text) - len(closing)]
            if len(items := _split(inner, _SEPARATOR)) > 1 or opening == r"\{":
                return cls(opening, items, closing)
        text = _THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
        items = _split(text, _SEPARATOR)
        if len(items) == 1 and r"\pm" in text:
            items = tuple(text.replace(r"\pm", sign).replace(r"\mp", minus) for sign, minus in ("+-", "-+"))
        return cls("", items, "")

    @property
    def is_set(self) -> bool:
        return self.opening == r"\{"


def _end_of_group(text: str, start: int) -> int:
    """Return the offset behind the bracket that closes the group before `start`; the length + 1 if none does."""
    depth = 1
    for i in range(start, len(text)):
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(text[i], 0)
        if not depth:
            return i + 1
    return len(text) + 1


def _split(text: str, separator: re.Pattern[str]) -> tuple[str, ...]:
    """Split a text at the separators that stand outside brackets."""
    items, start, depth = [], 0, 0
    separators = {match.start(): match.end() for match in separator.finditer(text)}
    for i, character in enumerate(text):
        if not depth and i in separators and i >= start:
            items.append(text[start:i])
            start = separators[i]
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(character, 0)
    return tuple(item.strip() for item in (*items, text[start:]) if item.strip())


def _same_answer(a: str, b: str, equal: Equal) -> bool:
    a, b = (_REALS if x == r"\mathbb{R}" else x for x in (a, b))
    if a == b:
        return True
    equations = [_Equation.of(x) for x in (a, b)]
    if len({_compact(x.name) for x in equations if x.is_equation}) == 1 and (a, b) != tuple(x.value for x in equations):
        return _same_answer(equations[0].value, equations[1].value, equal)
    if all(x.is_equation for x in equations):
        return _same_item(a, b, equal)
    first, second = _List.of(a), _List.of(b)
    if first.is_set != second.is_set and r"\emptyset" in (a, b):
        return False
    if len(first.items) == len(second.items) == 1 and (
        first.is_set == second.is_set or not (first.opening and second.opening)
    ):
        return _same_item(first.items[0], second.items[0], equal)
    if _INEQUALITY.search(a) or _INEQUALITY.search(b):
        return _same_item(a, b, equal)
    if first.opening and second.opening and (first.opening, first.closing) != (second.opening, second.closing):
        return False
    brackets = first if first.opening else second
    is_interval = len(brackets.items) == 2 and "[" in brackets.opening + brackets.closing.replace("]", "[")
    if is_interval and not (first.opening and second.opening):
        return False
    if brackets.opening and not brackets.is_set:
        return _same_sequence(first.items, second.items, equal)
    if first.is_set and second.is_set:
        return _contains(first.items, second.items, equal) and _contains(second.items, first.items, equal)
    if any(_is_sequence(x.items) for x in (first, second)):
        return _same_sequence(first.items, second.items, equal)
    return len(first.items) == len(second.items) and _matching(first.items, second.items, equal)


def _same_sequence(first: Sequence[str], second: Sequence[str], equal: Equal) -> bool:
    return len(first) == len(second) and all(_same_answer(a, b, equal) for a, b in zip(first, second, strict=True))


def _contains(first: Sequence[str], second: Sequence[str], equal: Equal) -> bool:
    """Return whether each item of `first` is in `second`."""
    return all(any(_same_answer(a, b, equal) for b in second) for a in first)


def _matching(first: Sequence[str], second: Sequence[str], equal: Equal) -> bool:
    remaining = sorted(second)
    for a in sorted(first):
        match = next((b for b in remaining if _same_answer(a, b, equal)), None)
        if match is None:
            return False
        remaining.remove(match)
    return True


def _is_sequence(items: Sequence[str]) -> bool:
    """Return whether the order of items without brackets counts: a sequence with dots, or answers to questions."""
    return any(r"\ldots" in x or TEXT.sub(r"\1", x).strip().lower() in ("yes", "no", "true", "false") for x in items)


@dataclass(frozen=True)
class _Equation:
    """The name and the value of "x = 5" or "x in [0, 1]"."""

    is_equation: bool
    name: str  # "" for other left sides
    value: str  # the whole text if the left side is neither a name nor numbers, as in "2 + 3 = 5"

    @classmethod
    def of(cls, text: str) -> "_Equation":
        """Read an answer; a list, an inequality or an expression is no equation."""
        parts = _split(text, _EQUALS)
        if len(parts) < 2 or len(_split(text, _SEPARATOR)) > 1 or _INEQUALITY.search(text):
            return cls(False, "", text)
        if len(parts) == 2 and _NAME.fullmatch(parts[1]) and not _NAME.fullmatch(parts[0]):
            parts = parts[::-1]  # "5 = x"
        name = parts[0] if _NAME.fullmatch(parts[0]) else ""
        has_value = name or all(NUMERIC.fullmatch(part) for part in parts[:-1])
        return cls(True, name, parts[-1] if has_value else text)


# ---- items ---------------------------------------------------------------------------------------------------------


def _same_item(a: str, b: str, equal: Equal) -> bool:
    """Compare two items by the first of the rules that applies to one of them."""
    if a == b or _compact(a) == _compact(b):
        return True
    for applies, rule in _RULES:
        if applies(a) or applies(b):
            return rule(a, b, equal)
    return _same_value(a, b, equal)


def _compact(text: str) -> str:
    return re.sub(r"(?<!\d)\s|\s(?!\d)", "", TEXT.sub(r"\1", text))


def _same_text(a: str, b: str, equal: Equal) -> bool:
    first, second = (re.sub(r"[\\$(){}\"'.*,:;!]", "", plain(x)).casefold().strip() for x in (a, b))
    return first == second != ""


def _same_literal(a: str, b: str, equal: Equal) -> bool:
    first, second = (re.sub(r"\{(\w)\}", r"\1", "".join(x.split())).casefold() for x in (a, b))
    return first == second


def _is_time(text: str) -> bool:
    return _TIME.fullmatch(TEXT.sub(r"\1", text).strip()) is not None


def _has_colon(text: str) -> bool:
    return len(_split(text, re.compile(":"))) > 1 and re.search(r"\d", text) is not None


def _same_time(a: str, b: str, equal: Equal) -> bool:
    """Compare times and ratios part by part; "3 p.m." is 3:00 p.m."""
    times, halves = [], []
    for text in (a, b):
        plain = TEXT.sub(r"\1", text).strip()
        if match := _TIME.fullmatch(plain):
            plain = match[1] + (match[2] or ":00")
            halves.append(match[3].lower())
        times.append(_split(plain, re.compile(":")))
    if len(set(halves)) > 1:
        return False
    if {len(parts) for parts in times} == {1, 2} and not halves:  # a ratio and a fraction
        (top, bottom), (value,) = sorted(times, key=len, reverse=True)
        return not bottom.startswith("0") and equal(rf"\frac{{{top}}}{{{bottom}}}", value)
    return _same_sequence(times[0], times[1], equal)


def _has_words(text: str) -> bool:
    """Return whether a text is not only mathematics: it has words, after the unit of a number is removed."""
    text = Quantity.of(text).value
    if any(re.search(r"[^\W\d_]{2}", content) for content in TEXT.findall(text)):
        return True
    runs = re.findall(r"[^\W\d_]{3,}", _COMMAND.sub(" ", TEXT.sub(" ", text)))
    return any(is_word(run) for run in runs if run.lower() not in _FUNCTIONS)


def _has_base(text: str) -> bool:
    return _BASE.fullmatch(text.replace(" ", "")) is not None


def _same_base(a: str, b: str, equal: Equal) -> bool:
    numerals = [_BASE.fullmatch(x.replace(" ", "")) for x in (a, b)]
    digits = [match[1] if match else x.replace(" ", "") for match, x in zip(numerals, (a, b), strict=True)]
    bases = {match[2] for match in numerals if match}
    return len(bases) == 1 and digits[0].lower() == digits[1].lower()


def _same_value(a: str, b: str, equal: Equal) -> bool:
    first, second = Quantity.of(a), Quantity.of(b)
    if not first.agrees(second):
        return False
    x, y = (_without_parentheses(q.value) for q in (first, second))
    if all(re.fullmatch(r"[-+]?\d+", v.replace(" ", "")) and len(v) < 4000 for v in (x, y)):
        same = int(x.replace(" ", "")) == int(y.replace(" ", ""))
    elif _symbols(x) != _symbols(y) and _symbols(re.sub("'", "", x.lower())) == _symbols(re.sub("'", "", y.lower())):
        return False  # math-verify reads AB and ab alike, and f' and f
    else:
        same = equal(x, y)
    if same or first.percent == second.percent:
        return same
    share, number = (x, y) if first.percent else (y, x)
    return equal(rf"\frac{{{share}}}{{100}}", number)


def _symbols(text: str) -> set[str]:
    return set(re.findall("[a-zA-Z]'*", _COMMAND.sub("", text)))


def _without_parentheses(text: str) -> str:
    text = text.strip()
    while text.startswith("(") and text.endswith(")") and _end_of_group(text, 1) == len(text):
        text = text[1:-1].strip()
    text = re.sub(r"((?<![_\d])\d+(?=\s*\()|\)(?=\s*(?:\(|\\frac)))", r"\1 \\cdot ", text)  # not 2(3) = 2 + 3
    return text.replace(r"\degree", r"\cdot \frac{\pi}{180}")


# What an item may be other than an expression, and how it is compared then.
_RULES: tuple[tuple[Callable[[str], bool], Callable[[str, str, Equal], bool]], ...] = (
    (lambda text: r"\ldots" in text, _same_text),
    (lambda text: _LITERAL.fullmatch(TEXT.sub(r"\1", text).strip()) is not None, _same_literal),
    (_is_time, _same_time),
    (_has_colon, _same_time),
    (_has_words, _same_text),
    (_has_base, _same_base),
    (lambda text: re.search(r"(?<![\d_^])\d+\s+\d", text) is not None, _same_text),  # math-verify reads 7 8 as 15
)
