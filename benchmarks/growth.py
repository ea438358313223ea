"""Growth of time and memory: of the head pass with N, V and k, and of an update with batch size and length."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.case import Case, Shape
from benchmarks.head import peak_in_new_process
from benchmarks.peers import naive, ours
from benchmarks.result import Result, Timed, in_turn, spread, versions
from benchmarks.update import ModelUpdate
from opd.head.head_pass import head_pass
from opd.head.inputs import FrozenOutputs, Hidden
from opd.head.vocabulary import Head, Vocabulary
from opd.losses.terms import Target
from opd.methods import METHODS
from opd.models import load as models
from opd.models.source import locate
from opd.models.student import Student
from opd.teachers.local import LocalTeacher

ARM = {"N, head pass": "ours", "N, naive": "naive"}  # curves whose memory is measured, too -> arm


@dataclass(frozen=True)
class Growth(Timed):
    """Settings of `python -m benchmarks growth`: the points of each curve, and the number of rounds."""

    tokens: tuple[int, ...] = (512, 1024, 2048, 4096)
    """Values of N, the number of tokens."""
    vocabulary: tuple[int, ...] = (8192, 16384, 32768)
    """Values of V, the vocabulary size, at the second N."""
    width: int = 256
    """Hidden width H of both models."""
    k: tuple[int, ...] = (1, 16, 64)
    """Values of k of vopd-topk, at the second N and V."""
    batch: tuple[int, ...] = (8, 16, 32)
    """Numbers of rollouts in an update of the embedded student."""
    length: tuple[int, ...] = (50, 100, 200)
    """Response lengths of an update in tokens, at the second batch size."""
    chunk: int = 256
    """Tokens per chunk of the head pass."""
    rounds: int = 3
    """Rounds, after a warm-up round."""


def measured(growth: Growth) -> Result:
    """Measure each point: seconds, and peak extra memory for the curves of the head pass over N."""
    torch.set_num_threads(growth.threads)
    n, v = growth.tokens[1], growth.vocabulary[1]
    shape = lambda tokens, size: Shape(
        tokens=tokens, vocabulary=size, student=growth.width, teacher=growth.width, chunk=growth.chunk
    )
    points: dict[tuple[str, int], tuple[Callable[[], object], Callable[[], object]]] = {}
    for tokens in growth.tokens:
        points["N, head pass", tokens] = _head(shape(tokens, v), ours)
        points["N, naive", tokens] = _head(shape(tokens, v), naive)
    for size in growth.vocabulary:
        points["V, head pass", size] = _head(shape(n, size), ours)
    for k in growth.k:
        points["k, vopd-topk", k] = _topk(growth, n, v, k)
    update = _embedded()
    for batch in growth.batch:
        points["batch, update", batch] = update.of(batch, growth.length[1])
    for length in growth.length:
        points["length, update", length] = update.of(growth.batch[1], length)
    rows_, measurements = [], []
    for (curve, x), (run, clear) in points.items():
        seconds = in_turn({"": run}, rounds=growth.rounds, clock=growth.clock, clean_up=clear)[""]
        extra = peak_in_new_process(ARM[curve], shape(x, v)) if curve in ARM else None
        rows_.append((curve, f"{x}", spread(seconds, 3), "" if extra is None else f"{extra / 2**20:.0f}"))
        measurements.append({"curve": curve, "x": x, "seconds": seconds, "peak_bytes": extra})
    packages = versions("opd", "torch")
    notes = (
        f"N={n} V={v} H={growth.width} chunk {growth.chunk} but for what grows; an update is that of embedded:student, "
        f"{growth.length[1]} tokens a response, {growth.batch[1]} responses, but for what grows",
        "peak memory is that of a fresh process, over what it held before",
        f"medians [min, max] of {growth.rounds} rounds, {growth.clock} clock; {growth}; {packages}",
    )
    numbers = {"growth": vars(growth), "versions": packages, "points": measurements}
    return Result("growth", ("curve", "at", "seconds", "peak MB"), tuple(rows_), notes, numbers)


def _head(shape: Shape, arm: Callable) -> tuple[Callable[[], object], Callable[[], object]]:
    case = Case.of(shape)
    return (lambda: arm(case, shape)), case.take_gradients


def _topk(growth: Growth, n: int, v: int, k: int) -> tuple[Callable[[], object], Callable[[], object]]:
    case = Case.of(Shape(tokens=n, vocabulary=v, student=growth.width, teacher=growth.width))
    method, vocabulary = METHODS["vopd-topk"](k=k), Vocabulary(v, chunk_bytes=growth.chunk * v * 6)
    student = Hidden(case.states, Head(case.weight))
    frozen = FrozenOutputs(Hidden(case.teacher_states, Head(case.teacher_weight)))
    target = (Target(torch.ones(n), None, None),)
    return (lambda: head_pass(method, student, frozen, case.ids, target, vocabulary)[0].backward()), case.take_gradients


def _embedded() -> ModelUpdate:
    """Return updates of the embedded pair."""
    cpu = torch.device("cpu")
    student, teacher = (
        models.load(locate(f"embedded:{name}", field=name), field=name, dtype=torch.float32, device=cpu)
        for name in ("student", "teacher")
    )
    return ModelUpdate(Student(student), LocalTeacher(teacher.requires_grad_(False), to=cpu), size=100, device=cpu)
