"""Reading the command line: flags as values, mistakes in one line."""

import contextlib
import difflib
import io
import re
from typing import Any

import tyro

from opd.types import Refusal


def parsed(what: Any, args: list[str], **options: Any) -> Any:
    """tyro's reading of the flags; its boxes for mistakes become one line."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(what, args=args, config=(tyro.conf.OmitArgPrefixes,), **options)
    except SystemExit as stop:
        if not stop.code:
            raise  # help was asked for, and printed
        text = re.sub(r"[─-╿]+", " ", said.getvalue())
        lines = [" ".join(line.split()) for line in text.splitlines()]
        told = [x for x in lines if x and not set(x) <= set("-") and not x.startswith("For full helptext")]
        at = next((i for i, x in enumerate(told) if x.startswith("Unrecognized options:")), len(told))
        missing, named = ([x.split()[0] for x in part if x.startswith("--")] for part in (told[:at], told[at + 1 :]))
        strange = " ".join(told[at:]).removeprefix("Unrecognized options:").replace(",", " ").split()
        if strange:
            word = next((x for x in strange if x.startswith("--")), strange[0])
            meant = near(word, [x for x in (*missing, *named) if x != word])
            what = f"unknown flag{meant}" if word.startswith("--") else "belongs to no flag"
            raise Refusal(f"{word}: {what}; `{options['prog']} --help` lists them") from None
        if told[0] == "Required options":
            raise Refusal(
                f"{', '.join(missing)} must be given; `{options['prog']} --help` explains the flags"
            ) from None
        if "Argument helptext:" in told:
            told = told[1 : told.index("Argument helptext:")]
        raise Refusal(" ".join(told).removeprefix("Error parsing ")) from None


def near(name: str, known: list[str]) -> str:
    """The known name that was probably meant, as the end of a message."""
    close = difflib.get_close_matches(name, known, 1)
    return f" (did you mean {close[0]}?)" if close else ""
