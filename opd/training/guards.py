"""Checks of each step and each checkpoint that end a run, rather than let it go on wrongly or for nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer

from opd.core.errors import Refusal
from opd.core.tensors import all_finite
from opd.core.types import Batch
from opd.losses.terms import Target
from opd.methods.method import Method
from opd.models.checkpoints import checkpoints
from opd.training.checkpoint import OptimizerState
from opd.training.session import Session

REFUSED = 5  # optimizer steps in a row that may be skipped because of gradients that are not finite
UNTRAINED = 10  # optimizer steps in a row that may have no token to train on


@dataclass
class Guards:
    """Checks of a run that count over its steps."""

    session: Session
    run: Path
    refused: int = 0  # consecutive optimizer steps that were skipped
    untrained: int = 0  # consecutive optimizer steps without a token to train on

    def check_update(self, targets: Sequence[Target], batch: Batch, *, finite: bool) -> None:
        """Refuse several steps in a row whose gradient is not `finite`, or in which no token has a weight."""
        self.refused = 0 if finite else self.refused + 1
        if self.refused == REFUSED:
            raise Refusal(
                f"the gradient was not finite {REFUSED} steps in a row, perhaps because the update before them "
                f"diverged; {self._remedy()}"
            )
        self.untrained = 0 if any(bool(target.weight.any()) for target in targets) else self.untrained + 1
        if self.untrained == UNTRAINED:
            raise Refusal(f"no token was trained on in {UNTRAINED} steps in a row: {self._nothing_trained(batch)}")

    def _nothing_trained(self, batch: Batch) -> str:
        """Return why no token of a batch has a weight, and a remedy."""
        config = self.session.config
        if batch.mask.any():
            return "the method's filters or weights leave none; look at the saved rollouts (`opd inspect`)"
        cut = float((~batch.stopped).float().mean())
        if config.truncated == "drop" and cut:
            return (
                f"{cut:.0%} of the responses were cut at --max-new-tokens {config.sampling.max_new_tokens}, and "
                "--truncated drop leaves those out; raise --max-new-tokens, or take --truncated train"
            )
        return "all responses are empty, or the method's filters drop them; look at the saved rollouts (`opd inspect`)"

    def check_saved(self, step: int, weights: Mapping[str, Tensor], optimizer: OptimizerState) -> None:
        """Refuse to save weights or a state of the optimizer that are infinite or no numbers.

        If they are sharded, every process must call it, with its part of them.
        """
        states = {f"{name}/{key}": x for name, row in optimizer.items() for key, x in row.items()}
        for what, tensors in (("weights of the student", weights), ("state of the optimizer", states)):
            bad = [name for name, x in tensors.items() if not all_finite(x)]
            if self.session.is_sharded:
                bad = sorted({*gather_object(bad)})
            if bad:
                others = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
                raise Refusal(
                    f"step {step}: the {what} are not finite ({bad[0]}{others}), and were not saved; {self._remedy()}"
                )

    def _remedy(self) -> str:
        """Return what the user can do after a run has diverged."""
        there = list(checkpoints(self.run).values())
        if not there:
            return "no checkpoint was saved before: start the run again with a lower --lr"
        names = ", ".join(map(str, there))
        return f"the checkpoints before are {names}: start a new run with a lower --lr and --student {there[0]}"

    def check_engine(self, batch: Batch) -> None:
        """Refuse an engine whose log-probs are not those of the trainer."""
        config = self.session.config
        engine = config.speaker
        if engine.engine == "hf" or batch.student_logp is None or not config.compares():
            return
        generated = batch.written()
        if "staleness" in batch.notes:  # the trainer no longer has the weights behind older rollouts
            generated = generated & (batch.notes["staleness"] == 0)[:, None]
        difference = (batch.student_logp - batch.sampler_logp)[generated].abs()
        mismatch = float(difference.mean()) if generated.any() else 0.0
        if not mismatch <= engine.max_mismatch:
            raise Refusal(
                f"--engine {engine.engine}: its log-probs are {mismatch:.3g} nats from the trainer's on average, above "
                f"--max-mismatch {engine.max_mismatch}: its weights, precision or vocabulary are others; compare with "
                "--precision fp32, or --engine hf"
            )


def check_teacher(batch: Batch, method: Method, tokenizer: Tokenizer) -> None:
    """Refuse log-probs of the teacher that are no numbers, or, unless the loss is bounded, infinite."""
    if batch.teacher_logp is None:
        return
    excluded = batch.teacher_logp == -torch.inf
    bad = batch.mask & ~batch.teacher_logp.isfinite()
    if bad.any() and method.bounded():
        bad = bad & ~excluded
    if bad.any():
        token = int(batch.ids[bad][0])
        text = tokenizer.decode([token])
        what = "probability 0" if excluded[bad][0] else "no number as log-prob"
        raise Refusal(
            f"the teacher gives {what} to token {token} ({text!r}), which the student generated, so the loss is "
            "not finite: is the teacher's vocabulary masked or its precision too low (--teacher-precision fp32)?"
        )
