"""Token-local methods inside TRL's DistillationTrainer: TRL generates, shards, saves and logs; the loss is a method's.

`MethodTrainer(..., method=opd.vopd())` stands in place of `DistillationTrainer(...)`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import reduce
from operator import mul
from typing import Any, cast

import torch
from accelerate import PartialState
from jaxtyping import Int
from peft import PeftModel
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from trl import DistillationConfig, DistillationTrainer

from opd.adapters.fit import refuse_misfit, surroundings
from opd.core.errors import Refusal, renamed
from opd.core.tensors import full
from opd.core.types import reads
from opd.head.head_pass import head_pass
from opd.head.inputs import FrozenOutputs, Hidden
from opd.head.vocabulary import Head, Vocabulary
from opd.losses.reductions import TokenMean
from opd.losses.target_distribution import models
from opd.losses.terms import MatchHidden, PolicyGradient, Target
from opd.methods.method import Method
from opd.models.load import head
from opd.models.verify import verify_head

ENGINE = "TRL's DistillationTrainer"


class MethodTrainer(DistillationTrainer):
    """TRL's DistillationTrainer with the loss of a method in place of the divergence that `beta` names."""

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        teacher_model: str | PreTrainedModel,
        *arguments: Any,
        method: Method,
        **options: Any,
    ) -> None:
        refuse_misfit(misfits(method), ENGINE)
        if not isinstance(teacher_model, str):
            verify_loaded(teacher_model, "teacher_model")
        super().__init__(model, teacher_model, *arguments, **options)
        student = cast(PreTrainedModel, self.model)
        check_settings(method, cast(DistillationConfig, self.args))
        self._check_engine()
        verify_loaded(student, "model")
        teacher = self.accelerator.unwrap_model(self.teacher_model)
        if isinstance(teacher_model, str) and teacher.config.model_type != student.config.model_type:
            raise Refusal(
                f"teacher_model {teacher_model}: it is a {teacher.config.model_type}, whose LM head was not compared "
                "with opd's; load it, and pass the model in place of its name"
            )
        self.method = method
        self._reverse_kl = torch.zeros(2)  # sum over the tokens of a micro-batch, and their number

    def _check_engine(self) -> None:
        """Refuse ways to distribute and to tokenize with which the loss would be wrong."""
        if self.is_deepspeed_enabled or (self.is_fsdp_enabled and not self.accelerator.is_fsdp2):
            raise Refusal("DeepSpeed or FSDP version 1: MethodTrainer knows DDP and FSDP2; set fsdp_version to 2")
        if self._is_vlm:
            raise Refusal("processing_class: MethodTrainer trains on text; pass the tokenizer of the model")

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return TRL's loss, and log the mean reverse KL of all processes, for which the loss may not stand."""
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        total, tokens = self.accelerator.reduce(self._reverse_kl, "sum").tolist()
        self._metrics["train" if cast(PreTrainedModel, self.model).training else "eval"]["reverse_kl"].append(
            total / max(tokens, 1)
        )
        return loss

    def _compute_loss(
        self,
        unwrapped_student: PreTrainedModel | PeftModel,
        inputs: Mapping[str, Tensor],
        num_items_in_batch: Tensor | int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss, the sum of the student's entropies and the number of tokens, inside the student's forward.

        `num_items_in_batch` is the number of trained tokens of the step, over the number of processes, because their
        gradients are averaged.  In an evaluation it is None.
        """
        ids = torch.cat((inputs["prompt_ids"], inputs["completion_ids"]), 1)
        attention = torch.cat((inputs["prompt_mask"], inputs["completion_mask"]), 1)
        trained = inputs["completion_mask"].bool()
        if "tool_mask" in inputs:
            trained = trained & inputs["tool_mask"].bool()
        sequence = (ids, attention, trained.shape[1])
        student_states = self._get_last_hidden_state(unwrapped_student, *sequence)
        teacher = self.accelerator.unwrap_model(self.teacher_model.eval())
        with torch.no_grad():
            teacher_states = self._forward_redirection(
                self.teacher_model, teacher, self._get_last_hidden_state, teacher, *sequence
            )
        student_head, teacher_head = head(unwrapped_student), gathered(head(teacher))
        if isinstance(student_head.weight, DTensor):
            raise Refusal(
                "the student's LM head is sharded inside the loss: use an FSDP2 wrap policy that leaves it whole"
            )
        tokens = inputs["completion_ids"][trained]
        loss, columns = head_pass(
            self.method,
            Hidden(student_states[trained], student_head),
            FrozenOutputs(Hidden(teacher_states[trained], teacher_head)),
            tokens,
            targets(self.method, tokens, num_items_in_batch),
            Vocabulary(min(len(student_head.weight), len(teacher_head.weight)), self.temperature),
        )
        assert columns.reverse_kl is not None and columns.student_entropy is not None
        count = trained.sum()
        self._reverse_kl = torch.stack((columns.reverse_kl.sum(), count.to(columns.reverse_kl.dtype)))
        return loss, columns.student_entropy.sum(), count


def misfits(method: Method) -> Iterator[str]:
    """Yield why a loss depends on more than each token and both models' distributions of it."""
    yield from surroundings(method, ENGINE)
    if method.rollouts.per_prompt > 1:
        yield f"it takes {method.rollouts.per_prompt} rollouts of each prompt, and TRL generates one"
    if method.reduction != TokenMean():
        yield f"its denominator is {method.reduction}, and TRL divides by the number of tokens"
    for term in method.terms:
        if isinstance(term, MatchHidden):
            yield f"{term} matches hidden states below the LM head"
        elif "reference_logp" in models(term.against):
            yield f"{term.against} reads a reference model, which TRL does not load"
        if isinstance(term, PolicyGradient) and term.transforms:
            yield f"{term.transforms} combine the rewards of the whole batch"
        for leaf in term.column_leaves():
            if columns := reads(leaf) - {"ids"}:
                yield f"{leaf} reads {', '.join(sorted(columns))}, which TRL does not measure over the batch"


def check_settings(method: Method, args: DistillationConfig) -> None:
    """Refuse settings of TRL that the method would ignore, or that bias its gradient."""
    if args.beta != 1:
        raise Refusal(f"beta={args.beta}: the method decides what is minimised; leave beta out")
    whole = {"top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0}
    changed = [f"{name}={getattr(args, name)}" for name, value in whole.items() if getattr(args, name) != value]
    biased = [t for t in method.terms if isinstance(t, PolicyGradient) and not t.corrected()]
    if changed and biased:
        raise Refusal(
            f"{', '.join(changed)}: a policy gradient needs samples of the student's whole distribution, and TRL "
            "keeps no log-probs to correct others; leave it out, or match distributions (opd_full, gkd)"
        )


def verify_loaded(model: PreTrainedModel | PeftModel, argument: str) -> None:
    """Refuse a model whose logits opd's head does not reproduce; only the main process is sure to have its weights."""
    if PartialState().is_main_process:
        was_training = model.training
        with renamed({f"--{argument}": argument}):
            verify_head(model.eval(), field=argument)
        model.train(was_training)


def targets(method: Method, ids: Int[Tensor, " N"], num_items: Tensor | int | None) -> tuple[Target, ...]:
    """Return a target per term: TRL's denominator, by default the tokens themselves, and the weights that read ids."""
    count = max(len(ids), 1) if num_items is None else num_items
    scale = torch.ones_like(ids, dtype=torch.float32) / count
    weights = ([leaf(ids=ids[None])[0] for leaf in term.weights] for term in method.terms)
    terms = zip(method.terms, weights, strict=True)
    return tuple(Target(reduce(mul, factors, scale * term.coef), None, None) for term, factors in terms)


def gathered(frozen: Head) -> Head:
    """Return a head without gradient, whole on each rank; all ranks call this at the same time."""
    return replace(frozen, weight=full(frozen.weight), bias=None if frozen.bias is None else full(frozen.bias))
