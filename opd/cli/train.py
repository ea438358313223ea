"""`opd train` and `opd doctor`, which run and examine the training that the flags describe."""

import json
import shlex
import sys
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import tyro
from rich.console import Console

from opd.cli.method_sources import check_flags, check_name, flag_names, listing
from opd.cli.parse import asks_for_help, flag_name, refuse_missing, run_tyro, scan_words, unknown_flag
from opd.config.precision import assumed_gpu
from opd.config.presets import arguments, run_arguments
from opd.config.train import Train
from opd.core.errors import Refusal
from opd.core.processes import is_main_process

UNREAD = "(not read)"  # --prompts of `opd doctor --estimate`
EXAMPLE = "{} --student embedded:student --teacher embedded:teacher --prompts embedded:ledger --preset embedded vopd"


@dataclass(frozen=True, kw_only=True)
class TrainFlags:
    """Flags of `opd train` beside those of the run."""

    preset: Literal["none", "paper", "embedded"] = "none"
    """Start from settings of a name: paper (the method's publication), embedded (tuned on the embedded pair)."""
    also: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME:weight of another method whose terms are added, "NAME FLAGS:weight" with flags of it; repeat for more."""
    json: bool = False
    """Print each line of metrics.jsonl as it is written, for machines; messages for people go to stderr."""
    run: Train


@dataclass(frozen=True, kw_only=True)
class DoctorFlags(TrainFlags):
    """Flags of `opd doctor`."""

    json: bool = False
    """Print as json."""
    estimate: str = ""
    """PROCESSESxGIB, such as 8x80 for eight GPUs with 80 GiB each: print the memory that each process needs there, and
    the flags that make the run fit.  Nothing is loaded: the models' config.json files are enough, and --prompts is not
    read.  Defaults are those of a machine with GPUs."""
    prompt_tokens: int = 512
    """Tokens of the longest prompt that --estimate assumes."""


def train(args: list[str]) -> int:
    """Train, and print the run folder."""
    args = _without_auto(args)
    flags = run_flags(args, TrainFlags, "opd train", "Distil a student from a teacher on the student's own samples:")
    from opd.training.train import train  # imported after parsing: help and mistakes are reported at once

    chosen_flags = {"preset": flags.preset, "set": sorted({a.partition("=")[0] for a in args if a.startswith("--")})}
    if flags.json:
        train(flags.run, lambda row: print(json.dumps(row), flush=True), chosen_flags)
    else:
        folder = train(flags.run, asked=chosen_flags)
        print(folder)
        if not flags.run.quiet and is_main_process():
            name = shlex.quote(str(folder))
            print(f"next: `opd report {name}` draws the run, `opd inspect {name}` its rollouts", file=sys.stderr)
    return 0


def _without_auto(args: list[str]) -> list[str]:
    """Return the words with `--resume auto` as --resume, which starts a run or continues it, as the user has it."""
    args = ["--resume" if word == "--resume=auto" else word for word in args]
    return [word for before, word in zip(["", *args], args, strict=False) if (before, word) != ("--resume", "auto")]


def doctor(args: list[str]) -> int:
    """Examine the settings of a run; nothing is written."""
    purpose = "What would go wrong in a run, before it: the flags are those of opd train, nothing is written."
    words = [word.partition("=")[0] for word in args]
    if "--estimate" in words:
        args = args if "--prompts" in words else ["--prompts", UNREAD, *args]
        with assumed_gpu():
            return _estimate(run_flags(args, DoctorFlags, "opd doctor", purpose))
    flags = run_flags(args, DoctorFlags, "opd doctor", purpose)
    from opd.training.doctor.command import doctor
    from opd.training.doctor.findings import errors, show

    findings = doctor(flags.run)
    if flags.json:
        print(json.dumps([asdict(f) for f in findings], indent=2))
    else:
        show(findings, Console())
    return 2 if errors(findings) else 0


def _estimate(flags: DoctorFlags) -> int:
    """Print the memory of a run on other GPUs; the exit code is 2 if it does not fit."""
    from opd.training.doctor.command import estimate_memory
    from opd.training.doctor.fit import show

    estimate = estimate_memory(flags.run, flags.estimate, flags.prompt_tokens)
    if flags.json:
        print(json.dumps(asdict(estimate), indent=2))
    else:
        show(estimate, Console())
    return 0 if estimate.fits else 2


def run_flags(args: list[str], kind: type[TrainFlags], prog: str, purpose: str) -> Any:
    """Return the flags of a run and its METHOD, read as `kind`; a misspelt name is refused before torch is imported."""
    method_names = listing()
    named_method = next((a for a in args if a in method_names), None)
    if named_method and asks_for_help(args[args.index(named_method) :]):
        from opd.cli.method_names import method_of

        method_of(named_method, ["--help"])
    description = (
        f"{purpose}\n{prog} --student S --teacher T --prompts P [run flags] METHOD [method flags]\n\nMETHOD is "
        f"{', '.join(method_names)}, or module:factory for your own. `opd methods` explains them, `opd train METHOD "
        "--help` lists a method's flags."
    )
    if asks_for_help(args):
        return run_tyro(kind, ["--help"], prog=prog, description=description)
    words = scan_words(kind, args)
    name, *method_words = words.remaining or ("",)
    if name.startswith("-"):
        flag = flag_name(name.lstrip("-").partition("=")[0])
        later = next((word for word in method_words if word in method_names), "")
        if later and flag in flag_names(later):
            raise Refusal(f"{flag}: is a flag of the method; write it after METHOD, as in {later} {name} ...")
        raise unknown_flag(name, words.names(), prog=prog)
    if name not in method_names and (later := next((word for word in method_words if word in method_names), "")):
        raise Refusal(f"{name}: belongs to no flag, and METHOD is {later}; --prompts takes one file, folder or name")
    absent = words.missing()
    if name in method_names and words.present.isdisjoint({"--teacher", "--route"}):
        from opd.methods import METHODS

        absent += [] if METHODS[name]().teacher else ["--teacher"]
    absent += [] if name else ["METHOD (`opd methods` lists them)"]
    refuse_missing(absent, EXAMPLE.format(prog))
    check_name(name)
    check_flags(name, method_words, words.names())
    from opd.cli.method_names import add_terms, factory_of, method_of

    factory_of(name)  # a module that cannot be imported is refused before the flags of the run
    flags = run_tyro(kind, words.own_words, prog=prog, description=description)
    method = method_of(name, [*arguments(flags.preset, name), *method_words], words.names())
    for other in flags.also:
        method = add_terms(method, other)
    if flags.preset != "none":  # parse again behind the preset's flags, so that the user's flags win
        preset_words = run_arguments(flags.preset, name)
        flags = run_tyro(kind, [*preset_words, *words.own_words], prog=prog, description=description)
    return replace(flags, run=replace(flags.run, method=method))
