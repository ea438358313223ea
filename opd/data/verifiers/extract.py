r"""Extraction of the final answer from a text, as text or number; "" or None if the text has no answer.

A marked answer is the last \boxed{...}, <answer>...</answer> or line that ends in "#### 42".  A stated answer follows
"answer is" or "answer:".  The final answer is the marked answer, unless the response states a short answer after it.
"""

import re
import unicodedata
from decimal import Context, Decimal
from fractions import Fraction
from itertools import pairwise

from opd.data.verifiers.thinking import MARKS

FLOAT_DIGITS = 15  # decimal digits that a 64-bit float keeps
TAIL = 500  # characters: an answer that is neither marked nor stated is searched for in this tail of a response

_OPENING = re.compile("|".join(re.escape(opening) for opening, _ in MARKS), re.IGNORECASE)
_CLOSING = re.compile("|".join(re.escape(closing) for _, closing in MARKS), re.IGNORECASE)
_SPACES = str.maketrans(dict.fromkeys("\u00a0\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u3000", " "))
_SIGNS = str.maketrans("\u2212\u2010\u2011\uff0d", "----")  # the minus sign of typeset text, and hyphens
_THOUSANDS = re.compile(
    r"(?<![\d.,])(\d{1,3})((?:[\u00a0\u2009\u202f]\d{3})+)(?!\d)"
)  # a space in other places may end a number
_BOX = re.compile(r"\\f?boxed\s*\{")
_HASHES = re.compile(r"####[ \t]*([-+$€£]*\d[\d.,/%]*)[ \t]*$", re.MULTILINE)  # not the heading "#### Step 1"
_STATED = re.compile(r"\banswer\b[\s*_]*(?:\bis\b|[:=])[\s*_:]*(\S[^\n]*)", re.IGNORECASE)
_DIGITS = r"\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(rf"((?<![\w)\].])-)?(?:\$(-)?)?({_DIGITS})(?:[eE]([+-]?\d+))?(?:/({_DIGITS}))?")
_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_FORMULA = re.compile(r"\$\$[^$]+\$\$|(?<!\\)\$[^$\n]+(?<!\\)\$|\\\(.*?\\\)|\\\[.*?\\\]", re.DOTALL)
_JOINT = re.compile(r"\s*(?:,|;|,?\s*\b(?:and|or)\b)\s*")
_COMMAND = re.compile(r"\\[a-zA-Z]+")
_STYLE = re.compile(r"\\(?:text|mathrm|textbf|mathbf|mbox)\b")
_LETTER = re.compile(r"\s*(?:option |choice )?([a-z])(?:\s*$|\s*[.:),;]|\s+(?![a-z\s]))", re.IGNORECASE)


def without_thinking(response: str) -> str:
    """Return the text after the last mark that closes thinking, up to a mark that opens it again.

    So a response that ends while it thinks has no answer.
    """
    closed = [mark.end() for mark in _CLOSING.finditer(response)]
    return _OPENING.split(response[closed[-1] if closed else 0 :], maxsplit=1)[0].strip()


def visible(text: str) -> str:
    """Return a text without invisible characters, and with plain spaces, minus signs, digits and letters."""
    text = _THOUSANDS.sub(lambda match: match[1] + re.sub(r"\D", "", match[2]), text)
    text = text.translate(_SPACES).translate(_SIGNS)
    text = "".join(c for c in text if unicodedata.category(c) != "Cf" and not "\ufe00" <= c <= "\ufe0f")
    return "".join(chr(ord(c) - 0xFEE0) if "\uff01" <= c <= "\uff5e" else c for c in text)  # full-width forms


def marked(text: str) -> str:
    r"""Return the marked answer: the last \boxed{...}, <answer>...</answer> or "#### 42"; "" if the text has none."""
    return _last_mark(text)[1]


def claimed(text: str) -> str:
    """Return the marked answer of a response; "" if it has none, or states an answer without words after it."""
    end, content = _last_mark(text)
    later = stated(text[end:])
    return "" if later and content and not re.search(r"[^\W\d_]{2}", _COMMAND.sub("", later)) else content


def final(text: str) -> str:
    """Return the final answer of a response: the marked answer, else the stated answer, else the last line."""
    return claimed(text) or stated(text) or text.rpartition("\n")[2]


def _last_mark(text: str) -> tuple[int, str]:
    """Return the offset of the end of the marked answer, and its content; (0, "") if the text has none."""
    candidates = [(0, "")]
    for box in list(_BOX.finditer(text))[:-9:-1]:  # at most 8 boxes, because each unclosed box costs a scan
        if content := _braced(text, box.end()):
            candidates.append((box.end() + len(content), content))
            break
    close = text.rfind("</answer>")
    if close >= 0 and (start := text.rfind("<answer>", 0, close)) >= 0:
        candidates.append((close, text[start + len("<answer>") : close]))
    candidates += [(line.end(), line[1]) for line in _HASHES.finditer(text)]
    end, content = max(candidates)
    content = content.strip()
    return end, (marked(content) or content) if content else ""


