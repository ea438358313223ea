"""Parsing of methods on the command line: `NAME`, `module:factory`, `NAME:weight`, `NAME:flag=value`."""

import importlib
import inspect
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace

from opd.cli.method_sources import check_name
from opd.cli.parse import parse_flags
from opd.core.errors import Refusal
from opd.methods import METHODS
from opd.methods.method import Method
from opd.methods.rollout_policies.on_policy import OnPolicy

SECOND_METHOD = {name: f"a run has one METHOD; add its terms by --also {name}:WEIGHT" for name in METHODS}


def method_of(name: str, flags: list[str], run_flags: Iterable[str] = ()) -> Method:
    """Return the method of this name with its flags; `run_flags` are also suggested for misspelt flags."""
    factory = factory_of(name)
    text = (inspect.getdoc(factory) or "").split("\n\nArgs:")[0]
    prog = f"opd train {name}"
    try:
        method = parse_flags(factory, flags, prog=prog, description=text, other_flags=run_flags, strays=SECOND_METHOD)
    except Refusal:
        raise
    except ValueError as error:
        raise Refusal(f"METHOD {name}: {error}") from error
    if not isinstance(method, Method):
        raise Refusal(f"{name}: the factory returned a {type(method).__name__}, not an opd.Method")
    return method


def factory_of(name: str) -> Callable[..., Method]:
    """Return the factory of a listed method, or import that of a name written as module:factory."""
    if name in METHODS:
        return METHODS[name]
    check_name(name)
    module, _, attribute = name.partition(":")
    sys.path.insert(0, "")  # finds a factory in the working folder
    try:
        factory = vars(importlib.import_module(module))[attribute]
    except ImportError as error:
        raise Refusal(f"{name}: {error}; METHOD as module:factory needs a module on the Python path") from error
    except KeyError:
        raise Refusal(f"{name}: the module {module} has no {attribute}") from None
    except Exception as error:  # code of the user
        raise Refusal(f"{name}: the module {module} cannot be imported: {error!r}; correct it") from error
    if not callable(factory) or inspect.signature(factory).return_annotation not in (Method, "Method", "opd.Method"):
        raise Refusal(f"{name}: must be a function annotated to return an opd.Method")
    return factory


def add_terms(method: Method, text: str) -> Method:
    """Return the method with the terms of another method, which `text` names with its weight."""
    name, colon, weight = text.rpartition(":")
    try:
        coef = float(weight)
    except ValueError:
        raise Refusal(f"--also {text}: write NAME:weight, such as gkd-forward:0.1") from None
    if not colon or not coef > 0:
        raise Refusal(f"--also {text}: write NAME:weight with a weight above 0, such as gkd-forward:0.1")
    name, *flags = name.split() or [""]
    added = method_of(name, flags)
    if added.rollouts not in (method.rollouts, OnPolicy()):
        raise Refusal(f"--also {text}: its rollouts are {added.rollouts}, the method's {method.rollouts}")
    if added.asks is not None:
        raise Refusal(
            f"--also {text}: it asks a teacher for texts ({added.asks}), as a run does or not: name it METHOD"
        )
    if added.filters:
        raise Refusal(f"--also {text}: it leaves out rollouts ({added.filters}), which would be the whole method's")
    try:
        return replace(method, terms=(*method.terms, *(replace(t, coef=t.coef * coef) for t in added.terms)))
    except ValueError as error:
        raise Refusal(f"--also {text}: {error}") from error


def parse_methods(text: str) -> dict[str, Method]:
    """Return the methods that --methods lists: NAME, or NAME:flag=value:flag, separated by commas."""
    out: dict[str, Method] = {}
    for word in filter(None, (w.strip() for w in text.split(","))):
        if word in out:
            raise Refusal(f"--methods {word}: named twice")
        first, *flags = word.split(":")
        if flags and first not in METHODS and "=" not in flags[0]:  # module:factory
            first, flags = f"{first}:{flags[0]}", flags[1:]
        out[word] = method_of(first, [f"--{flag}" for flag in flags])
    if not out:
        raise Refusal(f"--methods {text}: names no method; write vopd,vopd-topk:k=1, say")
    return out
