"""The command line: a function for each command; `USAGE` lists them."""

import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version

from opd.cli import commands, runs, tables
from opd.cli.flags import near
from opd.types import Refusal

USAGE = """usage: opd COMMAND ...

  opd train --student S --teacher T --prompts P [run flags] METHOD [method flags]
  opd doctor --student S --teacher T --prompts P [run flags] METHOD [method flags] [--json]
  opd eval --model M --prompts P [flags]
  opd methods [NAME] [--json]
  opd exact [METHOD [method flags] | --methods A,B,...] [--json]
  opd variance --student S --teacher T --prompts P [--methods A,B,...] [--json]
  opd rock --student S --teacher T --prompts P --out FILE
  opd report RUN [RUN...] [--out report.html] [--static DIR]
  opd inspect RUN [--step N] [--out inspect.html]
  opd rescore RUN --method NAME [--method NAME ...] [--step N] [--json]
  opd prune --model M --keep LAYERS --out DIR
  opd serve MODEL [flags]
  opd bench head|step|rollouts|async|packing|growth|all [flags]
  opd demo
  opd --version

`opd COMMAND --help` explains the flags; `opd train METHOD --help` those of a method."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 when done, 2 when the user has something to mend (one line says what)."""
    args = list(sys.argv[1:] if arguments is None else arguments)
    known: dict[str, Callable[[list[str]], int]] = {
        "train": runs.train,
        "doctor": runs.doctor,
        "eval": tables.eval_,
        "methods": tables.methods,
        "exact": tables.exact,
        "variance": tables.variance,
        "rock": commands.rock,
        "report": commands.report,
        "inspect": commands.inspect,
        "rescore": tables.rescore,
        "prune": commands.prune,
        "serve": commands.serve,
        "bench": commands.bench,
        "demo": commands.demo,
    }
    try:
        match args:
            case [] | ["-h" | "--help"]:
                print(USAGE)
                return 0
            case ["--version"]:
                print(f"opd {version('opd')}")
                return 0
            case [name, *rest] if name in known:
                try:
                    return known[name](rest)
                finally:
                    sys.stdout.flush()  # here, where a reader that is gone can still be told from a fault
            case [name, *_]:
                raise Refusal(f"{name}: unknown command{near(name, list(known))}; there are {', '.join(known)}")
    except Refusal as error:
        print(f"opd: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("opd: stopped; what was saved is whole", file=sys.stderr)
        return 130
    except BrokenPipeError:
        if not _unread():
            raise
        return 1  # as rich says, which prints the tables
    return 0


def _unread() -> bool:
    """Whether who reads stdout is gone, as in `opd methods | head`; then nothing more is written to it."""
    try:
        print(flush=True)  # a flush alone says nothing where the write that failed has emptied the buffer
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False
