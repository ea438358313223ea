"""Explanation of a method (`opd methods NAME`), or of all methods as json (`opd methods --json`)."""

import inspect
import re
from collections.abc import Iterator, Mapping
from json import dumps
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from opd.cli.method_names import factory_of, method_of
from opd.cli.method_sources import summary
from opd.config.presets import arguments, settings, spelled
from opd.methods import METHODS


def explain_methods(names: list[str], *, json: bool) -> int:
    """Print the explanation of one method as text, or of some methods as json."""
    rows = [_explained(name) for name in names]
    if json:
        print(dumps(rows[0] if len(names) == 1 else rows, indent=2))
        return 0
    console = Console()
    for head, lines in _page(rows[0]):
        console.print(f"[bold]{head}[/bold]", highlight=False)
        for line in lines:
            console.print(Padding(Text(line), (0, 0, 0, 2)))
    return 0


def _page(row: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """Yield the sections of a method's explanation as (title, lines)."""
    name, flag_helps = row["name"], argument_helps(inspect.getdoc(factory_of(row["name"])) or "")
    yield name, [row["what"], *filter(None, [row["source"]])]
    if flag_helps:
        default = lambda flag: row["defaults"][flag] if row["defaults"][flag] not in ("", ()) else "none"
        flags = [f"--{flag.replace('_', '-')} ({default(flag)})  {text}" for flag, text in flag_helps.items()]
        yield "flags, with their defaults", flags
    for preset in ("paper", "embedded"):
        if spelled(preset, name):
            yield f"--preset {preset} is", [" ".join([spelled(preset, name), name, *arguments(preset, name)])]
    local = (
        "each position is scored alone" if row["token_local"] else "a pass without gradient measures the batch first"
    )
    yield "reads", [f"{', '.join(row['reads'])}; {local}"]
    yield "as code", [row["value"]]
    if name in METHODS:
        yield "more", [f"the loss and its parts: docs/methods.md#{name}"]


def argument_helps(text: str) -> dict[str, str]:
    """Return the explanations of the arguments in a docstring, by name."""
    help_by_name: dict[str, str] = {}
    for line in text.partition("Args:\n")[2].splitlines():
        if new := re.match(r"    (\w+): (.*)", line):
            name, help_by_name[new[1]] = new[1], new[2]
        elif line.strip():
            help_by_name[name] += " " + line.strip()
    return help_by_name


def _explained(name: str) -> dict[str, object]:
    factory = factory_of(name)
    method = method_of(name, [])
    document = inspect.getdoc(factory) or ""
    presets = {
        p: {k: str(v) for k, v in settings(p, name).items()} | {"METHOD": " ".join([name, *arguments(p, name)])}
        for p in ("paper", "embedded")
        if spelled(p, name)
    }
    return {
        "name": name,
        "what": summary(document)[0],
        "source": summary(document)[1],
        "value": repr(method),
        "defaults": {p.name: p.default for p in inspect.signature(factory).parameters.values()},
        "arguments": document.split("Args:\n")[1] if "Args:" in document else "",
        "token_local": method.local(),
        "reads": sorted(method.reads()),
        "presets": presets,
    }
