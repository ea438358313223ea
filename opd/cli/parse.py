"""Reading the command line: `parse_flags(Settings, words, ...) -> Settings`, and each mistake as one line.

tyro prints the help and converts the values.  This module decides which words are flags, which values belong to them
and which are missing, from the fields of the dataclass or the parameters of the function, because tyro reports mistakes
only as boxes of several lines.
"""

import contextlib
import inspect
import io
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from types import MappingProxyType, NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from opd.core.errors import Refusal, suggestion

HELP = ("-h", "--help")
BOOLEANS = frozenset({"true", "false", "yes", "no", "on", "off"})  # words that other tools take after a flag
TRL_FLAGS: Mapping[str, tuple[str, ...]] = {  # flag of TRL or transformers -> flags of opd; the command has one of them
    "model-name-or-path": ("--student", "--model"),
    "student-model-name-or-path": ("--student",),
    "teacher-model-name-or-path": ("--teacher",),
    "dataset-name": ("--prompts",),
    "dataset-config": ("--subset",),
    "dataset-train-split": ("--split",),
    "output-dir": ("--out",),
    "learning-rate": ("--lr",),
    "lr-scheduler-type": ("--schedule",),
    "warmup-steps": ("--warmup",),
    "warmup-ratio": ("--warmup",),
    "adam-beta1": ("--betas",),
    "adam-beta2": ("--betas",),
    "max-steps": ("--steps",),
    "num-train-epochs": ("--steps",),
    "per-device-train-batch-size": ("--batch",),
    "per-device-eval-batch-size": ("--decode-rows",),
    "gradient-accumulation-steps": ("--micro-batch-tokens",),
    "num-generations": ("--per-prompt",),
    "num-iterations": ("--updates",),
    "max-completion-length": ("--max-new-tokens",),
    "max-length": ("--max-new-tokens",),
    "bf16": ("--precision bf16",),
    "dtype": ("--precision",),
    "torch-dtype": ("--precision",),
    "use-peft": ("--lora-rank",),
    "lora-r": ("--lora-rank",),
    "lora-target-modules": ("--lora-targets",),
    "use-vllm": ("--engine vllm",),
    "vllm-server-base-url": ("--engine",),
    "eval-steps": ("--eval-every",),
    "save-steps": ("--save-every",),
    "save-total-limit": ("--keep",),
    "resume-from-checkpoint": ("--resume",),
    "report-to": ("--trackers",),
}


@dataclass(frozen=True)
class Flag:
    """A flag or a positional argument, as its field or parameter declares it."""

    name: str  # "--max-new-tokens"; of a positional argument "RUN"
    kind: Any  # type of a value, or its constructor for tyro; None if only tyro can check it
    count: int | None  # values that follow; None: any number
    required: bool
    positional: bool = False

    def check(self, value: str) -> None:
        """Refuse a value that is not of the flag's type."""
        if get_origin(self.kind) is Literal:
            choices = [str(choice) for choice in get_args(self.kind)]
            if value not in choices:
                raise Refusal(f"{self.name} {value}: must be one of {', '.join(choices)}{suggestion(value, choices)}")
        elif isinstance(self.kind, PrimitiveConstructorSpec):
            self.kind.instance_from_str([value])
        elif self.kind in (int, float):
            try:
                self.kind(value)
            except ValueError:
                number = "a whole number" if self.kind is int else "a number"
                raise Refusal(f"{self.name} {value}: must be {number}") from None


@dataclass(frozen=True)
class Words:
    """The words of a command line, split into those of the command's flags and the remaining words."""

    flags: tuple[Flag, ...]  # all flags of the command
    present: frozenset[str]  # names of the flags and positional arguments among the words
    own_words: tuple[str, ...]  # words of these flags and their values, for tyro
    remaining: tuple[str, ...]  # all other words, in order

    def missing(self) -> list[str]:
        """Return the names of the required flags and positional arguments that are missing."""
        return [flag.name for flag in self.flags if flag.required and flag.name not in self.present]

    def names(self) -> list[str]:
        """Return the names of all flags."""
        return [flag.name for flag in self.flags if not flag.positional]


class OpaqueType(Exception):
    """A declared type for which only tyro knows the number of words."""


