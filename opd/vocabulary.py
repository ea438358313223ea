"""From hidden states to per-token numbers: the only place that sees the vocabulary, and the only shift.

`head_pass` walks over chunks of tokens: both models' logits, everything per token, the loss, and its gradient while the
chunk is alive (gradient in forward).  Matmuls are the minimum, 2NV(H_S + H_T) forward and 4NVH_S backward; no tensor
of [N, V] exists for either model.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opd.divergences import kl
from opd.method import Method, Positions, Target

GONE = -1e30  # logit of an id that a merged class stands for: probability 0, and still finite


@dataclass(frozen=True)
class Head:
    """What turns a final hidden state into logits: z = softcap(scale * (W h + b))."""

    weight: Float[Tensor, "V H"]
    bias: Float[Tensor, " V"] | None = None
    scale: float = 1.0
    softcap: float = 0.0  # 0: none; else z -> softcap * tanh(z / softcap), Gemma 2, arXiv:2408.00118


@dataclass(frozen=True)
class Vocabulary:
    """How both models' logits become comparable distributions."""

    size: int  # ids both models have: rows beyond are cut from both
    temperature: float = 1.0  # divides both models' logits, gradient included
    stop: tuple[int, ...] = ()  # ids merged into one class, at every position, under the first of them
    chunk_bytes: int = 256 << 20  # of logits and what is computed from them, bytes

    def chunk(self, dtype: torch.dtype) -> int:
        """Tokens a chunk holds: about eight [n, V] tensors are alive at its widest."""
        return max(1, self.chunk_bytes // (8 * self.size * dtype.itemsize))

    def canonical(self, ids: Int[Tensor, "*N"]) -> Int[Tensor, "*N"]:
        """Ids with every member of the stop class under the class's id."""
        if len(self.stop) < 2:
            return ids
        return torch.where(torch.isin(ids, torch.tensor(self.stop, device=ids.device)), self.stop[0], ids)

    def logp(self, raw: Float[Tensor, "N V"], head: Head) -> Float[Tensor, "N V"]:
        """Normalised log-probs of W h + b; differentiable."""
        z = raw if head.scale == 1 else raw * head.scale
        if head.softcap:
            z = torch.tanh(z / head.softcap) * head.softcap
        if self.temperature != 1:
            z = z / self.temperature
        if len(self.stop) > 1:
            members = torch.tensor(self.stop, device=z.device)
            whole = z[:, members].logsumexp(-1, keepdim=True)
            z = z.index_fill(-1, members[1:], GONE).index_copy(-1, members[:1], whole)
        return z.log_softmax(-1)


@dataclass(frozen=True)
class Hidden:
    """One model's final hidden states at the trained tokens, and its head."""

    states: Float[Tensor, "N H"]  # state n predicts token n
    head: Head


@dataclass(frozen=True)
class Columns:
    """Per-token numbers of a head pass, flat, detached."""

    student_logp: Float[Tensor, " N"]
    student_entropy: Float[Tensor, " N"]
    teacher_logp: Float[Tensor, " N"]
    teacher_entropy: Float[Tensor, " N"]
    reverse_kl: Float[Tensor, " N"]
    scores: tuple[Float[Tensor, " N"] | None, ...]  # reward - baseline at the sampled token, per term

    def named(self) -> Iterator[tuple[str, Float[Tensor, " N"]]]:
        """(name, column) of each; the scores as scores.0, scores.1, ..."""
        for f in fields(self):
            if f.name != "scores":
                yield f.name, getattr(self, f.name)
        yield from ((f"scores.{i}", s) for i, s in enumerate(self.scores) if s is not None)

    def cpu(self) -> "Columns":
        """The same numbers in main memory."""
        whole = {name: x.cpu() for name, x in self.named()}
        scores = tuple(whole.pop(f"scores.{i}", None) for i in range(len(self.scores)))
        return Columns(**whole, scores=scores)


def predictors(hidden: Float[Tensor, "B L H"], trained: Bool[Tensor, "B L"]) -> Float[Tensor, "N H"]:
    """The hidden states that predicted the marked tokens: one position to their left.  The only shift there is."""
    return hidden[:, :-1][trained[:, 1:]]


@torch.no_grad()
def measure(
    method: Method, student: Hidden, teacher: Hidden, ids: Int[Tensor, " N"], vocabulary: Vocabulary
) -> Columns:
    """All columns and the method's scores, a chunk at a time, without gradient."""
    chunks = _chunks(student, teacher, vocabulary.canonical(ids), vocabulary, live=False)
    return _join([_columns(method, at) for _, _, at in chunks], student, len(method.terms))


def head_pass(
    method: Method,
    student: Hidden,
    teacher: Hidden,
    ids: Int[Tensor, " N"],
    targets: tuple[Target, ...],
    vocabulary: Vocabulary,
) -> tuple[Float[Tensor, ""], Columns]:
    """The method's loss, differentiable in the student's states, head weight and bias; and the columns."""
    out: list[Columns] = []
    loss = _HeadPass.apply(
        student.states,
        student.head.weight,
        student.head.bias,
        (method, student.head, teacher, vocabulary.canonical(ids), targets, vocabulary, out),
    )
    return loss, _join(out, student, len(method.terms))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _matmul_dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _chunks(
    student: Hidden, teacher: Hidden, ids: Tensor, vocabulary: Vocabulary, live: bool
) -> Iterator[tuple[slice, Tensor, Positions]]:
    """(tokens, W h + b of the student, both distributions), chunk by chunk."""
    low, t_low, size = _matmul_dtype(student.states), teacher.states.dtype, vocabulary.size
    weight, bias = student.head.weight[:size].to(low), student.head.bias
    t_weight, t_bias = teacher.head.weight[:size].to(t_low), teacher.head.bias
    n = vocabulary.chunk(_wide(low))
    for start in range(0, len(ids), n):
        rows = slice(start, start + n)
        with torch.no_grad(), torch.autocast(ids.device.type, enabled=False):
            raw = _logits(student.states[rows].to(low), weight, bias)
            t_raw = _logits(teacher.states[rows], t_weight, t_bias)
            q = vocabulary.logp(t_raw, teacher.head).to(raw.dtype)
            del t_raw
        with torch.set_grad_enabled(live), torch.autocast(ids.device.type, enabled=False):
            at = Positions(ids[rows], vocabulary.logp(raw.requires_grad_(live), student.head), q)
        yield rows, raw, at


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    raw = (hidden @ weight.T).to(_wide(hidden.dtype))
    return raw if bias is None else raw.add_(bias[: len(weight)])


def _columns(method: Method, at: Positions) -> Columns:
    p, q = at.student_logp.detach(), at.teacher_logp
    at = replace(at, student_logp=p)
    return Columns(
        student_logp=at.sampled(p),
        student_entropy=-(p.exp() * p).sum(-1),
        teacher_logp=at.sampled(q),
        teacher_entropy=-(q.exp() * q).sum(-1),
        reverse_kl=kl(p, q),
        scores=tuple(term.score(at) for term in method.terms),
    )


def _join(parts: list[Columns], student: Hidden, terms: int) -> Columns:
    none = student.states.new_zeros(0, dtype=_wide(student.states.dtype))
    if not parts:
        return Columns(none, none, none, none, none, (none,) * terms)
    flat = {f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Columns)[:-1]}
    scores = zip(*(part.scores for part in parts), strict=True)
    return Columns(**flat, scores=tuple(None if s[0] is None else torch.cat(s) for s in scores))


