"""Commands that write files or start a server: rock, report, inspect, prune, serve, demo.

Each imports its implementation after parsing its flags, so that help and mistakes are reported at once.
"""

from functools import partial
from importlib import import_module

from opd.cli.parse import parse_flags
from opd.config.commands import Demo, Inspect, Prune, Report, Serve
from opd.config.rock import Rock


def _run(module: str, settings: type, description: str, args: list[str], *, example: str = "") -> int:
    """Call the function of `module` named like the command with the settings; print the path that it returns."""
    name = settings.__name__.lower()
    config = parse_flags(settings, args, prog=f"opd {name}", description=description, example=example)
    path = vars(import_module(module))[name](config)
    if settings not in (Serve, Demo):  # they write to the terminal by themselves
        print(path)
    return 0


rock = partial(
    _run,
    "opd.analysis.rock_tokens",
    Rock,
    "The frequent tokens whose KL stays large, and a control list, for `opd train ... rock-freeze`.",
    example="opd rock --student embedded:student --teacher embedded:teacher --prompts embedded:ledger",
)
report = partial(
    _run,
    "opd.analysis.report.page",
    Report,
    "Runs as one page: curves with bands over seeds, intervals, paired comparisons, alarms, configurations.",
    example="opd report outputs/opd",
)
inspect = partial(
    _run,
    "opd.analysis.report.inspect",
    Inspect,
    "Saved rollouts as one page: every token with its numbers, and what both models would rather have said.",
    example="opd inspect outputs/opd",
)
prune = partial(
    _run,
    "opd.models.prune",
    Prune,
    "A smaller model made of some layers of a model.",
    example="opd prune --model embedded:teacher --keep 0,2 --out outputs/pruned",
)
serve = partial(
    _run,
    "opd.teachers.serve.server",
    Serve,
    "A model behind HTTP: a teacher or judge for other machines, OpenAI-compatible.",
    example="opd serve embedded:teacher",
)
demo = partial(_run, "opd.cli.demo", Demo, "Watch the embedded student learn from its teacher.")
