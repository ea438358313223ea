"""The head pass beside a naive one and the peers: `python -m opd.bench.head --help`.

One process runs every arm in turn, round after round, on the same tensors; ratios are medians over rounds, so that the
noise of a shared machine hits all arms alike.  Peak memory is measured in a fresh process for each arm.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from opd.estimators import Value
from opd.method import Match, Method, PolicyGradient, Target
from opd.vocabulary import Head, Heard, Hidden, Vocabulary, head_pass

Objective = Literal["vopd", "reverse-kl"]
METHODS = {"vopd": Method((PolicyGradient(baseline=Value()),)), "reverse-kl": Method((Match(),))}


@dataclass(frozen=True)
class Shape:
    """What is measured, and how often."""

    tokens: int = 1024
    """N."""
    vocabulary: int = 49152
    """V."""
    student: int = 576
    """Width of the student's hidden states."""
    teacher: int = 576
    """Width of the teacher's."""
    chunk: int = 512
    """Tokens of a chunk, of ours and of Liger's; TRL's are its own constants."""
    objective: Objective = "vopd"
    """Of ours and the naive ones; a peer computes what it can."""
    frozen: bool = False
    """No gradient for the head."""
    rounds: int = 15
    """Alternating rounds, after one to warm up."""
    threads: int = 1
    """Of torch, on a CPU."""
    clock: Literal["wall", "cpu"] = "wall"
    """cpu: seconds this process computed, without what others of a shared machine took; for one thread."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of hidden states and heads."""
    device: str = "cpu"
    """cpu or cuda."""
    arms: tuple[str, ...] = ()
    """Some of the arms; none: all."""
    error_tokens: int = 32
    """Tokens on which loss and gradients are compared with float64; 0: none."""
    memory: bool = True
    """Measure peak memory."""
    json: Path | None = None
    """Also write the numbers here."""
    peak_of: str = ""
    """Print the peak extra memory of one arm, in bytes, and nothing else."""


@dataclass(frozen=True)
class Case:
    """Tensors that every arm shares."""

    states: Tensor
    weight: Tensor
    teacher_states: Tensor
    teacher_weight: Tensor
    ids: Tensor

    @classmethod
    def of(cls, shape: Shape) -> "Case":
        """Random, the same for one shape; entropies of a few nats."""
        g = torch.Generator().manual_seed(0)
        dtype = getattr(torch, shape.dtype)
        make = lambda *size: torch.randn(*size, generator=g).to(shape.device, dtype)
        n, v = shape.tokens, shape.vocabulary
        states, weight = make(n, shape.student), make(v, shape.student) * (3 / shape.student**0.5)
        teacher, head = make(n, shape.teacher), make(v, shape.teacher) * (3 / shape.teacher**0.5)
        ids = torch.randint(v, (n,), generator=g).to(shape.device)
        return cls(states.requires_grad_(), weight.requires_grad_(not shape.frozen), teacher, head, ids)

    def some(self, n: int, dtype: torch.dtype) -> "Case":
        """The first tokens, by themselves."""
        move = lambda x, live: x.detach().to(dtype).clone().requires_grad_(live)
        return Case(
            move(self.states[:n], True),
            move(self.weight, self.weight.requires_grad),
            self.teacher_states[:n].to(dtype),
            self.teacher_weight.to(dtype),
            self.ids[:n],
        )

    def take_gradients(self) -> list[Tensor]:
        """Of states and head; removed here."""
        found = [x.grad for x in (self.states, self.weight) if x.grad is not None]
        self.states.grad = self.weight.grad = None
        return found


Run = Callable[[Case, Shape], Tensor]  # forward and backward of a sum over tokens; returns the loss


