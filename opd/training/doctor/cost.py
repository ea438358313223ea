"""Estimates of a run's cost: memory on the student's device compared with the free memory, and seconds per step."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from accelerate.utils import gather_object
from torch.autograd.graph import saved_tensors_hooks

from opd.config.precision import dtype_of
from opd.core.tensors import local, placed
from opd.models import load as models
from opd.models.load import backbone, base
from opd.models.sharding import sharded_layers, whole
from opd.rollouts.engines.hf import HFEngine
from opd.teachers.local import LocalTeacher
from opd.training.doctor.findings import Finding, error, ok, warning
from opd.training.doctor.rehearsal import RehearsedRun
from opd.training.session import Session

SHORT, LONG = 16, 48  # tokens; row lengths of the two forwards that give the activation memory per token
STATES = 2 << 30  # bytes; limit on the teacher's hidden states kept between measuring and training
TIGHT, OVER = 0.9, 1.25  # fractions of the free memory: a warning above TIGHT, an error above OVER


@dataclass(frozen=True)
class MemoryItem:
    """An item that needs memory in addition to the weights, which are already loaded."""

    name: str
    bytes: int
    smaller: tuple[str, ...]  # flags that reduce it


def free_bytes(device: torch.device) -> int:
    """Return the bytes that this process may still allocate on a device.

    On a GPU, memory that torch has reserved but does not use counts as free.  On a CPU, the limit of the container
    (cgroup) applies as well.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    out = psutil.virtual_memory().available
    limit, used = (Path("/sys/fs/cgroup") / f"memory.{name}" for name in ("max", "current"))
    if limit.is_file() and used.is_file() and (limit_text := limit.read_text().strip()) != "max":
        out = min(out, int(limit_text) - int(used.read_text()))
    return out


def saved_bytes(session: Session, tokens: int) -> int:
    """Return the bytes that a forward over one row of `tokens` tokens saves for its backward, without checkpointing."""
    model, sizes_by_storage = base(session.plain().model), {}
    weights: set[int] = set()

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes_by_storage[storage.data_ptr()] = storage.nbytes()
        return x

    ids = torch.ones(1, tokens, dtype=torch.long, device=model.device)
    compute_dtype = dtype_of(session.config.precision)
    with (
        whole(session.student),
        torch.enable_grad(),
        torch.autocast(model.device.type, compute_dtype, enabled=compute_dtype != torch.float32),
        saved_tensors_hooks(pack, lambda x: x),
    ):
        weights |= {p.untyped_storage().data_ptr() for p in model.parameters()}
        out = backbone(model)(input_ids=ids, use_cache=False).last_hidden_state  # keeps the graph alive
    assert out.requires_grad
    return sum(sizes_by_storage.values())


