"""The facts that a run's memory depends on, known before its models are loaded: `planned(plan, ...) -> Setup`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PretrainedConfig

from opd.config import model_names
from opd.config.model_names import ModelName
from opd.config.plan import Plan
from opd.config.precision import dtype_of
from opd.config.train import Train
from opd.core.errors import Refusal, foreign_errors
from opd.models import load as models
from opd.models import lora
from opd.models.load import Model
from opd.models.outline import outline
from opd.models.source import locate


@dataclass(frozen=True)
class FrozenModel:
    """A model with weights that the run does not train."""

    field: str  # the flag that named it, as messages call it
    model: Model  # an outline
    is_here: bool = True  # on the student's device, and not on another or behind a server
    scores: bool = True  # and is sharded; a model that only generates texts is whole, in the main process


@dataclass(frozen=True)
class Setup:
    """The facts that the memory of each process depends on.  Models are outlines: they have shapes and no weights."""

    plan: Plan
    student: Model
    frozen: tuple[FrozenModel, ...]
    processes: int
    device: torch.device  # of the student
    row: int  # tokens of the longest prompt with its response

    @property
    def config(self) -> Train:
        return self.plan.config

    @property
    def shards(self) -> bool:
        return self.config.shard and self.processes > 1

    def changed(self, **settings: object) -> "Setup":
        """Return the setup of the same run with other settings."""
        plan = replace(self.plan, config=replace(self.config, **settings))  # type: ignore[arg-type]
        if _student_kind(plan.config) == _student_kind(self.config):
            return replace(self, plan=plan)
        student = student_outline(models.base(self.student).config, plan.config)
        away = [x.field for x in self.frozen if not x.is_here]
        frozen = tuple(_frozen(plan, student, self.device))  # an adapter's base needs no copy
        return replace(self, plan=plan, student=student, frozen=frozen).elsewhere(away)

    def elsewhere(self, fields: Sequence[str]) -> "Setup":
        """Return the setup of the same run with some of the frozen models on another device or machine."""
        return replace(self, frozen=tuple(replace(x, is_here=x.is_here and x.field not in fields) for x in self.frozen))


def planned(plan: Plan, *, processes: int, device: torch.device, row: int) -> Setup:
    """Return the setup of a run from its models' configurations.  Raises Refusal for a model that has no outline."""
    field, config = "student", plan.config
    source = locate(config.student, field=field, trust_remote_code=config.trust_remote_code)
    with foreign_errors(f"--{field} {source}: its config.json does not tell its size"):
        student = student_outline(models.config(source, field=field), config)
    return Setup(plan, student, tuple(_frozen(plan, student, device)), processes, device, row)


def student_outline(model: PretrainedConfig, config: Train) -> Model:
    """Return the outline of a student, with a new adapter if --lora-rank is set."""
    student = outline(model, lora.weights_dtype(config))
    if not config.lora_rank:
        return student
    with torch.device("meta"):
        return lora.with_adapter(student, config)


def is_same_device(name: str, device: torch.device, *, field: str) -> bool:
    """Return whether the device that a flag names is that of the student; it need not be on this machine."""
    try:
        other = device if name == "same" else torch.device(name)
    except RuntimeError as error:
        raise Refusal(f"--{field} {name}: is no device; use same, cpu, or cuda:0 ...") from error
    return other.type == device.type and other.index in (None, device.index)


def _student_kind(config: Train) -> tuple[torch.dtype, int, str]:
    """Return what decides about the parameters of a student's outline."""
    return lora.weights_dtype(config), config.lora_rank, config.lora_targets


def _frozen(plan: Plan, student: Model, device: torch.device) -> Iterator[FrozenModel]:
    """Yield the frozen models of a run."""
    config, scores = plan.config, plan.method.asks is None
    is_here = is_same_device(config.teacher_device, device, field="teacher-device")
    outlines: dict[str, Model] = {}  # by the name of the model

    def sized(name: str, field: str) -> Model:
        if name not in outlines:
            source = locate(name, field=field, trust_remote_code=config.trust_remote_code)
            with foreign_errors(f"--{field} {source}: its config.json does not tell its size"):
                outlines[name] = outline(models.config(source, field=field), dtype_of(config.teacher_precision))
        return outlines[name]

    named: list[tuple[str, ModelName | None]] = [
        *((f"route {name}" if name else "teacher", model) for name, model in plan.teachers.items()),
        ("judge", plan.judge),
    ]
    for field, model in named:
        if isinstance(model, model_names.AveragedStudent):
            yield FrozenModel(field, student)
        elif isinstance(model, model_names.InitialStudent) and not config.lora_rank:
            yield FrozenModel(field, sized(config.student, field), is_here)
        elif isinstance(model, model_names.ScoringServer):  # its head comes here; it may be as large as the student's
            yield FrozenModel(field, sized(config.student, field), is_here=False)
        elif isinstance(model, model_names.ModelFiles):
            yield FrozenModel(field, sized(model.name, field), is_here, scores and field != "judge")
    if "reference_logp" in plan.method.models() and (config.reference or not config.lora_rank):
        yield FrozenModel("reference", sized(config.reference or config.student, "reference"), is_here)
