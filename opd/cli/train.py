"""`opd train` and `opd doctor`: a run from its flags."""

import json
import os
import shlex
import sys
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import tyro
from rich.console import Console

from opd.cli.methods import check_flags, check_name, listing
from opd.cli.parse import asks_for_help, built, refuse_missing, scanned, unknown_flag
from opd.config.train import Train
from opd.core.errors import Refusal

EXAMPLE = "{} --student embedded:student --teacher embedded:teacher --prompts embedded:ledger --preset embedded vopd"


@dataclass(frozen=True, kw_only=True)
class TrainFlags:
    """Flags of `opd train` beside those of the run."""

    preset: Literal["none", "paper", "embedded"] = "none"
    """Start from settings of a name: paper (the method's publication), embedded (tuned on the embedded pair)."""
    also: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME:weight of another method whose terms are added, "NAME FLAGS:weight" with flags of it; repeat for more."""
    json: bool = False
    """Print each line of metrics.jsonl as it is written, for machines; what is for people goes to stderr."""
    run: Train


@dataclass(frozen=True, kw_only=True)
class DoctorFlags(TrainFlags):
    """Flags of `opd doctor`."""

    json: bool = False
    """Print as json."""


def train(args: list[str]) -> int:
    """Run it; prints the run folder."""
    flags = _run(args, TrainFlags, "opd train", "Distil a student from a teacher on the student's own samples:")
    from opd.training.train import train  # after parsing: help and mistakes answer at once

    asked = {"preset": flags.preset, "set": sorted({a.partition("=")[0] for a in args if a.startswith("--")})}
    if flags.json:
        train(flags.run, lambda row: print(json.dumps(row), flush=True), asked)
    else:
        folder = train(flags.run, asked=asked)
        print(folder)
        if not flags.run.quiet and not int(os.environ.get("RANK", 0)):
            name = shlex.quote(str(folder))
            print(f"next: `opd report {name}` draws the run, `opd inspect {name}` its rollouts", file=sys.stderr)
    return 0


def doctor(args: list[str]) -> int:
    """Examine it; nothing is written."""
    about = "What would go wrong in a run, before it: the flags are those of opd train, nothing is written."
    flags = _run(args, DoctorFlags, "opd doctor", about)
    from opd.training.doctor.command import doctor
    from opd.training.doctor.findings import errors, show

    found = doctor(flags.run)
    if flags.json:
        print(json.dumps([asdict(f) for f in found], indent=2))
    else:
        show(found, Console())
    return 2 if errors(found) else 0


def _run(args: list[str], kind: type[TrainFlags], prog: str, about: str) -> Any:
    """Return the flags of a run and its METHOD, read as `kind`; a misspelt name is refused before torch is imported."""
    listed = listing()
    asked = next((a for a in args if a in listed), None)
    if asked and asks_for_help(args[args.index(asked) :]):
        from opd.cli.method_names import method_of

        method_of(asked, ["--help"])
    description = (
        f"{about}\n{prog} --student S --teacher T --prompts P [run flags] METHOD [method flags]\n\n"
        f"METHOD is {', '.join(listed)}, or module:factory for your own. "
        "`opd methods` explains them, `opd train METHOD --help` lists a method's flags."
    )
    if asks_for_help(args):
        return built(kind, ["--help"], prog=prog, description=description)
    words = scanned(kind, args)
    name, *rest = words.rest or ("",)
    if name.startswith("-"):
        raise unknown_flag(name, words.names(), prog=prog)
    if name not in listed and (later := next((word for word in rest if word in listed), None)):
        raise Refusal(f"{name}: belongs to no flag, and METHOD is {later}; --prompts takes one file, folder or name")
    absent = words.missing()
    absent += ["--teacher"] if name in listed and "--teacher" not in words.given and not _teaches_itself(name) else []
    absent += [] if name else ["METHOD (`opd methods` lists them)"]
    refuse_missing(absent, EXAMPLE.format(prog))
    check_name(name)
    check_flags(name, rest, words.names())
    from opd.cli.method_names import factory_of, method_of, plus
    from opd.config.presets import arguments, settings

    factory_of(name)  # a module that cannot be imported is refused before the flags of the run
    flags = built(kind, words.known, prog=prog, description=description)
    method = method_of(name, [*arguments(flags.preset, name), *rest], words.names())
    for other in flags.also:
        method = plus(method, other)
    if flags.preset != "none":
        # A second reading: what the user set wins.  It appends to what may be repeated, so there that starts empty.
        run = replace(flags.run, **settings(flags.preset, name), route=(), trackers=())
        default = replace(flags, run=run, also=())
        flags = built(kind, words.known, prog=prog, description=description, default=default)
    return replace(flags, run=replace(flags.run, method=method))


def _teaches_itself(name: str) -> bool:
    """Return whether a method of the list has a default teacher."""
    from opd.methods import METHODS

    return METHODS[name]().teacher is not None
