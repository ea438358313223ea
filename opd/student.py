"""The student: one nn.Module whose forward runs backbone and head pass and returns the loss and its columns.

DDP, FSDP and DeepSpeed wrap this module, and nobody touches lm_head outside its forward: a head gathered elsewhere and
resharded before backward gives silently wrong gradients.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from opd.heard import Alternatives, Columns, Given, Heard, Hidden
from opd.method import Method, Target
from opd.models import base, head
from opd.representation import Lens
from opd.types import Rollout, pad
from opd.vocabulary import Vocabulary, alternatives, head_pass, measure, predictors, scores

Body = Callable[..., Any]  # what the layers of a model are called with, and give


@dataclass(frozen=True)
class Rows:
    """Prompts and responses as one model reads them, right padded."""

    ids: Int[Tensor, "B L"]
    trained: Bool[Tensor, "B L"]  # response tokens trained on; stays in main memory


def rows(rollouts: Sequence[Rollout], masks: Sequence[Sequence[bool]], *, teacher: bool, device: torch.device) -> Rows:
    """Each prompt and its response side by side; one dummy row where there is none, so that every rank has a batch."""
    prompts = [r.teacher_prompt_ids if teacher else r.prompt_ids for r in rollouts]
    pairs = list(zip(prompts, rollouts, masks, strict=True))
    ids = [torch.tensor([*prompt, *r.ids]) for prompt, r, _ in pairs] or [torch.zeros(2, dtype=torch.long)]
    trained = [torch.tensor([False] * len(prompt) + list(mask)) for prompt, _, mask in pairs] or [
        torch.zeros(2, dtype=torch.bool)
    ]
    return Rows(pad(ids, 0).to(device), pad(trained, False))


def micro_batches(widths: dict[int, int], budget: int) -> list[list[int]]:
    """Rows of like width, longest first, in the groups that waste least; a row beyond the budget goes alone.

    A group costs its padded tokens, at most `budget` of them, and a 64th of the budget for the calls it takes.
    """
    order = sorted(widths, key=lambda i: (-widths[i], i))
    least, start = [0] * (len(order) + 1), [0] * (len(order) + 1)  # of the first rows; where their last group starts
    for end in range(1, len(order) + 1):
        first = end - 1
        least[end], start[end] = least[first] + widths[order[first]], first
        while first and (end - first + 1) * widths[order[first - 1]] <= budget:
            first -= 1
            cost = least[first] + (end - first) * widths[order[first]]
            if cost < least[end]:
                least[end], start[end] = cost, first
        least[end] += budget // 64
    out, end = [], len(order)
    while end:
        out.append(order[start[end] : end])
        end = start[end]
    return out[::-1]


def compiled(model: PreTrainedModel | PeftModel) -> Body:
    """The layers below the head as one compiled call, for rows of any number and length; generation keeps its own."""
    return torch.compile(base(model).base_model.forward, dynamic=True)


def states(
    model: PreTrainedModel | PeftModel, at: Rows, lens: Lens | None = None, body: Body | None = None
) -> tuple[Float[Tensor, "N H"], tuple[Float[Tensor, "N D"], ...]]:
    """The final hidden states that predict the trained tokens, row by row; and the views of a lens on the layers.

    Padding is on the right, where a causal model never looks: without a mask attention takes its fastest way.  `body`
    runs in place of the layers.
    """
    out = (body or base(model).base_model)(input_ids=at.ids, use_cache=False, output_hidden_states=lens is not None)
    final = predictors(out.last_hidden_state, at.trained)
    if lens is None:
        return final, ()
    with torch.autocast(final.device.type, enabled=False):
        return final, lens([predictors(out.hidden_states[layer], at.trained) for layer in lens.layers])


def final_states(model: PreTrainedModel | PeftModel, at: Rows) -> Float[Tensor, "N H"]:
    """The hidden states that predict the trained tokens, row by row."""
    return states(model, at)[0]


def unprompted(rollouts: Sequence[Rollout]) -> tuple[list[Rollout], list[list[bool]]]:
    """The responses without their prompts, and their tokens that something precedes."""
    plain = [replace(r, prompt_ids=(), teacher_prompt_ids=()) for r in rollouts]
    return plain, [[i > 0 for i in range(len(r.ids))] for r in rollouts]


def cross_entropies(hidden: Hidden | Given, rollouts: Sequence[Rollout], vocabulary: Vocabulary) -> list[float]:
    """-mean log p(y_t | y_<t) of each, from its second token on, in nats; 0 where there is none.  arXiv:2308.12032.

    `hidden` are the states of what `unprompted` made of the rollouts.
    """
    if isinstance(hidden, Given):
        logp = hidden.logp
    else:
        ids = torch.tensor([x for r in rollouts for x in r.ids[1:]], dtype=torch.long, device=hidden.states.device)
        logp = scores(hidden, vocabulary.canonical(ids)[:, None], vocabulary, 1).logp[:, 0]
    parts = logp.double().split([max(0, len(r.ids) - 1) for r in rollouts])
    return [-float(part.mean()) if len(part) else 0.0 for part in parts]


class Student(nn.Module):
    """The model being trained; with `checkpointing` its layers recompute their activations in the backward pass."""

    def __init__(self, model: PreTrainedModel | PeftModel, *, checkpointing: bool = False) -> None:
        super().__init__()
        self.model, self.layers = model, []
        self.body: Body | None = None  # the layers compiled
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
        *,
        likeliest: int = 0,
    ) -> tuple[Float[Tensor, ""], Columns | Alternatives]:
        """Loss and columns of the trained tokens; without targets (flat, [N]) only the columns are measured.

        With `likeliest`, nothing but so many of each model's likeliest tokens.
        """
        with self.recomputing():
            final, views = states(self.model, at, heard.lens, self.body)
        student, ids = Hidden(final, head(self.model), views), at.ids[at.trained]
        if likeliest:
            return final.new_zeros(()), alternatives(student, heard.teacher, likeliest, vocabulary)
        if targets is None:
            loss, columns = final.new_zeros(()), measure(method, student, heard, ids, vocabulary)
        elif method.headless():
            loss, columns = final.new_zeros(()), Columns(scores=(None,) * len(method.terms))
        else:
            loss, columns = head_pass(method, student, heard, ids, targets, vocabulary)
        return _matched(method, student, heard, targets, loss, columns)


def _matched(
    method: Method,
    student: Hidden,
    heard: Heard,
    targets: tuple[Target, ...] | None,
    loss: Float[Tensor, ""],
    columns: Columns,
) -> tuple[Float[Tensor, ""], Columns]:
    """Loss and columns with the share of the term on hidden states, where the method has one."""
    term = method.hidden()
    if term is None:
        return loss, columns
    assert isinstance(heard.teacher, Hidden), "a teacher that is Given shows no layer"
    each = term.loss(student.views, heard.teacher.views)
    if targets is not None:
        loss = loss + (targets[method.terms.index(term)].weight * each).sum()
    with torch.no_grad():
        cosines = [cosine_similarity(a, b, dim=-1) for a, b in zip(student.views, heard.teacher.views, strict=True)]
        cosine = torch.stack(cosines).mean(0)
    return loss, replace(columns, hidden_distance=each.detach(), hidden_cosine=cosine)
