"""Commands that write files or start a server: rock, report, inspect, prune, serve, demo.

Each imports its implementation after parsing its flags, so that help and mistakes are reported at once.
"""

from importlib import import_module
from typing import Any

from opd.cli.parse import parse_flags
from opd.config.commands import Demo, Inspect, Prune, Report, Serve
from opd.config.rock import Rock


def _call(function: str, settings: type, args: list[str], *, description: str, example: str = "") -> Any:
    """Call `module:function` with the settings that the flags describe; the module is imported after parsing."""
    module, _, name = function.partition(":")
    prog = f"opd {settings.__name__.lower()}"
    config = parse_flags(settings, args, prog=prog, description=description, example=example)
    return vars(import_module(module))[name](config)


def rock(args: list[str]) -> int:
    """Write the list of rock tokens, and print its path."""
    description = "The frequent tokens whose KL stays large, and a control list, for `opd train ... rock-freeze`."
    example = "opd rock --student embedded:student --teacher embedded:teacher --prompts embedded:ledger"
    print(_call("opd.analysis.rock_tokens:rock", Rock, args, description=description, example=example))
    return 0


def report(args: list[str]) -> int:
    """Write a page about runs, and print its path."""
    description = (
        "Runs as one page: curves with bands over seeds, intervals, paired comparisons, alarms, configurations."
    )
    example = "opd report outputs/opd"
    print(_call("opd.analysis.report.page:report", Report, args, description=description, example=example))
    return 0


def inspect(args: list[str]) -> int:
    """Write a page about saved rollouts, and print its path."""
    description = (
        "Saved rollouts as one page: every token with its numbers, and what both models would rather have said."
    )
    example = "opd inspect outputs/opd"
    print(_call("opd.analysis.report.inspect:inspect", Inspect, args, description=description, example=example))
    return 0


def prune(args: list[str]) -> int:
    """Write a smaller model, and print its folder."""
    description = "A smaller model made of some layers of a model."
    example = "opd prune --model embedded:teacher --keep 0,2 --out outputs/pruned"
    print(_call("opd.models.prune:prune", Prune, args, description=description, example=example))
    return 0


def serve(args: list[str]) -> int:
    """Serve a model over HTTP until the process is stopped."""
    description = "A model behind HTTP: a teacher or judge for other machines, OpenAI-compatible."
    example = "opd serve embedded:teacher"
    _call("opd.teachers.serve.server:serve", Serve, args, description=description, example=example)
    return 0


def demo(args: list[str]) -> int:
    """Train the embedded student."""
    _call("opd.cli.demo:demo", Demo, args, description="Watch the embedded student learn from its teacher.")
    return 0
