"""`opd methods`: all methods, or one explained.

The list comes from the source files, without importing them: what is imported of torch takes longer than all the rest.
"""

import ast
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import tyro

from opd.cli.flags import near, parsed
from opd.errors import Refusal


@dataclass(frozen=True, kw_only=True)
class _MethodsFlags:
    name: tyro.conf.Positional[str] = ""
    """One method, explained."""
    json: bool = False
    """Print as json."""


def methods(args: list[str]) -> int:
    """Print all methods, or one explained."""
    flags = parsed(_MethodsFlags, args, prog="opd methods", description="List the methods, or explain one.")
    docstrings = dict(listing())
    if flags.name and flags.name not in docstrings and ":" not in flags.name:
        near_name = near(flags.name, docstrings)
        raise Refusal(f"{flags.name}: unknown method{near_name}; there are {', '.join(docstrings)}")
    if flags.name or flags.json:
        from opd.cli.tables import explain_methods

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


def listing() -> Iterator[tuple[str, str]]:
    """Yield the name and docstring of each method in the order of `opd.methods.FACTORIES`, from the source files."""
    package = find_spec("opd.methods")
    assert package is not None and package.origin is not None
    tree = ast.parse(Path(package.origin).read_text())
    modules = {
        alias.name: node.module
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    (factories,) = (
        node.value.elts
        for node in tree.body
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.value, ast.Tuple)
        and ast.unparse(node.target) == "FACTORIES"
    )
    sources: dict[str, ast.Module] = {}
    for factory in map(ast.unparse, factories):
        module = modules[factory]
        if module not in sources:
            path = Path(package.origin).with_name(module.rpartition(".")[2] + ".py")
            sources[module] = ast.parse(path.read_text())
        (function,) = (x for x in sources[module].body if isinstance(x, ast.FunctionDef) and x.name == factory)
        yield factory.replace("_", "-"), inspect.cleandoc(ast.get_docstring(function) or "")


def summary(docstring: str) -> tuple[str, str]:
    """Return the first sentence of a docstring, and what follows it in its first paragraph: the source."""
    what, _, where = docstring.split("\n\n")[0].replace("\n", " ").partition(".  ")
    return what + ".", where
