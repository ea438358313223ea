"""Functions that may hang or use much memory on a foreign text, run in child processes with hard limits.

`score(judge, *question) -> float` asks a child process.  This file, run as a script, is the child: it reads a pickled
question per line (trusted, because it comes from the parent) and writes a number per line.  It imports only modules of
opd that keep torch out of the children.  The time limit is a timer whose signal has no handler.  So the kernel ends
the child even inside a long C call such as 9**9**9, which no Python signal handler or thread can interrupt.
"""

import atexit
import base64
import contextlib
import json
import os
import pickle
import queue
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

CPU_LIMIT = 2.0  # CPU seconds per question; CPU time, so that other load on the machine does not change a score
WALL_LIMIT = 30  # wall-clock seconds per question, in case the child sleeps
MEMORY_LIMIT = 4 << 30  # bytes of address space
TEMPLATE_MEMORY = 512 << 20  # bytes of address space in which a chat template is tried; Python takes 50 MB of it
TEMPLATE_CHARACTERS = 10_000_000  # longest text of a small conversation
CHILDREN = min(4, os.cpu_count() or 1)  # maximum child processes per judge; started when calls overlap


def score(judge: str, *question: object) -> float:
    """Return the score that a judge of JUDGES gives, or 0.0 if it exceeds a limit; thread-safe."""
    line = base64.b64encode(pickle.dumps(question)) + b"\n"
    for _ in range(2):  # a child that was killed from outside is no verdict on the question: retry with another child
        reply, status = _children(judge).ask(line)
        if reply:
            return float(reply)
        if status in (-signal.SIGPROF, -signal.SIGALRM):
            break
    return 0.0


class Children:
    """A pool of child processes of a judge; a caller takes an idle child and puts it back."""

    def __init__(self, judge: str, *, size: int):
        self.judge = judge
        self.idle: queue.LifoQueue[subprocess.Popen | None] = queue.LifoQueue()  # reuses the child that was used last
        for _ in range(size):
            self.idle.put(None)

    def ask(self, line: bytes) -> tuple[bytes, int]:
        """Return the reply and 0, or b"" and the exit status of a child that died."""
        child, reply, status = self.idle.get(), b"", 0
        try:
            child = child or _start(self.judge)
            assert child.stdin and child.stdout
            with contextlib.suppress(BrokenPipeError):
                child.stdin.write(line)
                child.stdin.flush()
                reply = child.stdout.readline()
        finally:
            if child and not reply:  # also if the caller was interrupted: the next caller must not get its reply
                status, child = _end(child), None
            self.idle.put(child)
        return reply, status

    def close(self) -> None:
        """End the idle children."""
        for _ in range(self.idle.qsize()):
            if child := self.idle.get():
                _end(child)


def _start(judge: str) -> subprocess.Popen:
    """Start a child process.  Raises RuntimeError if it does not start."""
    command = [sys.executable, "-P", os.path.abspath(__file__), judge]  # -P: no module of this folder shadows another
    environment = {**os.environ, "PYTHONHASHSEED": "0"}  # sympy's answers depend on the order of sets
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    assert child.stdout
    if child.stdout.readline() != b"ready\n":
        raise RuntimeError(f"the {judge} judge did not start (exit status {_end(child)}); its error is printed above")
    return child


def _end(child: subprocess.Popen) -> int:
    """End a child that may be dead already, and return its exit status."""
    with child:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.communicate(timeout=0.5)  # closes stdin: an idle child exits, and a dead child keeps its exit status
        child.kill()
    return child.returncode


@cache
def _children(judge: str) -> Children:
    """Return the pool of a judge's child processes, which is kept until this process ends."""
    children = Children(judge, size=CHILDREN)
    atexit.register(children.close)
    return children


os.register_at_fork(after_in_child=_children.cache_clear)  # a forked process must not read its parent's replies


def _math() -> Callable[[str, str], bool]:
    """Return the function `(answer, candidate) -> equal?`."""
    sys.path.append(os.path.abspath(f"{__file__}/../../../.."))  # the folder of opd, if it is not installed
    from opd.data.verifiers import math_answers, math_engine

    def equal(answer: str, candidate: str) -> bool:
        with _limits():
            return math_answers.same(answer, candidate, math_engine.equal)

    return equal


def _reasoning_gym() -> Callable[[str, str, str, dict], float]:
    """Return `(name, options as JSON, response, entry) -> score` by the scorer that comes with each dataset."""
    import reasoning_gym

    @cache
    def dataset(name: str, options: str) -> reasoning_gym.dataset.ProceduralDataset:
        return reasoning_gym.create_dataset(name, seed=0, size=10, **json.loads(options))

    def judge(name: str, options: str, response: str, entry: dict) -> float:
        scorer = dataset(name, options)  # outside the limits: it may take seconds and reads no model text
        with _limits():
            return min(1.0, max(0.0, float(scorer.score_answer(response, entry))))  # this order maps NaN to 0

    return judge


def _template() -> Callable[[str, list[dict]], bool]:
    """Return the function `(chat template, arguments of each conversation) -> does it stay within the limits?`."""
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The tag {% generation %} of transformers, whose content is rendered as it is."""

        tags: set[str] = {"generation"}  # noqa: RUF012  # jinja declares it like this

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def fail(message: str) -> None:
        raise ValueError(message)

    # The environment in which transformers renders; importing it takes seconds.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False)
    environment.globals |= {"raise_exception": fail, "strftime_now": lambda form: form}
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (TEMPLATE_MEMORY, MEMORY_LIMIT))

    def judge(template: str, conversations: list[dict]) -> bool:
        with _limits():
            return all(_renders(environment, template, arguments) for arguments in conversations)

    return judge


def _renders(environment: Any, template: str, arguments: dict) -> bool:
    """Return False for a template that needs too much memory; the caller meets any other error itself."""
    try:
        return len(environment.from_string(template).render(**arguments)) <= TEMPLATE_CHARACTERS
    except MemoryError:
        return False
    except Exception:
        return True


JUDGES: dict[str, Callable[[], Callable[..., float]]] = {
    "math": _math,
    "reasoning-gym": _reasoning_gym,
    "template": _template,
}


@contextlib.contextmanager
def _limits() -> Iterator[None]:
    """Let the kernel end this process if the block exceeds CPU_LIMIT or WALL_LIMIT."""
    signal.setitimer(signal.ITIMER_PROF, CPU_LIMIT)
    signal.alarm(WALL_LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)


def _serve(judge: str) -> None:
    """Answer questions until the parent closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    for end_signal in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(end_signal, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM, signal.SIGPROF})  # a parent's mask is inherited
    with contextlib.suppress(ValueError, OSError):  # a lower limit may be set already
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    answer = JUDGES[judge]()
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # the libraries print warnings and parse errors
    os.dup2(nowhere, 2)
    replies.write(b"ready\n")
    for line in sys.stdin.buffer:
        try:
            reply = float(answer(*pickle.loads(base64.b64decode(line))))
        except Exception:  # text that makes a parser fail is a wrong answer
            reply = 0.0
        replies.write(b"%r\n" % reply)


if __name__ == "__main__":
    _serve(sys.argv[1])
