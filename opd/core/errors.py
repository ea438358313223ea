"""The errors `Refusal`, a line that tells the user what is wrong and what to do, and `Stopped`; checks that refuse."""

import contextlib
import math
from collections.abc import Iterator


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


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, and the second if the first ends with a colon."""
    first, _, rest = str(error).strip().partition("\n")
    second = rest.strip().split("\n")[0].strip()
    return (f"{first.strip()} {second}".strip() if first.rstrip().endswith(":") else first)[:300]


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
