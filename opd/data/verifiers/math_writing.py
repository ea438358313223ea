# ruff: noqa: RUF001  (this file is about such characters)
r"""The writing of mathematics: `latex(answer)` gives Unicode, plain text and LaTeX the one form that math-verify reads.

Decimals become fractions, because math-verify compares floats to six decimals.  Units, brackets and words are kept.
"""

import re
import unicodedata

from opd.data.verifiers.extract import visible

_SYMBOLS = {
    "×": r"\times ", "·": r"\times ", "⋅": r"\times ", "∙": r"\times ", "∗": r"\times ", "÷": "/", "⁄": "/", "∕": "/",
    "–": "-", "—": "-", "±": r"\pm ", "∓": r"\mp ", "∞": r"\infty ", "…": r"\ldots ", "⋯": r"\ldots ", "′": "'",
    "°": r"^\circ ", "º": r"^\circ ", "℃": r"^\circ C", "℉": r"^\circ F", "≤": r"\leq ", "⩽": r"\leq ", "≥": r"\geq ",
    "⩾": r"\geq ", "≠": r"\neq ", "≈": r"\approx ", "∈": r"\in ", "∪": r"\cup ", "∩": r"\cap ", "∖": r"\setminus ",
    "∅": r"\emptyset ", "→": r"\to ", "∠": r"\angle ", "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ",
    "⌉": r"\rceil ", "ϕ": r"\phi ", "ϵ": r"\epsilon ", "⟨": r"\langle ", "⟩": r"\rangle ", "µ": r"\mu ",
    "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}",
}  # fmt: skip
_GREEK = (
    *(
        "alpha",
        "beta",
        "gamma",
        "delta",
        "epsilon",
        "zeta",
        "eta",
        "theta",
        "iota",
        "kappa",
        "lambda",
        "mu",
        "nu",
        "xi",
    ),
    *("pi", "rho", "sigma", "tau", "phi", "chi", "psi", "omega"),
)
_CAPITALS = ("gamma", "delta", "theta", "lambda", "xi", "pi", "sigma", "phi", "psi", "omega")  # those that LaTeX has


def _greek(case: str, name: str) -> str:
    return unicodedata.lookup(f"GREEK {case} LETTER {name.replace('lambda', 'lamda')}")  # the spelling of Unicode


_CHARACTERS = str.maketrans(
    _SYMBOLS
    | {_greek("SMALL", name): rf"\{name} " for name in _GREEK}
    | {_greek("CAPITAL", name): rf"\{name.title()} " for name in _CAPITALS}
)
_RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿⁱˣ]+")
_LOWERED = re.compile("[₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎]+")
_VULGAR = re.compile("[¼-¾⅐-⅞↉]")
_STYLED = re.compile("[\U0001d400-\U0001d7ff]")  # letters and digits of mathematical styles
_FUNCTIONS = "sqrt|sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|sinh|cosh|tanh|log|ln|exp"
_PARENTHESES = (
    (re.compile(r"(?:\\?sqrt|√)\s*\("), r"\sqrt"),
    (re.compile(r"∛\s*\("), r"\sqrt[3]"),
    (re.compile(r"\^\s*\("), "^"),
)
_DECIMAL = re.compile(r"(?<![\d.])(\d*)\.(\d+)(?![\d.])")
_RECURRING = re.compile(r"(?<![\d.])(\d*)\.(\d*)(?:\\overline\s*\{(\d+)\}|\\dot\s*\{(\d)\}|\((\d+)\))")

