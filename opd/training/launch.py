"""The processes of a run and its engine: a launcher that was asked for N processes gets N, or a refusal."""

import os

import torch
from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env

from opd.core.errors import Refusal
from opd.core.processes import num_processes

SHARDED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}  # what `accelerate launch` sets for the engines that it is configured for
_GROUPS: list[object] = []  # kept by `keep_groups`


def needs_cpu_backend() -> bool:
    """Return True for several processes on a machine without GPUs: Accelerate connects those only with `cpu=True`."""
    return num_processes() > 1 and not torch.accelerator.is_available()


def check_launch() -> None:
    """Refuse a launch whose processes could not train together; call it before Accelerate connects them."""
    for variable, engine in SHARDED.items():
        if parse_flag_from_env(variable):
            raise Refusal(
                f"accelerate launch: its configuration asks for {engine}, which opd does not take from Accelerate; to "
                "shard the student, use torchrun --nproc_per_node N -m opd train --shard ...; for a full copy of it in "
                "each process (DDP), run `accelerate config` again without it"
            )
    # With one GPU or none, `accelerate launch --num_processes 2` starts one process, and of the two it sets only the
    # address of the main one.
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ and "LOCAL_RANK" not in os.environ:
        raise Refusal(
            "accelerate launch: it was asked for several processes and started one, because this machine has fewer "
            "than two GPUs; use torchrun --nproc_per_node N -m opd train ...; for one process use --num_processes 1, "
            "and unset MASTER_ADDR if your shell exports it"
        )
    local = int(os.environ.get("LOCAL_WORLD_SIZE", num_processes()))
    on_cpu = needs_cpu_backend() or parse_flag_from_env("ACCELERATE_USE_CPU")
    if num_processes() > 1 and not on_cpu and local > torch.accelerator.device_count():
        raise Refusal(
            f"the launcher started {local} processes on a machine with {torch.accelerator.device_count()} GPUs: start "
            "one process per GPU, or set ACCELERATE_USE_CPU=true to train on the CPU"
        )


def check_connected(accelerator: Accelerator) -> None:
    """Refuse processes that Accelerate did not connect: each would train alone and write the same run folder."""
    if accelerator.num_processes != num_processes():
        raise Refusal(
            f"the launcher started {num_processes()} processes and Accelerate connected {accelerator.num_processes} of "
            "them; on a machine without GPUs set ACCELERATE_USE_CPU=true, else check `accelerate env`"
        )


def engine_name(accelerator: Accelerator, *, sharded: bool) -> str:
    """Return the name of what trains the student: "fsdp2" shards it, "ddp" copies it, or "one process"."""
    if sharded:
        return "fsdp2"
    return "ddp" if accelerator.num_processes > 1 else "one process"


def keep_groups() -> None:
    """Keep the process groups until the interpreter ends; call it before they are destroyed.

    They must live longer than the DDP-wrapped student.  If DDP's reducer were the last owner, it would wait for the
    group's threads while it holds the GIL, which these threads may need: a deadlock.
    """
    if torch.distributed.is_initialized():
        _GROUPS.append(torch.distributed.group.WORLD)
