"""The training state of a checkpoint: `TrainingState`, with one `save` and one `load`.

A checkpoint is a model folder that transformers, peft and vLLM load.  The training state lies in its subfolder:

    state.json                     the seal: the step, the trained parameters that never had a gradient, and the size
                                   and digest of every other file
    optimizer.safetensors          AdamW's state, by parameter name
    shards/                        in place of it, in a sharded run: weights, AdamW's state and changing teachers, by
                                   torch.distributed.checkpoint
    memory.safetensors             tensors that the method carries from step to step, if any
    draws.safetensors              rollouts that are generated and not yet trained on, if any
    bridge.safetensors             projections between the hidden states of student and teacher, if any
    teacher.safetensors            weights of a teacher that changes during the run (ema)
    teacher.json                   an id of the weights behind a teacher's server
    teacher-N/                     the same two files of the N-th --route
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from accelerate.optimizer import AcceleratedOptimizer
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from opd.core.errors import Refusal, foreign_errors
from opd.core.tensors import all_finite, save_tensors
from opd.methods.rollout_policies.base import Memory
from opd.models.checkpoints import STATE, seal, seal_of
from opd.rollouts import buffer
from opd.teachers.base import BaseTeacher, TeacherState

OptimizerState = Mapping[str, Mapping[str, Tensor]]  # by parameter, then by AdamW's name: step, exp_avg, exp_avg_sq
ShardedState = dict[str, dict[str, Any]]  # model, optimizer and teachers, with parts of tensors
SHARDS = "shards"
TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)  # frozen weights are those of --student
ON_MAIN = StateDictOptions(full_state_dict=True, cpu_offload=True)  # the whole state, on the main process only
ON_EVERY = StateDictOptions(full_state_dict=True)  # the whole state, on every process


@dataclass(frozen=True)
class TrainingState:
    """Everything that a resumed run reads, beside the model folder of the checkpoint; by default, that of a new run."""

    step: int = 0
    optimizer: OptimizerState = field(default_factory=dict)
    without_state: Sequence[str] = ()  # trained parameters that never had a gradient, such as those of unused experts
    memory: Memory = field(default_factory=dict)
    rollouts: buffer.Batches = field(default_factory=dict)  # by batch number, without prompts
    bridge: Mapping[str, Tensor] = field(default_factory=dict)
    teachers: Sequence[TeacherState] = ()  # in the order of --teacher and the --routes
    refused: bool = False  # the step was refused, so the checkpoints before it stay
    sharded: bool = False  # weights, optimizer and tensors of teachers are in the shards, and not here


def save(state: TrainingState, checkpoint: Path, run: Path | None = None) -> None:
    """Write the training state of a checkpoint, and its seal with the history of the run in the folder `run`.

    The model must be saved before.  Tensors that are empty get no file.
    """
    folder = checkpoint / STATE
    folder.mkdir(parents=True, exist_ok=True)
    named = {f"{name}/{key}": x for name, row in state.optimizer.items() for key, x in row.items()}
    if not state.sharded:
        save_tensors(named, folder / "optimizer.safetensors")
    parts = {"memory": state.memory, "draws": buffer.to_tensors(state.rollouts), "bridge": state.bridge}
    for name, tensors in parts.items():
        if tensors:
            save_tensors(tensors, folder / f"{name}.safetensors")
    for k, teacher in enumerate(state.teachers):
        place = _place(folder, k)
        place.mkdir(exist_ok=True)
        if teacher.tensors and not state.sharded:
            save_tensors(teacher.tensors, place / "teacher.safetensors")
        if teacher.server_weights:
            (place / "teacher.json").write_text(json.dumps({"weights": teacher.server_weights}))
    numbers = {"step": state.step, "without_state": list(state.without_state), "refused": state.refused}
    seal(checkpoint, numbers, run)


def load(checkpoint: Path, num_teachers: int = 1) -> TrainingState:
    """Return the training state of a checkpoint.

    Older checkpoints keep it in the model folder itself.  A teacher without state may lack its folder, because stores
    of files drop empty folders.
    """
    with foreign_errors(f"checkpoint {checkpoint}: cannot be read", "remove it, then resume from the one before"):
        folder = checkpoint / STATE if (checkpoint / STATE).is_dir() else checkpoint
        return _load(folder, seal_of(checkpoint), num_teachers)


def _load(folder: Path, numbers: Mapping[str, Any], num_teachers: int) -> TrainingState:
    """Return the training state in a folder; `numbers` are those of the seal."""
    optimizer: dict[str, dict[str, Tensor]] = {}
    sharded = (folder / SHARDS).is_dir()
    for key, x in load_file(folder / "optimizer.safetensors").items() if not sharded else ():
        if not all_finite(x):  # of a checkpoint without digests, or of one that an earlier version saved
            raise ValueError(f"{key} of optimizer.safetensors holds numbers that are not finite")
        name, field = key.rsplit("/", 1)
        optimizer.setdefault(name, {})[field] = x
    return TrainingState(
        step=numbers["step"],
        optimizer=optimizer,
        without_state=numbers.get("without_state", ()),
        memory=_tensors(folder / "memory.safetensors"),
        rollouts=buffer.from_tensors(_tensors(folder / "draws.safetensors")),
        bridge=_tensors(folder / "bridge.safetensors"),
        teachers=[_teacher(_place(folder, k)) for k in range(num_teachers)],
        refused=numbers.get("refused", True),  # earlier versions do not say it
        sharded=sharded,
    )


def _place(folder: Path, teacher: int) -> Path:
    """Return the folder of a teacher's state: the state's own for --teacher, a subfolder for each --route."""
    return folder / f"teacher-{teacher}" if teacher else folder


def _teacher(folder: Path) -> TeacherState:
    path = folder / "teacher.json"
    weights = json.loads(path.read_text())["weights"] if path.is_file() else ""
    return TeacherState(_tensors(folder / "teacher.safetensors"), weights)


def _tensors(path: Path) -> dict[str, Tensor]:
    return load_file(path) if path.is_file() else {}


def optimizer_state(
    student: torch.nn.Module, optimizer: AcceleratedOptimizer
) -> tuple[OptimizerState, tuple[str, ...]]:
    """Return the optimizer's whole state, and the names of its parameters without state, on the main process only.

    Every process must call it.
    """
    saved: dict[str, Any] = get_optimizer_state_dict(student, optimizer.optimizer, options=ON_MAIN)
    state = saved.get("state", {})  # only the main process has it
    names = [name for group in saved.get("param_groups", ()) for name in group["params"]]
    return state, tuple(name for name in names if name not in state)


def restore_optimizer(
    student: torch.nn.Module, optimizer: AcceleratedOptimizer, saved: TrainingState, checkpoint: Path
) -> None:
    """Load an optimizer's state on every process.  Raises Refusal if the state of a trained parameter is missing."""
    current: dict[str, Any] = get_optimizer_state_dict(student, optimizer.optimizer, options=ON_EVERY)
    missing = sorted(current["state"].keys() - saved.optimizer.keys() - set(saved.without_state))
    if missing:
        raise Refusal(
            f"--resume: optimizer.safetensors of {checkpoint} lacks the state of {len(missing)} trained parameters, "
            f"such as {missing[0]}; remove this checkpoint to continue from the one before"
        )
    current["state"] |= saved.optimizer
    set_optimizer_state_dict(student, optimizer.optimizer, current, options=ON_EVERY)
    _drop_state(student, optimizer, saved.without_state)


