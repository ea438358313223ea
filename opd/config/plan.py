"""A run whose settings are resolved: `resolved(Train(...)) -> Plan`, once, at the top of `train` and of the doctor."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from opd.config.model_names import ModelName, parse
from opd.config.train import Train
from opd.core.errors import Refusal, at_least
from opd.core.types import Column
from opd.losses.reductions import Constant, SequenceMean, TokenMean
from opd.losses.surrogates import Reinforce, TruncatedRatio
from opd.losses.terms import PolicyGradient, Term
from opd.losses.token_weights import TruncatedImportance
from opd.methods.method import Method

CONTEXT = """{prompt}

Here is a correct solution:

{context}

Now answer the question in your own words."""


@dataclass(frozen=True)
class Plan:
    """The settings of a run, and what follows from them together with the method."""

    config: Train  # `data` reads --prompts with the run's seed
    method: Method  # with the run's overrides of rollouts, reduction and importance cap
    teachers: Mapping[str, ModelName]  # by route name; "" is --teacher, which routes make optional
    judge: ModelName | None  # None: --teacher, where the method asks a judge
    context: str  # privileged context that only the teacher reads: a column's name, "peer", or "" for none
    context_template: str  # of the teacher's prompt, with {prompt} and {context}

    def names(self) -> list[str]:
        """Return the names of the student and of its teachers."""
        return [self.config.student, *map(str, self.teachers.values())]


def teacher_flag(name: str) -> str:
    """Return what stands before a teacher's model on the command line, from its route name."""
    return f"--route {name}=" if name else "--teacher "


def resolved(config: Train) -> Plan:
    """Return the plan of a run.  Raises Refusal for routes, models or overrides that cannot be read."""
    at_least(config, per_prompt=0, updates=0)
    config = replace(config, data=replace(config.data, source=config.prompts, seed=config.seed))
    default = config.method.teacher
    weights = config.teacher or (default.weights if default and not config.route else "")
    teachers = {"": weights} if weights or not config.route else {}
    for route in config.route:
        name, equals, model = route.partition("=")
        if not (name and equals and model) or name in teachers:
            raise Refusal(f"--route {route}: write NAME=MODEL, each name once")
        teachers[name] = model
    return Plan(
        config,
        _method(config),
        MappingProxyType({name: parse(model, flag=teacher_flag(name)) for name, model in teachers.items()}),
        parse(config.judge, flag="--judge ") if config.judge else None,
        config.context or (default.context if default else ""),
        config.context_template or (default.template if default else "") or CONTEXT,
    )


def _method(config: Train) -> Method:
    """Return the method with the run's overrides."""
    policy = config.method.rollouts
    per_prompt, updates = config.per_prompt or policy.per_prompt, config.updates or policy.updates
    policy = replace(policy, per_prompt=per_prompt, updates=updates)
    reductions: dict[str, Column] = {
        "method": config.method.reduction,
        "token": TokenMean(),
        "sequence": SequenceMean(),
        "constant": Constant(config.sampling.max_new_tokens),
    }
    try:
        terms = tuple(_capped(config, term) for term in config.method.terms)
        return replace(config.method, terms=terms, rollouts=policy, reduction=reductions[config.reduction])
    except ValueError as error:
        raise Refusal(str(error)) from error


def _capped(config: Train, term: Term) -> Term:
    """Add --importance-cap to a policy-gradient term that has no ratio to the sampler; return others unchanged."""
    cap = config.importance_cap or (0.0 if config.speaker.engine == "hf" else 2.0)
    if not cap or not isinstance(term, PolicyGradient) or term.corrected():
        return term
    if term.surrogate == Reinforce():
        return replace(term, surrogate=TruncatedRatio(cap))
    return replace(term, weights=(*term.weights, TruncatedImportance(cap)))
