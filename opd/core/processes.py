"""The processes that torchrun, or a launcher like it, started: how many they are, and which of them this is."""

import contextlib
import os
from collections.abc import Callable, Iterator

_CLEANUPS: list[Callable[[], object]] = []  # of the blocks of `cleaned_up` that this process is in


def num_processes() -> int:
    """Return the number of processes that torchrun, or a launcher like it, started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1


def is_main_process() -> bool:
    """Return whether this is the process that prints and writes, known before the processes are connected."""
    return num_processes() == 1 or int(os.environ.get("RANK", 0)) == 0


@contextlib.contextmanager
def cleaned_up(cleanup: Callable[[], object]) -> Iterator[None]:
    """Call `cleanup` at the end of the block, also when the refusal of another process ends this one within it."""
    _CLEANUPS.append(cleanup)
    try:
        yield
    finally:
        _CLEANUPS.remove(cleanup)
        cleanup()


def clean_up() -> None:
    """Call what the open blocks of `cleaned_up` would call; for a thread that ends the process."""
    for cleanup in reversed(_CLEANUPS):
        with contextlib.suppress(OSError):
            cleanup()
