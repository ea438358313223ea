"""Random command lines: each runs, shows help, is refused in a line, or reaches the door of the first model.

They run in this process, and loading a model ends them.  Values are strange numbers, names, paths, addresses and texts.
"""

import contextlib
import io
import os
import random
import re
import signal
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from unittest import mock

import opd.cli
from opd.cli.method_sources import flag_names
from opd.methods import METHODS
from tests.campaigns import Counts
from tests.campaigns.commands import LONGEST, MODELS, train_run

CANNOT_START = re.compile(r"training cannot start: \d+ errors?\n\Z")
SECONDS = 60  # after which a command line hangs
WORDS = """
0 1 -1 2 0.5 -0.0 nan inf -inf 1e308 1e-400 1e999 99999999999999999999999999 4294967296 9223372036854775808 0x10 1_000
١٢ 1e5 8 64 1-5 0-99999 5-1 0,0 -1,2
True none null a a,b , : a:b = a=b x=embedded:student {} [1] [/] [bold [/red] %s % {0} {prompt} {prompt}{context}{x}
é 日本 \U0001f600 \u202e - -- --- --x -h embedded: embedded:student embedded:teacher embedded:ledger embedded:/etc
embedded:ledger-short embedded:../student reasoning-gym: reasoning-gym:x self base ema: ema:0.5 ema:x ema:-1 ema:nan
verifier peer response answer same own cpu cuda cuda:99 meta mps cpu:7 bf16 fp32 os:system json:dumps nosuch:x math:inf
:x x: vopd vopd:0.1 gkd-forward:nan gkd-forward:-1 opd.methods:METHODS
../../x / /dev/null /dev/zero /etc/passwd . .. ~ ~nobody a/b a/b/c x.jsonl x.gguf x.csv http:// http://127.0.0.1:1
http://127.0.0.1:99999 http://[::1 https://u:p@h openai: openai:x openai:x@http://127.0.0.1:1
"""
TEXTS = (
    "",
    " ",
    '{"a": 1}',
    "{prompt} {context}",
    "a\nb",
    "a\tb",
    "a\x00b",
    "\x1b[31m",
    "\x1b]0;x\x07",
    "\ud800",
    "a" * 5000,
)
VALUES = (*WORDS.split(), *TEXTS)
COMMANDS = ("train",) * 8 + ("doctor",) * 3 + ("eval",) * 3 + ("rock", "report", "inspect", "rescore", "prune") * 2
COMMANDS += ("exact", "variance", "methods", "serve", "help", "demo", "x")


class Reached(BaseException):
    """A model would load now."""


class TooSlow(BaseException):
    """The command line took too long."""


def run(folder: Path, count: int, seed: int) -> Counts:
    """Try `count` command lines."""
    draw, counts = random.Random(seed), Counts()
    finished = train_run(folder)
    place = folder / "place"
    place.mkdir()
    flags = {command: _help_flags(command) for command in {*COMMANDS} - {"help", "x"}}
    with contextlib.chdir(place), mock.patch("opd.models.load.load", side_effect=Reached), _alarm():
        for _ in range(count):
            words = _line(draw, flags, finished, place)
            fault, refused = _try(words)
            counts.add(f"opd {' '.join(map(ascii, words))}"[:600], fault, refused=refused)
    return counts


def _try(words: list[str]) -> tuple[str, bool]:
    """Run a command line; return its fault ("" for none), and whether it was refused."""
    out, err = io.StringIO(), io.StringIO()
    signal.alarm(SECONDS)
    code: object = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = opd.cli.main(words)
    except Reached:
        return "", False
    except TooSlow:
        return f"still runs after {SECONDS} s", False
    except SystemExit as end:
        code = end.code or 0
    except BaseException as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "/opd/" in f.filename]
        return f"{type(error).__name__}: {str(error)[:200]} in {frames[-1].name if frames else '?'}", False
    finally:
        signal.alarm(0)
    lines = err.getvalue().strip().split("\n")
    refusals = [line for line in lines if line.startswith("opd: ")]
    if code == 0:
        return "", False
    if code == 2 and words[0] == "doctor" and CANNOT_START.search(out.getvalue()):
        return "", True  # the doctor's own form of a refusal
    if code != 2 or len(refusals) != 1 or lines[-1] != refusals[0]:
        return f"exit code {code}, {len(refusals)} lines of refusal", False
    if len(refusals[0]) > LONGEST:
        return f"a refusal of {len(refusals[0])} characters", True
    strange = [c for c in err.getvalue() if ord(c) < 32 and c not in "\n\t"]
    return (f"control characters {strange!r} on the terminal" if strange else ""), True


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    def late(number: int, frame: FrameType | None) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGALRM, late)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, before)


def _value(draw: random.Random) -> str:
    kind = draw.random()
    if kind < 0.75:
        return draw.choice(VALUES)
    if kind < 0.85:
        return str(draw.randint(-10, 100))
    if kind < 0.93:
        return f"{draw.uniform(-2, 2):.3g}"
    return "".join(
        chr(draw.choice([draw.randint(1, 127), draw.randint(128, 0x2FFF)])) for _ in range(draw.randint(1, 12))
    )


def _flags(draw: random.Random, names: list[str], most: int) -> list[str]:
    words: list[str] = []
    for _ in range(draw.randint(0, most)):
        name = draw.choice(names) if names else "--x"
        name = name[:-1] if draw.random() < 0.06 else name
        how = draw.random()
        words += [name] if how < 0.12 else [f"{name}={_value(draw)}"] if how < 0.25 else [name, _value(draw)]
    return words


def _help_flags(command: str) -> list[str]:
    """Return the flags that the help of a command names."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit), mock.patch.dict(os.environ, COLUMNS="200"):
        opd.cli.main([command, "--help"])
    return sorted({*re.findall(r"--[a-z][a-z0-9-]+", out.getvalue())} - {"--help"})


def _line(draw: random.Random, flags: dict[str, list[str]], finished: Path, place: Path) -> list[str]:
    """Return a random command line; in most cases its required flags are there."""
    command = draw.choice(COMMANDS)
    good, out = draw.random() < 0.75, str(place / f"out-{draw.randint(0, 9)}")
    named = {
        "train": [*MODELS, "--out", out],
        "doctor": [*MODELS, "--out", out],
        "eval": ["--model", "embedded:student", *MODELS[4:]],
        "rock": [*MODELS, "--out", f"{out}.json"],
        "variance": [*MODELS],
        "report": [str(finished), "--out", f"{out}.html"],
        "inspect": [str(finished), "--out", f"{out}.html"],
        "rescore": [str(finished)],
        "prune": ["--model", "embedded:student", "--keep", draw.choice(["0", "0-1", _value(draw)]), "--out", out],
        "serve": ["embedded:student"],
    }.get(command, [])
    words = [command, *(named if good else [_value(draw)]), *_flags(draw, flags.get(command, []), 3)]
    if command in ("train", "doctor", "exact", "methods", "help") and draw.random() < 0.9:
        method = draw.choice([*METHODS])
        words += [method, *_flags(draw, flag_names(method), 2)]
    return words