def ours(case: Case, shape: Shape) -> Tensor:
    """`opd.vocabulary.head_pass`."""
    width = case.weight.element_size() + case.teacher_weight.element_size()
    vocabulary = Vocabulary(shape.vocabulary, chunk_bytes=shape.chunk * shape.vocabulary * width)
    one = Target(torch.ones(len(case.ids), device=case.ids.device), None, None)
    student = Hidden(case.states, Head(case.weight))
    teacher = Hidden(case.teacher_states, Head(case.teacher_weight))
    loss, _ = head_pass(METHODS[shape.objective], student, Heard(teacher), case.ids, (one,), vocabulary)
    loss.backward()
    return loss.detach()


def ours_autograd(case: Case, shape: Shape) -> Tensor:
    """Ours without its closed forms: autograd in blocks of rows, what methods without one run."""
    with patch("opd.vocabulary.closed_form", lambda method: None):
        return ours(case, shape)


def naive(case: Case, shape: Shape) -> Tensor:
    """Plain autograd over log_softmax of both models."""
    p = _wide(case.states @ case.weight.T).log_softmax(-1)
    with torch.no_grad():
        q = _wide(case.teacher_states @ case.teacher_weight.T).log_softmax(-1)
    if shape.objective == "reverse-kl":
        loss = (p.exp() * (p - q)).sum()
    else:
        with torch.no_grad():
            kl = (p.exp() * (p - q)).sum(-1)
            advantage = _at(q - p, case.ids) + kl
        loss = -(advantage * _at(p, case.ids)).sum()
    loss.backward()
    return loss.detach()


def careful(case: Case, shape: Shape) -> Tensor:
    """Still [N, V], but logsumexp less gather, work in place and early frees; always vopd."""
    z = _wide(case.states @ case.weight.T)
    logp = _at(z, case.ids) - z.logsumexp(-1)
    with torch.no_grad():
        t = _wide(case.teacher_states @ case.teacher_weight.T)
        mass = t.logsumexp(-1)
        ratio = _at(t, case.ids) - mass - logp
        gap = torch.sub(z, t, out=t)
        p = torch.softmax(z, -1)
        kl = p.mul_(gap).sum(-1) - (_at(z, case.ids) - logp) + mass
        del t, gap, p
    loss = -((ratio + kl) * logp).sum()
    loss.backward()
    return loss.detach()


def trl_divergence(case: Case, shape: Shape) -> Tensor:
    """TRL's DistillationTrainer: reverse KL, recomputed in backward."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    args = (case.states, case.weight, None, case.teacher_states, case.teacher_weight, None, 1.0)
    loss = ChunkedDivergenceFunction.apply(*args)[0].sum()
    loss.backward()
    return loss.detach()


def trl_composed(case: Case, shape: Shape) -> Tensor:
    """vOPD out of TRL's own functions: log p, teacher's log q, and the KL, three sweeps."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    logp = lambda states, weight: ChunkedLogProbFunction.apply(
        states, weight, None, case.ids, 1.0, 32768, None, 1.0, ()
    )[0]
    student = logp(case.states, case.weight)
    with torch.no_grad():
        both = (case.states, case.weight, None, case.teacher_states, case.teacher_weight, None, 1.0)
        kl = ChunkedDivergenceFunction.apply(*both)[0]
        advantage = logp(case.teacher_states, case.teacher_weight) - student + kl
    loss = -(advantage * student).sum()
    loss.backward()
    return loss.detach()


def liger_chunked(case: Case, shape: Shape) -> Tensor:
    """Liger's chunked JSD at beta 1, the reverse KL, not compiled; its mean over tokens, scaled to the sum."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    leaf = LigerFusedLinearJSDLoss(0.0, 1.0, beta=1.0, compiled=False, chunk_size=shape.chunk)
    loss = leaf(case.states, case.weight, case.teacher_states, case.teacher_weight, case.ids) * len(case.ids)
    loss.backward()
    return loss.detach()


def liger_fused(case: Case, shape: Shape) -> Tensor:
    """Liger's fused linear JSD at beta 1, a Triton kernel."""
    from liger_kernel.ops.fused_linear_jsd import LigerFusedLinearJSDFunction

    args = (case.states, case.weight, case.teacher_states, case.teacher_weight, None, 1.0)
    loss = LigerFusedLinearJSDFunction.apply(*args) * len(case.ids)
    loss.backward()
    return loss.detach()


