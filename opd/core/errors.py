"""The errors `Refusal`, a line that tells the user what is wrong and what to do, and `Stopped`; checks that refuse."""

import contextlib
import difflib
import math
import re
from collections.abc import Iterable, Iterator, Mapping

CLOSE = 0.7  # lowest ratio of difflib at which a name counts as a misspelling of another
LONGEST_WORD = 300  # characters between blanks: paths are shorter
LONGEST_MESSAGE = 1500  # characters of a message: its beginning names the flag, and its end the remedy
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2028\u2029\u2066-\u2069\ud800-\udfff]")


class Refusal(ValueError):
    """An error that the user can fix: a line that names the flag, the value, the reason and the remedy."""


class Stopped(Exception):
    """The end of a run before its last step, by a signal or --time-limit; the run is saved.

    `code` is the exit code: 130 for SIGINT, 143 for SIGTERM, and 75 for --time-limit and for SIGUSR1, with which
    schedulers warn of their own time limit.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


@contextlib.contextmanager
def foreign_errors(message: str, remedy: str = "") -> Iterator[None]:
    """Turn any exception of a library's code into a Refusal: the message, the first line of the error, the remedy."""
    try:
        yield
    except Refusal:
        raise
    except Exception as error:
        reason = first_line(error) or type(error).__name__
        raise Refusal(f"{message}: {reason}" + (f"; {remedy}" if remedy else "")) from error


@contextlib.contextmanager
def renamed(words: Mapping[str, str]) -> Iterator[None]:
    """Replace words in refusals: code that serves several flags names one, and the user typed another."""
    try:
        yield
    except Refusal as refusal:
        pattern = "|".join(rf"(?<![\w-]){re.escape(word)}(?![\w-])" for word in words)
        raise Refusal(re.sub(pattern, lambda match: words[match[0]], str(refusal))) from refusal


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or all lines as one if the first announces the others."""
    text = str(error).strip()
    line = text.split("\n")[0].rstrip()
    return (" ".join(text.split()) if line.endswith(":") else line)[:300]


def suggestion(name: str, candidates: Iterable[str], prefix: str = "") -> str:
    """Return the end of a message with the candidate that was probably meant; "" if none is similar."""
    by_lower = {candidate.lower(): candidate for candidate in candidates}
    close = difflib.get_close_matches(name.lower(), by_lower, 1, CLOSE)
    return f" (did you mean {prefix}{by_lower[close[0]]}?)" if close else ""


def positive(settings: object, *names: str) -> None:
    """Refuse settings that are not above 0."""
    for name in names:
        if not getattr(settings, name) > 0:
            raise Refusal(f"--{name.replace('_', '-')} {getattr(settings, name)}: must be above 0")


def at_least(settings: object, **bounds: int) -> None:
    """Refuse settings below their lower bounds."""
    for name, bound in bounds.items():
        if not getattr(settings, name) >= bound:
            raise Refusal(f"--{name.replace('_', '-')} {getattr(settings, name)}: must be at least {bound}")


def finite(settings: object, *names: str) -> None:
    """Refuse settings that are infinite or no number."""
    for name in names:
        if not math.isfinite(getattr(settings, name)):
            raise Refusal(f"--{name.replace('_', '-')} {getattr(settings, name)}: must be a finite number")


def check_seed(seed: int) -> None:
    """Refuse a seed that the random number generators do not accept."""
    if not 0 <= seed < 1 << 32:
        raise Refusal(f"--seed {seed}: must lie in [0, {(1 << 32) - 1}]")


def one_line(message: object, limit: int = 200) -> str:
    """Return a message as one line of at most `limit` characters."""
    text = " ".join(str(message).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def printable(message: object) -> str:
    """Return a message as a line that a terminal shows and does not obey; what it quotes may come from anywhere.

    Control characters become escapes, such as \\x1b, and words and messages that are too long lose their middle.
    """
    words = [_cut(word, LONGEST_WORD) for word in str(message).split()]
    line = _cut(" ".join(words), LONGEST_MESSAGE)
    return UNPRINTABLE.sub(lambda character: character[0].encode("unicode_escape", "surrogatepass").decode(), line)


def _cut(text: str, longest: int) -> str:
    """Return a text without its middle, if it is too long."""
    half = longest // 2
    return text if len(text) <= longest else f"{text[:half]}...{text[-half:]}"
