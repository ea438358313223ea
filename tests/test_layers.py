"""Imports point one way: a file imports its own package and those before it in ORDER, never a later one."""

import ast
import sys
from pathlib import Path

import pytest

import opd
from opd import methods

ROOT = Path(opd.__file__).parent
ORDER = [
    "core",
    "losses",
    "methods",
    "config",
    "head",
    "data",
    "models",
    "rollouts",
    "teachers",
    "training",
    "analysis",
    "cli",
    "adapters",
]
FILES = [path for path in sorted(ROOT.rglob("*.py")) if path.parent != ROOT]
LIBRARIES = {"torch", "numpy", "jaxtyping"}  # all that the mathematics knows of the outside


def imports(path: Path) -> set[str]:
    """Return the dotted names that a file imports, anywhere in it: `from a import b` gives a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: write absolute imports"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_the_packages_are_those_of_the_order():
    packages = {path.name for path in ROOT.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert packages == set(ORDER)
    assert {path.name for path in ROOT.glob("*.*")} <= {"__init__.py", "__main__.py", "py.typed"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    package = path.relative_to(ROOT).parts[0]
    ours = {name.split(".")[1] for name in imports(path) if name.startswith("opd.")}
    later = ours - set(ORDER[: ORDER.index(package) + 1])
    assert not later, f"{path.relative_to(ROOT)} imports from {later}: only from {ORDER[: ORDER.index(package) + 1]}"


@pytest.mark.parametrize("path", [p for p in FILES if p.relative_to(ROOT).parts[0] in ("losses", "methods")], ids=str)
def test_the_mathematics_imports_no_other_library(path):
    foreign = {name.split(".")[0] for name in imports(path)} - sys.stdlib_module_names - LIBRARIES - {"opd"}
    assert not foreign, f"{path.relative_to(ROOT)} imports {foreign}: the mathematics has {sorted(LIBRARIES)}"


def test_the_reader_of_imports(tmp_path):
    path = tmp_path / "some.py"
    path.write_text("import a.b, c\nfrom d import e\ndef f():\n    from opd.core.types import Batch\n")
    assert imports(path) == {"a.b", "c", "d.e", "opd.core.types.Batch"}


def test_type_checkers_see_the_public_names():
    tree = ast.parse((ROOT / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    found = [(node.module, alias) for node in block.body for alias in node.names]
    assert [module for module, alias in found if alias.name == "*"] == ["opd.methods"]
    names = {alias.asname for _, alias in found if alias.name != "*"} | {*methods.__all__}
    assert names == {*dir(opd)} and all(getattr(opd, name) is not None for name in names)