def _braced(text: str, start: int) -> str:
    """Return the text up to the brace that matches the brace before `start`; "" if none is within 4 TAIL characters."""
    depth = 1
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start, start + 4 * TAIL):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return text[start : match.start()]
    return ""


def stated(text: str) -> str:
    """Return the rest of the line after the last "answer is" or "answer:"; "" if the text has neither."""
    phrases = _STATED.findall(text)
    return phrases[-1].strip(" *_") if phrases else ""


def last_formula(text: str) -> str:
    """Return the last formula between dollar signs or LaTeX brackets, with those that "and" or "or" joins to it."""
    formulas = [x for x in _FORMULA.finditer(text) if not re.search(r"\s[a-z]{3,}\s", x[0])]  # "$5 a day and $" is none
    if not formulas:
        return ""
    start = formulas[-1].start()
    for earlier, later in list(pairwise(formulas))[::-1]:
        if later.start() != start or not _JOINT.fullmatch(text[earlier.end() : start]):
            break
        start = earlier.start()
    return text[start : formulas[-1].end()]


def reference(answer: str) -> str:
    """Return the expected answer; if the data set gives a worked solution, the marked answer in it."""
    return marked(answer) or answer.strip()


def number(text: str, *, first: bool = False) -> Fraction | None:
    """Return the last (or first) number of a text, as in 1,234, -$5, 3/4, 2e3 or 5%, which is 5; None without one."""
    text = _FRACTION.sub(r" \1/\2", visible(text))
    hits = list(_NUMBER.finditer(text.replace("\\$", "$").replace("{,}", ",").replace("\\!", "")))
    if not hits:
        return None
    minus, minus_too, top, power, bottom = hits[0 if first else -1].groups(default="")
    if len(top) + len(bottom) > TAIL or len(power) > 5:
        return None  # Python raises ValueError for integers of thousands of digits
    value = Fraction(top.replace(",", "")) * Fraction(10) ** int(power or 0)
    below = Fraction(bottom.replace(",", "") or 1)
    return (-value if minus or minus_too else value) / below if below else None


def same_number(a: Fraction, b: Fraction, *, digits: int = 6) -> bool:
    """Return whether two numbers are equal, or one is the other rounded to a decimal of at least `digits` digits.

    0.333333 is 1/3, and 0.33 is not.  Integers are never rounded.  Of a decimal, 15 digits count, as in a float.
    """
    return a == b or _is_rounded(a, b, digits) or _is_rounded(b, a, digits)


def _is_rounded(decimal: Fraction, exact: Fraction, digits: int) -> bool:
    """Return whether `decimal` has at least `digits` digits, and is `exact` rounded to them."""
    written = _decimal_digits(decimal)
    if written < digits or 1 in (decimal.denominator, exact.denominator):
        return False
    if written > FLOAT_DIGITS and _decimal_digits(exact) > FLOAT_DIGITS:
        return False  # both are exact beyond a float
    context = Context(prec=min(written, FLOAT_DIGITS))
    rounded = [context.divide(Decimal(x.numerator), Decimal(x.denominator)) for x in (decimal, exact)]
    return rounded[0] == rounded[1]


def _decimal_digits(x: Fraction) -> int:
    """Return the number of significant digits of a decimal; 0 for a number without a finite decimal, or a huge one."""
    places = next((k for k in range(4 * FLOAT_DIGITS) if 10**k % x.denominator == 0), None)
    numerator = 0 if places is None else abs(x.numerator) * 10**places // x.denominator
    return len(str(numerator).rstrip("0")) if numerator.bit_length() < 10_000 else 0


def is_number(text: str) -> bool:
    """Return whether a text is a single number and nothing else."""
    return _NUMBER.fullmatch(_FRACTION.sub(r"\1/\2", text)) is not None


def letter(text: str) -> str:
    """Return the option letter that a text starts with, as in "B", "(B)" or "B. text"; "" for a word, as in "A dog"."""
    opening = _LETTER.match(re.sub(r"[\s$*_{}\\(\[]+", " ", _STYLE.sub(" ", text)))
    return opening[1].upper() if opening else ""


def plain(text: str) -> str:
    """Return a text without LaTeX that has no meaning: spacing, sizes, dollar signs, text boxes, a final full stop.

    Spaces are removed, except between words and digits.
    """
    text = re.sub(r"\\(?:left|right|displaystyle)(?![a-zA-Z])|\\[,!;:$ ]|\$", "", visible(text))
    text = re.sub(rf"{_STYLE.pattern}\s*\{{([^{{}}]*)\}}", r"\1", text.replace("\\dfrac", "\\frac"))
    return re.sub(r"(?<!\w) | (?!\w)", "", " ".join(text.split())).rstrip(".")
