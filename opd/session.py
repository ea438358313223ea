"""What a run stands on: models, teacher, prompts and optimizer, opened once and checked before the first step."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from accelerate.tracking import filter_trackers
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    KwargsHandler,
    LoggerType,
    set_seed,
)
from peft import PeftModel
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from transformers import PreTrainedModel

from opd import adapters, bridge, models, opening, remote, tokens
from opd.collect import Collector
from opd.config import Train
from opd.engines.hf import HFEngine
from opd.launch import check_connected, check_launch, needs_cpu_backend
from opd.method import Method
from opd.panel import Panel
from opd.reading import Prompts
from opd.representation import Lenses
from opd.runs import STATE, load_optimizer, save_optimizer
from opd.student import Student, compiled
from opd.tasks.load import load
from opd.teachers.local import LocalTeacher
from opd.teachers.reach import Server
from opd.teachers.server import HiddenTeacher, LogpTeacher, open_teacher
from opd.teachers.text import TextTeacher
from opd.teachers.writer import ServerEngine
from opd.types import Refusal
from opd.vocabulary import Vocabulary

AnyTeacher = LocalTeacher | HiddenTeacher | LogpTeacher | TextTeacher
ASKING = timedelta(days=1)  # others wait for the main process: hundreds of questions a step, each with its retries
SAVED = StateDictOptions(full_state_dict=True, cpu_offload=True)  # the whole state, on the main process only
RESTORED = StateDictOptions(full_state_dict=True)  # the whole state, on every process


@dataclass(frozen=True)
class Session:
    """Everything a step needs."""

    accelerator: Accelerator
    student: torch.nn.Module  # Student, wrapped by Accelerate
    teachers: dict[str, AnyTeacher]  # by the names of --route; "" is --teacher
    reference: LocalTeacher | None  # for methods that read one
    panel: Panel | None  # for methods that ask
    optimizer: AcceleratedOptimizer
    vocabulary: Vocabulary
    collector: Collector
    prompts: Prompts
    held_out: Prompts | None
    agreements: dict[str, tokens.Agreement]  # with each teacher
    lenses: Lenses | None  # for methods that match hidden states

    def plain(self) -> Student:
        """The student without its wrappers."""
        return self.accelerator.unwrap_model(self.student)

    def shows_heads(self) -> bool:
        """Whether every teacher tells its whole distribution."""
        return all(isinstance(t, LocalTeacher | HiddenTeacher) for t in self.teachers.values())

    def save(self, folder: Path) -> None:
        """Write the model folder of a checkpoint and, in its subfolder, the state of optimizer and teachers.

        Every process calls it, because sharded values are gathered; the main process writes.
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
        """Load the optimizer and teacher state of a checkpoint and return its step; the model has its weights already.

        Args:
            state: the checkpoint's folder of training state.
            partial: accept parameters without optimizer state, because some of them never have a gradient.
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


def open_session(config: Train, method: Method, checkpoint: Path | None) -> Session:
    """Check what can be checked without weights, then load them; `checkpoint` replaces the student's own weights."""
    source = models.locate(config.student, field="student", trust_remote_code=config.trust_remote_code)
    sources = {name: opening.source_of(name, model, source, config) for name, model in config.routes().items()}
    own = remote.known(source, field="student")
    known = {name: own if s is None else _known(s, own, config, opening.flag(name)) for name, s in sources.items()}
    agreements = _agreed(own, known)
    size = min(a.vocabulary for a in agreements.values())
    stop = tuple(dict.fromkeys(id for a in agreements.values() for id in a.stop))
    lenses = bridge.plain_lenses(method, own.shape, {opening.flag(name): k.shape for name, k in known.items()})
    asked, held_out = _prompts(config, own, known)
    accelerator = _accelerator(config, method)
    device = accelerator.device
    student = Student(
        opening.trainable(config, source, checkpoint, device), checkpointing=config.gradient_checkpointing
    )
    on = device if config.teacher_device == "same" else models.device(config.teacher_device, field="teacher-device")
    models.verify_head(student.model, field="student")
    differ = any(set(own.stop) != set(k.stop) for k in known.values())
    merged = stop if config.stop_token == "canonical" and differ else ()
    main = accelerator.is_main_process
    teachers = _teachers(
        config, method, sources, student.model, asked, size=size, merged=merged, on=on, to=device, main=main
    )
    local = {name: t for name, t in teachers.items() if isinstance(t, LocalTeacher)}
    reference = opening.reference(method, config, source, student.model, size, on, device)
    frozen = {**{opening.flag(name): t for name, t in local.items()}, **({"reference": reference} if reference else {})}
    for field, model in (("student", student.model), *((field, t.model) for field, t in frozen.items())):
        models.verify_finite(model, own.text, ids=size, field=field)
    models.small_threads(student.model, *(t.model for t in local.values()))
    if config.compile:
        if device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
            raise Refusal("--compile: needs a C++ compiler on a CPU, and there is no g++; install one, or leave it out")
        student.body = compiled(student.model)
        for scorer in frozen.values():
            scorer.body = compiled(scorer.model)
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)
    wrapped, wrapped_optimizer = accelerator.prepare(student, optimizer)
    writers = _writers(config, teachers, student.model, size, stop, merged)
    speaker = opening.speaker(config, source, student.model, size, stop, merged, accelerator)
    rounded = config.logit_precision == "bf16"
    vocabulary = Vocabulary(size, config.loss_temperature, merged, config.chunk_mb << 20, rounded)
    return Session(
        accelerator=accelerator,
        student=wrapped,
        teachers=teachers,
        reference=reference,
        panel=opening.panel(method, config, asked.task, teachers, own.text, on, main=main),
        optimizer=wrapped_optimizer,
        vocabulary=vocabulary,
        collector=Collector(speaker, writers, own.text, vocabulary),
        prompts=asked,
        held_out=held_out,
        agreements=agreements,
        lenses=lenses,
    )


