"""Estimate of the memory that each process of a run needs on its device, item by item."""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor

from opd.config.precision import dtype_of
from opd.core.processes import num_processes
from opd.models.load import Model, base, head
from opd.models.sharding import sharded_layers
from opd.training.doctor.activations import Activations, activations, computing
from opd.training.setup import Setup, is_same_device

STATES = 2 << 30  # bytes; limit on the teacher's hidden states kept between measuring and training
FP32 = 4  # bytes of a number


@dataclass(frozen=True)
class Memory:
    """Bytes that a process needs, by item, in the groups in which it needs them at the same time."""

    weights: Mapping[str, int]  # of the loaded models
    stays: Mapping[str, int]  # for the whole run
    generates: Mapping[str, int]  # while rollouts are generated
    trains: Mapping[str, int]  # in a forward and backward pass
    updates: Mapping[str, int]  # in an optimizer step
    loads: Mapping[str, int]  # while models are loaded, when only `weights` are there
    overlaps: bool = False  # a worker generates on the same device while the student trains

    def busiest(self) -> dict[str, int]:
        """Return what the phase that needs most has beside what stays."""
        total = lambda x: sum(x.values())
        step = max((self.trains, self.updates), key=total)
        return {**self.generates, **step} if self.overlaps else dict(max((self.generates, step), key=total))

    def beside_weights(self) -> int:
        """Return the peak of everything that comes on top of the loaded models."""
        return sum(self.stays.values()) + sum(self.busiest().values())

    def at_peak(self) -> dict[str, int]:
        """Return the items that are there at the peak of the run, largest first."""
        is_loading = sum(self.loads.values()) > self.beside_weights()
        items = {**self.weights, **(self.loads if is_loading else {**self.stays, **self.busiest()})}
        return {name: size for name, size in sorted(items.items(), key=lambda x: -x[1]) if size}

    def peak(self) -> int:
        """Return the peak of the run."""
        return sum(self.at_peak().values())


def estimate(setup: Setup) -> Memory:
    """Return the memory of each process of a run; of the main process, if that alone holds a judge."""
    config, share = setup.config, setup.processes if setup.shards else 1
    trained = [p for p in setup.student.parameters() if p.requires_grad]
    gradients = {"gradients": held(trained, share)}
    adam = 2 * held(trained, share)
    buckets = gradients["gradients"] if setup.processes > 1 and not setup.shards else 0
    # AdamW computes all weights at once on a GPU.  It computes sharded ones one by one, like all on a CPU.
    is_at_once = setup.device.type != "cpu" and not setup.shards
    largest = max(held([p], share) for p in trained)
    engine = {"vLLM": _colocated_engine(setup)}
    sleeps = config.speaker.engine_sleep
    whole = [bytes_of(model) for model in (setup.student, *(x.model for x in setup.frozen if x.scores))]
    return Memory(
        weights=weights(setup),
        stays={"AdamW": adam, "DDP's buckets": buckets, **_kept(setup), **({} if sleeps else engine)},
        generates=_generation(setup) | (engine if sleeps else {}),
        trains=gradients | _training(setup),
        updates=gradients | {"AdamW at work": held(trained, share) if is_at_once else 2 * largest},
        loads={"whole model before it is sharded": max(whole) if setup.shards and setup.device.type == "cpu" else 0},
        overlaps=_worker_is_here(setup),
    )


