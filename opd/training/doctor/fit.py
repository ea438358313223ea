"""Say whether a run fits into memory: before its models load, after that, and on GPUs that are not here."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.console import Console

from opd.config.plan import Plan
from opd.core.errors import Refusal
from opd.training.doctor.alternatives import changes, fitting
from opd.training.doctor.findings import Finding, error, note, ok, warning
from opd.training.doctor.memory import bytes_of, bytes_text, estimate, free_bytes, weights
from opd.training.session import Session
from opd.training.setup import Setup, planned

TIGHT, OVER = 0.9, 1.25  # fractions of the free memory: a warning above TIGHT, an error above OVER
LARGEST = 8  # items that are printed


def require_room(setup: Setup, accelerator: Accelerator) -> None:
    """Refuse models whose weights alone do not fit into the free memory of a process; nothing is loaded for it.

    A collective operation, so that all processes refuse or none does.
    """
    measure = lambda x: sum(weights(x).values())
    needed, free = measure(setup), min(gather_object([free_bytes(accelerator.device)]))
    if needed <= free:
        return
    remedy = _remedy(fitting(setup, changes(setup), free, measure))
    parts = " and ".join(f"{bytes_text(size)} of --{name}" for name, size in weights(setup).items() if size)
    raise Refusal(
        f"--student {setup.config.student}: the models' weights do not fit into memory: {parts}, and a process has "
        f"{bytes_text(free)} free on {accelerator.device.type}; {remedy}; or --no-doctor to try it"
    )


def memory(session: Session) -> Iterator[Finding]:
    """MemoryEstimate whether the run fits into the free memory of the student's device, beside the loaded models."""
    setup = session.setup
    if setup is None:
        yield note(what="not estimated: the config.json of a model does not tell its size")
        return
    needs, free = estimate(setup), min(gather_object([free_bytes(session.accelerator.device)]))
    needed = needs.beside_weights()
    line = f"about {bytes_text(needed)} beside the models, {bytes_text(free)} free"
    if needed <= TIGHT * free:
        yield ok(what=line)
        return
    is_error, loaded = needed > OVER * free, needs.weights
    items = {name: size for name, size in needs.at_peak().items() if name not in loaded}
    names = " and ".join(f"{name} ({bytes_text(size)})" for name, size in list(items.items())[:2])
    room = sum(loaded.values()) + int(TIGHT * free)
    yield (error if is_error else warning)(
        what=f"{line}: {names}",
        why=f"the run {'will' if is_error else 'may'} end out of memory, in its first step or at its longest responses",
        do=_remedy(fitting(setup, changes(setup), room, peak)),
        detail=_table(items),
    )


def peak(setup: Setup) -> int:
    """Return the bytes that a process of a run needs at its peak."""
    return estimate(setup).peak()


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory of a run on GPUs that are not here, in bytes."""

    processes: int
    available: int  # to each process
    usable: int  # of it; the rest is for CUDA's context, NCCL and fragments
    peak: int
    fits: bool
    items: dict[str, int]  # at the peak, largest first
    peaks: dict[str, int]  # with each flag by itself
    fitting: list[str]  # the smallest sets of flags with which the run fits
    host: int  # main memory of all processes while a model loads
    assumed: str


def estimated(plan: Plan, target: str, prompt_tokens: int) -> MemoryEstimate:
    """Return the estimate for the GPUs of `target`: 8x80 are eight processes with 80 GiB each.  Nothing is loaded."""
    processes, gib = parse_target(target)
    if prompt_tokens < 1:
        raise Refusal(f"--prompt-tokens {prompt_tokens}: must be above 0")
    if plan.config.batch % processes:
        raise Refusal(f"--batch {plan.config.batch}: must be a multiple of the {processes} processes of --estimate")
    row = prompt_tokens + plan.config.sampling.max_new_tokens
    return evaluated(planned(plan, processes=processes, device=torch.device("cuda"), row=row), int(gib * 2**30))


def evaluated(setup: Setup, available: int) -> MemoryEstimate:
    """Return the estimate of a setup beside the memory that each process has."""
    needs, usable, new = estimate(setup), int(TIGHT * available), setup.config.sampling.max_new_tokens
    fits = needs.peak() <= usable
    options = {} if fits else changes(setup)
    peaks = {flags: peak(change(setup)) for flags, change in options.items()}
    lower = {flags: size for flags, size in peaks.items() if size < needs.peak()}
    return MemoryEstimate(
        processes=setup.processes,
        available=available,
        usable=usable,
        peak=needs.peak(),
        fits=fits,
        items=needs.at_peak(),
        peaks=dict(sorted(lower.items(), key=lambda x: x[1])),
        fitting=fitting(setup, options, usable, peak),
        host=setup.processes * max(bytes_of(m) for m in (setup.student, *(x.model for x in setup.frozen if x.is_here))),
        assumed=f"prompts of {setup.row - new} tokens (--prompt-tokens) and responses of {new} (--max-new-tokens), "
        f"{setup.config.precision} (--precision), {setup.config.batch} rollouts a step (--batch)",
    )


def parse_target(text: str) -> tuple[int, float]:
    """Return the number of processes and the GiB of each from a text such as 8x80."""
    count, times, size = text.lower().partition("x")
    try:
        processes, gib = int(count), float(size)
    except ValueError:
        processes, gib = 0, 0.0
    if not (times and 1 <= processes <= 1 << 16 and 0 < gib <= 1 << 16):
        raise Refusal(f"--estimate {text}: write PROCESSESxGIB, such as 8x80 for eight GPUs with 80 GiB each")
    return processes, gib


def show(x: MemoryEstimate, console: Console) -> None:
    """Print an estimate for people."""
    many = "1 process" if x.processes == 1 else f"{x.processes} processes, each"
    verdict = "fits" if x.fits else "does not fit"
    lines = [
        f"{many} with {bytes_text(x.available)}, of which {bytes_text(x.usable)} are usable: "
        f"{bytes_text(x.peak)} at the peak, which {verdict}",
        _table(x.items),
    ]
    if not x.fits:
        lines += ["", "with one change:", _table(x.peaks)]
        lines += ["", f"to make it fit: {_remedy(x.fitting)}"]
    lines += ["", f"assumed: {x.assumed}", f"main memory while models load: up to {bytes_text(x.host)} a machine"]
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def _remedy(sets: list[str]) -> str:
    """Return what to do, from the sets of flags of which each helps."""
    return "; or ".join(sets) if sets else "no three flags make it fit: take a smaller model, or more processes"


def _table(sizes: dict[str, int]) -> str:
    """Return a line for each size."""
    return "\n".join(f"  {name:<34}{bytes_text(size):>10}" for name, size in sizes.items())
