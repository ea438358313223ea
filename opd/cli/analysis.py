"""Commands that print a table: exact, variance, rock, eval, rescore.

Each imports its implementation after parsing its flags, so that mistakes are reported at once.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from json import dumps
from typing import Any

import tyro
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from opd.cli.method_sources import check_flags, check_name
from opd.cli.parse import asks_for_help, parse_flags, run_tyro, scan_words, unknown_flag
from opd.config.commands import Rescore, Size, Variance
from opd.config.evaluate import Evaluate
from opd.config.rock import Rock
from opd.core.errors import Refusal
from opd.core.processes import is_main_process


@dataclass(frozen=True, kw_only=True)
class _ExactFlags:
    methods: str = ""
    """NAME or NAME:flag=value:flag, separated by commas; empty: all methods."""
    json: bool = False
    """Print as json."""
    what: Size


def exact(args: list[str]) -> int:
    """Print the bias and noise of methods in an enumerable world."""
    prog = "opd exact"
    description = (
        "Every method in a world of enumerable sequences: its mean gradient against that of the sequence KL, and its "
        "noise.\nopd exact [flags] METHOD [method flags], or --methods, or all."
    )
    if asks_for_help(args):
        run_tyro(_ExactFlags, ["--help"], prog=prog, description=description)
    words = scan_words(_ExactFlags, args)
    name, *method_words = words.remaining or ("",)
    if name.startswith("-"):
        raise unknown_flag(name, words.names(), prog=prog)
    if name:
        check_name(name)
        check_flags(name, method_words, words.names())
    flags = run_tyro(_ExactFlags, words.own_words, prog=prog, description=description)
    if name and flags.methods:
        raise Refusal(f"--methods {flags.methods} beside METHOD {name}: give one of the two")
    size = flags.what
    size.check()
    from opd.analysis.exact import World
    from opd.cli.method_names import method_of, parse_methods
    from opd.methods import METHODS

    world = World.random(size.vocab, size.length, mismatch=size.mismatch, seed=size.seed)
    if name:
        methods = {name: method_of(name, method_words, words.names())}
    else:
        methods = parse_methods(flags.methods) if flags.methods else {name: make() for name, make in METHODS.items()}
    rows = []
    for name, method in methods.items():
        reason = world.unsupported_reason(method)
        note = {"note": world.note(method)} if world.note(method) else {}
        rows.append({"method": name, **({"why": reason} if reason else {**asdict(world.row(method)), **note})})
    if flags.json:
        print(dumps(rows, indent=2))
        return 0
    table = Table("method", "cosine", "bias", "noise", box=None, pad_edge=False)
    for row in rows:
        if "why" not in row:
            table.add_row(Text(row["method"]), *(f"{row[key]:.4g}" for key in ("cosine", "bias", "noise")))
    Console().print(table, highlight=False)
    for row in rows:
        if "why" in row:
            print(f"{row['method']}: not here: {row['why']}")
        if "note" in row:
            print(f"{row['method']}: {row['note']}")
    return 0


def variance(args: list[str]) -> int:
    """Print the gradient variance of methods on two models."""

    @dataclass(frozen=True, kw_only=True)
    class Flags:
        methods: str = "opd,opd-full,vopd,vopd-topk,opd-optimal,opd-stratified"
        """NAME or NAME:flag=value:flag, separated by commas."""
        json: bool = False
        """Print as json."""
        what: Variance

    flags = parse_flags(
        Flags,
        args,
        prog="opd variance",
        description="How noisy the gradient of each method is on two models, at fixed contexts of the student's own.",
        example="opd variance --student embedded:student --teacher embedded:teacher --prompts embedded:ledger",
    )
    from opd.analysis.variance import variance
    from opd.cli.method_names import parse_methods
    from opd.training.prompt_shares import connected

    methods = parse_methods(flags.methods)
    with connected():
        results = variance(flags.what, methods)
    if flags.json:
        print(dumps(asdict(results), indent=2))
        return 0
    titles = ("variance", "of opd's", "in logits", "raised", "noise", "cosine")
    table = Table(Column("method", overflow="fold"), *titles, box=None, pad_edge=False)
    with_interval = lambda e: Text(f"{e.value:.4g} [{e.low:.3g}, {e.high:.3g}]")
    for name, x in results.methods.items():
        numbers = (f"{x.logits.value:.3f}", f"{x.raised:.1%}", f"{x.noise:.4g}", f"{x.cosine:.4f}")
        table.add_row(Text(name), with_interval(x.variance), with_interval(x.ratio), *numbers)
    Console().print(table, highlight=False)
    print(
        f"{results.contexts} contexts of {results.rollouts} rollouts, {results.parameters:,} parameters, reverse KL "
        f"{results.reverse_kl:.4g} nats; 95 % intervals over rollouts"
    )
    if results.largest > 0.2:
        print(f"one rollout holds {results.largest:.0%} of opd's variance: no interval is reliable; add --rollouts")
    return 0


def rock(args: list[str]) -> int:
    """Find the frequent tokens with a large KL, and print the path of their list."""
    config = parse_flags(
        Rock,
        args,
        prog="opd rock",
        description=Rock.__doc__ or "",
        example="opd rock --student embedded:student --teacher embedded:teacher --prompts embedded:ledger",
    )
    from opd.analysis.rock_tokens import rock
    from opd.training.prompt_shares import connected

    with connected():
        print(rock(config))
    return 0


@dataclass(frozen=True, kw_only=True)
class _EvalFlags:
    json: bool = False
    """Print as json."""
    what: Evaluate


def eval_(args: list[str]) -> int:
    """Evaluate a model, or two models, on problems."""
    flags = parse_flags(
        _EvalFlags,
        args,
        prog="opd eval",
        description="Accuracy of a model on problems with a verifier: avg@k, pass@k, maj@k, with 95 % intervals over "
        "prompts; or of two models, and their difference paired by prompt.",
        example="opd eval --model embedded:teacher --prompts embedded:ledger",
    )
    from opd.analysis.evaluate import evaluate, output, save
    from opd.training.prompt_shares import connected

    what = flags.what
    configs = {name: replace(what, model=name) for name in (what.model, what.against) if name}
    if what.against == what.model:
        raise Refusal(f"--against {what.against}: is --model itself; name another one")
    if what.out:
        output(what).check()
    with connected() as processes:
        scores = {name: evaluate(config, processes) for name, config in configs.items()}
        try:
            if what.out and is_main_process():
                save(output(what), scores)
        finally:  # prints the numbers even if the disk is full
            _show_scores(what, scores, json=flags.json)
    return 0


def _show_scores(what: Evaluate, scores: Mapping[str, Any], *, json: bool) -> None:
    """Print the measures of a model, or of two models and their difference."""
    from opd.analysis.evaluate import compare_scores

    task = {"task": what.prompts, **({"set": what.set} if what.set else {})}
    tables = [{"model": name, **task, **score.table(what.interval)} for name, score in scores.items()]
    paired = {name: asdict(p) for name, p in compare_scores(*scores.items()).items()} if what.against else {}
    if json:
        print(dumps(tables[0] if not paired else {"models": tables, "paired": paired}, indent=2))
        return
    shares = lambda x: f"{100 * x['value']:.1f} % [{100 * x['low']:.1f}, {100 * x['high']:.1f}]"
    text_of = lambda x: shares(x) if isinstance(x, dict) else f"{x:.4g}" if isinstance(x, float) else str(x)
    titles = ("", *(["value"] * len(tables)), *(["difference", "better / worse"] if paired else []))
    printed = Table(*titles, box=None, pad_edge=False)
    for name in tables[0]:
        difference = paired.get(name)
        difference_cells = (shares(difference), f"{difference['better']} / {difference['worse']}") if difference else ()
        printed.add_row(name, *(text_of(table[name]) for table in tables), *difference_cells)
    Console().print(printed, markup=False, highlight=False)
    print("[ ] are 95 % intervals over prompts" + (", of the difference by a paired bootstrap" if paired else ""))


def rescore(args: list[str]) -> int:
    """Compare methods on the saved rollouts of a run."""

    @dataclass(frozen=True, kw_only=True)
    class Flags:
        method: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
        """NAME or NAME:flag=value:flag; repeat for more.  None: all methods."""
        json: bool = False
        """Print as json."""
        what: Rescore

    flags = parse_flags(
        Flags,
        args,
        prog="opd rescore",
        description="What other methods would have said about the saved rollouts of a run.",
        example="opd rescore outputs/opd --method vopd-topk",
    )
    from opd.analysis.rescore import rescore
    from opd.cli.method_names import parse_methods
    from opd.methods import METHODS

    names = flags.method
    methods = parse_methods(",".join(names)) if names else {name: make() for name, make in METHODS.items()}
    results = rescore(flags.what, methods)
    if flags.json:
        print(dumps(asdict(results), indent=2))
    else:
        _show_rescored(results, with_tokens=bool(names))
    return 0


def _show_rescored(results: Any, *, with_tokens: bool) -> None:
    """Print a row for each term of each method, and with `with_tokens` the tokens whose pulls differ most."""
    titles = ("mean A", "std A", "used", "eff.", "kept", "r", "rank r", "cosine", "opposed")
    table = Table(*(Column(head, no_wrap=True) for head in ("method", *titles)), box=None, pad_edge=False)
    for name, verdict in results.methods.items():
        agreement, cells = verdict.agreement, [f"{verdict.kept}/{results.rollouts}"]
        if agreement is not None:
            correlations = (agreement.pearson, agreement.spearman, agreement.cosine)
            cells += [*("-" if x is None else f"{x:.2f}" for x in correlations), f"{agreement.opposed:.0%}"]
        for i, term in enumerate(verdict.terms):
            size = ("" if x is None else f"{x:.2g}" for x in (term.advantage, term.advantage_std))
            shares = (f"{term.weighted:.0%}", f"{term.effective:.0%}")
            table.add_row(Text("" if i else name), *size, *shares, *(() if i else cells))
    print(f"{results.run}, step {results.step}: {results.rollouts} rollouts, {results.tokens} trained tokens")
    Console().print(table, highlight=False)
    if results.beside:
        print(
            "A: advantage (reward minus baseline), nats; used, eff.: share of tokens with weight, and effective share; "
            "kept: rollouts in which a token counts\nr, rank r, cosine: how the pulls of a method, weight x advantage "
            f"of each token, go with those of {results.beside} (1: as one); opposed: share of the tokens pulled the "
            "other way"
        )
    for name, verdict in results.methods.items():
        for line in filter(None, (*verdict.lacks, verdict.note)):
            print(f"{name}: {line}")
    for name, verdict in results.methods.items() if with_tokens else ():
        if verdict.agreement and verdict.agreement.tokens:
            print(f"\npulls of {results.beside}, then of {name}, where they differ most (1: a side's root mean square)")
            for x in verdict.agreement.tokens:
                text = f"{x.before}[{x.text}]{x.after}".replace("\n", "\\n")
                print(f"  {x.own:+7.2f} {x.other:+7.2f}  rollout {x.rollout}, token {x.position}: {text}")
