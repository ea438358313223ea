"""Everything that a step needs, and its checkpoints."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from opd.core.errors import Refusal
from opd.data import tokenizers as tokens
from opd.data.prompt_stream import Prompts
from opd.head.vocabulary import Vocabulary
from opd.losses.hidden_states import Lenses
from opd.models import adapters
from opd.models.student import Student
from opd.rollouts.collector import Collector
from opd.teachers.judges.annotator import Annotator
from opd.teachers.local import LocalTeacher
from opd.teachers.remote import HiddenTeacher, LogpTeacher
from opd.teachers.text.text_teacher import TextTeacher
from opd.training import hidden_bridge as bridge
from opd.training.checkpoint import load_optimizer, save_optimizer
from opd.training.run_folder import STATE

AnyTeacher = LocalTeacher | HiddenTeacher | LogpTeacher | TextTeacher
SAVED = StateDictOptions(full_state_dict=True, cpu_offload=True)  # the full state, on the main process only
RESTORED = StateDictOptions(full_state_dict=True)  # the full state, on every process


@dataclass(frozen=True)
class Session:
    """The objects that every training step needs."""

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

    def plain(self) -> Student:
        """Return the student without the wrappers of Accelerate."""
        return self.accelerator.unwrap_model(self.student)

    def shows_heads(self) -> bool:
        """Return whether every teacher provides its full next-token distribution."""
        return all(isinstance(t, LocalTeacher | HiddenTeacher) for t in self.teachers.values())

    def save(self, folder: Path) -> None:
        """Write the model folder of a checkpoint and, in its subfolder, the state of optimizer and teachers.

        Every process must call it, because sharded values are gathered.  Only the main process writes.
        """
        weights = self.accelerator.get_state_dict(self.student)
        whole: dict[str, Any] = get_optimizer_state_dict(self.student, self.optimizer.optimizer, options=SAVED)
        if self.accelerator.is_main_process:
            named = {name.removeprefix("model."): x for name, x in weights.items()}
            adapters.save(self.plain().model, folder, named)
            self.collector.tokenizer.save_pretrained(folder)
            state = folder / STATE
            save_optimizer(whole["state"], state / "optimizer.safetensors")
            for k, teacher in enumerate(self.teachers.values()):
                place = _place(state, k)
                place.mkdir(exist_ok=True)
                teacher.save(place)
            if self.lenses is not None:
                bridge.save(self.lenses, state)

    def restore(self, state: Path, *, partial: bool) -> int:
        """Load the optimizer and teacher state of a checkpoint and return its step.

        The model's weights are already loaded.

        Args:
            state: the checkpoint's folder of training state.
            partial: accept trained parameters without optimizer state, because some never receive a gradient.

        Raises Refusal if optimizer state is missing and `partial` is False.
        """
        optimizer = self.optimizer.optimizer
        whole: dict[str, Any] = get_optimizer_state_dict(self.student, optimizer, options=RESTORED)
        kept = load_optimizer(state / "optimizer.safetensors")
        missing = sorted(whole["state"].keys() - kept.keys())
        if missing and not partial:
            raise Refusal(
                f"--resume: {state / 'optimizer.safetensors'} lacks the state of {len(missing)} trained parameters, "
                f"{missing[0]} for one; remove this checkpoint to go on from the one before"
            )
        whole["state"] |= kept
        set_optimizer_state_dict(self.student, optimizer, whole, options=RESTORED)
        for k, teacher in enumerate(self.teachers.values()):
            teacher.restore(_place(state, k))
        return json.loads((state / "state.json").read_text())["step"]


def _place(state: Path, teacher: int) -> Path:
    """Return the folder of a teacher's state: `state` itself for --teacher, a subfolder for each --route."""
    return state / f"teacher-{teacher}" if teacher else state
