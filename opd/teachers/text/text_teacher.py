"""Teachers and judges that only generate text: `continue_(prefixes, ...) -> texts`, `chat(prompts, ...) -> texts`.

The model is behind an OpenAI-compatible endpoint, or in this process.  A request that fails is counted and returns no
texts; the other answers of its batch are kept, in memory and on disk.  If too many requests fail, the run stops.
"""

import importlib
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol, TypeVar, runtime_checkable

from opd.core.errors import Refusal
from opd.core.sampling import Prompt
from opd.core.types import STUDENT_COLUMNS, Rollout
from opd.losses.hidden_states import Lens
from opd.teachers.base import Teacher
from opd.teachers.text.answer_cache import Answers, key

T = TypeVar("T")
LEAST, LAST = 10, 50  # requests: the fewest after which failures can stop a run, and the window that is counted


@dataclass(frozen=True)
class Begun:
    """A request: a prompt, and the prefix of its answer."""

    prompt: Prompt
    text: str = ""
    schema: str = ""  # JSON schema of the answer; empty: free text


@dataclass(frozen=True)
class How:
    """The generation parameters of a request."""

    n: int
    max_tokens: int
    temperature: float
    setting: str  # the flag that sets max_tokens, for error messages


@dataclass
class Account:
    """Counters of requests and tokens.  Threads update them under the lock."""

    calls: int = 0  # requests sent to the model
    cached: int = 0  # requests answered from the cache
    failed: int = 0
    read_tokens: int = 0
    written_tokens: int = 0
    seconds: float = 0.0  # sum over the calls, parallel ones included
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, **more: float | int) -> None:
        """Add to the counters."""
        with self.lock:
            for name, value in more.items():
                setattr(self, name, getattr(self, name) + value)

    def numbers(self) -> dict[str, float]:
        """Return all counters by name."""
        with self.lock:
            return {f.name: float(getattr(self, f.name)) for f in fields(self) if f.name != "lock"}


class Gate:
    """A limit on failures: it stops the run when more than the share `most` of the last LAST requests failed.

    It waits for LEAST requests first.
    """

    def __init__(self, who: str, most: float, of: str = "questions") -> None:
        self.who, self.most, self.of, self.lock = who, most, of, threading.Lock()
        self.last: deque[bool] = deque(maxlen=LAST)
        self.why = ""

    def note(self, why: str) -> None:
        """Count one request.  `why` is the reason of its failure, or empty.  Raises Refusal above the limit."""
        with self.lock:
            self.last.append(bool(why))
            self.why = why or self.why
            if len(self.last) >= LEAST and (share := sum(self.last) / len(self.last)) > self.most:
                raise Refusal(
                    f"--{self.who}: {share:.0%} of the last {len(self.last)} {self.of} failed, and --judge-failures "
                    f"allows {self.most:.0%}; the last: {self.why}: mend that, then run the same command with --resume"
                )


class Failed(Exception):
    """A request without an answer, with the reason."""


Written = list[tuple[int, list[str] | Failed]]
"""Pairs (index of a request, its texts or its failure)."""


@runtime_checkable
class Writer(Protocol):
    """A model that generates text."""

    @property
    def name(self) -> str:
        """Return the model's name, which is part of each cache key."""

    def reads(self, begun: Begun) -> object:
        """Return what the model reads, as json.  With name, parameters and seed it forms the cache key."""

    def write(self, asked: Sequence[tuple[Begun, int]], how: How, account: Account) -> Iterator[Written]:
        """Generate texts for pairs (request, seed).  Yields results as they finish, in any order."""


class TextTeacher(Teacher):
    """A teacher that answers with text only.  It suits methods that need no log-probs of the teacher."""

    provides = STUDENT_COLUMNS | {"text"}

    def __init__(self, writer: Writer, answers: Answers, gate: Gate) -> None:
        self.writer, self.answers, self.gate = writer, answers, gate
        self.account, self.before = Account(), dict[str, float]()

    def continue_(
        self, prefixes: Sequence[Begun], n: int, max_tokens: int, seed: int, temperature: float = 1.0
    ) -> list[list[str]]:
        """Return `n` continuations of each prefix; an empty list where the request failed.

        `max_tokens` counts tokens of the teacher's tokenizer.
        """
        return self.texts(prefixes, How(n, max_tokens, temperature, "--length"), seed)

    def chat(self, conversations: Sequence[Prompt], how: How, seed: int) -> list[list[str]]:
        """Return the answers to each conversation; an empty list where the request failed."""
        return self.texts([Begun(x) for x in conversations], how, seed)

    def forget(self, asked: Sequence[Begun], how: How, seed: int) -> None:
        """Delete useless answers from the cache, so that the requests are sent again next time."""
        self.answers.drop([self._key(x, how, seed) for x in asked])

    def _key(self, begun: Begun, how: How, seed: int) -> str:
        return key(self.writer.name, self.writer.reads(begun), how.n, how.max_tokens, how.temperature, seed)

    def texts(self, asked: Sequence[Begun], how: How, seed: int) -> list[list[str]]:
        """Return the texts of each request, from the cache or from the model; an empty list where it failed.

        Equal requests are sent once.
        """
        keys, found = [self._key(x, how, seed) for x in asked], dict[str, list[str]]()
        wanted: dict[str, tuple[Begun, int]] = {}
        for k, x in zip(keys, asked, strict=True):
            if k in found or k in wanted:
                continue
            if (kept := self.answers.find(k)) is not None:
                found[k] = kept
            else:
                wanted[k] = (x, int(k[:7], 16))  # a request's seed comes from its key: 28 bits
        self.account.add(calls=len(wanted), cached=len(found))
        names = list(wanted)
        for some in self.writer.write(list(wanted.values()), how, self.account) if wanted else ():
            for i, texts in some:  # store all answers before a failure can stop the run
                if not isinstance(texts, Failed):
                    self.answers.keep(names[i], texts)
                    found[names[i]] = texts
            for _, texts in some:
                failed = isinstance(texts, Failed)
                self.account.add(failed=failed)
                self.gate.note(str(texts) if failed else "")
        return [found.get(k, []) for k in keys]

    def hidden(self, rollouts: Sequence[Rollout], masks: Sequence[Sequence[bool]], lens: Lens | None = None) -> None:
        """Return None: a text-only teacher has no hidden states."""

    def traffic(self) -> dict[str, float]:
        """Return the counters since the last call, for perf.jsonl."""
        now = self.account.numbers()
        new = {f"teacher_{name}": value - self.before.get(name, 0.0) for name, value in now.items()}
        self.before = now
        return new


def needed(package: str, what: str) -> Any:
    """Import a package of the extra `text`.  Raises Refusal if it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise Refusal(f"{what}: needs {package}, which is not installed; pip install 'opd[text]'") from error