def _known(source: models.Source | Server, student: remote.Known, config: Train, field: str) -> remote.Known:
    """A teacher that scores, before its weights."""
    if isinstance(source, Server):
        return remote.known_there(source, student, config)
    return remote.known(source, field=field)


def _agreed(own: remote.Known, known: Mapping[str, remote.Known]) -> dict[str, tokens.Agreement]:
    """What the student's vocabulary and each teacher's agree on; refuses those that do not."""
    compare = lambda other: tokens.agreement(
        own.text,
        other.text,
        student_rows=own.shape.vocab_size,
        teacher_rows=other.shape.vocab_size,
        student_eos=own.stop,
        teacher_eos=other.stop,
    )
    return {name: tokens.require(compare(other)) for name, other in known.items()}


def _prompts(config: Train, own: remote.Known, known: Mapping[str, remote.Known]) -> tuple[Prompts, Prompts | None]:
    """Those to train on, and the held-out ones."""
    texts = {name: k.text for name, k in known.items()}
    context = min(k.shape.max_position_embeddings for k in (own, *known.values()))
    room = context - config.sampling.max_new_tokens
    asked, held_out = Prompts(load(config.data), own.text, texts, config, room), None
    if config.eval_prompts:
        # A random choice of the held-out rows, the same for every run.
        chosen = replace(config.data, source=config.eval_prompts, split="test", limit=config.eval_limit, seed=0)
        held_out = Prompts(load(chosen), own.text, texts, config, room, optional=True)
    if room < 1:
        raise Refusal(
            f"--max-new-tokens {config.sampling.max_new_tokens}: the models' context of {context} tokens leaves none "
            f"for a prompt; lower it, to {context // 2} say"
        )
    asked.check()
    if held_out is not None:
        held_out.check()
    return asked, held_out


def _accelerator(config: Train, method: Method) -> Accelerator:
    """Processes, precision and trackers; seeds what is random."""
    for name in config.trackers:
        if name not in {str(known) for known in LoggerType}:
            raise Refusal(f"--trackers {name}: unknown; choose {', '.join(sorted(map(str, LoggerType)))}")
        if not filter_trackers([name], logging_dir=config.out):
            raise Refusal(f"--trackers {name}: not installed; pip install {name}")
    set_seed(config.seed)
    AcceleratorState._reset_state()  # an earlier run of this process may have had another precision
    # Without the heads, and the layers above those matched, some parameters have no gradient to wait for.
    handlers: list[KwargsHandler] = [DistributedDataParallelKwargs(find_unused_parameters=method.headless())]
    if method.asks is not None:
        handlers.append(InitProcessGroupKwargs(timeout=ASKING))
    check_launch()
    accelerator = Accelerator(
        cpu=needs_cpu_backend(),
        mixed_precision="bf16" if config.precision == "bf16" else "no",
        log_with=list(config.trackers) or None,
        project_dir=config.out,
        kwargs_handlers=handlers,
    )
    check_connected(accelerator)
    per_update = accelerator.num_processes * method.rollouts.per_prompt * method.rollouts.updates
    if config.batch % per_update:
        raise Refusal(
            f"--batch {config.batch}: must be a multiple of {per_update} "
            f"({accelerator.num_processes} processes x {method.rollouts.per_prompt} rollouts per prompt "
            f"x {method.rollouts.updates} updates)"
        )
    return accelerator


def _teachers(
    config: Train,
    method: Method,
    sources: Mapping[str, models.Source | Server | None],
    student: PreTrainedModel | PeftModel,
    prompts: Prompts,
    *,
    size: int,
    merged: tuple[int, ...],
    on: torch.device,
    to: torch.device,
    main: bool,
) -> dict[str, AnyTeacher]:
    """The teachers by name, their weights on one device and what they say on another."""
    out: dict[str, AnyTeacher] = {}
    for name, called in config.routes().items():
        at = sources[name]
        if at is None:
            out[name] = opening.text_teacher(called, config, on, field=opening.flag(name), main=main)
        elif isinstance(at, Server):
            out[name] = there = open_teacher(at, to=to, stop=merged, size=size, tops=method.supports())
            if config.remote.teacher_local and not name:
                remote.compared(there, [p.teacher_ids for p in prompts.first(8)], config, on)
        else:
            out[name] = opening.teacher(called, at, student, config, on, to, field=opening.flag(name))
    return out


def _writers(
    config: Train,
    teachers: Mapping[str, AnyTeacher],
    student: PreTrainedModel | PeftModel,
    size: int,
    stop: tuple[int, ...],
    merged: tuple[int, ...],
) -> dict[str, HFEngine | ServerEngine]:
    """Who writes what a teacher says in a rollout."""
    here = lambda model: HFEngine(model, size, stop, config.decode_rows, merged)

    def writer(teacher: AnyTeacher) -> HFEngine | ServerEngine:
        match teacher:
            case LocalTeacher():
                return here(teacher.model)
            case TextTeacher():
                return here(student)  # a method that asks for texts lets no teacher write rollouts
        return ServerEngine(teacher.server, size, stop)

    return {name: writer(teacher) for name, teacher in teachers.items()}


def _place(state: Path, teacher: int) -> Path:
    """Return the folder of a teacher's state: that of --teacher is the training state's own, each --route has one."""
    return state / f"teacher-{teacher}" if teacher else state
