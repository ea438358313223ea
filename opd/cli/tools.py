"""Commands that write files or start a server: report, inspect, export, prune, serve, demo.

Each imports its implementation after parsing its flags, so that help and mistakes are reported at once.
"""

from functools import partial
from importlib import import_module

from opd.cli.parse import parse_flags
from opd.config.commands import Demo, Export, Inspect, Prune, Report, Serve


def _run(settings: type, module: str, example: str, args: list[str]) -> int:
    """Call the function of `module` that has the command's name, and print the path that it returns.

    The docstring of the settings describes the command in its help.
    """
    name = settings.__name__.lower()
    config = parse_flags(
        settings, args, prog=f"opd {name}", description=settings.__doc__ or "", example=f"opd {name} {example}"
    )
    path = vars(import_module(module))[name](config)
    if settings not in (Serve, Demo):  # they write to the terminal by themselves
        print(path)
    return 0


report = partial(_run, Report, "opd.analysis.report.page", "outputs/opd")
inspect = partial(_run, Inspect, "opd.analysis.report.inspect", "outputs/opd")
export = partial(_run, Export, "opd.training.export", "outputs/opd --out outputs/model")
prune = partial(_run, Prune, "opd.models.prune", "--model embedded:teacher --keep 0,2 --out outputs/pruned")
serve = partial(_run, Serve, "opd.teachers.serve.server", "embedded:teacher")
demo = partial(_run, Demo, "opd.cli.demo", "")
