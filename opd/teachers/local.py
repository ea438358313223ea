"""Teachers in this process.

A teacher is another model, the student's current weights, its weights without the adapter, or their moving average.
"""

import contextlib
import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from opd.errors import Refusal
from opd.heard import Hidden
from opd.kernels.logits import Head
from opd.models import head
from opd.representation import Lens
from opd.student import Body, rows, states
from opd.teachers.base import Teacher
from opd.tensors import save_tensors
from opd.types import MEASURED, Rollout


class LocalTeacher(Teacher):
    """A transformers model that scores tokens with whole distributions.

    It may be on another device than the student.  `low` is the autocast dtype of its matmuls, for weights of a wider
    dtype.  It reads the teacher's prompt of each rollout if `own_prompt` is true, else the student's.
    """

    provides = MEASURED | {"vocabulary", "layers", "decoding"}  # columns, distributions, layers

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        *,
        to: torch.device,
        low: torch.dtype = torch.float32,
        own_prompt: bool = True,
    ) -> None:
        self.model, self.to, self.low, self.own_prompt = model, to, low, own_prompt
        self.body: Body | None = None  # the compiled layers, if any
        own = head(model)
        # The head pass runs on the student's device: the head is copied there once, the states of each batch follow.
        self.head = Head(own.weight.to(to), own.bias if own.bias is None else own.bias.to(to), own.scale, own.softcap)

    @torch.no_grad()
    def hidden(self, rollouts: Sequence[Rollout], masks: Sequence[Sequence[bool]], lens: Lens | None = None) -> Hidden:
        """Return the final hidden states [N, H] at the N trained tokens, and a lens' views of the layers.

        The context of a token is the prompt that `own_prompt` selects and the response before the token.
        """
        device = self.model.device
        with torch.autocast(device.type, self.low, enabled=self.low != torch.float32):
            at = rows(rollouts, masks, teacher=self.own_prompt, device=device)
            final, views = states(self.model, at, lens, self.body)
        return Hidden(final.to(self.to), self.head, tuple(view.to(self.to) for view in views))


class WithoutAdapter(LocalTeacher):
    """The student's base weights, with the adapter disabled.  They are not copied."""

    @torch.no_grad()
    def hidden(self, rollouts: Sequence[Rollout], masks: Sequence[Sequence[bool]], lens: Lens | None = None) -> Hidden:
        """Return the hidden states at the trained tokens, computed with the adapter disabled."""
        with self.model.disable_adapter() if isinstance(self.model, PeftModel) else contextlib.nullcontext():
            return super().hidden(rollouts, masks, lens)


class Average(LocalTeacher):
    """An exponential moving average of the student's weights, in fp32: w += rate (student - w) after each step."""

    def __init__(
        self, student: PreTrainedModel | PeftModel, rate: float, *, to: torch.device, low: torch.dtype
    ) -> None:
        super().__init__(copy.deepcopy(student).requires_grad_(False), to=to, low=low)
        self.rate, self.student = rate, student

    def _pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the pair (average, student) of every trained weight, by name."""
        mine = dict(self.model.named_parameters())
        return {name: (mine[name], p.detach()) for name, p in self.student.named_parameters() if p.requires_grad}

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
        kept = load_file(folder / "teacher.safetensors")
        for name, (average, _) in self._pairs().items():
            average.copy_(kept[name])


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