class _HeadPass(torch.autograd.Function):
    """The loss and, while each chunk is alive, its gradients; backward only scales them (they are stored unscaled)."""

    @staticmethod
    def forward(ctx, states, weight, bias, work):
        method, head, teacher, ids, targets, vocabulary, out = work
        student = Hidden(states, head)
        wide, low, size = _wide(states.dtype), _matmul_dtype(states), vocabulary.size
        w = weight[:size].to(low)
        d_states = torch.zeros_like(states)
        d_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        d_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and ctx.needs_input_grad[2] else None
        loss = states.new_zeros((), dtype=wide)
        for rows, raw, at in _chunks(student, teacher, ids, vocabulary, live=True):
            with torch.autocast(states.device.type, enabled=False):
                with torch.enable_grad():
                    part = method.loss(at, tuple(target[rows] for target in targets)).sum()
                (g,) = torch.autograd.grad(part, raw)
                out.append(_columns(method, at))
                del at
                loss += part.detach()
                if d_bias is not None:
                    d_bias[:size] += g.sum(0)
                g = g.to(low)
                d_states[rows] = (g @ w).to(states.dtype)
                if d_weight is not None:
                    d_weight[:size] += g.T @ states[rows].to(low)
        ctx.save_for_backward(d_states, d_weight, d_bias)
        return loss

    @staticmethod
    def backward(ctx, scale):
        scaled = [d if d is None else d * scale.to(d.dtype) for d in ctx.saved_tensors]
        return *scaled, None