class Floor:
    """The products alone, in buffers made beforehand."""

    def __init__(self) -> None:
        self.buffers: list[Tensor] = []

    def __call__(self, case: Case, shape: Shape) -> Tensor:
        w, t, n = case.weight.detach(), case.teacher_weight, min(shape.chunk, len(case.ids))
        if not self.buffers:
            self.buffers = [
                w.new_empty(n, len(w)),
                t.new_empty(n, len(t)),
                w.new_empty(n, w.shape[1]),
                w.new_zeros(w.shape),
            ]
        z, tz, dh, dw = self.buffers
        for start in range(0, len(case.ids), n):
            h, th = case.states.detach()[start : start + n], case.teacher_states[start : start + n]
            k = len(h)
            torch.mm(h, w.T, out=z[:k])
            torch.mm(th, t.T, out=tz[:k])
            torch.mm(z[:k], w, out=dh[:k])
            if not shape.frozen:
                dw.addmm_(z[:k].T, h)
        return z.new_zeros(())


ARMS: dict[str, Run] = {
    "floor": Floor(),
    "ours": ours,
    "ours-autograd": ours_autograd,
    "naive": naive,
    "careful": careful,
    "trl-divergence": trl_divergence,
    "trl-composed": trl_composed,
    "liger-chunked": liger_chunked,
    "liger-fused": liger_fused,
}
ALWAYS: dict[str, Objective] = {
    "careful": "vopd",
    "trl-composed": "vopd",
    "trl-divergence": "reverse-kl",
    "liger-chunked": "reverse-kl",
    "liger-fused": "reverse-kl",
}


def main(shape: Shape) -> None:
    """Measure, print a table, perhaps write json."""
    torch.set_num_threads(shape.threads)
    if shape.peak_of:
        print(peak(shape))
        return
    if unknown := set(shape.arms) - set(ARMS):
        raise ValueError(f"--arms {' '.join(sorted(unknown))}: unknown; there are {', '.join(ARMS)}")
    case = Case.of(shape)
    arms, refused = runnable(case, shape)
    seconds = timed(arms, case, shape)
    rows: dict[str, dict[str, Any]] = {name: {"seconds": seconds[name]} for name in arms}
    for name in arms:
        if shape.memory and name != "floor":
            rows[name]["peak_bytes"] = fresh_peak(name, shape)
        if shape.error_tokens and name != "floor":
            rows[name]["error"] = errors(name, case, shape)
    report(rows, refused, shape)


