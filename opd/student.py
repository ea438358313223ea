"""The student: an nn.Module whose forward runs the backbone and the LM head and returns the loss and its columns.

DDP, FSDP and DeepSpeed wrap this module.  No code may use lm_head outside its forward: a head that is gathered
elsewhere and resharded before the backward pass gives silently wrong gradients.
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

Body = Callable[..., Any]  # the forward function of a model's backbone, below the LM head


@dataclass(frozen=True)
class Rows:
    """Prompts and responses as a model's input ids, padded on the right."""

    ids: Int[Tensor, "B L"]
    trained: Bool[Tensor, "B L"]  # response tokens that train; stays in main memory


def rows(rollouts: Sequence[Rollout], masks: Sequence[Sequence[bool]], *, teacher: bool, device: torch.device) -> Rows:
    """Concatenate each prompt with its response, for the teacher or the student.

    Without rollouts, returns a dummy row without trained tokens, so that every rank runs a forward pass.
    """
    prompts = [r.teacher_prompt_ids if teacher else r.prompt_ids for r in rollouts]
    pairs = list(zip(prompts, rollouts, masks, strict=True))
    ids = [torch.tensor([*prompt, *r.ids]) for prompt, r, _ in pairs] or [torch.zeros(2, dtype=torch.long)]
    trained = [torch.tensor([False] * len(prompt) + list(mask)) for prompt, _, mask in pairs] or [
        torch.zeros(2, dtype=torch.bool)
    ]
    return Rows(pad(ids, 0).to(device), pad(trained, False))


def micro_batches(widths: dict[int, int], budget: int) -> list[list[int]]:
    """Split rows into micro-batches of similar length, longest first, at minimal cost (dynamic programming).

    A micro-batch costs its padded tokens, at most `budget`, plus budget / 64 for the overhead of its calls.  A row
    longer than the budget is a micro-batch by itself.

    Args:
        widths: length of each row in tokens, by row number.
        budget: padded tokens of a micro-batch.
    """
    order = sorted(widths, key=lambda i: (-widths[i], i))
    # For the first `end` rows: the least cost, and the start of the last micro-batch at that cost.
    least, start = [0] * (len(order) + 1), [0] * (len(order) + 1)
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
    """Compile the backbone below the LM head, for any batch size and length; generation stays uncompiled."""
    return torch.compile(base(model).base_model.forward, dynamic=True)


def states(
    model: PreTrainedModel | PeftModel, at: Rows, lens: Lens | None = None, body: Body | None = None
) -> tuple[Float[Tensor, "N H"], tuple[Float[Tensor, "N D"], ...]]:
    """Return the final hidden states that predict the trained tokens, row by row, and a lens's views of other layers.

    Padding is on the right, where causal attention never looks.  No attention mask is needed, so attention uses its
    fastest kernel.  `body` replaces the backbone, for example by its compiled version.
    """
    out = (body or base(model).base_model)(input_ids=at.ids, use_cache=False, output_hidden_states=lens is not None)
    final = predictors(out.last_hidden_state, at.trained)
    if lens is None:
        return final, ()
    with torch.autocast(final.device.type, enabled=False):
        return final, lens([predictors(out.hidden_states[layer], at.trained) for layer in lens.layers])


def final_states(model: PreTrainedModel | PeftModel, at: Rows) -> Float[Tensor, "N H"]:
    """Return the final hidden states that predict the trained tokens, row by row, [N, H]."""
    return states(model, at)[0]


def unprompted(rollouts: Sequence[Rollout]) -> tuple[list[Rollout], list[list[bool]]]:
    """Return the rollouts without prompts, and masks of all response tokens but the first, which has no context."""
    plain = [replace(r, prompt_ids=(), teacher_prompt_ids=()) for r in rollouts]
    return plain, [[i > 0 for i in range(len(r.ids))] for r in rollouts]


def cross_entropies(hidden: Hidden | Given, rollouts: Sequence[Rollout], vocabulary: Vocabulary) -> list[float]:
    """Return -mean log p(y_t | y_<t) of each response without its prompt, in nats per token.  arXiv:2308.12032.

    The mean starts at the second token; a response with a single token gets 0.  `hidden` is computed from the rows and
    masks that `unprompted` returns.
    """
    if isinstance(hidden, Given):
        logp = hidden.logp
    else:
        ids = torch.tensor([x for r in rollouts for x in r.ids[1:]], dtype=torch.long, device=hidden.states.device)
        logp = scores(hidden, vocabulary.canonical(ids)[:, None], vocabulary, 1).logp[:, 0]
    parts = logp.double().split([max(0, len(r.ids) - 1) for r in rollouts])
    return [-float(part.mean()) if len(part) else 0.0 for part in parts]


class Student(nn.Module):
    """The trained model; with `checkpointing`, its layers recompute their activations in the backward pass."""

    def __init__(self, model: PreTrainedModel | PeftModel, *, checkpointing: bool = False) -> None:
        super().__init__()
        self.model, self.layers = model, []
        self.body: Body | None = None  # the compiled backbone, or None
        if checkpointing:
            base(model).gradient_checkpointing_enable({"use_reentrant": False})
            self.layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]

    @contextlib.contextmanager
    def recomputing(self) -> Iterator[None]:
        """Enable gradient checkpointing inside the block.

        transformers checkpoints only layers in training mode.  The modules inside the layers stay in eval mode, so
        dropout stays off.
        """
        for layer in self.layers:
            layer.training = True
        yield
        for layer in self.layers:
            layer.training = False  # generation needs the KV cache, which checkpointing would disable

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
        """Return the loss and the columns of the trained tokens.

        Args:
            at: input ids and the mask of the N trained tokens.
            heard: outputs of the frozen models.
            method: the method whose terms are computed.
            targets: targets of each term, flat [N]; None measures the columns without a loss.
            vocabulary: common ids, temperature and stop class of the LM heads.
            likeliest: if above 0, return only each model's top-k tokens with k = `likeliest`, as `Alternatives`.
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
    """Add the hidden-state term's loss and columns, if the method has such a term."""
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
