"""Commands that make something: rock, report, inspect, prune, serve, demo.

Each imports what it runs after its flags are read, so that help and mistakes are answered at once.
"""

from opd.cli.parse import parsed


def rock(args: list[str]) -> int:
    """Write the list of rock tokens."""
    from opd.config.commands import Rock

    config = parsed(
        Rock,
        args,
        prog="opd rock",
        description="The frequent tokens whose KL stays large, and a control list, for `opd train ... rock-freeze`.",
        example="opd rock --student embedded:student --teacher embedded:teacher --prompts embedded:ledger",
    )
    from opd.analysis.rock_tokens import rock

    print(rock(config))
    return 0


def report(args: list[str]) -> int:
    """Write runs as one page."""
    from opd.config.commands import Report

    config = parsed(
        Report,
        args,
        prog="opd report",
        description="Runs as one page: curves with bands over seeds, intervals, paired comparisons, alarms, "
        "configurations.",
        example="opd report outputs/opd",
    )
    from opd.analysis.report.page import report

    print(report(config))
    return 0


def inspect(args: list[str]) -> int:
    """Write saved rollouts as one page."""
    from opd.config.commands import Inspect

    config = parsed(
        Inspect,
        args,
        prog="opd inspect",
        description="Saved rollouts as one page: every token with its numbers, and what both models would rather have "
        "said.",
        example="opd inspect outputs/opd",
    )
    from opd.analysis.report.inspect import inspect

    print(inspect(config))
    return 0


def prune(args: list[str]) -> int:
    """Write a smaller model."""
    from opd.config.commands import Prune

    config = parsed(
        Prune,
        args,
        prog="opd prune",
        description="A smaller model made of some layers of a model.",
        example="opd prune --model embedded:teacher --keep 0,2 --out outputs/pruned",
    )
    from opd.models.prune import prune

    print(prune(config))
    return 0


def serve(args: list[str]) -> int:
    """Serve a model over HTTP until the process is stopped."""
    from opd.config.commands import Serve

    config = parsed(
        Serve,
        args,
        prog="opd serve",
        description="A model behind HTTP: a teacher or judge for other machines, OpenAI-compatible.",
        example="opd serve embedded:teacher",
    )
    from opd.teachers.serve.server import serve

    serve(config)
    return 0


def demo(args: list[str]) -> int:
    """Train the embedded student."""
    from opd.config.commands import Demo

    config = parsed(Demo, args, prog="opd demo", description="Watch the embedded student learn from its teacher.")
    from opd.cli.demo import demo

    demo(config)
    return 0
