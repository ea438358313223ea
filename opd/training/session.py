"""The objects that every training step needs: `Session`."""

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer

from opd.config.plan import Plan
from opd.config.train import Train
from opd.data import tokenizers as tokens
from opd.data.prompt_stream import Prompts
from opd.head.vocabulary import Vocabulary
from opd.losses.hidden_states import Lenses
from opd.methods.method import Method
from opd.models.sharding import is_sharded
from opd.models.student import Student
from opd.rollouts.collector import Collector
from opd.teachers.judges.annotator import Annotator
from opd.teachers.local import LocalTeacher
from opd.teachers.remote import HiddenTeacher, LogpTeacher
from opd.teachers.text.text_teacher import TextTeacher
from opd.training.setup import Setup

AnyTeacher = LocalTeacher | HiddenTeacher | LogpTeacher | TextTeacher


@dataclass(frozen=True)
class Session:
    """The objects that every training step needs."""

    plan: Plan
    accelerator: Accelerator
    student: torch.nn.Module  # Student, wrapped by Accelerate
    teachers: dict[str, AnyTeacher]  # by route name; "" is --teacher
    reference: LocalTeacher | None  # for methods with a reference model
    annotator: Annotator  # asks text-only teachers and judges, for methods with a question
    optimizer: AcceleratedOptimizer
    vocabulary: Vocabulary
    collector: Collector
    prompts: Prompts
    held_out: Prompts | None
    agreements: dict[str, tokens.TokenizerAgreement]  # tokenizer comparison with each teacher, by route name
    lenses: Lenses | None  # for methods that match hidden states
    setup: Setup | None  # for estimates of memory; None with --no-doctor or if a config.json does not tell a size

    @property
    def config(self) -> Train:
        return self.plan.config

    @property
    def method(self) -> Method:
        return self.plan.method

    @property
    def is_sharded(self) -> bool:
        return is_sharded(self.student)

    def plain(self) -> Student:
        """Return the student without the wrappers of Accelerate."""
        return self.accelerator.unwrap_model(self.student)

    def shows_heads(self) -> bool:
        """Return whether every teacher provides its full next-token distribution."""
        return all(isinstance(t, LocalTeacher | HiddenTeacher) for t in self.teachers.values())
