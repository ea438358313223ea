"""Imports point one way: mathematics <- vocabulary <- edges <- program."""

import ast
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

import opd

ROOT = Path(opd.__file__).parent
FLOORS = {  # a floor imports itself and those above it in this list
    "mathematics": (
        "errors sampling types noise questions rubrics rewards against estimators divergences transforms weights "
        "judged surrogates rollouts representation terms method methods methods.* metrics exact occurrences"
    ),
    "vocabulary": "vocabulary heard kernels kernels.*",
    "edges": (
        "precision disk tensors hub prompts tokens stages tasks tasks.* engines engines.* teachers teachers.* student "
        "models collect adapters adapters.*"
    ),
    "program": (
        "config checks settings presets launch reading remote opening panel asking staging episode session bridge runs "
        "progress draws jobs background worker passes writing steps loop doctor doctor.* evaluation rescore variance "
        "prune rock report report.* inspect bench bench.* serve serve.* cli cli.* demo __main__ "
        "opd"  # opd: the package's front door, which opens on all floors
    ),
}
ORDER = tuple(FLOORS)
FOREIGN = {"mathematics": {"torch", "numpy", "jaxtyping"}, "vocabulary": {"torch", "numpy", "jaxtyping", "triton"}}


def name_of(path: Path) -> str:
    """opd/methods/vopd.py -> methods.vopd; a package's __init__ is the package; the root is opd."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "opd"


MODULES = {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}


def floor(module: str) -> str | None:
    return next((f for f, globs in FLOORS.items() if any(fnmatch(module, g) for g in globs.split())), None)


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports, wherever in the file: `from a import b` counts as a and a.b."""
    package = ("opd", *path.relative_to(ROOT).parts[:-1])
    out = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            out |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join((*package[: len(package) - node.level + 1], *filter(None, [node.module])))
            base = base if node.level else node.module
            out |= ({base} - {"opd"}) | {f"{base}.{alias.name}" for alias in node.names}
    return out


def ours(path: Path) -> set[str]:
    """The modules of this project among a file's imports."""
    names = {name.removeprefix("opd.") for name in imports(path) if name.split(".")[0] == "opd"}
    front = {"opd" for name in names if name.split(".")[0] not in MODULES}  # a name that the front door gives
    return {name for name in names if name in MODULES} | front


@pytest.mark.parametrize("module", MODULES)
def test_module_stands_on_a_floor(module):
    assert floor(module), (
        f"opd/{module.replace('.', '/')} stands on no floor: add it to FLOORS in tests/test_layers.py, on the highest "
        "floor whose rules it keeps (ARCHITECTURE.md, 'One picture')"
    )


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_up(module):
    here = ORDER.index(floor(module) or "program")
    below = {name: floor(name) for name in ours(MODULES[module]) if ORDER.index(floor(name) or "program") > here}
    assert not below, f"{module} ({ORDER[here]}) imports from a floor below: {below}"


@pytest.mark.parametrize("module", [m for m in MODULES if floor(m) in FOREIGN])
def test_upper_floors_import_no_other_library(module):
    names = {name.split(".")[0] for name in imports(MODULES[module])} - {"opd"}
    foreign = names - sys.stdlib_module_names - FOREIGN[floor(module)]
    assert not foreign, f"{module} ({floor(module)}) imports {foreign}; its floor has {FOREIGN[floor(module)]}"


def test_the_reader_of_imports(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "methods").mkdir()
    path = tmp_path / "methods" / "some.py"
    path.write_text("import a.b, c\nfrom d import e\ndef f():\n    from ..types import Batch\n    from . import vopd\n")
    assert imports(path) == {"a.b", "c", "d", "d.e", "opd.types", "opd.types.Batch", "opd.methods", "opd.methods.vopd"}
