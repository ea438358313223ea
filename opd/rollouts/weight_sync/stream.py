"""The student's weights on their way from all processes to the main process, which sends them: `WeightStream`.

Sharded weights exist only while all processes gather them together.  So every process iterates them as often as the
sender of the main process does, and a sender that fails part of the way is a refusal in every process, not a wait.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from opd.core.errors import Refusal
from opd.rollouts.weight_sync.vllm_plugin import weights

ITERATE, SENT, FAILED = "iterate", "sent", "failed"  # messages of the main process: it iterates the weights, or ended
T = TypeVar("T")


@dataclass
class WeightStream:
    """The current weights in the dtype of an engine; each iteration, inside `share`, gathers them once.

    If it `keeps` them, a copy of the weights that were sent last remains in main memory, and `is_repeated` makes it
    yield that copy.
    """

    model: PreTrainedModel | PeftModel
    dtype: torch.dtype
    keeps: bool = False
    kept: dict[str, Tensor] = field(default_factory=dict)
    is_repeated: bool = False
    gathering: Iterator[tuple[str, Tensor]] = iter(())  # iteration of the sender that now runs

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yield names and weights in the main process, while the other processes gather them, too."""
        if self.is_repeated:
            yield from self.kept.items()
            return
        self._finish_gathering()
        _broadcast((ITERATE, None))
        self.gathering = weights(self.model)
        for name, x in self.gathering:
            if self.keeps:
                self.kept[name] = x.to("cpu", self.dtype, copy=True)
            yield name, x.to(self.dtype)

    def share(self, send: Callable[[], T]) -> T:
        """Call `send` in the main process, which may iterate this stream, and return its result in every process.

        Every process must call it.  A Refusal in the main process is raised in all of them.
        """
        if not PartialState().is_main_process:
            return self._gather()
        message: tuple[str, Any] = (FAILED, "the main process failed as it sent weights")
        try:
            message = (SENT, send())
        except Refusal as error:
            message = (FAILED, str(error))
            raise
        finally:
            self._finish_gathering()
            _broadcast(message)
        return message[1]

    def _finish_gathering(self) -> None:
        """Gather what a sender left that failed or stopped early, because the other processes gather it, too."""
        deque(self.gathering, maxlen=0)

    def _gather(self) -> Any:
        """Gather the weights as often as the main process iterates them, and return what it sent at the end."""
        while (message := _broadcast(None))[0] == ITERATE:
            deque(weights(self.model), maxlen=0)
        kind, result = message
        if kind == FAILED:
            raise Refusal(result)
        return result


def _broadcast(message: tuple[str, Any] | None) -> tuple[str, Any]:
    """Return the message of the main process."""
    (received,) = broadcast_object_list([message])
    return received
