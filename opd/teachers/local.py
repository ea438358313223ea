"""Teachers in this process: another model, or the student's current weights, with or without the adapter."""

import contextlib
from collections.abc import Sequence
from dataclasses import replace

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from opd.core.tensors import placed
from opd.core.types import MEASURED, Rollout
from opd.head.inputs import Hidden
from opd.head.vocabulary import Head
from opd.losses.hidden_states import Lens
from opd.models.batching import rows
from opd.models.forward import Body, states
from opd.models.load import head
from opd.models.sharding import gather_root, shard_frozen
from opd.models.student import Student
from opd.teachers.base import BaseTeacher


class LocalTeacher(BaseTeacher):
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
        self.root: Student | None = None  # the sharded student, if the weights are its own
        # The head pass runs on the student's device: a head from elsewhere is copied there once, the states of each
        # batch follow.  A teacher whose weights change is on that device, and its head is never copied.
        self.copied_head: Head | None = None

    @property
    def head(self) -> Head:
        """Return the head as its weights are now, on the student's device."""
        own = head(self.model)
        if own.weight.device == placed(self.to):
            return own
        if self.copied_head is None:
            bias = None if own.bias is None else own.bias.to(self.to)
            self.copied_head = replace(own, weight=own.weight.to(self.to), bias=bias)
        return self.copied_head

    def shard(self, student: Student) -> None:
        """Shard the model, unless its weights are those of the student, which is sharded already."""
        if self.model is not student.model:
            return shard_frozen(self.model, self.to)
        self.root = student

    @torch.no_grad()
    def hidden(self, rollouts: Sequence[Rollout], masks: Sequence[Sequence[bool]], lens: Lens | None = None) -> Hidden:
        """Return the final hidden states [N, H] at the N trained tokens, and a lens' views of the layers.

        The context of a token is the prompt that `own_prompt` selects and the response before the token.
        """
        if self.root is not None:
            gather_root(self.root)
        device = self.model.device
        with torch.autocast(device.type, self.low, enabled=self.low != torch.float32):
            batch = rows(rollouts, masks, teacher=self.own_prompt, device=device)
            final, views = states(self.model, batch, lens, self.body)
        return Hidden(final.to(self.to), self.head, tuple(view.to(self.to) for view in views))


class WithoutAdapter(LocalTeacher):
    """The student's base weights, with the adapter disabled.  They are not copied."""

    @torch.no_grad()
    def hidden(self, rollouts: Sequence[Rollout], masks: Sequence[Sequence[bool]], lens: Lens | None = None) -> Hidden:
        with self.model.disable_adapter() if isinstance(self.model, PeftModel) else contextlib.nullcontext():
            return super().hidden(rollouts, masks, lens)
