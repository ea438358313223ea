"""Methods as the command line names them: `NAME`, `module:factory`, `NAME:weight`, `NAME:flag=value`."""

import importlib
import inspect
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace

from opd.cli.methods import check_name
from opd.cli.parse import parsed
from opd.core.errors import Refusal
from opd.methods import METHODS
from opd.methods.method import Method
from opd.methods.rollout_policies.on_policy import OnPolicy

SECOND = {name: f"a run has one METHOD; add its terms by --also {name}:WEIGHT" for name in METHODS}


def method_of(name: str, flags: list[str], run_flags: Iterable[str] = ()) -> Method:
    """Return the method of that name with its flags; `run_flags` are suggested, too, for misspelt ones."""
    factory = factory_of(name)
    documented = (inspect.getdoc(factory) or "").split("\n\nArgs:")[0]
    try:
        method = parsed(
            factory, flags, prog=f"opd train {name}", description=documented, others=run_flags, strays=SECOND
        )
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
    sys.path.insert(0, "")  # a factory in the folder one works in
    try:
        factory = vars(importlib.import_module(module))[attribute]
    except ImportError as error:
        raise Refusal(f"{name}: {error}; METHOD as module:factory needs a module on the Python path") from error
    except KeyError:
        raise Refusal(f"{name}: the module {module} has no {attribute}") from None
    if inspect.signature(factory).return_annotation not in (Method, "Method", "opd.Method"):
        raise Refusal(f"{name}: must be a function annotated to return an opd.Method")
    return factory


def plus(method: Method, other: str) -> Method:
    """The method with the terms of another, at a weight."""
    name, colon, weight = other.rpartition(":")
    try:
        coef = float(weight)
    except ValueError:
        raise Refusal(f"--also {other}: write NAME:weight, such as gkd-forward:0.1") from None
    if not colon or not coef > 0:
        raise Refusal(f"--also {other}: write NAME:weight with a weight above 0, such as gkd-forward:0.1")
    name, *flags = name.split() or [""]
    more = method_of(name, flags)
    if more.rollouts not in (method.rollouts, OnPolicy()):
        raise Refusal(f"--also {other}: its rollouts are {more.rollouts}, the method's {method.rollouts}")
    if more.asks is not None:
        raise Refusal(
            f"--also {other}: it asks a teacher for texts ({more.asks}), as a run does or not: name it METHOD"
        )
    if more.filters:
        raise Refusal(f"--also {other}: it leaves out rollouts ({more.filters}), which would be the whole method's")
    try:
        return replace(method, terms=(*method.terms, *(replace(t, coef=t.coef * coef) for t in more.terms)))
    except ValueError as error:
        raise Refusal(f"--also {other}: {error}") from error


def several(text: str) -> dict[str, Method]:
    """Methods as --methods lists them: NAME, or NAME:flag=value:flag, separated by commas."""
    out: dict[str, Method] = {}
    for word in filter(None, (w.strip() for w in text.split(","))):
        if word in out:
            raise Refusal(f"--methods {word}: named twice")
        first, *rest = word.split(":")
        if rest and first not in METHODS and "=" not in rest[0]:  # module:factory
            first, rest = f"{first}:{rest[0]}", rest[1:]
        pairs = (part.partition("=") for part in rest)
        out[word] = method_of(
            first, [x for key, is_, value in pairs for x in ((f"--{key}", value) if is_ else (f"--{key}",))]
        )
    if not out:
        raise Refusal(f"--methods {text}: names no method; write vopd,vopd-topk:k=1, say")
    return out
