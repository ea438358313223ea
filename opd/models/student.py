"""The student: an nn.Module whose forward runs the backbone and the LM head and returns the loss and its columns.

DDP, FSDP and DeepSpeed wrap this module.  No code may use lm_head outside its forward: a head that is gathered
elsewhere and resharded before the backward pass gives silently wrong gradients.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from opd.head.head_pass import head_pass, measure
from opd.head.inputs import FrozenOutputs, Hidden
from opd.head.outputs import Alternatives, HeadColumns
from opd.head.token_scores import alternatives
from opd.head.vocabulary import Vocabulary
from opd.losses.terms import Target
from opd.methods.method import Method
from opd.models.batching import Rows
from opd.models.forward import Body, states
from opd.models.load import base, head


class Student(nn.Module):
    """The trained model; with `checkpointing`, its layers recompute their activations in the backward pass."""

    def __init__(self, model: PreTrainedModel | PeftModel, *, checkpointing: bool = False) -> None:
        super().__init__()
        self.model, self.layers = model, []
        self.body: Body | None = None  # the compiled backbone, or None
        if checkpointing:
            base(model).gradient_checkpointing_enable({"use_reentrant": False})
            self.layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]

    def forward(
        self,
        rows: Rows,
        frozen: FrozenOutputs,
        method: Method,
        targets: tuple[Target, ...] | None,
        vocabulary: Vocabulary,
        *,
        likeliest: int = 0,
    ) -> tuple[Float[Tensor, ""], HeadColumns | Alternatives]:
        """Return the loss and the columns of the N trained tokens of `rows`.

        `targets` has the targets of each term, flat [N]; None measures the columns without a loss.  If `likeliest` is
        above 0, only each model's top-k tokens with k = `likeliest` are returned, as `Alternatives`.
        """
        # transformers checkpoints only layers in training mode.  The modules inside the layers stay in eval mode, so
        # dropout stays off.
        for layer in self.layers:
            layer.training = True
        final, views = states(self.model, rows, frozen.lens, self.body)
        for layer in self.layers:
            layer.training = False  # generation needs the KV cache, which checkpointing would disable
        student, ids = Hidden(final, head(self.model), views), rows.ids[rows.trained]
        loss, columns = final.new_zeros(()), HeadColumns(scores=(None,) * len(method.terms))
        if likeliest:
            return loss, alternatives(student, frozen.teacher, likeliest, vocabulary)
        if targets is None:
            columns = measure(method, student, frozen, ids, vocabulary)
        elif not method.headless():
            loss, columns = head_pass(method, student, frozen, ids, targets, vocabulary)
        if (term := method.hidden()) is None:
            return loss, columns
        assert isinstance(frozen.teacher, Hidden), "a teacher that is Given shows no layer"
        distances = term.loss(student.views, frozen.teacher.views)
        if targets is not None:
            loss = loss + (targets[method.terms.index(term)].weight * distances).sum()
        with torch.no_grad():
            pairs = zip(student.views, frozen.teacher.views, strict=True)
            cosine = torch.stack([cosine_similarity(a, b, dim=-1) for a, b in pairs]).mean(0)
        return loss, replace(columns, hidden_distance=distances.detach(), hidden_cosine=cosine)
