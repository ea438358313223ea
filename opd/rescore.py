"""What other methods would have said about saved rollouts: `rescore(Rescore(...), methods) -> Rescored`.

The columns of a run folder are its batch, so a method is asked as in training, through `Method.prepare`.  A score that
needs the vocabulary at a token, which no folder has, is not guessed: the method is listed with what it lacks.
"""

import ast
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from safetensors.torch import load_file
from torch import Tensor

from opd import (
    against,
    divergences,
    estimators,
    judged,
    method,
    representation,
    rewards,
    rollouts,
    surrogates,
    transforms,
)
from opd import weights as weighing
from opd.against import Teacher
from opd.estimators import Sampled, Value
from opd.method import Match, MatchHidden, Method, PolicyGradient, Target, Term
from opd.methods import METHODS
from opd.metrics import weighting
from opd.report.logs import lines, saved_at
from opd.rewards import LogRatio, One, ReverseKLPlus
from opd.rollouts import OnPolicy
from opd.settings import Rescore
from opd.types import Batch, Refusal

LEAVES = (
    *(against, divergences, estimators, judged, method, representation, rewards, rollouts, surrogates, transforms),
    weighing,
)
SPACES = (*map(vars, LEAVES), *(vars(sys.modules[make.__module__]) for make in METHODS.values()))
NAMES = {name: part for space in SPACES for name, part in space.items() if isinstance(part, type)}
OWN, NO_ADVANTAGE = "the run's own", "a token has a weight and no advantage"
BEFORE, AFTER = 12, 4  # tokens of context
EXPECTED = {LogRatio(): 0.0, ReverseKLPlus(): -1.0}  # rewards whose mean is -KL and a constant


@dataclass(frozen=True)
class Spread:
    """One term over the trained tokens."""

    weighted: float  # share of the tokens that count at all
    effective: float  # (sum w)^2 / (n sum w^2)
    advantage: float | None  # mean and deviation where it counts; None where no token has one of its own
    advantage_std: float | None


@dataclass(frozen=True)
class Token:
    """A token in its context, and how hard each side pulls at it; 1 is the root mean square of a side's pulls."""

    rollout: int
    position: int
    before: str
    text: str
    after: str
    own: float
    other: float


@dataclass(frozen=True)
class Agreement:
    """The pulls w A at log p of each trained token, those of a method beside those of another."""

    pearson: float | None  # None beside pulls that are all the same
    spearman: float | None
    cosine: float | None
    opposed: float  # share of the tokens that both pull at, in opposite directions
    tokens: tuple[Token, ...]  # where they differ most


@dataclass(frozen=True)
class Verdict:
    """What a method says about the rollouts."""

    kept: int  # rollouts in which a token counts
    terms: tuple[Spread, ...]
    agreement: Agreement | None
    lacks: tuple[str, ...]  # why something above is missing
    note: str = ""  # what it would have done before it scored anything


@dataclass(frozen=True)
class Rescored:
    """All methods, beside one of them."""

    run: str
    step: int
    rollouts: int
    tokens: int  # trained
    beside: str  # whose pulls the others are compared with; "" where no method has any
    methods: Mapping[str, Verdict]


