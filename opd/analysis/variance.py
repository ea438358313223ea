"""Gradient variance of each estimator on two real models, `variance(Variance(...)) -> Variances`.

A context is a prompt with the first tokens of the student's response.  At a fixed context, the next token y ~ p is
random, and so is the gradient g_y of its token loss in all trained parameters.  Its total variance is tr Cov_y(g_y).
Two facts make it cheap to estimate:

- For a direction d of independent random signs, E_d[Var_y(g_y . d)] = tr Cov_y(g_y), because E[d d'] = I.
- g_y . d is the derivative of the token loss along d.  A forward-mode pass gives the derivative of log p along d at all
  positions of a rollout.  From it follows g_y . d for every y of the vocabulary and every method (`exact.slopes`).
  So the variance over y is an exact sum, and methods are compared along the same directions, at the same contexts.

Each rollout gives an unbiased estimate of the sum of the total variance over its contexts.  Rollouts have independent
prompts, tokens and directions, so their estimates are independent.  Intervals are over rollouts and include the noise
of all three.  Means over y are exact too: `cosine` and `noise` use the mean gradient at these contexts.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from rich.console import Console
from rich.progress import track

from opd.analysis.exact import dependence_reason
from opd.analysis.gradient_moments import Means, RolloutSums, directions, measure_rollout
from opd.config.checks import check_vocabulary
from opd.config.commands import Variance
from opd.config.plan import resolved
from opd.config.train import Train
from opd.core.errors import Refusal, renamed
from opd.core.intervals import Estimate, ratio
from opd.core.processes import is_main_process, num_processes
from opd.core.types import Rollout
from opd.head.inputs import Hidden
from opd.methods import METHODS
from opd.methods.method import Method
from opd.methods.rollout_policies.on_policy import OnPolicy
from opd.models.batching import rows
from opd.rollouts.collector import RolloutRequest
from opd.training.build import open_session
from opd.training.prompt_shares import Processes
from opd.training.session import Session

Measured = tuple[int, dict[str, RolloutSums], float]  # of a rollout: contexts, sums of each method, reverse KL (nats)


@dataclass(frozen=True)
class MethodVariance:
    """Results of a method over all contexts.  Variances are those of the gradient of a token's loss."""

    variance: Estimate  # total variance in the parameters, mean over contexts
    ratio: Estimate  # that variance / the variance of `opd`, paired by rollout
    logits: Estimate  # the same ratio for gradients in the logits, which involves no random directions
    raised: float  # share of contexts where the variance in the logits is above that of `opd`
    noise: float  # variance / squared norm of the mean gradient at these contexts
    cosine: float  # between that mean gradient and the mean gradient of `opd-full`


@dataclass(frozen=True)
class Variances:
    """Results of all methods, and the size of the sample that they come from."""

    methods: Mapping[str, MethodVariance]
    rollouts: int
    contexts: int
    parameters: int  # number of selected weights (scalars)
    reverse_kl: float  # nats per context
    largest: float  # largest share of a single rollout in the variance of `opd`; if large, intervals are too narrow


def variance(config: Variance, methods: Mapping[str, Method]) -> Variances:
    """Generate rollouts and estimate the gradient variance of each method at their contexts.

    `opd` and `opd-full` are always measured.  Several connected processes share the rollouts; all of them must call
    this function.  Raises Refusal for errors that the user can fix.
    """
    config.check()
    for name, method in methods.items():
        if reason := dependence_reason(method):
            raise Refusal(f"--methods {name}: {reason}, so its noise is not that of one token; leave it out")
        if method.models() - {"teacher_logp"}:
            raise Refusal(f"--methods {name}: compares with a third model, and here are two; leave it out")
    methods = {name: METHODS[name]() for name in ("opd", "opd-full")} | dict(methods)
    session = open_session(resolved(replace(_run(config), method=methods["opd"])))
    for name, method in methods.items():
        with renamed({"--k": f"--methods {name}: k"}):
            check_vocabulary(method, config.sampling, session.vocabulary.size)
    student = session.plain()
    trained = {n: p for n, p in student.named_parameters() if p.requires_grad and re.search(config.parameters, n)}
    if not trained:
        some = ", ".join(list(dict(student.named_parameters()))[:3])
        raise Refusal(f"--parameters {config.parameters}: no trained parameter has such a name; there are {some}, ...")
    processes, means, measured = Processes.of(session.accelerator), Means(), list[Measured]()
    console = Console(stderr=True, quiet=not is_main_process())
    for rollout in track(_rollouts(config, session, processes), "rollouts", console=console, transient=True):
        mask = [[True] * len(rollout.ids)]
        response_rows = rows([rollout], mask, teacher=False, device=student.model.device)
        teacher = session.teachers[rollout.teacher].hidden([rollout], mask)
        if not isinstance(teacher, Hidden):
            raise Refusal(
                f"--teacher {config.teacher}: gives log-probs of some tokens, and the exact sum needs them all"
            )
        signs, vocabulary = directions(trained, config, rollout.index), session.vocabulary
        sums, divergence = measure_rollout(student, response_rows, teacher, vocabulary, trained, signs, methods, means)
        measured.append((len(rollout.ids), sums, divergence))
    means = means.whole(processes, trained)
    return _results(processes.gather(measured), means, methods, sum(p.numel() for p in trained.values()))


def _rollouts(config: Variance, session: Session, processes: Processes) -> list[Rollout]:
    """Generate this process's share of the rollouts."""
    part = processes.share(config.rollouts)
    prompts = session.prompts.batch(1, config.rollouts)
    request = RolloutRequest(
        prompts=[prompts[i] for i in part],
        policy=OnPolicy(),
        sampling=config.sampling,
        seed=config.seed,
        step=1,
        first=part.start,
    )
    return session.collector.collect(request, lambda text, prompt: 0.0)


def _results(measured: Sequence[Measured], means: Means, methods: Iterable[str], parameters: int) -> Variances:
    """Return the results of all methods from what was measured on each rollout."""
    lengths = [float(length) for length, _, _ in measured]
    count = sum(lengths)
    column = lambda name, what: [getattr(sums[name], what) for _, sums, _ in measured]
    out = {}
    for name in methods:
        norm2, cosine = means.compare(name)
        variance = ratio(column(name, "variance"), lengths)
        out[name] = MethodVariance(
            variance=variance,
            ratio=ratio(column(name, "variance"), column("opd", "variance")),
            logits=ratio(column(name, "logits"), column("opd", "logits")),
            raised=sum(column(name, "raised")) / count,
            noise=variance.value * count**2 / norm2 if norm2 else math.nan,
            cosine=cosine,
        )
    return Variances(
        out,
        rollouts=len(measured),
        contexts=int(count),
        parameters=parameters,
        reverse_kl=sum(kl for _, _, kl in measured) / count,
        largest=max(column("opd", "variance")) / max(sum(column("opd", "variance")), torch.finfo().tiny),
    )


def _run(config: Variance) -> Train:
    """Return the training configuration with which the session is opened."""
    return Train(
        student=config.student,
        teacher=config.teacher,
        prompts=config.prompts,
        data=replace(config.data, source=config.prompts, seed=config.seed),
        sampling=config.sampling,
        batch=num_processes(),  # nothing reads it; a session needs a multiple of the number of processes
        precision="fp32",
        teacher_precision="fp32",
        chunk_mb=config.chunk_mb,
        seed=config.seed,
        trust_remote_code=config.trust_remote_code,
    )