# (what is written, what math-verify reads), in the order of application
_REWRITES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (
            r"\\\(|\\\)|(?<!\\)\\\[|(?<!\\)\\\](?![a-z])|(?<!\\)\$|\\(?:left|right|[bB]igg?[lr]?|displaystyle)(?![a-zA-Z])",
            "",
        ),
        (r"(?<=\d)(?:\{,\}|,\\!|\\[,:;! ]|~)\s*(?=\d{3}(?!\d))", ""),  # spaces and braces between thousands
        (r"(?<!\\)\\[,:;! ]|\\q?quad(?![a-z])|~", " "),
        (r"(?<![\d.,])\d{1,3}(?: \d{3})+(?!\d)", lambda match: match[0].replace(" ", "")),
        (r"(?<![\d.,(\[{])\d{1,3}(?:,\d{3})+(?=\.\d)", lambda match: match[0].replace(",", "")),
        (r"\\(?:[dtcsx]|nice)frac(?![a-z])", r"\\frac"),
        (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
        (r"\\(?:mathrm|mathit|mathbf|boldsymbol|operatorname)\s*\{([a-zA-Z])\}", r"\1"),
        (r"\\(?:lbrace|lbrack)(?![a-z])", r"\\{"),
        (r"\\(?:rbrace|rbrack)(?![a-z])", r"\\}"),
        (r"\\langle(?![a-z])", "("),
        (r"\\rangle(?![a-z])", ")"),
        (r"\\varnothing(?![a-z])|\\\{\s*\\\}", r"\\emptyset "),
        (r"\\le(?![a-z])|\\leqslant|<=|=<", r"\\leq "),
        (r"\\ge(?![a-z])|\\geqslant|>=", r"\\geq "),
        (r"\\ne(?![a-z])|!=", r"\\neq "),
        (r"\\(?:cdots|dots[a-z]?)(?![a-z])|(?<!\.)\.\.\.(?!\.)", r"\\ldots "),
        (r"\+/?-", r"\\pm "),
        (r"\*\*", "^"),
        (r"\\(?:degree|textdegree|deg)(?![a-z])", r"^\\circ "),
        (r"\^\s*\{\s*\\circ\s*\}|\{\s*\^\s*\\circ\s*\}|\^\s*\\circ", r"\\degree "),
        (r"(?<![\\a-zA-Z])sqrt\s*(\d+)", r"\\sqrt{\1}"),
        (rf"(?<![\\a-zA-Z])({_FUNCTIONS}|pi|infty|{'|'.join(n for n in _GREEK if len(n) > 3)})(?![a-zA-Z])", r"\\\1 "),
        (r"(?<![\\a-zA-Z])infinity(?![a-zA-Z])", r"\\infty "),
        (r"√\s*(\d+|[a-zA-Z]|\\[a-z]+|\{[^{}]*\})", r"\\sqrt{\1}"),
        (r"∛\s*(\d+|[a-zA-Z]|\\[a-z]+|\{[^{}]*\})", r"\\sqrt[3]{\1}"),
        (r"(?<=\d)\s*[eE]([+-]?\d+)\b", r"\\times 10^{\1}"),
        (r"(?<=\d)\s*[xX]\s*(?=10\s*\^)", r"\\times "),
        (r"(?<![\d.,/])(\d+) (\d+)/(\d+)(?![\d/])", r"\1\\frac{\2}{\3}"),
        (r"(?<![\d.)\}/^\w])(\d+)/(\d+)(?=\s)", r"\\frac{\1}{\2}"),
        (r"\^\s*([+-]?\d+)(?![.\d])", r"^{\1}"),
        (r"\^\s*(-?\\frac\s*\{[^{}]*\}\s*\{[^{}]*\}|-?\\[a-z]+)", r"^{\1}"),
    )
)


def latex(answer: str) -> str:
    """Return an answer in the LaTeX that math-verify reads."""
    text = visible(answer)
    text = _VULGAR.sub(_vulgar, text)
    text = _RAISED.sub(lambda match: "^{" + _plain(match[0]) + "}", text)
    text = _LOWERED.sub(lambda match: "_{" + _plain(match[0]) + "}", text)
    text = _STYLED.sub(lambda match: _plain(match[0]), text).translate(_CHARACTERS)
    for opening, command in _PARENTHESES:
        text = _braced_arguments(text, opening, command)
    text = _RECURRING.sub(_recurring, text)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = _DECIMAL.sub(_decimal, text)
    return " ".join(text.split()).rstrip(".,; ")


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text).replace("\u2212", "-")


def _vulgar(match: re.Match[str]) -> str:
    """Return a fraction that is a single character, such as ¾."""
    top, _, bottom = _plain(match[0]).partition("\u2044")
    return rf"\frac{{{top}}}{{{bottom}}}"


def _decimal(match: re.Match[str]) -> str:
    """Return a decimal as a fraction."""
    digits = (match[1] + match[2]).lstrip("0") or "0"
    return rf"(\frac{{{digits}}}{{1{'0' * len(match[2])}}})"


def _recurring(match: re.Match[str]) -> str:
    """Return a recurring decimal such as 0.1(6) as a fraction."""
    integer_part, fixed, period = match[1], match[2], match[3] or match[4] or match[5]
    top = int(integer_part + fixed + period) - int(integer_part + fixed or 0)
    return rf"\frac{{{top}}}{{{'9' * len(period)}{'0' * len(fixed)}}}"


def _braced_arguments(text: str, opening: re.Pattern[str], command: str) -> str:
    """Replace the parentheses of an argument, as in sqrt(2), by braces; unbalanced parentheses stay."""
    start = 0
    while match := opening.search(text, start):
        depth, end = 1, match.end()
        while end < len(text) and depth:
            depth += {"(": 1, ")": -1}.get(text[end], 0)
            end += 1
        if depth:
            return text
        text = f"{text[: match.start()]}{command}{{{text[match.end() : end - 1]}}}{text[end:]}"
        start = match.start() + len(command)
    return text