def parse_flags(
    what: Any,
    args: Sequence[str],
    *,
    prog: str,
    description: str,
    example: str = "",
    other_flags: Iterable[str] = (),
    strays: Mapping[str, str] = MappingProxyType({}),
) -> Any:
    """Return the dataclass, or the function's result, that the words describe; refuse all other words.

    Args:
        what: a dataclass, or a function with annotated parameters.
        args: the words after the command's name.
        prog: the command's name in help and messages.
        description: opening text of the help.
        example: a complete command line, shown if a required flag is missing.
        other_flags: further flags of the command line, which are also suggested for misspelt flags.
        strays: messages about words that belong to no flag, by word.
    """
    if asks_for_help(args):
        return run_tyro(what, HELP[-1:], prog=prog, description=description)
    try:
        words = scan_words(what, args)
    except OpaqueType:
        return run_tyro(what, args, prog=prog, description=description)
    after = {value: flag for flag, _, value in zip(args, args[1:], args[2:], strict=False) if flag in words.present}
    for word in sorted(words.remaining, key=lambda word: not word.startswith("-")):  # a misspelt flag before its value
        if word.startswith("-"):
            raise unknown_flag(word, [*words.names(), *other_flags], prog=prog)
        reason = f"belongs to no flag ({after[word]} takes one value)" if word in after else "belongs to no flag"
        raise Refusal(f"{word}: {strays.get(word, reason)}; `{prog} --help` lists the flags")
    refuse_missing(words.missing(), example)
    return run_tyro(what, words.own_words, prog=prog, description=description)


def asks_for_help(args: Sequence[str]) -> bool:
    """Return whether a flag for help is among the words."""
    return not {*HELP}.isdisjoint(args)


def run_tyro(what: Any, args: Sequence[str], **options: Any) -> Any:
    """Return the value that tyro builds from scanned words; convert an error box of tyro to one line."""
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output):
            return tyro.cli(what, args=args, config=(tyro.conf.OmitArgPrefixes,), **options)
    except SystemExit as stop:
        if not stop.code:
            raise  # tyro printed the help
        text = " ".join(re.sub(r"[─-╿]+", " ", output.getvalue()).split())
        raise Refusal(f"{options['prog']}: {text}") from None


def refuse_missing(names: Sequence[str], example: str) -> None:
    """Refuse a command line that lacks some flags or positional arguments."""
    if names:
        listed = " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
        raise Refusal(f"{listed} must be given" + (f"; for example: {example}" if example else ""))


def unknown_flag(word: str, names: Sequence[str], *, prog: str) -> Refusal:
    """Return the refusal of an unknown flag, with the flag that was probably meant."""
    flag = word.partition("=")[0]
    bare = flag.lstrip("-").replace("_", "-").lower()
    translated = [ours for ours in TRL_FLAGS.get(bare, ()) if ours.split()[0] in names]
    similar = suggestion(bare, ["help", *(name.removeprefix("--") for name in names)], "--")
    meant = f" (opd calls it {translated[0]})" if translated else similar
    return Refusal(f"{flag}: unknown flag{meant}; `{prog} --help` lists the flags")


def scan_words(what: Any, args: Sequence[str]) -> Words:
    """Split the words of a command line; refuse values that are missing, superfluous or of another type."""
    flags = tuple(flags_of(what))
    names = {f.name: f for f in flags if not f.positional} | {_negated(f.name): f for f in flags if f.count == 0}
    present, own_words, remaining = list[str](), list[str](), list[str]()
    queue = deque(args)
    while queue:
        word = queue.popleft()
        name, equals, value = _split_flag(word)
        if name not in names:
            remaining.append(word)
            continue
        flag = names[name]
        if flag.count == 0 and (equals or (queue and queue[0].lower() in BOOLEANS)):
            given = f"{flag.name} {value if equals else queue[0]}"
            raise Refusal(f"{given}: the flag takes no value; write {flag.name} for yes, {_negated(flag.name)} for no")
        values = [value] if equals else []
        while queue and (flag.count is None or len(values) < flag.count) and not _is_flag(queue[0], names):
            values.append(queue.popleft())
        if len(values) < (flag.count or 0):
            raise _too_few(flag, len(values), queue[0] if queue else "", names)
        if values == [""] and flag.required:
            continue  # counts as missing: often a shell variable that is not set
        for value in values:
            flag.check(value)
        present.append(flag.name)
        own_words += [f"{name}={values[0]}", *values[1:]] if equals else [name, *values]
    for flag in flags:
        if flag.positional:
            places = [i for i, word in enumerate(remaining) if not word.startswith("-")][: flag.count]
            own_words = [*(remaining[i] for i in places), *own_words]
            remaining = [word for i, word in enumerate(remaining) if i not in places]
            present += [flag.name] if places else []
    return Words(flags, frozenset(present), tuple(own_words), tuple(remaining))