def rescore(config: Rescore, methods: Mapping[str, Method]) -> Rescored:
    """Ask each method about the rollouts of a run, and compare it with the run's own."""
    if config.tokens < 0:
        raise Refusal(f"--tokens {config.tokens}: a number of tokens to show, 0 or more")
    step, path = saved_at(config.run, config.step, "config.json")
    rows, columns = lines(path.with_suffix(".jsonl")), load_file(path.with_suffix(".safetensors"))
    written = str(json.loads((config.run / "config.json").read_text())["method"])
    batch, terms = batch_of(columns), own_targets(columns)
    known = read(written)
    pulls: dict[str, Float[Tensor, " n"]] = {}
    if (own := pull(terms, batch.mask)) is not None:
        pulls[OWN] = own
    silent = any(t.advantage is None for t in terms)
    found: dict[str, tuple[tuple[Target, ...], tuple[str, ...]]] = {OWN: (terms, (NO_ADVANTAGE,) * silent)}
    for name, other in methods.items():
        found[name] = asked(other, batch, known, terms)
        if not found[name][1] and (mine := pull(found[name][0], batch.mask)) is not None:
            pulls[name] = mine
    beside = next(iter(pulls), "")
    texts = json.loads(path.with_suffix(".tokens.json").read_text())
    spell = lambda ids: "".join(texts.get(str(i), "") for i in ids)
    out = {}
    for name, (targets, lacks) in found.items():
        agreement = None
        if name in pulls and name != beside:
            places = apart(pulls[beside], pulls[name], config.tokens)
            agreement = compared(pulls[beside], pulls[name], [_token(batch, rows, spell, *p) for p in places])
        kept = torch.stack([batch.mask & False, *((t.weight != 0) & batch.mask for t in targets)]).any(0)
        note = written_by(methods[name]) if name in methods else ""
        out[name] = Verdict(int(kept.any(1).sum()), spreads(targets, batch.mask), agreement, lacks, note)
    return Rescored(str(config.run), step, len(rows), int(batch.mask.sum()), beside, out)


def batch_of(columns: Mapping[str, Tensor]) -> Batch:
    """The batch that was saved; what nobody measured is None."""
    found: dict[str, Any] = {f.name: columns[f.name] for f in fields(Batch) if f.name in columns}
    return Batch(**found)


def own_targets(columns: Mapping[str, Tensor]) -> tuple[Target, ...]:
    """What the run's method asked of each token."""
    terms = sum(name.startswith("weight.") for name in columns)
    return tuple(Target(columns[f"weight.{i}"], columns.get(f"advantage.{i}"), None) for i in range(terms))


def asked(
    other: Method, batch: Batch, known: Method | None, own: Sequence[Target]
) -> tuple[tuple[Target, ...], tuple[str, ...]]:
    """The targets of a method, and what it lacks; no targets where its leaves read a column that nobody measured."""
    absent = sorted(name for name in other.reads() if getattr(batch, name) is None)
    if absent:
        return (), (f"it reads {', '.join(absent)}, which this run did not measure",)
    scores, lacks = [], []
    for term in other.terms:
        score = scored(term, batch, known, own)
        scores.append(score if isinstance(score, Tensor) else None)
        if isinstance(score, str):
            lacks.append(score)
            if not term.local():  # it transforms what is missing
                return (), tuple(lacks)
    return other.prepare(replace(batch, scores=tuple(scores))), tuple(lacks)


def scored(term: Term, batch: Batch, known: Method | None, own: Sequence[Target]) -> Float[Tensor, "B T"] | str:
    """Reward minus baseline of each token, exactly; or why the saved columns do not tell it."""
    match term:
        case MatchHidden():
            return f"matches hidden states: {NO_ADVANTAGE}"
        case Match():
            return f"differentiates {term.divergence!r}: {NO_ADVANTAGE}"
    assert isinstance(term, PolicyGradient)
    for mine, target in zip(known.terms if known else (), own, strict=False):
        if (
            isinstance(mine, PolicyGradient)
            and not mine.transforms
            and target.advantage is not None
            and same(mine, term)
        ):
            return target.advantage
    p, q = batch.student_logp, batch.teacher_logp
    if term.estimator != Sampled():
        return f"{term.estimator!r} pulls at many tokens of a position: it needs both models' vocabulary there"
    if term.against != Teacher():
        return f"{term.against!r}: it needs the reference model's log-probs, which are not saved"
    if p is None or q is None:
        return "it needs student_logp and teacher_logp, which this run did not measure"
    value = term.reward(p, q)
    if term.baseline is None:
        return value
    if term.baseline == Value() and term.reward == One():
        return value - 1
    if term.baseline == Value() and term.reward in EXPECTED:
        if batch.reverse_kl is None:
            return f"{term.baseline!r} needs reverse_kl, which this run did not measure"
        return value + batch.reverse_kl - EXPECTED[term.reward]
    return f"{term.baseline!r} of {term.reward!r} needs both models' vocabulary at each token"


