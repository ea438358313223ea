"""Gradients of a rollout's token losses, at fixed contexts: their exact variance over the next token, and their means.

`measure_rollout` gives both for several methods at once.  `opd.analysis.variance` says why it is exact and cheap.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from opd.analysis.exact import slopes
from opd.config.commands import Variance
from opd.core.errors import Refusal
from opd.head.inputs import Hidden
from opd.head.sweep import blocks
from opd.head.vocabulary import Head, Vocabulary
from opd.losses.divergences import kl
from opd.losses.terms import Positions
from opd.methods import METHODS
from opd.methods.method import Method
from opd.models.batching import Rows
from opd.models.forward import final_states
from opd.models.load import head
from opd.models.student import Student
from opd.training.prompt_shares import Processes

ROUNDING = 1e-4  # relative; two mean gradients in the logits that differ by less count as equal


@dataclass
class RolloutSums:
    """Sums over the contexts of a rollout, for a method."""

    variance: float = 0.0  # total variance in the parameters, an unbiased estimate
    logits: float = 0.0  # total variance in the logits, exact
    raised: float = 0.0  # number of contexts where the variance in the logits is above that of `opd`


@dataclass
class Means:
    """Mean gradients summed over contexts: that of `opd-full`, and each method's difference to it beyond rounding."""

    sums: dict[tuple[str, str], Tensor] = field(default_factory=dict)  # by method and parameter

    def add(self, method: str, gradients: Mapping[str, Tensor | None]) -> None:
        """Add the gradients of some contexts, keyed by parameter name."""
        for name, x in gradients.items():
            if x is not None:
                key = method, name
                self.sums[key] = self.sums[key].add_(x) if key in self.sums else x.clone()

    def whole(self, processes: Processes, trained: Mapping[str, Tensor]) -> "Means":
        """Return the sums over all processes; a gradient that a process lacks is zero there."""
        keys = sorted(set(processes.gather(list(self.sums))))
        sums = {key: torch.zeros_like(trained[key[1]]) for key in keys} | self.sums
        return Means({key: processes.add(sums[key]) for key in keys})

    def compare(self, method: str) -> tuple[float, float]:
        """Return the squared norm of a method's mean gradient, and its cosine with that of `opd-full`."""
        dot = lambda a, b: sum(float((a[n] * b[n]).sum(dtype=torch.float64)) for n in a.keys() & b.keys())
        gradient = lambda method: {name: x for (whose, name), x in self.sums.items() if whose == method}
        full, difference = gradient("opd-full"), {} if method == "opd-full" else gradient(method)
        full2, cross = dot(full, full), dot(full, difference)
        norm2 = full2 + 2 * cross + dot(difference, difference)
        return norm2, (full2 + cross) / math.sqrt(full2 * norm2) if full2 * norm2 > 0 else math.nan


def directions(trained: Mapping[str, Tensor], config: Variance, rollout: int) -> Iterator[dict[str, Tensor]]:
    """Yield directions of independent random signs, a sign per weight; a function of (seed, rollout)."""
    for i in range(config.directions):
        device = next(iter(trained.values())).device
        key = int(np.random.SeedSequence([config.seed, rollout, i]).generate_state(1, np.uint64)[0] >> 1)
        noise = torch.Generator(device).manual_seed(key)
        yield {n: torch.empty_like(p).bernoulli_(0.5, generator=noise).mul_(2).sub_(1) for n, p in trained.items()}