def _split_flag(word: str) -> tuple[str, str, str]:
    """Split "--max_new_tokens=3" into the flag's name with dashes, "=" and the value."""
    name, equals, value = word.partition("=")
    return (flag_name(name[2:]) if name.startswith("--") else name), equals, value


def flag_name(name: str) -> str:
    """Return the flag of a field or parameter: --max-new-tokens of max_new_tokens."""
    return f"--{name.replace('_', '-')}"


def _negated(name: str) -> str:
    return f"--no-{name.removeprefix('--')}"


def _is_flag(word: str, names: Mapping[str, Flag]) -> bool:
    """Return whether a word is a flag or looks like one; numbers such as -1, -.5 and -inf do not."""
    if _split_flag(word)[0] in names:
        return True
    try:
        float(word)
    except ValueError:
        return word.startswith("-") and word.lstrip("-")[:1].isalpha()
    return False


def _too_few(flag: Flag, count: int, following: str, names: Mapping[str, Flag]) -> Refusal:
    """Return the refusal of a flag with fewer values than it takes."""
    dashed = ""
    if following.startswith("-") and _split_flag(following)[0] not in names:
        dashed = f"; write {flag.name}={following} if that is its value"
    if flag.count == 1:
        return Refusal(f"{flag.name}: its value is missing{dashed}")
    return Refusal(f"{flag.name}: takes {flag.count} values, not {count}{dashed}")


def flags_of(what: Any, *, has_instance: bool = False) -> Iterator[Flag]:
    """Yield the flags that tyro derives from a dataclass with its nested ones, or from a function.

    None is required if `has_instance`.  Raises OpaqueType for an unknown type.
    """
    try:
        hints = get_type_hints(what, include_extras=True)
    except (NameError, TypeError) as error:
        raise OpaqueType from error
    if is_dataclass(what):
        optional = {f.name: (f.default is not MISSING or f.default_factory is not MISSING) for f in fields(what)}
    else:
        parameters = inspect.signature(what).parameters
        optional = {name: p.default is not p.empty for name, p in parameters.items()}
    for name, has_default in optional.items():
        if name not in hints:
            raise OpaqueType
        hint = hints[name]
        base, *marks = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        if tyro.conf.Suppress in marks or tyro.conf.Fixed in marks:
            continue
        if is_dataclass(base):
            yield from flags_of(base, has_instance=has_instance or has_default)
            continue
        kind, count = _value_type(base, marks, has_default)
        required = not (has_instance or has_default)
        if tyro.conf.Positional in marks:
            yield Flag(name.upper().removesuffix("S" if count is None else ""), kind, count, required, positional=True)
        else:
            yield Flag(flag_name(name), kind, count, required)


def _value_type(base: Any, marks: Sequence[Any], has_default: bool) -> tuple[Any, int | None]:
    """Return the type of one value, and how many values follow the flag (None: any number)."""
    for mark in marks:
        if isinstance(mark, PrimitiveConstructorSpec):
            return mark, mark.nargs if isinstance(mark.nargs, int) else None
    kinds = get_args(base)
    if base is bool:
        return (bool, 0) if has_default else (None, 1)
    if base in (int, float, str, Path) or get_origin(base) is Literal:
        return base, 1
    if get_origin(base) in (Union, UnionType) and len(kinds) == 2 and NoneType in kinds:
        (kind,) = (k for k in kinds if k is not NoneType)
        return None, _value_type(kind, (), has_default=False)[1]
    if get_origin(base) is tuple and tyro.conf.UseAppendAction in marks:
        return kinds[0], 1
    if get_origin(base) is tuple and len({*kinds} - {...}) == 1 and kinds[0] in (int, float, str, Path):
        return kinds[0], None if ... in kinds else len(kinds)
    raise OpaqueType
