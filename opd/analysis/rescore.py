"""Weights and advantages of other methods on saved rollouts: `rescore(Rescore(...), methods) -> Rescored`.

The columns of a run folder are its batch, so a method computes its targets as in training, through `Method.prepare`.
A score that needs the full distribution at a token, which no run folder contains, is not approximated: the method is
listed with the reason.
"""

import ast
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from opd.config.commands import Rescore
from opd.core.errors import Refusal
from opd.core.types import Batch
from opd.losses.baselines import Value
from opd.losses.estimators import Sampled
from opd.losses.rewards import LogRatio, One, ReverseKLPlus
from opd.losses.target_distribution import Teacher
from opd.losses.terms import Match, MatchHidden, PolicyGradient, Target, Term
from opd.methods.constructors import constructors
from opd.methods.method import Method
from opd.training.metrics import weight_metrics
from opd.training.run_files import REMEDY, read_object, read_rollouts
from opd.training.run_log import saved_at

NAMES = constructors()
NEEDED = {f.name for f in fields(Batch) if f.default is f.default_factory is MISSING}  # columns of every batch
OWN_METHOD, NO_ADVANTAGE = "the run's own", "a token has a weight and no advantage"
BEFORE, AFTER = 12, 4  # tokens of context shown before and after a token
EXPECTED = {LogRatio(): 0.0, ReverseKLPlus(): -1.0}  # rewards with mean -KL + constant -> the constant


@dataclass(frozen=True)
class TermSpread:
    """Weights and advantages of a term over the trained tokens."""

    weighted: float  # share of the tokens with a weight other than 0
    effective: float  # effective sample size as a share: (sum w)^2 / (n sum w^2)
    advantage: float | None  # mean over weighted tokens; None if the term has no advantage per token
    advantage_std: float | None  # standard deviation over weighted tokens


@dataclass(frozen=True)
class Token:
    """A token in its context, with the pull of each method on it, in units of the method's root mean square pull."""

    rollout: int
    position: int
    before: str
    text: str
    after: str
    own: float
    other: float


@dataclass(frozen=True)
class PullAgreement:
    """Comparison of the pulls w A (weight times advantage, on log p of each trained token) of two methods."""

    pearson: float | None  # None if all pulls of a method are equal
    spearman: float | None
    cosine: float | None
    opposed: float  # share of opposite signs among the tokens on which both pull
    tokens: tuple[Token, ...]  # tokens on which the two differ most


@dataclass(frozen=True)
class Verdict:
    """Results of a method on the rollouts."""

    kept: int  # number of rollouts with a weighted token
    terms: tuple[TermSpread, ...]
    agreement: PullAgreement | None
    lacks: tuple[str, ...]  # reasons why a value above is missing
    note: str = ""  # difference between the method's rollouts and these, if any


@dataclass(frozen=True)
class Rescored:
    """Results of all methods, compared with a common reference."""

    run: str
    step: int
    rollouts: int
    tokens: int  # number of trained tokens
    beside: str  # name of the reference method for the comparison of pulls; "" if no method has pulls
    methods: Mapping[str, Verdict]


def rescore(config: Rescore, methods: Mapping[str, Method]) -> Rescored:
    """Compute the targets of each method on the rollouts of a run, and compare them with those of the run's method."""
    if config.tokens < 0:
        raise Refusal(f"--tokens {config.tokens}: a number of tokens to show, 0 or more")
    step, path = saved_at(config.run, config.step, "config.json")
    saved = read_rollouts(path)
    rows, columns = saved.rows, saved.columns
    if missing := sorted(NEEDED - columns.keys()):
        raise Refusal(f"{path}.safetensors: the column {missing[0]} is missing; {REMEDY}")
    method_text = read_object(config.run / "config.json", {"method": (str,)})["method"]
    batch, terms, run_method = batch_of(columns), own_targets(columns), parse_method(method_text)
    own_lacks = (NO_ADVANTAGE,) * any(t.advantage is None for t in terms)
    targets_by_method = {OWN_METHOD: (terms, own_lacks)}
    targets_by_method |= {name: targets_of(other, batch, run_method, terms) for name, other in methods.items()}
    pulls: dict[str, Float[Tensor, " n"]] = {}
    for name, (targets, lacks) in targets_by_method.items():
        if not lacks and (method_pull := pull(targets, batch.mask)) is not None:
            pulls[name] = method_pull
    beside = next(iter(pulls), "")
    text_of = lambda ids: "".join(saved.texts[i] for i in ids)
    verdicts = {}
    for name, (targets, lacks) in targets_by_method.items():
        agreement = None
        if name in pulls and name != beside:
            differing = most_different(pulls[beside], pulls[name], config.tokens)
            agreement = compare_pulls(pulls[beside], pulls[name], [_token(batch, rows, text_of, *p) for p in differing])
        is_weighted = torch.stack([batch.mask & False, *((t.weight != 0) & batch.mask for t in targets)]).any(0)
        note = ""
        if name in methods and not methods[name].rollouts.on_policy:
            note = f"its rollouts are {methods[name].rollouts!r}; these are the run's"
        verdicts[name] = Verdict(int(is_weighted.any(1).sum()), spreads(targets, batch.mask), agreement, lacks, note)
    return Rescored(str(config.run), step, len(rows), int(batch.mask.sum()), beside, verdicts)


def batch_of(columns: Mapping[str, Tensor]) -> Batch:
    """Return the saved batch; columns that were not measured are None."""
    return Batch(**{f.name: columns[f.name] for f in fields(Batch) if f.name in columns})  # type: ignore[arg-type]


