"""The command line: a function for each command; `USAGE` lists them."""

import contextlib
import errno
import io
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TextIO

from opd.cli.refusals import refusing
from opd.core.errors import Refusal, Stopped, printable, suggestion
from opd.core.processes import is_main_process, num_processes

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
  opd export RUN --out DIR [--step N] [--merge]
  opd prune --model M --keep LAYERS --out DIR
  opd serve MODEL [flags]
  opd demo
  opd help [COMMAND]
  opd --version

`opd COMMAND --help` explains the flags; `opd train METHOD --help` those of a method."""
COMMANDS = {  # command -> its module and function; imported when used, because torch alone takes seconds
    "train": ("opd.cli.train", "train"),
    "doctor": ("opd.cli.train", "doctor"),
    "eval": ("opd.cli.analysis", "eval_"),
    "methods": ("opd.cli.methods", "methods"),
    "exact": ("opd.cli.analysis", "exact"),
    "variance": ("opd.cli.analysis", "variance"),
    "rock": ("opd.cli.analysis", "rock"),
    "report": ("opd.cli.tools", "report"),
    "inspect": ("opd.cli.tools", "inspect"),
    "rescore": ("opd.cli.analysis", "rescore"),
    "export": ("opd.cli.tools", "export"),
    "prune": ("opd.cli.tools", "prune"),
    "serve": ("opd.cli.tools", "serve"),
    "demo": ("opd.cli.tools", "demo"),
}
SHARED = {"train", "eval", "variance", "rock"}  # commands that several processes can run together


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns 0 on success, 2 after printing a line about an error that the user can fix, and the code of a stopped run.
    """
    args = list(sys.argv[1:] if arguments is None else arguments)
    refuse = refusing()
    try:
        _check_characters(args)
        match args:
            case [] | ["-h" | "--help"] | ["help"]:
                print(USAGE)
            case ["--version"]:
                print(f"opd {version('opd')}")
            case ["help", *words]:
                return main([*words, "--help"])
            case [name, *words] if name in COMMANDS:
                _check_processes(name)
                module, function = COMMANDS[name]
                command: Callable[[list[str]], int] = vars(import_module(module))[function]
                try:
                    with _short_warnings(), _main_output():
                        return command(words)
                finally:
                    sys.stdout.flush()  # here a closed pipe is still distinguishable from other errors
            case [name, *_]:
                raise Refusal(f"{name}: unknown command{suggestion(name, COMMANDS)}; there are {', '.join(COMMANDS)}")
    except Refusal as error:
        return refuse(str(error))
    except Stopped as stop:
        return stop.code
    except KeyboardInterrupt:
        print("opd: stopped; what was saved is whole", file=sys.stderr)
        return 130
    except BrokenPipeError:
        if not _stdout_is_closed():
            raise
        return 1  # like rich, which prints the tables
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        return refuse(f"{error.filename}: {error.strerror}; name another path")
    return 0


@contextlib.contextmanager
def _short_warnings() -> Iterator[None]:
    """Print opd's own warnings without a line of its code, and hide what libraries tell developers."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read when transformers is imported
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        show = warnings.showwarning

        def show_short(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if not Path(filename).is_relative_to(Path(__file__).parents[1]):
                show(message, category, filename, lineno, file, line)
            elif is_main_process():
                print(f"warning: {printable(message)}", file=sys.stderr)

        warnings.showwarning = show_short
        yield


@contextlib.contextmanager
def _main_output() -> Iterator[None]:
    """Print to stdout in the main process only."""
    with contextlib.nullcontext() if is_main_process() else contextlib.redirect_stdout(io.StringIO()):
        yield


def _check_characters(words: Sequence[str]) -> None:
    """Refuse what no shell can pass, and no file name can hold: a null character, or half of a character."""
    for word in words:
        try:
            strange = b"\0" in os.fsencode(word)
        except UnicodeEncodeError:
            strange = True
        if strange:
            raise Refusal(f"{word!a}: a null character, or half of a character, is in it; remove that")


def _check_processes(command: str) -> None:
    """Refuse several processes of a launcher for a command that does not share its work among them."""
    if num_processes() > 1 and command not in SHARED:
        raise Refusal(
            f"opd {command}: it runs in one process, and the launcher started {num_processes()}; run it without "
            f"torchrun or accelerate launch (only {', '.join(sorted(SHARED))} share their work among processes)"
        )


def _stdout_is_closed() -> bool:
    """Return True if the reader of stdout has closed it, as in `opd methods | head`; then redirect stdout to null."""
    try:
        print(flush=True)  # a flush alone would not fail, because the failed write has emptied the buffer
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False