def runnable(case: Case, shape: Shape) -> tuple[list[str], dict[str, str]]:
    """The arms that run, tried on one token's worth of work, and why the others do not."""
    fine, refused = [], {}
    tiny = case.some(4, case.states.dtype)
    for name in shape.arms or ARMS:
        try:
            Floor()(tiny, shape) if name == "floor" else ARMS[name](tiny, shape)
        except (ImportError, RuntimeError, TypeError) as error:
            refused[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        else:
            fine.append(name)
    return fine, refused


def timed(arms: list[str], case: Case, shape: Shape) -> dict[str, list[float]]:
    """Seconds of forward and backward, round by round."""
    clock = {"wall": time.perf_counter, "cpu": time.process_time}[shape.clock]
    out: dict[str, list[float]] = {name: [] for name in arms}
    for turn in track(range(shape.rounds + 1), "rounds", transient=True, console=Console(stderr=True)):
        for name in arms:
            _wait(shape)
            start = clock()
            ARMS[name](case, shape)
            _wait(shape)
            if turn:
                out[name].append(clock() - start)
            case.take_gradients()
    return out


def errors(name: str, case: Case, shape: Shape) -> dict[str, float]:
    """Relative distance of loss and gradients from float64 on the same inputs."""
    exact = case.some(shape.error_tokens, torch.float64)
    asked = replace(shape, objective=ALWAYS.get(name, shape.objective))
    wanted = [naive(exact, asked), *exact.take_gradients()]
    mine = case.some(shape.error_tokens, case.states.dtype)
    found = [ARMS[name](mine, shape), *mine.take_gradients()]
    distance = lambda x, y: float((x.double() - y).norm() / y.norm())
    return dict(zip(("loss", "states", "weight"), map(distance, found, wanted), strict=False))


def peak(shape: Shape) -> int:
    """Extra bytes at the widest moment of one arm's forward and backward, in this process."""
    case = Case.of(shape)
    if shape.device == "cpu":
        before = _status("VmRSS")
        ARMS[shape.peak_of](case, shape)
        return _status("VmHWM") - before
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ARMS[shape.peak_of](case, shape)
    return torch.cuda.max_memory_allocated() - before


def fresh_peak(name: str, shape: Shape) -> int:
    """`peak` in a process of its own."""
    same = ("tokens", "vocabulary", "student", "teacher", "chunk", "objective", "threads", "dtype", "device")
    flags = [flag for field in same for flag in (f"--{field}", str(getattr(shape, field)))]
    command = [sys.executable, "-m", "opd.bench.head", *flags, *(["--frozen"] if shape.frozen else [])]
    return int(subprocess.run([*command, "--peak-of", name], capture_output=True, text=True, check=True).stdout)


def report(rows: dict, refused: dict[str, str], shape: Shape) -> None:
    """The table on the terminal; the numbers, versions and arguments as json."""
    table = Table(title=f"head pass, N={shape.tokens} V={shape.vocabulary} H={shape.student}/{shape.teacher}")
    for column in ("arm", "seconds", "of floor", "ours faster by", "peak MB", "of naive's", "error: loss, dh, dW"):
        table.add_column(column, justify="left" if column == "arm" else "right", no_wrap=True)
    for name, row in rows.items():
        table.add_row(
            name,
            f"{statistics.median(row['seconds']):.3f}",
            _ratio(row, rows.get("floor")),
            _ratio(row, rows.get("ours")),
            f"{row['peak_bytes'] / 2**20:.0f}" if "peak_bytes" in row else "",
            f"1 / {rows['naive']['peak_bytes'] / row['peak_bytes']:.1f}"
            if "peak_bytes" in row and "naive" in rows
            else "",
            " ".join(f"{x:.0e}" for x in row.get("error", {}).values()),
        )
    console = Console(width=max(130, Console().width), markup=False, highlight=False)
    console.print(table)
    for name, reason in refused.items():
        console.print(f"{name} cannot run here: {reason}")
    versions = {name: _version(name) for name in ("opd", "torch", "trl", "liger-kernel", "triton")}
    console.print(f"medians [min, max] of {shape.rounds} alternating rounds; {shape}; {versions}")
    if shape.json is not None:
        whole = {
            "shape": vars(shape) | {"json": str(shape.json)},
            "versions": versions,
            "rows": rows,
            "refused": refused,
        }
        shape.json.write_text(json.dumps(whole, indent=1))


def _ratio(row: dict, base: dict | None) -> str:
    if base is None:
        return ""
    each = [a / b for a, b in zip(row["seconds"], base["seconds"], strict=True)]
    return f"{statistics.median(each):.2f} [{min(each):.2f}, {max(each):.2f}]"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def _status(field: str) -> int:
    """A line of /proc/self/status, in bytes; ru_maxrss would start from the parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) << 10


def _wait(shape: Shape) -> None:
    if shape.device != "cpu":
        torch.cuda.synchronize()


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _at(x: Tensor, ids: Tensor) -> Tensor:
    return x.gather(-1, ids[:, None])[:, 0]


if __name__ == "__main__":
    main(tyro.cli(Shape, description=__doc__))