def own_targets(columns: Mapping[str, Tensor]) -> tuple[Target, ...]:
    """Return the targets (weights and advantages) of the run's method, a target per term."""
    terms = sum(name.startswith("weight.") for name in columns)
    return tuple(Target(columns[f"weight.{i}"], columns.get(f"advantage.{i}"), None) for i in range(terms))


def targets_of(
    other: Method, batch: Batch, run_method: Method | None, own_terms: Sequence[Target]
) -> tuple[tuple[Target, ...], tuple[str, ...]]:
    """Return a method's targets (none if it reads an unmeasured column) and the reasons why something is missing."""
    absent = sorted(name for name in other.reads() if getattr(batch, name) is None)
    if absent:
        return (), (f"it reads {', '.join(absent)}, which this run did not measure",)
    scores, lacks = [], []
    for term in other.terms:
        score = term_scores(term, batch, run_method, own_terms)
        scores.append(score if isinstance(score, Tensor) else None)
        if isinstance(score, str):
            lacks.append(score)
            if not term.local():  # its transforms need the missing score
                return (), tuple(lacks)
    return other.prepare(replace(batch, scores=tuple(scores))), tuple(lacks)


def term_scores(
    term: Term, batch: Batch, run_method: Method | None, own_terms: Sequence[Target]
) -> Float[Tensor, "B T"] | str:
    """Return the exact reward minus baseline of each token, or the reason why the saved columns do not suffice."""
    match term:
        case MatchHidden():
            return f"matches hidden states: {NO_ADVANTAGE}"
        case Match():
            return f"differentiates {term.divergence!r}: {NO_ADVANTAGE}"
    assert isinstance(term, PolicyGradient)
    scored_by = lambda t: (t.reward, t.baseline, t.estimator, t.against)
    for own, target in zip(run_method.terms if run_method else (), own_terms, strict=False):
        same = isinstance(own, PolicyGradient) and not own.transforms and scored_by(own) == scored_by(term)
        if same and target.advantage is not None:
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
    if term.baseline != Value() or term.reward not in EXPECTED:
        return f"{term.baseline!r} of {term.reward!r} needs both models' vocabulary at each token"
    if batch.reverse_kl is None:
        return f"{term.baseline!r} needs reverse_kl, which this run did not measure"
    return value + batch.reverse_kl - EXPECTED[term.reward]


def pull(targets: Sequence[Target], mask: Bool[Tensor, "B T"]) -> Float[Tensor, " n"] | None:
    """Return the sum of w A over the terms for each trained token; None if a term has no advantage A."""
    if not targets or any(t.advantage is None for t in targets):
        return None
    parts = [torch.where(t.weight != 0, t.weight * t.advantage, 0)[mask] for t in targets]  # type: ignore[operator]
    return torch.stack(parts).sum(0).double()


def spreads(targets: Sequence[Target], mask: Bool[Tensor, "B T"]) -> tuple[TermSpread, ...]:
    """Return the statistics of each term's weights and advantages over the trained tokens."""
    out = []
    for target in targets:
        shares, is_weighted = weight_metrics([target], mask), mask & (target.weight != 0)
        a = target.advantage[is_weighted].double() if target.advantage is not None and is_weighted.any() else None
        mean, std = (None, None) if a is None else (float(a.mean()), float(a.std(correction=0)))
        out.append(TermSpread(shares["weighted"], shares["effective"], mean, std))
    return tuple(out)


def compare_pulls(first: Float[Tensor, " n"], second: Float[Tensor, " n"], tokens: Sequence[Token]) -> PullAgreement:
    """Return correlation, cosine and opposed signs of the pulls of two methods."""
    both_pull = (first != 0) & (second != 0)
    opposed = float((first.sign() != second.sign())[both_pull].double().mean()) if both_pull.any() else 0.0
    centre = lambda x: x - x.mean()
    cosine = lambda a, b: float((a @ b) / (a.norm() * b.norm())) if a.any() and b.any() else None
    pearson, spearman = (cosine(centre(a), centre(b)) for a, b in ((first, second), (ranks(first), ranks(second))))
    return PullAgreement(pearson, spearman, cosine(first, second), opposed, tuple(tokens))


def ranks(x: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Return the rank of each value; equal values share their mean rank."""
    _, value_index, count = x.unique(return_inverse=True, return_counts=True)
    return (count.cumsum(0) - (count - 1) / 2)[value_index].double()


def most_different(
    first: Float[Tensor, " n"], second: Float[Tensor, " n"], limit: int
) -> list[tuple[int, float, float]]:
    """Return (n, own, other) for trained tokens n, in row-major order, whose pulls (scaled to RMS 1) differ most."""
    a, b = (x / x.square().mean().sqrt().clamp(min=torch.finfo(x.dtype).tiny) for x in (first, second))
    gaps, indices = (a - b).abs().topk(min(limit, len(a)))
    return [(int(i), float(a[i]), float(b[i])) for s, i in zip(gaps, indices, strict=True) if s > 1e-6]


def _token(batch: Batch, rows: Sequence[Mapping], spell: Callable, nth: int, first: float, second: float) -> Token:
    row, t = batch.mask.nonzero()[nth].tolist()
    ids = batch.ids[row, : rows[row]["tokens"]].tolist()
    context, continuation = ids[max(0, t - BEFORE) : t], ids[t + 1 : t + 1 + AFTER]
    return Token(rows[row]["index"], t, spell(context), spell(ids[t : t + 1]), spell(continuation), first, second)


def parse_method(text: str) -> Method | None:
    """Parse the repr of a method; None if it has parts that are not defined in `opd`."""

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
        method = value(ast.parse(text, mode="eval").body)
    except (ValueError, TypeError, SyntaxError):
        return None
    return method if isinstance(method, Method) else None