def same(a: PolicyGradient, b: PolicyGradient) -> bool:
    """Whether two terms score tokens alike."""
    return all(getattr(a, name) == getattr(b, name) for name in ("reward", "baseline", "estimator", "against"))


def pull(targets: Sequence[Target], mask: Bool[Tensor, "B T"]) -> Float[Tensor, " n"] | None:
    """The sum of w A over the terms, what log p of each trained token is pulled by; None where a term has no A."""
    if not targets or any(t.advantage is None for t in targets):
        return None
    parts = [torch.where(t.weight != 0, t.weight * t.advantage, 0)[mask] for t in targets]  # type: ignore[operator]
    return torch.stack(parts).sum(0).double()


def spreads(targets: Sequence[Target], mask: Bool[Tensor, "B T"]) -> tuple[Spread, ...]:
    """How each term spreads over the trained tokens."""
    out = []
    for target in targets:
        shares, at = weighting([target], mask), mask & (target.weight != 0)
        a = target.advantage[at].double() if target.advantage is not None and at.any() else None
        mean, std = (None, None) if a is None else (float(a.mean()), float(a.std(correction=0)))
        out.append(Spread(shares["weighted"], shares["effective"], mean, std))
    return tuple(out)


def compared(own: Float[Tensor, " n"], other: Float[Tensor, " n"], tokens: Sequence[Token]) -> Agreement:
    """How alike two pulls are."""
    both = (own != 0) & (other != 0)
    opposed = float((own.sign() != other.sign())[both].double().mean()) if both.any() else 0.0
    centred = lambda x: x - x.mean()
    cosine = lambda a, b: float((a @ b) / (a.norm() * b.norm())) if a.any() and b.any() else None
    pearson, spearman = (cosine(centred(a), centred(b)) for a, b in ((own, other), (ranks(own), ranks(other))))
    return Agreement(pearson, spearman, cosine(own, other), opposed, tuple(tokens))


def ranks(x: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """The place of each value in order; equal values share the mean of theirs."""
    _, at, count = x.unique(return_inverse=True, return_counts=True)
    return (count.cumsum(0) - (count - 1) / 2)[at].double()


def apart(own: Float[Tensor, " n"], other: Float[Tensor, " n"], most: int) -> list[tuple[int, float, float]]:
    """The tokens (n-th trained one) whose pulls differ most, both sides scaled to root mean square 1."""
    a, b = (x / x.square().mean().sqrt().clamp(min=torch.finfo(x.dtype).tiny) for x in (own, other))
    size, at = (a - b).abs().topk(min(most, len(a)))
    return [(int(i), float(a[i]), float(b[i])) for s, i in zip(size, at, strict=True) if s > 1e-6]


def _token(batch: Batch, rows: Sequence[Mapping], spell: Callable, nth: int, own: float, other: float) -> Token:
    row, t = batch.mask.nonzero()[nth].tolist()
    ids = batch.ids[row, : rows[row]["tokens"]].tolist()
    before, after = ids[max(0, t - BEFORE) : t], ids[t + 1 : t + 1 + AFTER]
    return Token(rows[row]["index"], t, spell(before), spell(ids[t : t + 1]), spell(after), own, other)


def written_by(other: Method) -> str:
    """Who would have written the rollouts, where it is not the student alone."""
    return "" if isinstance(other.rollouts, OnPolicy) else f"its rollouts are {other.rollouts!r}; these are the run's"


def read(text: str) -> Method | None:
    """The method that prints so, of our own parts; None where it has others."""

    def value(node: ast.expr) -> object:
        match node:
            case ast.Call(func=ast.Name(id=name)) if name in NAMES:
                named = {k.arg: value(k.value) for k in node.keywords if k.arg}
                return NAMES[name](*map(value, node.args), **named)
            case ast.Name(id="inf" | "nan" as name):
                return float(name)
            case ast.Tuple(elts=parts):
                return tuple(map(value, parts))
            case _:
                return ast.literal_eval(node)

    try:
        made = value(ast.parse(text, mode="eval").body)
    except (ValueError, TypeError, SyntaxError):
        return None
    return made if isinstance(made, Method) else None
