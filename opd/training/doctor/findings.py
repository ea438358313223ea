"""Findings of the doctor: their data type, the selection by severity, and the output on a terminal."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

from rich.console import Console
from rich.text import Text


class Level(StrEnum):
    """A severity level.  Only an error keeps a run from starting."""

    OK = "ok"
    NOTE = "note"
    WARNING = "warning"
    ERROR = "error"


MARKS = {Level.OK: "✓", Level.NOTE: "·", Level.WARNING: "!", Level.ERROR: "✗"}
COLORS = {Level.OK: "green", Level.NOTE: "cyan", Level.WARNING: "yellow", Level.ERROR: "red"}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A finding: the observation (`what`), why it matters (`why`), and the remedy (`do`).

    If one sentence covers all three, it stands in `what` and the other two are empty.
    """

    check: str = ""  # its name; a check that leaves it empty gets its own name here
    level: Level
    what: str
    why: str = ""
    do: str = ""
    detail: str = ""  # several lines for the reader, such as a diff or a table

    def __str__(self) -> str:
        reason = f" ({self.why})" if self.why else ""
        return f"{self.level}: {self.check}: {self.what}{reason}" + (f"; {self.do}" if self.do else "")


ok = partial(Finding, level=Level.OK)
note = partial(Finding, level=Level.NOTE)
warning = partial(Finding, level=Level.WARNING)
error = partial(Finding, level=Level.ERROR)


def errors(findings: Iterable[Finding]) -> list[Finding]:
    """Return the findings of level error, which keep a run from starting."""
    return [f for f in findings if f.level is Level.ERROR]


def alarming(findings: Iterable[Finding]) -> list[Finding]:
    """Return the warnings and errors, which a training run prints."""
    return [f for f in findings if f.level in (Level.WARNING, Level.ERROR)]


def teacher_label(name: str) -> str:
    """Return the words for a teacher in a message, from its route name."""
    return f"teacher {name}".rstrip()


def show(findings: Sequence[Finding], console: Console) -> None:
    """Print all findings, and the verdict last."""
    width = max(len(f.check) for f in findings)
    for f in findings:
        mark, name = (f"{MARKS[f.level]} ", COLORS[f.level]), (f"{f.check:<{width}}  ", "bold")
        console.print(Text.assemble(mark, name, f.what), soft_wrap=True)
        for word, text in (("why", f.why), ("do", f.do)):
            if text:
                console.print(Text.assemble(" " * (width + 4), (f"{word}: ", "dim"), text), soft_wrap=True)
        for line in f.detail.splitlines():
            tint = {"+": "green", "-": "red"}.get(line[:1], "dim")
            console.print(Text(" " * (width + 4) + line, tint), soft_wrap=True)
    count = {level: sum(f.level is level for f in findings) for level in Level}
    numbers = ", ".join(f"{n} {level}{'s' * (n != 1)}" for level, n in count.items() if n and level is not Level.OK)
    verdict = "training cannot start" if count[Level.ERROR] else "training may start"
    console.print(Text(f"{verdict}: {numbers or 'nothing to mend'}", "bold red" if count[Level.ERROR] else "bold"))
