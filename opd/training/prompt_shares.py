"""The prompts of a command that several processes share: each works on its part, and all know all results.

>>> with connected() as processes:
...     part = processes.share(len(prompts))
...     results = processes.gather([measure(prompts[i]) for i in part])
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object, parse_flag_from_env
from torch import Tensor

from opd.core.processes import num_processes
from opd.rollouts import buffer
from opd.training.launch import check_launch, keep_groups, needs_cpu_backend

T = TypeVar("T")
LONGEST_WAIT = timedelta(days=1)  # for a process that generates much longer than another


@dataclass(frozen=True)
class Processes:
    """The processes that share the prompts of a command.  By default, this process works on all prompts."""

    rank: int = 0
    count: int = 1

    @classmethod
    def of(cls, state: Accelerator | PartialState) -> "Processes":
        """Return the processes that Accelerate has connected."""
        return cls(state.process_index, state.num_processes)

    def share(self, count: int) -> range:
        """Return the positions of this process's part of `count` prompts."""
        return range(count)[buffer.share(count, self.rank, self.count)]

    def gather(self, part: Sequence[T]) -> list[T]:
        """Return the results of all processes, in the order of their parts.  Every process must call it."""
        return gather_object(list(part)) if self.count > 1 else list(part)

    def add(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over all processes, and return it.  Every process must call it."""
        if self.count > 1:
            torch.distributed.all_reduce(tensor)
        return tensor


@contextlib.contextmanager
def connected() -> Iterator[Processes]:
    """Connect the processes of the launch while the context is active; without a launcher there is only this one."""
    if num_processes() == 1:
        yield Processes()
        return
    check_launch()
    cpu = needs_cpu_backend() or parse_flag_from_env("ACCELERATE_USE_CPU")
    state = PartialState(cpu=cpu, timeout=LONGEST_WAIT)
    processes = Processes.of(state)
    yield processes
    processes.gather([])  # the others wait for what the main process writes, and may refuse
    keep_groups()
    state.destroy_process_group()
