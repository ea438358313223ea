"""Forward and backward of responses through student, teacher and LM head: `ModelUpdate(...).of(batch, length)`."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from opd.core.types import Rollout
from opd.head.inputs import FrozenOutputs
from opd.head.vocabulary import Vocabulary
from opd.losses.terms import Target
from opd.methods import METHODS
from opd.models.batching import micro_batches, rows
from opd.models.student import Student
from opd.teachers.local import LocalTeacher

PROMPT = 40  # tokens of a prompt
FIRST_ID = 3  # the ids below are special tokens


@dataclass(frozen=True)
class ModelUpdate:
    """Everything of a training step between rollouts and optimizer, with vopd and random tokens."""

    student: Student
    teacher: LocalTeacher
    size: int  # ids of the vocabulary
    device: torch.device

    def of(self, batch: int, length: int) -> tuple[Callable[[], object], Callable[[], object]]:
        """Return functions that run forward and backward of `batch` responses and that clear the gradients.

        Every second response has half the length.
        """
        g, method = torch.Generator().manual_seed(0), METHODS["vopd"]()
        draw = lambda n: tuple(torch.randint(FIRST_ID, self.size, (n,), generator=g).tolist())
        rollouts = []
        for i in range(batch):
            prompt, ids = draw(PROMPT), draw(length // (1 + i % 2))
            rollouts.append(
                Rollout(
                    prompt_ids=prompt,
                    teacher_prompt_ids=prompt,
                    ids=ids,
                    sampler_logp=(0.0,) * len(ids),
                    index=i,
                    group=i,
                    stopped=True,
                )
            )
        groups = micro_batches({i: PROMPT + len(r.ids) for i, r in enumerate(rollouts)}, 8192)
        vocabulary = Vocabulary(self.size)

        def run() -> None:
            for group in groups:
                part = [rollouts[i] for i in group]
                masks = [[True] * len(r.ids) for r in part]
                target = (Target(torch.ones(sum(map(len, masks)), device=self.device), None, None),)
                batch_rows = rows(part, masks, teacher=False, device=self.device)
                frozen = FrozenOutputs(self.teacher.hidden(part, masks))
                self.student(batch_rows, frozen, method, target, vocabulary)[0].backward()

        return run, self.student.zero_grad
