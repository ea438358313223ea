"""`opd methods`: the list of all methods, or one of them explained."""

import ast
import inspect
from dataclasses import dataclass

import tyro

from opd.cli.method_sources import check_name, listing, summary
from opd.cli.parse import parse_flags


@dataclass(frozen=True, kw_only=True)
class _MethodsFlags:
    name: tyro.conf.Positional[str] = ""
    """One method, explained."""
    json: bool = False
    """Print as json."""


def methods(args: list[str]) -> int:
    """Print all methods, or the explanation of one."""
    flags = parse_flags(_MethodsFlags, args, prog="opd methods", description="List the methods, or explain one.")
    docstrings = {name: inspect.cleandoc(ast.get_docstring(factory) or "") for name, factory in listing().items()}
    if flags.name:
        check_name(flags.name)
    if flags.name or flags.json:
        from opd.cli.explain import explain_methods

        return explain_methods([flags.name] if flags.name else list(docstrings), json=flags.json)
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("method", "what", "source", box=None, pad_edge=False)
    for name, docstring in docstrings.items():
        what, source = summary(docstring)
        table.add_row(Text(name, "bold"), Text(what), Text(source))
    Console().print(table)
    return 0