def measure_rollout(
    student: Student,
    response_rows: Rows,
    teacher: Hidden,
    vocabulary: Vocabulary,
    trained: Mapping[str, Tensor],
    sign_directions: Iterable[Mapping[str, Tensor]],
    methods: Mapping[str, Method],
    means: Means,
) -> tuple[dict[str, RolloutSums], float]:
    """Measure the contexts of a rollout: return each method's sums and the summed reverse KL (nats); add to `means`.

    `sign_directions` are directions d with E[d d'] = I.  The keys of `trained` are the parameter names of `student`.
    `methods` contains `opd` and `opd-full`.
    """
    lm_head, ids = head(student.model), vocabulary.canonical(response_rows.ids[response_rows.trained])
    parts = ("weight", "bias")
    head_parameters = {part: n for part in parts for n, p in trained.items() if p is getattr(lm_head, part)}
    derivatives = []
    for direction in sign_directions:
        inside = {part: direction[n] for part, n in head_parameters.items()}
        derivatives.append((forward_derivative(student, response_rows, trained, direction), inside))
    states = final_states(student.model, response_rows)
    out, summed_kl = {name: RolloutSums() for name in methods}, 0.0
    gradients_by_method: dict[str, Tensor] = {}  # method -> gradient of its mean loss in the states
    for part in blocks(len(ids), vocabulary.chunk(len(ids), 16 * vocabulary.size * states.itemsize)):
        leaf = states.detach()[part].requires_grad_()
        student_logp = _logp(vocabulary, lm_head, {"states": leaf})
        logp = student_logp.detach()
        p = logp.exp()
        with torch.no_grad():
            q = _logp(vocabulary, teacher.head, {"states": teacher.states[part]})
        positions = Positions(ids[part], logp, q)
        summed_kl += float(kl(logp, q).sum())
        tangents = [_tangent(vocabulary, lm_head, leaf.detach(), x[part], inside) for x, inside in derivatives]
        full = slopes(METHODS["opd-full"](), positions).mean(p)
        opd_variance = slopes(METHODS["opd"](), positions).variance(p)
        for name, method in methods.items():
            s = slopes(method, positions)
            logits = s.variance(p)
            out[name].variance += sum(float(s.spread(p, x).sum()) for x in tangents) / len(tangents)
            out[name].logits += float(logits.sum())
            out[name].raised += float((logits > (1 + ROUNDING) * opd_variance).sum())
            mean = s.mean(p) if name == "opd-full" else s.mean(p) - full
            if name != "opd-full" and mean.norm() <= ROUNDING * full.norm():
                continue
            inputs = [leaf, *(getattr(lm_head, which) for which in head_parameters)]
            state_gradient, *head_gradients = torch.autograd.grad(student_logp, inputs, mean, retain_graph=True)
            means.add(name, dict(zip(head_parameters.values(), head_gradients, strict=True)))
            gradients_by_method.setdefault(name, torch.zeros_like(states))[part] = state_gradient
    for name, state_gradient in gradients_by_method.items():
        inputs = list(trained.values())
        gradients = torch.autograd.grad(states, inputs, state_gradient, retain_graph=True, allow_unused=True)
        means.add(name, dict(zip(trained, gradients, strict=True)))
    return out, summed_kl


@torch.no_grad()
def forward_derivative(
    student: Student, response_rows: Rows, trained: Mapping[str, Tensor], direction: Mapping[str, Tensor]
) -> Float[Tensor, "N H"]:
    """Return the derivative [N, H] of the final hidden states along a direction of the parameters (forward mode).

    Raises Refusal if the model has an operation without forward-mode derivative.
    """
    states = lambda values: functional_call(_States(student.model), values, (response_rows,))
    try:
        with sdpa_kernel(SDPBackend.MATH), _padding_frozen(student.model):  # fused attention has no forward mode
            return jvp(states, ({n: p.detach() for n, p in trained.items()},), (dict(direction),))[1]
    except NotImplementedError as error:
        raise Refusal(
            f"--student: {type(student.model).__name__} has an operation that torch cannot differentiate in forward "
            f"mode: {str(error).splitlines()[0]}"
        ) from error


@contextlib.contextmanager
def _padding_frozen(model: nn.Module) -> Iterator[None]:
    """Exclude the padding token's embedding from the derivative while the context is active.

    `padding_idx` freezes this embedding in reverse mode only, so forward mode needs a hook.  The token occurs in
    normal text: chat models pad with the token that ends each turn.
    """

    def still(module: nn.Embedding, args: tuple[Tensor, ...], out: Float[Tensor, "B L H"]) -> Float[Tensor, "B L H"]:
        assert module.padding_idx is not None
        return torch.where(args[0].eq(module.padding_idx)[..., None], out.detach(), out)

    padded = [m for m in model.modules() if isinstance(m, nn.Embedding) and m.padding_idx is not None]
    with contextlib.ExitStack() as hooks:
        for module in padded:
            hooks.enter_context(module.register_forward_hook(still))
        yield


class _States(nn.Module):
    """A student up to its final hidden states, with the parameter names of `Student`."""

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, response_rows: Rows) -> Float[Tensor, "N H"]:
        return final_states(self.model, response_rows)


def _logp(vocabulary: Vocabulary, lm_head: Head, values: Mapping[str, Tensor]) -> Float[Tensor, "n V"]:
    """Return log-probs [n, V], differentiable in `values`: the states and possibly the head's weight and bias."""
    raw = values["states"] @ values.get("weight", lm_head.weight)[: vocabulary.size].T
    bias = values.get("bias", lm_head.bias)
    return vocabulary.logp(raw if bias is None else raw + bias[: vocabulary.size], replace(lm_head, bias=None))


@torch.no_grad()
def _tangent(
    vocabulary: Vocabulary,
    lm_head: Head,
    states: Float[Tensor, "n H"],
    state_direction: Float[Tensor, "n H"],
    inside: dict,
) -> Float[Tensor, "n V"]:
    """Return the derivative of the log-probs [n, V] when states and trained head parameters move along a direction."""
    values = {"states": states} | {part: getattr(lm_head, part).detach() for part in inside}
    return jvp(lambda x: _logp(vocabulary, lm_head, x), (values,), ({"states": state_direction} | inside,))[1]
