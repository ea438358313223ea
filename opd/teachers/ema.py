"""A teacher that is an exponential moving average of the student's weights."""

import copy
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from opd.core.errors import Refusal
from opd.core.tensors import save_tensors
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
        """Move the averages towards the student's weights."""
        for average, current in self._pairs().values():
            average.lerp_(current, self.rate)

    def save(self, folder: Path) -> None:
        """Write the averages to a checkpoint."""
        save_tensors({name: pair[0] for name, pair in self._pairs().items()}, folder / "teacher.safetensors")

    @torch.no_grad()
    def restore(self, folder: Path) -> None:
        """Load the averages of a checkpoint."""
        saved = load_file(folder / "teacher.safetensors")
        for name, (average, _) in self._pairs().items():
            average.copy_(saved[name])


def average_rate(name: str) -> float | None:
    """Return the rate of a teacher named `ema:RATE` (`ema`: 0.05), or None for any other name.

    Raises Refusal for a rate outside (0, 1].
    """
    kind, colon, rate = name.partition(":")
    if kind != "ema":
        return None
    try:
        value = float(rate) if colon else 0.05
    except ValueError:
        value = -1.0
    if not 0 < value <= 1:
        raise Refusal(f"--teacher {name}: write ema:RATE with the student's share of each step in (0, 1], such as 0.05")
    return value
