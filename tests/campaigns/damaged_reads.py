"""Run folders with a damaged file, read by report, inspect and rescore: the same output as before, or a refusal.

An attempt is lost if the command crashes, hangs, or succeeds with another output.  Two things look like no damage, and
are not counted: a log that ends early is that of a running job, and a file that is missing was not written yet.  A
flipped bit in a text may be another valid text; only columns carry digests.
"""

import itertools
import json
import os
import random
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import opd.analysis.report.page
import opd.analysis.rescore  # noqa: F401  # before the forks
from tests.campaigns import Counts
from tests.campaigns.commands import run_command, train_run

PAGE = "page.html"
COMMANDS = {
    "report": lambda run: ["report", str(run), "--out", str(run.parent / PAGE)],
    "inspect": lambda run: ["inspect", str(run), "--out", str(run.parent / PAGE)],
    "rescore": lambda run: ["rescore", str(run), "--method", "opd-clip", "--method", "fire", "--json"],
}
Damage = Callable[[Path, random.Random], None]


def _cut(path: Path, draw: random.Random) -> None:
    os.truncate(path, draw.randrange(1, path.stat().st_size))


def _zero(path: Path, draw: random.Random) -> None:
    raw = path.read_bytes()
    start = draw.randrange(len(raw))
    path.write_bytes(raw[:start] + bytes(min(4096, len(raw) - start)) + raw[start + 4096 :])


def _flip(path: Path, draw: random.Random) -> None:
    raw = bytearray(path.read_bytes())
    raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
    path.write_bytes(raw)


def _insert(line: bytes) -> Damage:
    """Return the damage that a line of the file is this one."""

    def damage(path: Path, draw: random.Random) -> None:
        lines = path.read_bytes().splitlines(keepends=True)
        lines.insert(draw.randrange(len(lines) + 1), line)
        path.write_bytes(b"".join(lines))

    return damage


def _retype(path: Path, draw: random.Random) -> None:
    """Give a value of a JSON object another type."""
    other = draw.choice([None, True, "x", -1, 0.5, [], [1], {}, {"a": {"b": 1}}])
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.suffix == ".jsonl" else None
        value = draw.choice(rows) if rows else json.loads(path.read_text())
    except ValueError:  # tensors, or the method
        return _flip(path, draw)
    value[draw.choice(list(value))] = other
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) if rows else json.dumps(value))


def _huge(path: Path, draw: random.Random) -> None:
    """Give a number hundreds of digits."""
    numbers = list(re.finditer(rb"\d+", path.read_bytes()))
    if path.suffix == ".safetensors" or not numbers:
        return _flip(path, draw)
    number = draw.choice(numbers)
    raw = path.read_bytes()
    path.write_bytes(raw[: number.start()] + draw.choice([b"9" * 400, b"1e999", b"9" * 5000]) + raw[number.end() :])


def _replace(make: Callable[[Path], object]) -> Damage:
    """Return the damage that something else lies in the place of the file."""

    def damage(path: Path, draw: random.Random) -> None:
        path.unlink()
        make(path)

    return damage


DAMAGES: dict[str, Damage] = {
    "missing": lambda path, draw: path.unlink(),
    "empty": lambda path, draw: path.write_bytes(b""),
    "truncated": _cut,
    "zeroed": _zero,
    "bit flip": _flip,
    "binary": lambda path, draw: path.write_bytes(draw.randbytes(64)),
    "NUL line": _insert(b"\0\0\0\n"),
    "blank line": _insert(b"\n"),
    "null": lambda path, draw: path.write_text("null\n"),
    "foreign line": _insert(b'{"step": "one", "prompt": 1}\n'),
    "foreign JSON": lambda path, draw: path.write_text(
        draw.choice(["[1, 2]\n", '"text"\n', "5\n", '{"a": 1}\n', "[{}]\n"])
    ),
    "other type": _retype,
    "huge number": _huge,
    "deep nesting": lambda path, draw: path.write_text('{"step": ' * 100_000 + "\n"),
    "deep enough": _insert(b'{"step": 1, "x": ' + b"[" * 900 + b"]" * 900 + b"}\n"),
    "folder": _replace(Path.mkdir),
    "dangling link": _replace(lambda path: path.symlink_to("nothing")),
    "unreadable": _replace(lambda path: path.symlink_to("/proc/self/mem")),  # also to root, whom no mode stops
}
LOGS = ("metrics.jsonl", "perf.jsonl")


def looks_whole(file: str, damage: str) -> bool:
    """Return whether nobody can tell the damaged file from one that was written like this."""
    is_columns = file.endswith(".safetensors")
    return (
        damage == "missing"
        or (file in LOGS and damage in ("empty", "truncated"))
        or (not is_columns and damage in ("bit flip", "other type", "huge number"))
    )


def run(folder: Path, count: int, seed: int) -> Counts:
    """Damage a file `count` times and read the run each time."""
    draw, counts = random.Random(seed), Counts()
    source = train_run(folder)
    case = folder / "case" / "run"
    files = sorted(
        str(path.relative_to(source))
        for path in source.rglob("*")
        if path.is_file() and "checkpoints" not in path.relative_to(source).parts
    )
    attempts = list(itertools.product(files, DAMAGES, COMMANDS))
    draw.shuffle(attempts)
    whole = {name: _read(name, source, case) for name in COMMANDS}
    for file, damage, command in itertools.islice(itertools.cycle(attempts), count):
        code, fault, output = _read(command, source, case, partial(DAMAGES[damage], case / file, draw))
        if not fault and code == 0 and output != whole[command][2] and not looks_whole(file, damage):
            fault = "another output without a word"
        counts.add(f"{command}, {file}, {damage}: {output[-300:]}", fault, refused=code == 2)
    return counts


def _read(command: str, source: Path, case: Path, damage: Callable[[], None] = lambda: None) -> tuple[int, str, str]:
    """Return exit code, fault and output of a command on a damaged copy of a run."""
    shutil.rmtree(case.parent, ignore_errors=True)
    shutil.copytree(source, case, ignore=shutil.ignore_patterns("checkpoints"))
    damage()
    outcome = run_command(COMMANDS[command](case))
    page = case.parent / PAGE
    shown = page.read_text() if outcome.code == 0 and page.is_file() else ""
    return outcome.code, outcome.fault(), shown + outcome.output
