"""The student: one nn.Module whose forward runs backbone and head pass and returns the loss and its columns.

DDP, FSDP and DeepSpeed wrap this module, and nobody touches lm_head outside its forward: a head gathered elsewhere and
resharded before backward gives silently wrong gradients.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from opd.method import Method, Target
from opd.models import base, head
from opd.types import Rollout, pad
from opd.vocabulary import Columns, Heard, Hidden, Vocabulary, head_pass, measure, predictors


@dataclass(frozen=True)
class Rows:
    """Prompts and responses as one model reads them, right padded."""

    ids: Int[Tensor, "B L"]
    real: Bool[Tensor, "B L"]  # not padding
    trained: Bool[Tensor, "B L"]  # response tokens trained on


def rows(rollouts: Sequence[Rollout], masks: Sequence[Sequence[bool]], *, teacher: bool, device: torch.device) -> Rows:
    """Each prompt and its response side by side; one dummy row where there is none, so that every rank has a batch."""
    prompts = [r.teacher_prompt_ids if teacher else r.prompt_ids for r in rollouts]
    pairs = list(zip(prompts, rollouts, masks, strict=True))
    ids = [torch.tensor([*prompt, *r.ids]) for prompt, r, _ in pairs] or [torch.zeros(2, dtype=torch.long)]
    trained = [torch.tensor([False] * len(prompt) + list(mask)) for prompt, _, mask in pairs] or [
        torch.zeros(2, dtype=torch.bool)
    ]
    real = [torch.ones(len(row), dtype=torch.bool) for row in ids]
    return Rows(pad(ids, 0).to(device), pad(real, False).to(device), pad(trained, False).to(device))


def final_states(model: PreTrainedModel | PeftModel, at: Rows) -> Float[Tensor, "N H"]:
    """The hidden states that predict the trained tokens, row by row."""
    backbone = base(model).base_model
    hidden = backbone(input_ids=at.ids, attention_mask=at.real.long(), use_cache=False).last_hidden_state
    return predictors(hidden, at.trained)


class Student(nn.Module):
    """The model being trained; with `checkpointing` its layers recompute their activations in the backward pass."""

    def __init__(self, model: PreTrainedModel | PeftModel, *, checkpointing: bool = False) -> None:
        super().__init__()
        self.model, self.layers = model, []
        if checkpointing:
            base(model).gradient_checkpointing_enable({"use_reentrant": False})
            self.layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]

    @contextlib.contextmanager
    def recomputing(self) -> Iterator[None]:
        """transformers checkpoints layers in training mode only; what is inside them stays in eval mode, no dropout."""
        for layer in self.layers:
            layer.training = True
        yield
        for layer in self.layers:
            layer.training = False  # generation needs the KV cache, which checkpointing turns off

    def forward(
        self,
        at: Rows,
        heard: Heard,
        method: Method,
        targets: tuple[Target, ...] | None,
        vocabulary: Vocabulary,
    ) -> tuple[Float[Tensor, ""], Columns]:
        """Loss and columns of the trained tokens; without targets (flat, [N]) only the columns are measured."""
        with self.recomputing():
            states = final_states(self.model, at)
        student, ids = Hidden(states, head(self.model)), at.ids[at.trained]
        if targets is None:
            return states.new_zeros(()), measure(method, student, heard, ids, vocabulary)
        return head_pass(method, student, heard, ids, targets, vocabulary)
