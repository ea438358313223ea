"""Flags that make a run fit into memory, by the estimate of each and of as few as possible together."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial, reduce
from itertools import combinations

from opd.config import model_names
from opd.core.errors import Refusal
from opd.models.sharding import sharded_layers
from opd.training.doctor.memory import largest_micro_batch
from opd.training.setup import Setup

LORA_RANK = 32  # of the alternative
SHARE = 4  # the alternatives of buffers are a quarter of them
MOST = 3  # flags together

Change = Callable[[Setup], Setup]
Measure = Callable[[Setup], int]  # bytes


def changes(setup: Setup) -> dict[str, Change]:
    """Return the changes that are open to a run, by the flags that make them."""
    config = setup.config
    tokens, micro = largest_micro_batch(setup), max(setup.row, largest_micro_batch(setup) // SHARE)
    out: dict[str, Change] = {}
    if not config.lora_rank:
        adapted = cache(partial(setup.changed, lora_rank=LORA_RANK))  # the slow one: another outline of the student
        out[f"--lora-rank {LORA_RANK}"] = lambda x: adapted()  # it is first, so x is the setup
    if not setup.shards and _can_shard(setup):
        out["--shard"] = lambda x: x.changed(shard=True)
    if not config.gradient_checkpointing:
        out["--gradient-checkpointing"] = lambda x: x.changed(gradient_checkpointing=True)
    if served := [x.field for x in setup.frozen if x.is_here and _can_be_served(setup, x.field)]:
        flags = "the teachers on servers (--route NAME=http://...)" if len(served) > 1 else "--teacher http://HOST:PORT"
        out[flags] = lambda x: x.elsewhere(served)
    if not config.speaker.engine.startswith("http") and not config.worker and not config.staleness:
        out["--engine http://HOST:PORT"] = lambda x: x.changed(
            speaker=replace(x.config.speaker, engine="http://HOST:PORT", engine_sleep=False)
        )
    if micro < tokens:
        out[f"--micro-batch-tokens {micro}"] = lambda x: x.changed(micro_batch_tokens=micro)
    for name, least in (("chunk_mb", 16), ("decode_rows", 1)):
        value = max(least, getattr(config, name) // SHARE)
        if value < getattr(config, name):
            out[f"--{name.replace('_', '-')} {value}"] = partial(Setup.changed, **{name: value})
    if (config.worker or config.staleness) and config.worker_device == "same" and setup.device.type != "cpu":
        out["--worker-device cpu"] = lambda x: x.changed(worker_device="cpu")
    return out


def fitting(setup: Setup, options: Mapping[str, Change], room: int, measure: Measure) -> list[str]:
    """Return the smallest sets of changes with which a run fits into `room` bytes; [] if no three do."""
    changed = lambda flags: reduce(lambda x, flag: options[flag](x), flags, setup)
    for count in range(1, MOST + 1):
        if found := [" ".join(x) for x in combinations(options, count) if measure(changed(x)) <= room]:
            return found
    return []


def _can_shard(setup: Setup) -> bool:
    """Return whether --shard is open to a run; its models may have no layers that it takes."""
    config = setup.config
    if setup.processes == 1 or config.worker or config.staleness or config.compile or config.teacher_device != "same":
        return False
    try:
        return all(sharded_layers(m) for m in (setup.student, *(x.model for x in setup.frozen if x.scores)))
    except Refusal:
        return False


def _can_be_served(setup: Setup, field: str) -> bool:
    """Return whether a frozen model is a teacher of its own, which a server can hold."""
    name = "" if field == "teacher" else field.removeprefix("route ")
    return isinstance(setup.plan.teachers.get(name), model_names.ModelFiles)
