r"""Extraction of the final answer from a text, as text or number; "" or None if the text has no answer.

A marked answer is the last \boxed{...}, <answer>...</answer> or line that ends in "#### 42".  A stated answer follows
"answer is" or "answer:".
"""

import re
from fractions import Fraction

TAIL = 500  # characters: an answer that is neither marked nor stated is searched for in this tail of a response

_BOX = re.compile(r"\\f?boxed\s*\{")
_HASHES = re.compile(r"####[ \t]*([-+$€£]*\d[\d.,/%]*)[ \t]*$", re.MULTILINE)  # not the heading "#### Step 1"
_STATED = re.compile(r"\banswer\b[\s*_]*(?:\bis\b|[:=])[\s*_:]*(\S[^\n]*)", re.IGNORECASE)
_DIGITS = r"\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(rf"((?<![\w)\].])-)?(?:\$(-)?)?({_DIGITS})(?:[eE]([+-]?\d{{1,2}})(?!\d))?(?:/({_DIGITS}))?")
_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_STYLE = re.compile(r"\\(?:text|mathrm|textbf|mathbf|mbox)\b")
_LETTER = re.compile(r"\s*(?:option |choice )?([a-z])(?:\s*$|\s*[.:),;]|\s+(?![a-z\s]))", re.IGNORECASE)


def without_thinking(response: str) -> str:
    """Return the response without its thinking: the text after the last </think>."""
    return response.rpartition("</think>")[2].strip()


def marked(text: str) -> str:
    r"""Return the marked answer: the last \boxed{...}, <answer>...</answer> or "#### 42"; "" if the text has none."""
    candidates = [(0, "")]
    for box in list(_BOX.finditer(text))[:-9:-1]:  # at most 8 boxes, because each unclosed box costs a scan
        if content := _braced(text, box.end()):
            candidates.append((box.end() + len(content), content))
            break
    close = text.rfind("</answer>")
    if close >= 0 and (start := text.rfind("<answer>", 0, close)) >= 0:
        candidates.append((close, text[start + len("<answer>") : close]))
    candidates += [(line.end(), line[1]) for line in _HASHES.finditer(text)]
    content = max(candidates)[1].strip()
    return (marked(content) or content) if content else ""


def _braced(text: str, start: int) -> str:
    """Return the text up to the brace that matches the brace before `start`; "" if none is within 4 TAIL characters."""
    depth = 1
    for i in range(start, min(len(text), start + 4 * TAIL)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[start:i]
    return ""


def stated(text: str) -> str:
    """Return the rest of the line after the last "answer is" or "answer:"; "" if the text has neither."""
    phrases = _STATED.findall(text)
    return phrases[-1].strip(" *_") if phrases else ""


def reference(answer: str) -> str:
    """Return the expected answer; if the data set gives a worked solution, the marked answer in it."""
    return marked(answer) or answer.strip()


def number(text: str, *, first: bool = False) -> Fraction | None:
    """Return the last (or first) number of a text, as in 1,234, -$5, 3/4, 2e3 or 5%, which is 5; None without one."""
    text = _FRACTION.sub(r" \1/\2", text).replace("\u2212", "-")  # the minus sign of typeset text
    hits = list(_NUMBER.finditer(text.replace("\\$", "$").replace("{,}", ",").replace("\\!", "")))
    if not hits:
        return None
    minus, minus_too, top, power, bottom = hits[0 if first else -1].groups(default="")
    if len(top) + len(bottom) > TAIL:
        return None  # Python raises ValueError for integers of thousands of digits
    value = Fraction(top.replace(",", "")) * Fraction(10) ** int(power or 0)
    below = Fraction(bottom.replace(",", "") or 1)
    return (-value if minus or minus_too else value) / below if below else None


def is_number(text: str) -> bool:
    """Return whether a text is a single number and nothing else."""
    return _NUMBER.fullmatch(text) is not None


def letter(text: str) -> str:
    """Return the option letter that a text starts with, as in "B", "(B)" or "B. text"; "" for a word, as in "A dog"."""
    opening = _LETTER.match(re.sub(r"[\s$*_{}\\(\[]+", " ", _STYLE.sub(" ", text)))
    return opening[1].upper() if opening else ""


def plain(text: str) -> str:
    """Return a text without LaTeX that has no meaning: spacing, sizes, dollar signs, text boxes, a final full stop.

    Spaces are removed, except between words and digits.
    """
    text = re.sub(r"\\(?:left|right|displaystyle)(?![a-zA-Z])|\\[,!;:$ ]|\$", "", text)
    text = re.sub(rf"{_STYLE.pattern}\s*\{{([^{{}}]*)\}}", r"\1", text.replace("\\dfrac", "\\frac"))
    return re.sub(r"(?<!\w) | (?!\w)", "", " ".join(text.split())).rstrip(".")
