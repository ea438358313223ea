"""The number of processes of a run: a launcher that was asked for N of them gets N, or a refusal."""

import os

import torch
from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env

from opd.core.errors import Refusal

SHARDED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}  # what `accelerate launch` sets for the engines that it is configured for


def num_processes() -> int:
    """Return the number of processes that torchrun, or a launcher like it, started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1


def is_main_process() -> bool:
    """Return whether this is the process that writes, known before Accelerate connects the processes."""
    return num_processes() == 1 or int(os.environ.get("RANK", 0)) == 0


def needs_cpu_backend() -> bool:
    """Return True for several processes on a machine without GPUs: Accelerate connects those only with `cpu=True`."""
    return num_processes() > 1 and not torch.accelerator.is_available()


def check_launch() -> None:
    """Refuse a launch whose processes could not train together; call it before Accelerate connects them."""
    for variable, engine in SHARDED.items():
        if parse_flag_from_env(variable):
            raise Refusal(
                f"accelerate launch: its configuration asks for {engine}, which opd does not support; each process "
                "trains a full copy of the student (DDP): run `accelerate config` again without it, or use "
                "torchrun --nproc_per_node N -m opd train ..."
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
