"""The processes that torchrun, or a launcher like it, started: how many they are, and which of them this is."""

import os


def num_processes() -> int:
    """Return the number of processes that torchrun, or a launcher like it, started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1


def is_main_process() -> bool:
    """Return whether this is the process that prints and writes, known before the processes are connected."""
    return num_processes() == 1 or int(os.environ.get("RANK", 0)) == 0
