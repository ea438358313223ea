"""`opd methods`: the list of all methods, or one of them explained.

The list is read from the source files.  The rest imports torch, and is imported when an explanation is asked for.
"""

import ast
import inspect
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from json import dumps
from typing import Any

import tyro
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from opd.cli.method_sources import check_name, listing, summary
from opd.cli.parse import parse_flags
from opd.config.presets import arguments, settings, spelled


@dataclass(frozen=True, kw_only=True)
class _MethodsFlags:
    name: tyro.conf.Positional[str] = ""
    """One method, explained."""
    json: bool = False
    """Print as json."""


def methods(args: list[str]) -> int:
    """Print the list of all methods, the explanation of one as text, or either as json."""
    flags = parse_flags(_MethodsFlags, args, prog="opd methods", description="List the methods, or explain one.")
    if flags.name:
        check_name(flags.name)
    console = Console()
    if flags.json:
        print(dumps(_explained(flags.name) if flags.name else [*map(_explained, listing())], indent=2))
    elif flags.name:
        for head, lines in _page(_explained(flags.name)):
            console.print(f"[bold]{head}[/bold]", highlight=False)
            for line in lines:
                console.print(Padding(Text(line), (0, 0, 0, 2)))
    else:
        table = Table("method", "what", "source", box=None, pad_edge=False)
        for name, factory in listing().items():
            what, source = summary(inspect.cleandoc(ast.get_docstring(factory) or ""))
            table.add_row(Text(name, "bold"), Text(what), Text(source))
        console.print(table)
    return 0


def _explained(name: str) -> dict[str, Any]:
    """Return all that is known of a method, as it goes into json."""
    from opd.cli.method_names import factory_of, method_of

    factory, method = factory_of(name), method_of(name, [])
    document = inspect.getdoc(factory) or ""
    what, source = summary(document)
    presets = {
        p: {k: str(v) for k, v in settings(p, name).items()} | {"METHOD": shlex.join([name, *arguments(p, name)])}
        for p in ("paper", "embedded")
        if spelled(p, name)
    }
    return {
        "name": name,
        "what": what,
        "source": source,
        "value": repr(method),
        "defaults": {p.name: p.default for p in inspect.signature(factory).parameters.values()},
        "arguments": document.split("Args:\n")[1] if "Args:" in document else "",
        "token_local": method.local(),
        "reads": sorted(method.rollout_columns()),
        "presets": presets,
    }


def _page(row: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """Yield the sections of a method's explanation as (title, lines)."""
    name, defaults, flag_helps = row["name"], row["defaults"], argument_helps(row["arguments"])
    yield name, [row["what"], *filter(None, [row["source"]])]
    if flag_helps:
        default = lambda flag: defaults[flag] if defaults[flag] not in ("", ()) else "none"
        flags = [f"--{flag.replace('_', '-')} ({default(flag)})  {text}" for flag, text in flag_helps.items()]
        yield "flags, with their defaults", flags
    for preset in row["presets"]:
        yield f"--preset {preset} is", [f"{spelled(preset, name)} {shlex.join([name, *arguments(preset, name)])}"]
    local = (
        "each position is scored alone" if row["token_local"] else "a pass without gradient measures the batch first"
    )
    yield "reads", [f"{', '.join(row['reads'])}; {local}"]
    yield "as code", [row["value"]]
    if name in listing():
        yield "more", [f"the loss and its parts: docs/methods.md#{name}"]


def argument_helps(arguments: str) -> dict[str, str]:
    """Return the explanations in the "Args:" section of a docstring, by the name of the argument."""
    help_by_name: dict[str, str] = {}
    for line in arguments.splitlines():
        if new := re.match(r"    (\w+): (.*)", line):
            name, help_by_name[new[1]] = new[1], new[2]
        elif line.strip():
            help_by_name[name] += " " + line.strip()
    return help_by_name