def memory_items(session: Session) -> list[MemoryItem]:
    """Return what the configuration needs on the student's device in addition to the loaded models, in bytes."""
    config = session.config
    model = session.plain().model
    shape = model.config.get_text_config()
    trained = sum(local(p).numel() for p in session.student.parameters() if p.requires_grad)
    itemsize, layers, width = dtype_of(config.precision).itemsize, shape.num_hidden_layers, shape.hidden_size
    longest = max(max(len(p.ids), len(p.teacher_ids)) for p in session.prompts.first(64))
    row = longest + config.sampling.max_new_tokens
    share = -(-config.batch // session.accelerator.num_processes)
    tokens = min(max(config.micro_batch_tokens, row), share * row)

    a, b = saved_bytes(session, SHORT), saved_bytes(session, LONG)
    token_bytes = (b - a) / (LONG - SHORT)  # the remainder is copies of the weights in the compute dtype
    copies, layer = max(0.0, a - SHORT * token_bytes), token_bytes / layers
    activations = tokens * (token_bytes if not config.gradient_checkpointing else layers * width * itemsize + layer)
    working = tokens * layer / 2  # gradients during the backward, while activations are being freed

    heads = shape.to_dict().get("num_key_value_heads") or shape.num_attention_heads
    head = shape.to_dict().get("head_dim") or width // shape.num_attention_heads
    rows = min(config.decode_rows, share)
    cache = 2 * layers * heads * head * itemsize * rows * row * (1 + 1 / layers)  # growing the cache copies a layer
    states = [t.head.weight.shape[1] for t in session.teachers.values() if isinstance(t, LocalTeacher)]
    widest = max(states, default=width)
    batch = min(STATES, share * config.sampling.max_new_tokens * widest * 4)
    kept_states = tokens * widest * 4 if session.method.local() else batch
    logits = min(2 * (config.chunk_mb << 20), 16 * tokens * session.vocabulary.size)
    smaller_batches = f"--micro-batch-tokens {max(row, tokens // 4)}"
    worker = sum(p.numel() * p.itemsize for p in model.parameters()) if _shared(session) else 0
    gathered, whole_student = _gathered_bytes(session) if session.is_sharded else (0, 0)
    return [
        MemoryItem("gathered layers", gathered, ("--precision bf16",)),
        MemoryItem("whole student", whole_student, ("--engine with a server, which generates elsewhere",)),
        MemoryItem("worker's student", worker, ("--worker-device for the worker",)),
        MemoryItem("gradients", 4 * trained, ("--lora-rank 32",)),
        MemoryItem("AdamW", 8 * trained, ("--lora-rank 32",)),
        MemoryItem("weights in the compute type", int(copies), ("--precision fp32",)),
        MemoryItem("activations", int(activations + working), (smaller_batches, "--gradient-checkpointing")),
        MemoryItem("logits", logits, (f"--chunk-mb {max(16, config.chunk_mb // 4)}",)),
        MemoryItem("KV cache", int(cache), (f"--decode-rows {max(1, config.decode_rows // 4)}",)),
        MemoryItem("teacher at work", int(tokens * layer * widest / width), (smaller_batches,)),
        MemoryItem("teacher states", kept_states, ("a smaller --batch",)),
    ]


def peak(needs: Sequence[MemoryItem]) -> int:
    """Return the peak memory of a run in bytes.

    Gradients and optimizer state stay allocated.  Sampling and training alternate, so only the larger of the two
    counts, except with a worker process on the same device: then both run at once.
    """
    size = {p.name: p.bytes for p in needs}
    stays = size["gradients"] + size["AdamW"] + size["weights in the compute type"] + size["teacher states"]
    trains = size["gathered layers"] + max(size["teacher at work"], size["activations"] + size["logits"])
    if size["worker's student"]:
        return stays + size["worker's student"] + size["KV cache"] + trains
    return stays + max(size["whole student"] + size["KV cache"], trains)


def _gathered_bytes(session: Session) -> tuple[int, int]:
    """Return what a sharded run gathers at most: layers of the models in a training step, the student in a rollout.

    While a layer works, the next one arrives.
    """
    itemsize, student = dtype_of(session.config.precision).itemsize, session.plain().model
    frozen = [t.model for t in session.teachers.values() if isinstance(t, LocalTeacher)]
    layers = lambda model: backbone(model).config.get_text_config().num_hidden_layers
    inside = lambda model: sum(p.numel() for part in sharded_layers(model) for p in part.parameters())
    total = sum(p.numel() for p in student.parameters())
    layer = max(inside(m) / layers(m) * (itemsize if m is student else m.dtype.itemsize) for m in (student, *frozen))
    root = (total - inside(student)) * itemsize
    generates = isinstance(session.collector.student, HFEngine)
    return int(root + 2 * layer), total * itemsize if generates else 0


def _shared(session: Session) -> bool:
    """Return True if a worker process keeps its copy of the student on the student's device."""
    config, device = session.config, session.accelerator.device
    if config.speaker.engine != "hf" or not (config.staleness or config.worker):
        return False
    worker = device if config.worker_device == "same" else models.device(config.worker_device, field="worker-device")
    return worker.type == device.type and worker.index in (None, device.index)


def memory(session: Session) -> Iterator[Finding]:
    """Estimate whether the run fits into the free memory of the student's device."""
    device = session.accelerator.device
    free = min(gather_object([free_bytes(device)]))
    items = sorted(memory_items(session), key=lambda p: -p.bytes)
    needed = peak(items)
    line = f"about {bytes_text(needed)} beside the models, {bytes_text(free)} free"
    if needed <= TIGHT * free:
        yield ok(what=line)
        return
    is_error, largest = needed > OVER * free, items[:2]
    names = " and ".join(f"{p.name} ({bytes_text(p.bytes)})" for p in largest)
    local = [t for t in session.teachers.values() if isinstance(t, LocalTeacher)]
    elsewhere = ("--teacher-device for the teacher",) if any(t.model.device == placed(device) for t in local) else ()
    yield (error if is_error else warning)(
        what=f"{line}: {names}",
        why=f"the run {'will' if is_error else 'may'} end out of memory, in its first step or at its longest responses",
        do="; ".join(dict.fromkeys((*largest[0].smaller, *largest[1].smaller, *elsewhere))),
        detail="\n".join(f"{p.name:<28}{bytes_text(p.bytes):>10}" for p in items),
    )


def bytes_text(size: int) -> str:
    """Format a number of bytes as MiB or GiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def duration(run: RehearsedRun) -> Iterator[Finding]:
    """Estimate seconds per step, total time and tokens per second from the rehearsal.

    The result is a range.  The lower time assumes that sampling costs the same for each group of --decode-rows
    rollouts, the upper one that it grows with the number of tokens.
    """
    config, seconds, n = run.session.config, run.phases, len(run.rollouts)
    share = config.batch / n
    groups = math.ceil(config.batch / config.decode_rows) / math.ceil(n / config.decode_rows)
    update = seconds["update"] + (0 if run.session.method.local() else seconds["measure"])
    evals = config.steps // config.eval_every + 2 if config.eval_prompts else 0
    evaluation = evals * config.eval_limit / n * (seconds["measure"] + seconds["rollout"])
    step = [seconds["rollout"] * times + update * share for times in sorted((groups, share))]
    times = [config.steps * s + evaluation for s in step]
    tokens = int(run.batch.mask.sum()) * share
    per_step, total = (range_text(*map(duration_text, x)) for x in (step, times))
    speed = range_text(*(f"{tokens / s:.2g}" if tokens < 10 * s else f"{tokens / s:.0f}" for s in reversed(step)))
    yield ok(
        what=f"a step of {config.batch} rollouts takes about {per_step}, {config.steps} of them {total}, {speed} "
        f"tokens/s (an estimate from {n} rollouts, which took {run.seconds:.1f} s; responses may grow)"
    )


def range_text(low: str, high: str) -> str:
    """Format a range; a single value if both ends print the same."""
    return low if low == high else f"{low} to {high}"


def duration_text(seconds: float) -> str:
    """Format a duration in seconds, minutes or hours."""
    if seconds < 90:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
