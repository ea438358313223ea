"""Commands that print a table: exact, variance, eval, rescore.

Each imports what it runs after its flags are read, so that mistakes are answered at once.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from json import dumps
from typing import Any

import tyro
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from opd.cli.methods import check_flags, check_name
from opd.cli.parse import asks_for_help, built, parsed, scanned, unknown_flag
from opd.config.commands import Rescore, Size, Variance
from opd.config.evaluate import Evaluate
from opd.core.errors import Refusal


@dataclass(frozen=True, kw_only=True)
class _ExactFlags:
    methods: str = ""
    """NAME or NAME:flag=value:flag, separated by commas; empty: all methods."""
    json: bool = False
    """Print as json."""
    what: Size


def exact(args: list[str]) -> int:
    """Methods in the enumerable world."""
    prog = "opd exact"
    about = (
        "Every method in a world of enumerable sequences: its mean gradient against that of the sequence KL, and its "
        "noise.\nopd exact [flags] METHOD [method flags], or --methods, or all."
    )
    if asks_for_help(args):
        built(_ExactFlags, ["--help"], prog=prog, description=about)
    words = scanned(_ExactFlags, args)
    name, *rest = words.rest or ("",)
    if name.startswith("-"):
        raise unknown_flag(name, words.names(), prog=prog)
    if name:
        check_name(name)
        check_flags(name, rest, words.names())
    flags = built(_ExactFlags, words.known, prog=prog, description=about)
    if name and flags.methods:
        raise Refusal(f"--methods {flags.methods} beside METHOD {name}: give one of the two")
    size = flags.what
    size.check()
    from opd.analysis.exact import World
    from opd.cli.method_names import method_of, several
    from opd.methods import METHODS

    world = World.random(size.vocab, size.length, mismatch=size.mismatch, seed=size.seed)
    listed = {name: method_of(name, rest, words.names())} if name else {name: make() for name, make in METHODS.items()}
    rows = []
    for name, method in (several(flags.methods) if flags.methods else listed).items():
        why = world.outside(method)
        note = {"note": world.note(method)} if world.note(method) else {}
        rows.append({"method": name, **({"why": why} if why else {**asdict(world.row(method)), **note})})
    if flags.json:
        print(dumps(rows, indent=2))
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


def variance(args: list[str]) -> int:
    """Methods on two real models."""

    @dataclass(frozen=True, kw_only=True)
    class Flags:
        methods: str = "opd,opd-full,vopd,vopd-topk,opd-optimal,opd-stratified"
        """NAME or NAME:flag=value:flag, separated by commas."""
        json: bool = False
        """Print as json."""
        what: Variance

    flags = parsed(
        Flags,
        args,
        prog="opd variance",
        description="How noisy the gradient of each method is on two models, at fixed contexts of the student's own.",
        example="opd variance --student embedded:student --teacher embedded:teacher --prompts embedded:ledger",
    )
    from opd.analysis.variance import variance
    from opd.cli.method_names import several

    found = variance(flags.what, several(flags.methods))
    if flags.json:
        print(dumps(asdict(found), indent=2))
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


@dataclass(frozen=True, kw_only=True)
class _EvalFlags:
    json: bool = False
    """Print as json."""
    what: Evaluate


def eval_(args: list[str]) -> int:
    """A model on problems, or two of them."""
    flags = parsed(
        _EvalFlags,
        args,
        prog="opd eval",
        description="Accuracy of a model on problems with a verifier: avg@k, pass@k, maj@k, with 95 % intervals over "
        "prompts; or of two models, and their difference paired by prompt.",
        example="opd eval --model embedded:teacher --prompts embedded:ledger",
    )
    from opd.analysis.evaluate import evaluate, output, save

    what = flags.what
    asked = {name: replace(what, model=name) for name in (what.model, what.against) if name}
    if what.against == what.model:
        raise Refusal(f"--against {what.against}: is --model itself; name another one")
    if what.out:
        output(what).check()
    scores = {name: evaluate(config) for name, config in asked.items()}
    try:
        if what.out:
            save(output(what), scores)
    finally:  # a disk that is full does not lose the numbers
        _show_scores(what, scores, json=flags.json)
    return 0


def _show_scores(what: Evaluate, scores: Mapping[str, Any], *, json: bool) -> None:
    """Print the measures of a model, or of two beside their difference."""
    from opd.analysis.report.compare import versus

    task = {"task": what.prompts, **({"set": what.set} if what.set else {})}
    tables = [{"model": name, **task, **score.table(what.interval)} for name, score in scores.items()]
    paired = {name: asdict(p) for name, p in versus(*scores.items()).items()} if what.against else {}
    if json:
        print(dumps(tables[0] if not paired else {"models": tables, "paired": paired}, indent=2))
        return
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


def rescore(args: list[str]) -> int:
    """Methods on the saved rollouts of a run."""

    @dataclass(frozen=True, kw_only=True)
    class Flags:
        method: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
        """NAME or NAME:flag=value:flag; repeat for more.  None: all methods."""
        json: bool = False
        """Print as json."""
        what: Rescore

    flags = parsed(
        Flags,
        args,
        prog="opd rescore",
        description="What other methods would have said about the saved rollouts of a run.",
        example="opd rescore outputs/opd --method vopd-topk",
    )
    from opd.analysis.rescore import rescore
    from opd.cli.method_names import several
    from opd.methods import METHODS

    asked = several(",".join(flags.method)) if flags.method else {name: make() for name, make in METHODS.items()}
    found = rescore(flags.what, asked)
    if flags.json:
        print(dumps(asdict(found), indent=2))
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
            "A: advantage (reward minus baseline), nats; used, eff.: share of tokens with weight, and effective share; "
            "kept: rollouts in which a token counts\n"
            f"r, rank r, cosine: how the pulls of a method, weight x advantage of each token, go with those of "
            f"{found.beside} (1: as one); opposed: share of the tokens pulled the other way"
        )
    for name, verdict in found.methods.items():
        for line in filter(None, (*verdict.lacks, verdict.note)):
            print(f"{name}: {line}")
    for name, verdict in found.methods.items() if flags.method else ():
        if verdict.agreement and verdict.agreement.tokens:
            print(f"\npulls of {found.beside}, then of {name}, where they differ most (1: a side's root mean square)")
            for x in verdict.agreement.tokens:
                text = f"{x.before}[{x.text}]{x.after}".replace("\n", "\\n")
                print(f"  {x.own:+7.2f} {x.other:+7.2f}  rollout {x.rollout}, token {x.position}: {text}")
    return 0
