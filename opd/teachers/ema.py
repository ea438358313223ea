"""A teacher that is an exponential moving average of the student's weights."""

import copy

import torch
from peft import PeftModel
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from opd.teachers.base import TeacherState
from opd.teachers.local import LocalTeacher


class Average(LocalTeacher):
    """An exponential moving average of the student's weights, in fp32: w += rate (student - w) after each step."""

    def __init__(
        self, student: PreTrainedModel | PeftModel, rate: float, *, to: torch.device, low: torch.dtype
    ) -> None:
        super().__init__(copy.deepcopy(student).requires_grad_(False), to=to, low=low)
        self.rate, self.student = rate, student

    def _pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the pair (average, student) of every trained weight, by name."""
        averages = dict(self.model.named_parameters())
        return {name: (averages[name], p.detach()) for name, p in self.student.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def follow(self) -> None:
        for average, current in self._pairs().values():
            if isinstance(current, DTensor) and not isinstance(average, DTensor):
                current = current.full_tensor()  # embeddings and head, which stay whole beside sharded layers
            average.lerp_(current, self.rate)

    def state(self) -> TeacherState:
        return TeacherState({name: average for name, (average, _) in self._pairs().items()})

    @torch.no_grad()
    def restore(self, state: TeacherState) -> None:
        for name, (average, _) in self._pairs().items():
            average.copy_(state.tensors[name])