def save_shards(state: ShardedState, checkpoint: Path) -> None:
    """Write a sharded state: every process its own part.  A collective operation; the folder must exist."""
    writer = HuggingFaceStorageWriter(str(checkpoint / STATE / SHARDS), save_distributed=True)
    dcp.save(dict(state), storage_writer=writer)


def load_shards(state: ShardedState, checkpoint: Path) -> None:
    """Fill the tensors of a state from shards that any number of processes wrote.  A collective operation."""
    folder = checkpoint / STATE / SHARDS
    with foreign_errors(
        f"checkpoint {checkpoint}: its shards cannot be read", "remove it to go on from the one before"
    ):
        dcp.load(dict(state), storage_reader=HuggingFaceStorageReader(str(folder)))


def sharded_state(
    student: torch.nn.Module, optimizer: AcceleratedOptimizer, teachers: Sequence[TeacherState]
) -> tuple[ShardedState, tuple[str, ...]]:
    """Return what the shards of a checkpoint hold, as parts of tensors, and the parameters without optimizer state.

    Weights that are not trained are those of --student, and not in it.
    """
    weights, saved = cast(tuple[Any, Any], get_state_dict(student, optimizer.optimizer, options=TRAINED))
    names = [name for group in saved["param_groups"] for name in group["params"]]
    tensors = {str(k): dict(teacher.tensors) for k, teacher in enumerate(teachers) if teacher.tensors}
    without_state = tuple(name for name in names if name not in saved["state"])
    return {"model": weights, "optimizer": saved["state"], "teachers": tensors}, without_state


def restore_shards(
    student: torch.nn.Module,
    optimizer: AcceleratedOptimizer,
    teachers: Sequence[BaseTeacher],
    saved: TrainingState,
    checkpoint: Path,
) -> None:
    """Load weights, optimizer and teachers from the shards of a checkpoint.  A collective operation."""
    state, _ = sharded_state(student, optimizer, [teacher.state() for teacher in teachers])
    for name in saved.without_state:
        del state["optimizer"][name]
    load_shards(state, checkpoint)
    set_model_state_dict(student, state["model"], options=TRAINED)
    current: dict[str, Any] = get_optimizer_state_dict(student, optimizer.optimizer)
    set_optimizer_state_dict(student, optimizer.optimizer, current | {"state": current["state"] | state["optimizer"]})
    _drop_state(student, optimizer, saved.without_state)
    for k, (teacher, other) in enumerate(zip(teachers, saved.teachers, strict=True)):
        teacher.restore(TeacherState(state["teachers"].get(str(k), {}), other.server_weights))


def _drop_state(student: torch.nn.Module, optimizer: AcceleratedOptimizer, names: Sequence[str]) -> None:
    """Remove the state that torch gives to every parameter: AdamW must start these at their first gradient."""
    for name, parameter in student.named_parameters():
        if name.removeprefix("module.") in names:
            optimizer.optimizer.state.pop(parameter, None)
