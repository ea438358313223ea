"""The classes that a method prints with, by name: what `method.txt` of a run folder is read back through."""

import importlib
import pkgutil

import opd.losses
import opd.methods


def constructors() -> dict[str, type]:
    """Return every public class of `opd.losses` and `opd.methods` by its name: all that `repr(method)` uses."""
    return {
        name: value
        for package in (opd.losses, opd.methods)
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
        for name, value in vars(importlib.import_module(module.name)).items()
        if isinstance(value, type) and value.__module__ == module.name and not name.startswith("_")
    }
