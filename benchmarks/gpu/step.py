"""The device, and a training step on it: bf16 against fp32, memory against the estimate, speed against the products."""

import gc
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.case import Case
from benchmarks.gpu.check import CheckRow
from benchmarks.gpu.size import CheckSize, random_model
from benchmarks.peers import MatmulFloor
from benchmarks.result import in_turn, peak, versions
from benchmarks.run import Trained, opened
from opd.core.types import Batch, Rollout
from opd.methods.rollout_policies.base import NOTHING
from opd.models.load import backbone
from opd.rollouts.batch import collate
from opd.training.doctor.memory import bytes_text, estimate
from opd.training.run_log import lines
from opd.training.setup import planned
from opd.training.trainer import Trainer

BF16_LOSS, BF16_GRADIENT = 0.02, 0.1  # relative differences from fp32
MEMORY = (0.8, 2.0)  # estimate over measured peak
MATMUL_SHARE = 0.25  # least share of a step's time that its products take at the speed of a plain matmul


def device(cpu: bool) -> Iterator[CheckRow]:
    """Show devices and versions.  A GPU needs Triton, without which its head pass is slow."""
    if cpu:
        yield CheckRow("device", f"{torch.get_num_threads()} threads", what="CPU, tiny sizes")
    for i in range(0 if cpu else torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(i)
        what = f"{facts.name}, compute capability {facts.major}.{facts.minor}"
        yield CheckRow("device", bytes_text(facts.total_memory), what=what)
    for name, number in versions("opd", "torch", "transformers", "accelerate").items():
        yield CheckRow(name, number)
    fine = cpu or find_spec("triton") is not None
    what = "" if fine else "pip install 'opd[gpu]'"
    yield CheckRow.judged("triton", versions("triton")["triton"], "", what, fine=fine)


def step(cpu: bool) -> Iterator[CheckRow]:
    """Train random models of real width: bf16 against fp32, memory against the estimate, speed against the products."""
    size = CheckSize.of(cpu)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        student, teacher = (random_model(folder / x, size, seed=i) for i, x in enumerate(("student", "teacher")))
        settings = Trained(student, teacher, "embedded:ledger-short", size.batch, size.new_tokens)
        exact = settings.run(folder / "fp32", "opd-full")
        trainer = opened(exact)
        rollouts = trainer.rollout_source.take(1, NOTHING, trainer.passes)
        loss, gradients = loss_and_gradients(trainer, rollouts)
        del trainer
        gc.collect()
        if not cpu:
            torch.cuda.empty_cache()
        trainer = opened(replace(exact, out=folder / "bf16", precision="bf16", teacher_precision="bf16"))
        yield from compared(loss_and_gradients(trainer, rollouts), (loss, gradients))
        del gradients
        yield memory(trainer, size)
        yield from speed(trainer, rollouts, size)


def loss_and_gradients(trainer: Trainer, rollouts: Sequence[Rollout]) -> tuple[float, dict[str, Tensor]]:
    """Return the loss of a batch and its gradients, in main memory, and clear them."""
    _, loss = forward_and_backward(trainer, rollouts)()
    student = trainer.session.student
    gradients = {name: p.grad.float().cpu() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    return loss, gradients


def forward_and_backward(trainer: Trainer, rollouts: Sequence[Rollout]) -> Callable[[], tuple[Batch, float]]:
    """Return a function that runs all of a training step between rollouts and optimizer."""
    batch = collate(rollouts, stop_token="train", truncated="train", seed=0, step=1)
    targets = trainer.method.prepare(batch)
    return lambda: trainer.passes.run(batch, rollouts, targets)


def compared(found: tuple[float, dict[str, Tensor]], exact: tuple[float, dict[str, Tensor]]) -> Iterator[CheckRow]:
    """Compare loss and gradients in bf16 with those in fp32."""
    (loss, gradients), (exact_loss, exact_gradients) = found, exact
    assert gradients.keys() == exact_gradients.keys()
    finite = math.isfinite(loss) and all(bool(x.isfinite().all()) for x in gradients.values())
    yield CheckRow.judged("bf16 step", f"{loss:.4f}", "finite", "loss in nats, and all gradients", fine=finite)
    error = abs(loss - exact_loss) / abs(exact_loss)
    what = "from fp32's, relative"
    yield CheckRow.judged("bf16 loss", f"{error:.1e}", f"< {BF16_LOSS}", what, fine=error < BF16_LOSS)
    square = lambda tensors: sum(float(x.double().square().sum()) for x in tensors)
    difference = square(gradients[name] - x for name, x in exact_gradients.items())
    error = (difference / square(exact_gradients.values())) ** 0.5
    yield CheckRow.judged("bf16 gradient", f"{error:.1e}", f"< {BF16_GRADIENT}", what, fine=error < BF16_GRADIENT)


def memory(trainer: Trainer, size: CheckSize) -> CheckRow:
    """Measure the peak memory of two training steps beside the loaded models, and compare it with the estimate."""
    session = trainer.session
    row = max(len(p.ids) for p in session.prompts.first(size.batch)) + size.new_tokens
    setup = planned(session.plan, processes=1, device=session.accelerator.device, row=row)
    guess = estimate(setup).beside_weights()

    def steps() -> None:
        for number in (2, 3):  # the second of them has AdamW's states; step 1 also saves its rollouts
            trainer.step(number, NOTHING)

    if size.judged:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        loaded = torch.cuda.memory_allocated()
        steps()
        measured = torch.cuda.max_memory_allocated() - loaded
    else:
        measured = peak(steps)
    least, most = MEMORY
    found = guess / max(1, measured)
    what = f"of measured {bytes_text(measured)}: the doctor's {bytes_text(guess)}, beside the models"
    return size.timed("memory", f"{found:.2f}", f"{least} to {most}", what, fine=least < found < most)


def speed(trainer: Trainer, rollouts: Sequence[Rollout], size: CheckSize) -> Iterator[CheckRow]:
    """Time forward and backward beside their matrix products, and show the speed of the whole step."""
    tokens = sum(len(r.prompt_ids) + len(r.ids) for r in rollouts)
    trained = sum(len(r.ids) for r in rollouts)
    arms: dict[str, Callable[[], object]] = {
        "floor": products(trainer.session.plain().model, tokens, trained, size),
        "step": forward_and_backward(trainer, rollouts),
    }
    clean = trainer.session.student.zero_grad
    seconds = in_turn(arms, rounds=size.head.rounds, clock="wall", gpu=size.judged, clean_up=clean)
    share = statistics.median(a / b for a, b in zip(seconds["floor"], seconds["step"], strict=True))
    what = "of a step's forward and backward: its matrix products alone"
    yield size.timed("matmul share", f"{share:.2f}", f"> {MATMUL_SHARE}", what, fine=share > MATMUL_SHARE)
    each = trained / statistics.median(seconds["step"])
    yield CheckRow("update", f"{each:.0f} tokens/s", what="both models' forward, head, student's backward")
    row = lines(trainer.run.folder / "perf.jsonl", "seconds")[-1]
    yield CheckRow("rollouts", f"{row['tokens_per_s.rollout']:.0f} tokens/s", what=f"--engine hf, {len(rollouts)} rows")


def products(model: PreTrainedModel | PeftModel, tokens: int, trained: int, size: CheckSize) -> Callable[[], None]:
    """Return a function that runs the matrix products of a step: teacher and student have the shapes of `model`."""
    layers = [m for m in backbone(model).modules() if isinstance(m, nn.Linear)]
    draw = lambda *shape: torch.randn(*shape, device=size.device, dtype=torch.bfloat16)
    factors = {m.weight.shape: (draw(*m.weight.shape), draw(tokens, m.in_features)) for m in layers}
    gradients = {shape: draw(tokens, shape[0]) for shape in factors}
    shape = replace(size.head, tokens=trained, dtype="bfloat16")
    case, head_floor = Case.of(shape), MatmulFloor()

    def run() -> None:
        for layer in layers:
            (weight, states), gradient = factors[layer.weight.shape], gradients[layer.weight.shape]
            for _ in ("student", "teacher"):
                states @ weight.T
            gradient @ weight
            gradient.T @ states
        head_floor(case, shape)

    return run
