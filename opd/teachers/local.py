"""Teachers in this process: another model, or the student's own weights as they are, were, or have been on average."""

import contextlib
import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from opd.heard import Hidden
from opd.kernels.logits import Head
from opd.models import head
from opd.representation import Lens
from opd.student import Body, rows, states
from opd.teachers.base import Teacher
from opd.tensors import save_tensors
from opd.types import MEASURED, Refusal, Rollout


class LocalTeacher(Teacher):
    """A transformers model that scores every token, whole distributions included, on its own device.

    `low` is the type its products are rounded to where its weights are wider; `own_prompt` says which of a rollout's
    two prompts it reads.
    """

    provides = MEASURED | {"vocabulary", "layers", "decoding"}  # columns, whole distributions, hidden states

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        *,
        to: torch.device,
        low: torch.dtype = torch.float32,
        own_prompt: bool = True,
    ) -> None:
        self.model, self.to, self.low, self.own_prompt = model, to, low, own_prompt
        self.body: Body | None = None  # the layers compiled
        own = head(model)
        # The head pass runs where the student is: the head moves there once, the states of each batch after it.
        self.head = Head(own.weight.to(to), own.bias if own.bias is None else own.bias.to(to), own.scale, own.softcap)

    @torch.no_grad()
    def hidden(self, rollouts: Sequence[Rollout], masks: Sequence[Sequence[bool]], lens: Lens | None = None) -> Hidden:
        """Final states at the trained tokens, after the teacher's own prompt; and the views of a lens on its layers."""
        device = self.model.device
        with torch.autocast(device.type, self.low, enabled=self.low != torch.float32):
            at = rows(rollouts, masks, teacher=self.own_prompt, device=device)
            final, views = states(self.model, at, lens, self.body)
        return Hidden(final.to(self.to), self.head, tuple(view.to(self.to) for view in views))


class WithoutAdapter(LocalTeacher):
    """The weights under the student's adapter: no second copy of them is held."""

    @torch.no_grad()
    def hidden(self, rollouts: Sequence[Rollout], masks: Sequence[Sequence[bool]], lens: Lens | None = None) -> Hidden:
        """States at the trained tokens, the adapter off."""
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
        """(average, student) of every trained weight."""
        mine = dict(self.model.named_parameters())
        return {name: (mine[name], p.detach()) for name, p in self.student.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def follow(self) -> None:
        """Move towards the student."""
        for average, current in self._pairs().values():
            average.lerp_(current, self.rate)

    def save(self, folder: Path) -> None:
        """The averages."""
        save_tensors({name: pair[0] for name, pair in self._pairs().items()}, folder / "teacher.safetensors")

    @torch.no_grad()
    def restore(self, folder: Path) -> None:
        """The averages of a checkpoint."""
        kept = load_file(folder / "teacher.safetensors")
        for name, (average, _) in self._pairs().items():
            average.copy_(kept[name])


def average_rate(name: str) -> float | None:
    """The rate of `ema:RATE`; None for another name."""
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
