"""Verifiers: pure functions `(response, answer) -> score from 0 to 1`, which never raise on any text.

They score the marked answer, else the stated answer, else the end of the response (`extract.py` has the rules).  Text
before </think> is ignored.  The expected answer may be a worked solution with a marked answer.
"""

import importlib
import os
import re
import sys
from collections.abc import Callable
from functools import lru_cache, partial

from opd.core.errors import Refusal
from opd.data.verifiers import sandbox
from opd.data.verifiers.extract import (
    TAIL,
    claimed,
    is_number,
    last_formula,
    letter,
    number,
    plain,
    reference,
    same_number,
    stated,
    without_thinking,
)
from opd.data.verifiers.math_answers import has_words

Verifier = Callable[[str, str], float]

_CONNECTIVE = re.compile(r"^\s*(?:so|thus|hence|therefore|then)\b[,:\s]*", re.IGNORECASE)


def math(response: str, answer: str) -> float:
    """Score 1 if the final answer is mathematically equal to the expected answer, by math-verify.

    `math_answers` has the rules.  A comparison that takes more than `sandbox.CPU_LIMIT` CPU seconds scores 0.
    """
    text, gold = without_thinking(response), reference(answer)
    if not plain(gold) or not text:
        return 0.0
    content = claimed(text)
    if plain(content or text) == plain(gold):
        return 1.0
    if content:
        return _equal(gold, content)
    statement = _CONNECTIVE.sub("", stated(text) or text.rpartition("\n")[2])
    if _equal(gold, statement):
        return 1.0
    if len(statement) <= 4 * TAIL and re.search(r"\w", statement) and not has_words(statement):
        return 0.0
    formula = last_formula(stated(text) or text[-TAIL:])
    if re.search(r"\d", formula) or not is_number(gold):
        return _equal(gold, formula)
    return numeric(response, answer)


def _equal(gold: str, candidate: str) -> float:
    if not candidate or max(len(gold), len(candidate)) > 4 * TAIL:
        return 0.0
    return _compared(*sorted((gold, candidate)))


@lru_cache(maxsize=4096)  # rollouts of the same prompt often have the same answer
def _compared(first: str, second: str) -> float:
    integers = [plain(text).strip("()") for text in (first, second)]  # (073) is a number in spite of its parentheses
    if all(re.fullmatch(r"-?\d{1,9}", text) for text in integers):
        return float(int(integers[0]) == int(integers[1]))
    return sandbox.score("math", first, second)


def numeric(response: str, answer: str) -> float:
    """Score 1 if the final number equals the expected number.

    The final number is the last in a marked answer, else the first in a stated answer, else the last in the response.
    Integers must be equal.  Of other numbers, one may be the other rounded to five digits or more.
    """
    text, gold = without_thinking(response), number(reference(answer))
    if content := claimed(text):
        value = number(content)
    else:
        value = number(stated(text).rpartition("=")[2], first=True)
        value = number(text[-TAIL:]) if value is None else value
    return float(value is not None and gold is not None and same_number(value, gold, digits=5))


def exact(response: str, answer: str) -> float:
    """Score 1 if the final answer, the last line or the whole response is the expected text.

    Case, spacing, quotes and punctuation at the ends are ignored, so "CO" equals "Co".
    """
    text, gold = without_thinking(response), _tidy(reference(answer))
    content = claimed(text)
    candidates = (content,) if content else (stated(text), text.rpartition("\n")[2], text)
    return float(gold != "" and gold in map(_tidy, candidates))


def _tidy(text: str) -> str:
    return " ".join(re.sub(r"[\"'`“”‘’]", "", plain(text)).casefold().split()).strip(" .!*:;")  # noqa: RUF001


def choice(response: str, answer: str) -> float:
    """Score 1 if the response picks the expected letter: "B", "(B)", "B. text" or "the answer is B"."""
    text, gold = without_thinking(response), letter(reference(answer))
    if content := claimed(text) or stated(text):
        picked = letter(content)
    else:
        picked = letter(text.rpartition("\n")[2]) or letter(text) or ["", *re.findall(r"\(([A-Z])\)", text)][-1]
    return float(gold != "" and picked == gold)


def none(response: str, answer: str) -> float:
    """Score 0: nothing is verified."""
    return 0.0


VERIFIERS: dict[str, Verifier] = {"math": math, "numeric": numeric, "exact": exact, "choice": choice, "none": none}


def find(name: str) -> Verifier:
    """Return the verifier with this name, or the function that `module:function` names.

    Modules are also searched in the working folder.  Raises Refusal for an unknown name or a failed import.
    """
    if name in VERIFIERS:
        return VERIFIERS[name]
    module, _, function = name.partition(":")
    if not (module and function):
        raise Refusal(f"--verifier {name} is not known: choose {', '.join(VERIFIERS)}, or module:function for your own")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # appended last, so that a file there shadows no installed module
    try:
        score = vars(importlib.import_module(module))[function]
    except ImportError as error:
        raise Refusal(f"--verifier {name}: {error}; give module:function, installed or from this folder") from error
    except KeyError as error:
        raise Refusal(f"--verifier {name}: the module {module} has no {function}; name one it has") from error
    except Exception as error:  # code of the user
        raise Refusal(f"--verifier {name}: the module {module} cannot be imported: {error!r}; correct it") from error
    if not callable(score):
        raise Refusal(f"--verifier {name}: is a {type(score).__name__}; name a function of a response and an answer")
    return partial(_checked, score, name)


def _checked(function: Verifier, name: str, response: str, answer: str) -> float:
    """Refuse a score outside [0, 1] of a user's function; its exceptions are bugs that a score of 0 would hide."""
    score = function(response, answer)
    if not isinstance(score, int | float) or not 0 <= score <= 1:
        raise Refusal(f"--verifier {name} returned {score!r}: return a number from 0 to 1")
    return float(score)
