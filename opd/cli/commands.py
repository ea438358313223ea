"""Commands that make something: rock, report, inspect, prune, serve, bench, demo."""

from opd.cli.flags import near, parsed
from opd.types import Refusal


def rock(args: list[str]) -> int:
    """The list of rock tokens."""
    from opd.rock import Rock, rock

    config = parsed(
        Rock,
        args,
        prog="opd rock",
        description="The frequent tokens whose KL stays large, and a control list, for `opd train ... rock-freeze`.",
    )
    print(rock(config))
    return 0


def report(args: list[str]) -> int:
    """Runs as one page."""
    from opd.report.page import Report, report

    about = "Runs as one page: curves with bands over seeds, intervals, paired comparisons, alarms, configurations."
    print(report(parsed(Report, args, prog="opd report", description=about)))
    return 0


def inspect(args: list[str]) -> int:
    """Saved rollouts as one page."""
    from opd.report.tokens import Inspect
    from opd.report.tokens import inspect as shown

    about = "Saved rollouts as one page: every token with its numbers, and what both models would rather have said."
    print(shown(parsed(Inspect, args, prog="opd inspect", description=about)))
    return 0


def prune(args: list[str]) -> int:
    """A smaller model."""
    from opd.prune import Prune, prune

    print(prune(parsed(Prune, args, prog="opd prune", description="A smaller model made of some layers of a model.")))
    return 0


def serve(args: list[str]) -> int:
    """A model behind HTTP, until it is stopped."""
    from opd.serve.server import Serve, serve

    about = "A model behind HTTP: a teacher or judge for other machines, OpenAI-compatible."
    serve(parsed(Serve, args, prog="opd serve", description=about))
    return 0


def bench(args: list[str]) -> int:
    """One part of the benchmark."""
    from opd.bench.command import PARTS, bench

    name, *rest = args or ["--help"]
    if name in ("-h", "--help"):
        print("usage: opd bench PART [flags]\n")
        print("\n".join(f"  {part:9} {about}" for part, (_, about) in PARTS.items()))
        return 0
    if name not in PARTS:
        raise Refusal(f"{name}: no part of the benchmark{near(name, list(PARTS))}; there are {', '.join(PARTS)}")
    kind, about = PARTS[name]
    bench(parsed(kind, rest, prog=f"opd bench {name}", description=about))
    return 0


def demo(args: list[str]) -> int:
    """The embedded student learns."""
    from opd.demo import Demo, demo

    demo(parsed(Demo, args, prog="opd demo", description="Watch the embedded student learn from its teacher."))
    return 0
