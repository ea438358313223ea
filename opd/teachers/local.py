"""A teacher in this process, on the same or another device, in its own dtype."""

from collections.abc import Sequence

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from opd.models import head
from opd.student import final_states, rows
from opd.types import MEASURED, Rollout
from opd.vocabulary import Head, Hidden


class LocalTeacher:
    """A frozen transformers model that scores every token, whole distributions included."""

    provides = MEASURED | {"vocabulary"}  # the columns it allows to measure, and both models' distributions

    def __init__(self, model: PreTrainedModel | PeftModel, *, to: torch.device) -> None:
        self.model = model.requires_grad_(False)
        self.to = to
        own = head(model)
        # The head pass runs where the student is: the head moves there once, the states of each batch after it.
        self.head = Head(own.weight.to(to), own.bias if own.bias is None else own.bias.to(to), own.scale, own.softcap)

    @torch.no_grad()
    def hidden(self, rollouts: Sequence[Rollout], masks: Sequence[Sequence[bool]]) -> Hidden:
        """Final states at the trained tokens, after the teacher's own prompt."""
        device = self.model.device
        with torch.autocast(device.type, enabled=False):
            states = final_states(self.model, rows(rollouts, masks, teacher=True, device=device))
        return Hidden(states.to(self.to), self.head)