def held(parameters: Iterable[Tensor], share: int) -> int:
    """Return the bytes of parameters in each process if `share` processes shard them along their first dimension."""
    return sum(-(-len(p) // share) * (p.numel() // len(p)) * p.itemsize for p in parameters)


def bytes_of(model: Model) -> int:
    """Return the bytes of a whole model."""
    return held(model.parameters(), 1)


def weights(setup: Setup) -> dict[str, int]:
    """Return the bytes of each model's weights in each process."""
    share = setup.processes if setup.shards else 1
    sizes = {"student": held(setup.student.parameters(), share)}
    for x in setup.frozen:
        if not x.is_here:
            sizes[f"LM head of {x.field}"] = head(x.model).weight.nbytes if x.scores else 0
        elif share == 1 or not x.scores:
            sizes[x.field] = bytes_of(x.model)
        else:
            layers = {id(p): p for layer in sharded_layers(x.model) for p in layer.parameters()}
            sizes[x.field] = bytes_of(x.model) - held(layers.values(), 1) + held(layers.values(), share)
    return sizes


def _generation(setup: Setup) -> dict[str, int]:
    """Return what rollouts need: a KV cache, and whole weights of sharded models that generate or read along."""
    config, is_on_policy = setup.config, setup.plan.method.rollouts.on_policy
    itemsize = dtype_of(config.precision).itemsize
    generates = config.speaker.engine == "hf"
    beside = [] if is_on_policy else [x.model for x in setup.frozen if x.is_here and x.scores]
    rows = min(config.decode_rows, _rollouts(setup))
    student = setup.student if generates or not is_on_policy else None
    caches = [_cache_bytes(m, rows * setup.row, itemsize) for m in (student, *beside) if m is not None]
    items = {"KV cache": sum(caches)}
    if setup.shards and student is not None:
        items["whole student"] = sum(p.numel() for p in student.parameters()) * itemsize
    if setup.shards and beside:
        items["whole teachers"] = sum(map(bytes_of, beside))
    if _worker_is_here(setup):
        items["worker's student"] = bytes_of(setup.student)
    return items


def _cache_bytes(model: Model, tokens: int, itemsize: int) -> int:
    """Return the bytes of a model's keys and values; growing the cache copies those of a layer."""
    shape = base(model).config.get_text_config()
    settings, layers = shape.to_dict(), shape.num_hidden_layers
    heads = settings.get("num_key_value_heads") or shape.num_attention_heads
    width = settings.get("head_dim") or shape.hidden_size // shape.num_attention_heads
    return 2 * (layers + 1) * heads * width * itemsize * tokens


def _training(setup: Setup) -> dict[str, int]:
    """Return what a forward and backward pass needs beside the gradients."""
    config, student = setup.config, setup.student
    shape = base(student).config.get_text_config()
    measured, tokens = _measured(setup), largest_micro_batch(setup)
    layer = measured.token / shape.num_hidden_layers
    kept = measured.inputs + layer if config.gradient_checkpointing and measured.inputs else measured.token
    # During the backward pass, gradients take the place of the activations that it frees.
    saved = int(tokens * (kept + layer / 2))
    logits = min(2 * (config.chunk_mb << 20), 16 * tokens * shape.vocab_size)
    scoring = [x for x in setup.frozen if x.is_here and x.scores]
    widest = max((head(x.model).weight.shape[1] for x in scoring), default=0)
    teacher = int(tokens * layer * widest / shape.hidden_size)
    items = {"weights in the compute type": measured.copies} | (_gathered(setup) if setup.shards else {})
    if teacher > saved + logits:
        return items | {"teacher at work": teacher}
    return items | {"activations": saved, "logits": logits}


def _gathered(setup: Setup) -> dict[str, int]:
    """Return what a sharded run gathers at most in a step: while a layer works, the next one arrives.

    The gradients of a layer are whole until they are reduced, in fp32.  So are those of embeddings and head.
    """
    itemsize, student = dtype_of(setup.config.precision).itemsize, setup.student
    numel = lambda parameters: sum(p.numel() for p in parameters)
    per_layer = lambda model: [list(layer.parameters()) for layer in sharded_layers(model)]
    layers = per_layer(student)
    inside = {id(p) for layer in layers for p in layer}
    root = [p for p in student.parameters() if id(p) not in inside]
    trained = lambda parameters: numel(p for p in parameters if p.requires_grad)
    reduced = 0 if itemsize == FP32 else FP32
    largest = max(2 * numel(x) * itemsize + trained(x) * (itemsize + reduced) for x in layers)
    frozen = [2 * held(x, 1) for f in setup.frozen if f.is_here and f.scores for x in per_layer(f.model)]
    return {
        "gathered layers": max([largest, *frozen]),
        "gathered embeddings and head": numel(root) * itemsize + trained(root) * (itemsize + reduced),
    }


def _kept(setup: Setup) -> dict[str, int]:
    """Return the teachers' hidden states, which are kept from the measuring pass to the training pass."""
    widths = [head(x.model).weight.shape[1] for x in setup.frozen if x.scores]
    width = max(widths, default=base(setup.student).config.get_text_config().hidden_size)
    whole_batch = min(STATES, _rollouts(setup) * setup.config.sampling.max_new_tokens * width * FP32)
    return {"teacher states": largest_micro_batch(setup) * width * FP32 if setup.plan.method.local() else whole_batch}


def _colocated_engine(setup: Setup) -> int:
    """Return the memory of vLLM in this process: the student's weights in the compute dtype, and its KV cache."""
    if setup.config.speaker.engine != "vllm":
        return 0
    count = sum(p.numel() for name, p in setup.student.named_parameters() if ".lora_" not in name)
    return count * dtype_of(setup.config.precision).itemsize + int(setup.config.speaker.engine_kv_gb * 2**30)


def _measured(setup: Setup) -> Activations:
    """Return the activations of the student: under autocast, or of layers that are gathered in the compute dtype."""
    dtype = dtype_of(setup.config.precision)
    if not setup.shards:
        return activations(setup.student, dtype)
    return activations(computing(setup.student, dtype), torch.float32)


def _rollouts(setup: Setup) -> int:
    """Return the number of rollouts of a process in a step."""
    return -(-setup.config.batch // setup.processes)


def largest_micro_batch(setup: Setup) -> int:
    """Return the tokens of the largest micro-batch."""
    return min(max(setup.config.micro_batch_tokens, setup.row), _rollouts(setup) * setup.row)


def _worker_is_here(setup: Setup) -> bool:
    """Return True if a worker process keeps its copy of the student on the student's device."""
    config = setup.config
    starts = config.speaker.engine == "hf" and (config.worker or config.staleness > 0)
    return starts and is_same_device(config.worker_device, setup.device, field="worker-device")


def free_bytes(device: torch.device) -> int:
    """Return the bytes that this process may still allocate on a device.

    On a GPU, memory that torch has reserved but does not use counts as free.  On a CPU, the limit of the container
    (cgroup) applies as well, where files that are only cached count as free; the processes of a machine share it.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    out, cgroup = psutil.virtual_memory().available, Path("/sys/fs/cgroup")
    limit, used, parts = (cgroup / f"memory.{name}" for name in ("max", "current", "stat"))
    if limit.is_file() and used.is_file() and (limit_text := limit.read_text().strip()) != "max":
        cached = re.search(r"^inactive_file (\d+)", parts.read_text() if parts.is_file() else "", re.MULTILINE)
        out = min(out, int(limit_text) - int(used.read_text()) + int(cached[1] if cached else 0))
    return out // int(os.environ.get("LOCAL_WORLD_SIZE", num_processes()))


def bytes_text(size: int) -> str:
    """Format a number of bytes as MiB or GiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
