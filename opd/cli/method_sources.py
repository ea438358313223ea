"""The listed methods as their source files define them: names, flags and docstrings.

The files are parsed and not imported, because importing torch takes longer than all else that an answer needs.
"""

import ast
from collections.abc import Iterable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from opd.cli.parse import flag_name, unknown_flag
from opd.core.errors import Refusal, suggestion


@cache
def listing() -> dict[str, ast.FunctionDef]:
    """Return the factory of each method in the order of `opd.methods.__all__`, as the source files define it."""
    package = find_spec("opd.methods")
    assert package is not None and package.origin is not None
    trees = {path.stem: ast.parse(path.read_text()) for path in Path(package.origin).parent.glob("*.py")}
    functions = {x.name: x for tree in trees.values() for x in tree.body if isinstance(x, ast.FunctionDef)}
    assignments = (x for x in trees["__init__"].body if isinstance(x, ast.Assign))
    (names,) = (ast.literal_eval(x.value) for x in assignments if ast.unparse(x.targets[0]) == "__all__")
    return {name.replace("_", "-"): functions[name] for name in names}


def check_name(name: str) -> None:
    """Refuse a METHOD that is not in the list and not written as module:factory."""
    if name not in listing() and ":" not in name:
        raise Refusal(f"{name}: unknown method{suggestion(name, listing())}; `opd methods` lists them")


def flag_names(name: str) -> list[str]:
    """Return the flags of a method of the list, from its source."""
    arguments = listing()[name].args
    return [flag_name(argument.arg) for argument in (*arguments.args, *arguments.kwonlyargs)]


def check_flags(name: str, words: Iterable[str], run_flags: Iterable[str]) -> None:
    """Refuse a flag that a listed method does not have; `run_flags` are also suggested for misspelt flags."""
    if name not in listing():  # module:factory
        return
    flags = flag_names(name)
    accepted = {"--help", *flags, *(flag.replace("--", "--no-", 1) for flag in flags)}
    for word in words:
        if word[:2] == "--" and word[2:3].isalpha() and flag_name(word[2:].partition("=")[0]) not in accepted:
            raise unknown_flag(word, [*flags, *run_flags], prog=f"opd train {name}")


def summary(docstring: str) -> tuple[str, str]:
    """Return the first sentence of a docstring, and what follows it in its first paragraph: the source."""
    what, _, where = docstring.split("\n\n")[0].replace("\n", " ").partition(".  ")
    return what + ".", where
