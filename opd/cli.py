"""The command line: a function for each command; `USAGE` lists them."""

import contextlib
import difflib
import importlib
import inspect
import io
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from opd.config import Evaluate, Train
from opd.exact import Size
from opd.method import Method
from opd.methods import METHODS
from opd.presets import arguments, settings
from opd.rollouts import OnPolicy
from opd.tasks.task import Data
from opd.types import Refusal, Sampling

USAGE = """usage: opd COMMAND ...

  opd train --student S --teacher T --prompts P [run flags] METHOD [method flags]
  opd doctor --student S --teacher T --prompts P [run flags] METHOD [method flags] [--json]
  opd eval --model M --prompts P [flags]
  opd methods [NAME] [--json]
  opd exact [METHOD [method flags] | --methods A,B,...] [--json]
  opd variance --student S --teacher T --prompts P [--methods A,B,...] [--json]
  opd rock --student S --teacher T --prompts P --out FILE
  opd report RUN [RUN...] [--out report.html] [--static DIR]
  opd inspect RUN [--step N] [--out inspect.html]
  opd rescore RUN --method NAME [--method NAME ...] [--step N] [--json]
  opd prune --model M --keep LAYERS --out DIR
  opd serve MODEL [flags]
  opd bench head|step|rollouts|growth|all [flags]
  opd demo
  opd --version

`opd COMMAND --help` explains the flags; `opd train METHOD --help` those of a method."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 when done, 2 when the user has something to mend (one line says what)."""
    args = list(sys.argv[1:] if arguments is None else arguments)
    commands: dict[str, Callable[[list[str]], int]] = {
        "train": _train,
        "doctor": _doctor,
        "eval": _eval,
        "methods": _methods,
        "exact": _exact,
        "variance": _variance,
        "rock": _rock,
        "report": _report,
        "inspect": _inspect,
        "rescore": _rescore,
        "prune": _prune,
        "serve": _serve,
        "bench": _bench,
        "demo": _demo,
    }
    try:
        match args:
            case [] | ["-h" | "--help"]:
                print(USAGE)
                return 0
            case ["--version"]:
                print(f"opd {version('opd')}")
                return 0
            case [name, *rest] if name in commands:
                return commands[name](rest)
            case [name, *_]:
                raise Refusal(f"{name}: unknown command{_near(name, list(commands))}; there are {', '.join(commands)}")
    except Refusal as error:
        print(f"opd: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("opd: stopped; what was saved is whole", file=sys.stderr)
        return 130
    return 0


def _parsed(what: Any, args: list[str], **options: Any) -> Any:
    """tyro's reading of the flags; its boxes for mistakes become one line."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(what, args=args, **options)
    except SystemExit as stop:
        if not stop.code:
            raise  # help was asked for, and printed
        text = re.sub(r"[─-╿]+", " ", said.getvalue())
        lines = [" ".join(line.split()) for line in text.splitlines()]
        told = [x for x in lines if x and not set(x) <= set("-") and not x.startswith("For full helptext")]
        missing = [x.split()[0] for x in told if x.startswith("--")]
        if told[0] == "Required options":
            raise Refusal(
                f"{', '.join(missing)} must be given; `{options['prog']} --help` explains the flags"
            ) from None
        if "Argument helptext:" in told:
            told = told[1 : told.index("Argument helptext:")]
        raise Refusal(" ".join(told).removeprefix("Error parsing ")) from None


@dataclass(frozen=True, kw_only=True)
class _TrainFlags:
    preset: Literal["none", "paper", "embedded"] = "none"
    """Start from settings of a name: paper (the method's publication), embedded (tuned on the embedded pair)."""
    also: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME:weight of another method whose terms are added, "NAME FLAGS:weight" with flags of it; repeat for more."""
    json: bool = False
    """Print each line of metrics.jsonl as it is written, for machines; what is for people goes to stderr."""
    run: Train


@dataclass(frozen=True, kw_only=True)
class _DoctorFlags(_TrainFlags):
    json: bool = False
    """Print as json."""


def _train(args: list[str]) -> int:
    flags = _run(args, _TrainFlags, "opd train", "Distil a student from a teacher on the student's own samples:")
    from opd.loop import train  # after parsing: help and mistakes answer at once

    if flags.json:
        train(flags.run, lambda row: print(json.dumps(row), flush=True))
    else:
        print(train(flags.run))
    return 0


def _doctor(args: list[str]) -> int:
    about = "What would go wrong in a run, before it: the flags are those of opd train, nothing is written."
    flags = _run(args, _DoctorFlags, "opd doctor", about)
    from opd.doctor.command import doctor
    from opd.doctor.findings import errors, show

    found = doctor(flags.run)
    if flags.json:
        print(json.dumps([asdict(f) for f in found], indent=2))
    else:
        show(found, Console())
    return 2 if errors(found) else 0


def _run(args: list[str], kind: type[_TrainFlags], prog: str, about: str) -> Any:
    """The flags of a run and its METHOD, read as `kind`."""
    asked = next((a for a in args if a in METHODS), None)
    if asked and {"-h", "--help"} & set(args[args.index(asked) :]):
        _method(asked, ["--help"])
    parse = lambda **default: _parsed(
        kind,
        args,
        prog=prog,
        description=f"{about}\n"
        f"{prog} --student S --teacher T --prompts P [run flags] METHOD [method flags]\n\n"
        f"METHOD is {', '.join(METHODS)}, or module:factory for your own. "
        "`opd methods` explains them, `opd train METHOD --help` lists a method's flags.",
        return_unknown_args=True,
        config=(tyro.conf.OmitArgPrefixes,),
        **default,
    )
    flags, left = parse()
    if not left:
        raise Refusal(f"METHOD is missing: name one of {', '.join(METHODS)}, or module:factory")
    name, *rest = left
    method = _method(name, [*arguments(flags.preset, name), *rest])
    for other in flags.also:
        method = _plus(method, other)
    if flags.preset != "none":
        run = replace(flags.run, **settings(flags.preset, name))
        flags, _ = parse(default=replace(flags, run=run))  # a second reading: what the user set wins
    return replace(flags, run=replace(flags.run, method=method))


def _method(name: str, flags: list[str]) -> Method:
    """The method of that name with its flags."""
    factory = METHODS[name] if name in METHODS else _imported(name)
    documented = inspect.getdoc(factory) or ""
    try:
        method = _parsed(factory, flags, prog=f"opd train {name}", description=documented.split("\n\nArgs:")[0])
    except ValueError as error:
        raise Refusal(f"METHOD {name}: {error}") from error
    if not isinstance(method, Method):
        raise Refusal(f"{name}: the factory returned a {type(method).__name__}, not an opd.Method")
    return method


def _imported(name: str) -> Callable[..., Method]:
    module, colon, attribute = name.partition(":")
    if name.startswith("-"):
        flags = [f"--{f.name.replace('_', '-')}" for kind in (Train, Data, Sampling) for f in fields(kind)]
        raise Refusal(f"{name}: unknown flag{_near(name.partition('=')[0], flags)}; `opd train --help` lists them")
    if not colon:
        raise Refusal(f"{name}: unknown method{_near(name, list(METHODS))}; `opd methods` lists them")
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


def _plus(method: Method, other: str) -> Method:
    """The method with the terms of another, at a weight."""
    name, colon, weight = other.rpartition(":")
    try:
        coef = float(weight)
    except ValueError:
        raise Refusal(f"--also {other}: write NAME:weight, such as gkd-forward:0.1") from None
    if not colon or not coef > 0:
        raise Refusal(f"--also {other}: write NAME:weight with a weight above 0, such as gkd-forward:0.1")
    name, *flags = name.split() or [""]
    more = _method(name, flags)
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


def _several(text: str) -> dict[str, Method]:
    """Methods as --methods lists them: NAME, or NAME:flag=value:flag, separated by commas."""
    out: dict[str, Method] = {}
    for word in filter(None, (w.strip() for w in text.split(","))):
        if word in out:
            raise Refusal(f"--methods {word}: named twice")
        first, *rest = word.split(":")
        if rest and first not in METHODS and "=" not in rest[0]:  # module:factory
            first, rest = f"{first}:{rest[0]}", rest[1:]
        pairs = (part.partition("=") for part in rest)
        out[word] = _method(
            first, [x for key, is_, value in pairs for x in ((f"--{key}", value) if is_ else (f"--{key}",))]
        )
    if not out:
        raise Refusal(f"--methods {text}: names no method; write vopd,vopd-topk:k=1, say")
    return out


def _near(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, 1)
    return f" (did you mean {close[0]}?)" if close else ""


def _summary(factory: Callable[..., Method]) -> tuple[str, str]:
    """The first sentence of a docstring, and what follows it in its first paragraph: the source."""
    what, _, where = (inspect.getdoc(factory) or "").split("\n\n")[0].replace("\n", " ").partition(".  ")
    return what + ".", where


@dataclass(frozen=True, kw_only=True)
class _EvalFlags:
    json: bool = False
    """Print as json."""
    what: Evaluate


def _eval(args: list[str]) -> int:
    flags = _parsed(
        _EvalFlags,
        args,
        prog="opd eval",
        description="Accuracy of a model on problems with a verifier: avg@k, pass@k, maj@k, with 95 % intervals over "
        "prompts; or of two models, and their difference paired by prompt.",
        config=(tyro.conf.OmitArgPrefixes,),
    )
    from opd.evaluation import evaluate, save
    from opd.report.compare import versus

    what = flags.what
    asked = {name: replace(what, model=name) for name in (what.model, what.against) if name}
    if what.against == what.model:
        raise Refusal(f"--against {what.against}: is --model itself; name another one")
    scores = {name: evaluate(config) for name, config in asked.items()}
    if what.out:
        save(what.out, scores)
    task = {"task": what.prompts, **({"set": what.set} if what.set else {})}
    tables = [{"model": name, **task, **score.table()} for name, score in scores.items()]
    paired = {name: asdict(p) for name, p in versus(*scores.items()).items()} if what.against else {}
    if flags.json:
        print(json.dumps(tables[0] if not paired else {"models": tables, "paired": paired}, indent=2))
        return 0
    shares = lambda x: f"{100 * x['value']:.1f} % [{100 * x['low']:.1f}, {100 * x['high']:.1f}]"
    told = lambda x: shares(x) if isinstance(x, dict) else f"{x:.4g}" if isinstance(x, float) else str(x)
    heads = ("", *(["value"] * len(tables)), *(["difference", "better / worse"] if paired else []))
    shown = Table(*heads, box=None, pad_edge=False)
    for name in tables[0]:
        more = paired.get(name)
        apart = (shares(more), f"{more['better']} / {more['worse']}") if more else ()
        shown.add_row(name, *(told(table[name]) for table in tables), *apart)
    Console().print(shown, markup=False, highlight=False)
    print("[ ] are 95 % intervals over prompts" + (", of the difference by a paired bootstrap" if paired else ""))
    return 0


@dataclass(frozen=True, kw_only=True)
class _ExactFlags:
    methods: str = ""
    """NAME or NAME:flag=value:flag, separated by commas; empty: all methods."""
    json: bool = False
    """Print as json."""
    what: Size


def _exact(args: list[str]) -> int:
    flags, left = _parsed(
        _ExactFlags,
        args,
        prog="opd exact",
        description="Every method in a world of enumerable sequences: its mean gradient against that of the sequence "
        "KL, and its noise.\nopd exact [flags] METHOD [method flags], or --methods, or all.",
        return_unknown_args=True,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    if left and flags.methods:
        raise Refusal(f"--methods {flags.methods} beside METHOD {left[0]}: give one of the two")
    world = flags.what.world()
    listed = {left[0]: _method(left[0], left[1:])} if left else {name: make() for name, make in METHODS.items()}
    rows = []
    for name, method in (_several(flags.methods) if flags.methods else listed).items():
        why = world.outside(method)
        note = {"note": world.note(method)} if world.note(method) else {}
        rows.append({"method": name, **({"why": why} if why else {**asdict(world.row(method)), **note})})
    if flags.json:
        print(json.dumps(rows, indent=2))
        return 0
    shown = Table("method", "cosine", "bias", "noise", box=None, pad_edge=False)
    for row in rows:
        if "why" not in row:
            shown.add_row(Text(row["method"]), *(f"{row[key]:.4g}" for key in ("cosine", "bias", "noise")))
    Console().print(shown, highlight=False)
    for row in rows:
        if "why" in row:
            print(f"{row['method']}: not here: {row['why']}")
        if "note" in row:
            print(f"{row['method']}: {row['note']}")
    return 0


def _variance(args: list[str]) -> int:
    from opd.variance import Variance, variance

    @dataclass(frozen=True, kw_only=True)
    class Flags:
        methods: str = "opd,opd-full,vopd,vopd-topk,opd-optimal,opd-stratified"
        """NAME or NAME:flag=value:flag, separated by commas."""
        json: bool = False
        """Print as json."""
        what: Variance

    flags = _parsed(
        Flags,
        args,
        prog="opd variance",
        description="How noisy the gradient of each method is on two models, at fixed contexts of the student's own.",
        config=(tyro.conf.OmitArgPrefixes,),
    )
    found = variance(flags.what, _several(flags.methods))
    if flags.json:
        print(json.dumps(asdict(found), indent=2))
        return 0
    heads = ("variance", "of opd's", "in logits", "raised", "noise", "cosine")
    shown = Table(Column("method", overflow="fold"), *heads, box=None, pad_edge=False)
    wide = lambda e: Text(f"{e.value:.4g} [{e.low:.3g}, {e.high:.3g}]")
    for name, x in found.methods.items():
        numbers = (f"{x.logits.value:.3f}", f"{x.raised:.1%}", f"{x.noise:.4g}", f"{x.cosine:.4f}")
        shown.add_row(Text(name), wide(x.variance), wide(x.ratio), *numbers)
    Console().print(shown, highlight=False)
    print(
        f"{found.contexts} contexts of {found.rollouts} rollouts, {found.parameters:,} parameters, reverse KL "
        f"{found.reverse_kl:.4g} nats; 95 % intervals over rollouts"
    )
    if found.largest > 0.2:
        print(f"one rollout holds {found.largest:.0%} of opd's variance: no interval is reliable; add --rollouts")
    return 0


def _rock(args: list[str]) -> int:
    from opd.rock import Rock, rock

    config = _parsed(
        Rock,
        args,
        prog="opd rock",
        description="The frequent tokens whose KL stays large, and a control list, for `opd train ... rock-freeze`.",
        config=(tyro.conf.OmitArgPrefixes,),
    )
    print(rock(config))
    return 0


def _report(args: list[str]) -> int:
    from opd.report.page import Report, report

    about = "Runs as one page: curves with bands over seeds, intervals, paired comparisons, alarms, configurations."
    print(report(_parsed(Report, args, prog="opd report", description=about)))
    return 0


def _inspect(args: list[str]) -> int:
    from opd.report.tokens import Inspect
    from opd.report.tokens import inspect as shown

    about = "Saved rollouts as one page: every token with its numbers, and what both models would rather have said."
    print(shown(_parsed(Inspect, args, prog="opd inspect", description=about)))
    return 0


def _rescore(args: list[str]) -> int:
    from opd.rescore import Rescore, rescore

    @dataclass(frozen=True, kw_only=True)
    class Flags:
        method: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
        """NAME or NAME:flag=value:flag; repeat for more.  None: all methods."""
        json: bool = False
        """Print as json."""
        what: Rescore

    flags = _parsed(
        Flags,
        args,
        prog="opd rescore",
        description="What other methods would have said about the saved rollouts of a run.",
        config=(tyro.conf.OmitArgPrefixes,),
    )
    asked = _several(",".join(flags.method)) if flags.method else {name: make() for name, make in METHODS.items()}
    found = rescore(flags.what, asked)
    if flags.json:
        print(json.dumps(asdict(found), indent=2))
        return 0
    heads = ("mean A", "std A", "used", "eff.", "kept", "r", "rank r", "cosine", "opposed")
    shown = Table(*(Column(head, no_wrap=True) for head in ("method", *heads)), box=None, pad_edge=False)
    for name, verdict in found.methods.items():
        like = verdict.agreement
        alike = [] if like is None else [like.pearson, like.spearman, like.cosine]
        told = [*("-" if x is None else f"{x:.2f}" for x in alike), "" if like is None else f"{like.opposed:.0%}"]
        for i, term in enumerate(verdict.terms):
            size = ("" if x is None else f"{x:.2g}" for x in (term.advantage, term.advantage_std))
            kept = f"{verdict.kept}/{found.rollouts}"
            shares = (f"{term.weighted:.0%}", f"{term.effective:.0%}")
            shown.add_row(Text("" if i else name), *size, *shares, *(() if i else (kept, *(told if like else ()))))
    print(f"{found.run}, step {found.step}: {found.rollouts} rollouts, {found.tokens} trained tokens")
    Console().print(shown, highlight=False)
    if found.beside:
        print(
            "used, eff.: share of tokens with weight, and effective share; r to opposed: weight x advantage of each "
            f"token beside that of {found.beside}"
        )
    for name, verdict in found.methods.items():
        for line in filter(None, (*verdict.lacks, verdict.note)):
            print(f"{name}: {line}")
    for name, verdict in found.methods.items() if flags.method else ():
        if verdict.agreement and verdict.agreement.tokens:
            print(f"\n{name} against {found.beside}, where they differ most (1 is a side's root mean square)")
            for x in verdict.agreement.tokens:
                text = f"{x.before}[{x.text}]{x.after}".replace("\n", "\\n")
                print(f"  {x.own:+7.2f} {x.other:+7.2f}  rollout {x.rollout}, token {x.position}: {text}")
    return 0


def _prune(args: list[str]) -> int:
    from opd.prune import Prune, prune

    print(prune(_parsed(Prune, args, prog="opd prune", description="A smaller model made of some layers of a model.")))
    return 0


def _serve(args: list[str]) -> int:
    from opd.serve.server import Serve, serve

    about = "A model behind HTTP: a teacher or judge for other machines, OpenAI-compatible."
    serve(_parsed(Serve, args, prog="opd serve", description=about))
    return 0


def _bench(args: list[str]) -> int:
    from opd.bench.command import PARTS, bench

    name, *rest = args or ["--help"]
    if name in ("-h", "--help"):
        print("usage: opd bench PART [flags]\n")
        print("\n".join(f"  {part:9} {about}" for part, (_, about) in PARTS.items()))
        return 0
    if name not in PARTS:
        raise Refusal(f"{name}: no part of the benchmark{_near(name, list(PARTS))}; there are {', '.join(PARTS)}")
    kind, about = PARTS[name]
    bench(_parsed(kind, rest, prog=f"opd bench {name}", description=about))
    return 0


def _demo(args: list[str]) -> int:
    from opd.demo import Demo, demo

    demo(_parsed(Demo, args, prog="opd demo", description="Watch the embedded student learn from its teacher."))
    return 0


@dataclass(frozen=True, kw_only=True)
class _MethodsFlags:
    name: tyro.conf.Positional[str] = ""
    """One method, explained."""
    json: bool = False
    """Print as json."""


def _methods(args: list[str]) -> int:
    flags = _parsed(_MethodsFlags, args, prog="opd methods", description="List the methods, or explain one.")
    if flags.name and flags.name not in METHODS:
        raise Refusal(f"{flags.name}: unknown method{_near(flags.name, list(METHODS))}; there are {', '.join(METHODS)}")
    rows = [_explained(name) for name in METHODS if flags.name in ("", name)]
    if flags.json:
        print(json.dumps(rows if not flags.name else rows[0], indent=2))
        return 0
    console = Console()
    if flags.name:
        for key, value in rows[0].items():
            console.print(f"[bold]{key}[/bold]", highlight=False)
            text = value if isinstance(value, str) else json.dumps(value, indent=2)
            console.print(f"  {text}", markup=False, highlight=False)
        return 0
    table = Table("method", "what", "source", box=None, pad_edge=False)
    for row in rows:
        table.add_row(Text(str(row["name"]), "bold"), Text(str(row["what"])), Text(str(row["source"])))
    console.print(table)
    return 0


def _explained(name: str) -> dict[str, object]:
    factory = METHODS[name]
    method = factory()
    document = inspect.getdoc(factory) or ""
    presets = {
        p: {k: str(v) for k, v in settings(p, name).items()} | {"METHOD": " ".join([name, *arguments(p, name)])}
        for p in ("paper", "embedded")
        if _has(p, name)
    }
    return {
        "name": name,
        "what": _summary(factory)[0],
        "source": _summary(factory)[1],
        "value": repr(method),
        "defaults": {p.name: p.default for p in inspect.signature(factory).parameters.values()},
        "arguments": document.split("Args:\n")[1] if "Args:" in document else "",
        "token_local": method.local(),
        "reads": sorted(method.reads()),
        "presets": presets,
    }


def _has(preset: str, name: str) -> bool:
    try:
        settings(preset, name)
    except Refusal:
        return False
    return True
