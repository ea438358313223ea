"""Commands of `opd` in forked children of a process that has imported it: a crash is seen, and an import paid once."""

import contextlib
import importlib
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

from accelerate.state import AcceleratorState

import opd.cli

for name in (  # what the commands import, before the forks
    "opd.analysis.evaluate",
    "opd.analysis.report.page",
    "opd.analysis.rescore",
    "opd.teachers.serve.server",
    "opd.training.train",
    "peft.tuners.lora",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.qwen3.modeling_qwen3",
):
    importlib.import_module(name)

LONGEST = 2000  # characters of a refusal: a longer one hides its reason
MODELS = ("--student", "embedded:student", "--teacher", "embedded:teacher", "--prompts", "embedded:ledger-short")


@dataclass(frozen=True)
class Outcome:
    """The end of a command."""

    code: int  # exit code; below 0: the signal that ended the process
    output: str  # stdout and stderr
    seconds: float

    def fault(self, *codes: int) -> str:
        """Return how the command broke its promise; "" if it did not.

        The promise is to succeed, to say why not in a line, or to end with one of the other `codes`.
        """
        if "Traceback (most recent call last)" in self.output:
            return f"traceback: {self.last_line()}"
        if self.code in codes:
            return ""
        if self.code < 0:
            return f"ended by {signal.Signals(-self.code).name}"
        if self.code not in (0, 2):
            return f"exit code {self.code}"
        refusals = [line for line in self.output.splitlines() if line.startswith("opd: ")]
        if self.code == 2 and (len(refusals) != 1 or not self.output.rstrip("\n").endswith(refusals[0])):
            return "not a refusal of one line"
        if self.code == 2 and len(refusals[0]) > LONGEST:
            return f"a refusal of {len(refusals[0])} characters"
        if any(ord(c) < 32 and c not in "\n\t" for c in self.output):
            return "a control character on the terminal"
        return ""

    def last_line(self) -> str:
        """Return the last line of the output."""
        return self.output.strip().rpartition("\n")[2][:300]


@dataclass
class Running:
    """A command in a child process, which leads its own process group."""

    pid: int
    file: BinaryIO
    start: float = field(default_factory=time.monotonic)
    status: int | None = None

    def ended(self, within: float = 0.0) -> bool:
        """Return whether the command ended; wait for that for some seconds."""
        end = time.monotonic() + within
        while self.status is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                self.status = status
            elif time.monotonic() >= end:
                return False
            else:
                time.sleep(0.002)
        return True

    def kill(self, number: int = signal.SIGKILL, *, group: bool = False) -> None:
        """Send a signal to the command, or with `group` also to its children."""
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self.pid, number)

    def outcome(self, seconds: float = 60) -> Outcome:
        """Return the end of the command; SIGKILL ends it after `seconds`."""
        if not self.ended(seconds):
            self.kill(group=True)
            self.ended(30)
        assert self.status is not None
        self.file.seek(0)
        text = self.file.read().decode(errors="replace")
        self.file.close()
        return Outcome(os.waitstatus_to_exitcode(self.status), text, time.monotonic() - self.start)


def start(
    arguments: Sequence[str],
    environment: Mapping[str, str] = MappingProxyType({}),
    before: Callable[[], object] = lambda: None,
    typed: bytes = b"",
) -> Running:
    """Start `opd ARGUMENTS` in a child without a terminal, whose input is `typed`, after `before()` in it."""
    output = tempfile.TemporaryFile()  # noqa: SIM115  # `Running.outcome` closes it
    with tempfile.TemporaryFile() as keyboard:
        keyboard.write(typed)
        keyboard.seek(0)
        child = os.fork()
        if not child:
            os.environ.update(environment)
            _be_opd(arguments, keyboard.fileno(), output.fileno(), before)
    return Running(child, output)


def run_command(
    arguments: Sequence[str],
    seconds: float = 60,
    before: Callable[[], object] = lambda: None,
    *,
    typed: bytes = b"",
) -> Outcome:
    """Run `opd ARGUMENTS` in a child; SIGKILL ends it after `seconds`."""
    return start(arguments, before=before, typed=typed).outcome(seconds)


def start_ranks(arguments: Sequence[str], processes: int, before: Callable[[], object] = lambda: None) -> list[Running]:
    """Start a training command in several connected processes, as torchrun does, after `before()` in each."""
    if processes == 1:
        return [start(arguments, before=before)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    ranks = [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    return [start(arguments, rank, before) for rank in ranks]


def _be_opd(arguments: Sequence[str], keyboard: int, output: int, before: Callable[[], object]) -> None:
    """Run a command with its input and output in files, then end this process."""
    code = 1
    try:
        os.setsid()
        os.dup2(keyboard, 0)
        sys.stdin = os.fdopen(os.dup(0))
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = (os.fdopen(os.dup(fd), "w", buffering=1, errors="backslashreplace") for fd in (1, 2))
        warnings.resetwarnings()
        warnings.simplefilter("ignore", DeprecationWarning)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        AcceleratorState._reset_state(reset_partial_state=True)  # the parent may have trained, in one process
        before()
        code = opd.cli.main(list(arguments))
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code & 255)


def train_run(folder: Path) -> Path:
    """Train the embedded student for a few steps; return its run folder, which holds every kind of file."""
    sizes = (
        "--steps 3 --batch 4 --max-new-tokens 12 --eval-every 2 --eval-limit 4 --rollouts-every 1 --no-doctor --quiet"
    )
    prompts = "--eval-prompts embedded:ledger-short"
    out = folder / "run"
    done = run_command(["train", *MODELS, *f"{prompts} {sizes}".split(), "--out", str(out), "vopd"], 300)
    assert done.code == 0, done.output
    return out
