"""The session of a run: models, teachers, prompts and optimizer, loaded and checked before the first step."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import filter_trackers
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, KwargsHandler, LoggerType, set_seed
from peft import PeftModel
from transformers import PreTrainedModel

from opd.config.plan import Plan
from opd.config.train import Train
from opd.core.errors import Refusal
from opd.data import tokenizers as tokens
from opd.data.prompt_stream import Prompts
from opd.data.tasks.load import load
from opd.head.vocabulary import Vocabulary
from opd.models import load as models
from opd.models import lora
from opd.models.forward import compiled
from opd.models.remote.vllm_protocol import Server
from opd.models.student import Student
from opd.rollouts.collector import Collector
from opd.rollouts.engines.completions import ServerEngine
from opd.rollouts.engines.hf import HFEngine
from opd.teachers import connect as remote
from opd.teachers.local import LocalTeacher
from opd.teachers.remote import open_teacher
from opd.teachers.text.text_teacher import TextTeacher
from opd.training import build_teachers as opening
from opd.training import hidden_bridge as bridge
from opd.training.launch import check_connected, check_launch, needs_cpu_backend
from opd.training.session import AnyTeacher, Session

ASKING = timedelta(days=1)  # process-group timeout: the main process asks hundreds of questions a step, with retries


def open_session(plan: Plan, checkpoint: Path | None = None) -> Session:
    """Load models, teachers, prompts and optimizer; checks that need no weights come first.

    If `checkpoint` is given, the student's weights come from it.
    """
    config, method = plan.config, plan.method
    source = models.locate(config.student, field="student", trust_remote_code=config.trust_remote_code)
    sources = {name: opening.source_of(name, model, source, plan) for name, model in plan.teachers.items()}
    own = remote.known(source, field="student")
    known = {name: own if s is None else _known(s, own, config, opening.flag(name)) for name, s in sources.items()}
    agreements = _agreed(own, known)
    size = min(a.vocabulary for a in agreements.values())
    stop = tuple(dict.fromkeys(id for a in agreements.values() for id in a.stop))
    lenses = bridge.plain_lenses(method, own.shape, {opening.flag(name): k.shape for name, k in known.items()})
    asked, held_out = _prompts(plan, own, known)
    accelerator = _accelerator(plan)
    device = accelerator.device
    student = Student(lora.trainable(config, source, checkpoint, device), checkpointing=config.gradient_checkpointing)
    on = device if config.teacher_device == "same" else models.device(config.teacher_device, field="teacher-device")
    models.verify_head(student.model, field="student")
    differ = any(set(own.stop) != set(k.stop) for k in known.values())
    merged = stop if config.stop_token == "canonical" and differ else ()
    main = accelerator.is_main_process
    teachers = _teachers(plan, sources, student.model, asked, size=size, merged=merged, on=on, to=device, main=main)
    local = {name: t for name, t in teachers.items() if isinstance(t, LocalTeacher)}
    reference = opening.reference(plan, source, student.model, size, on, device)
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
        plan=plan,
        accelerator=accelerator,
        student=wrapped,
        teachers=teachers,
        reference=reference,
        annotator=opening.annotator(plan, asked, teachers, on, main=main),
        optimizer=wrapped_optimizer,
        vocabulary=vocabulary,
        collector=Collector(speaker, writers, own.text, vocabulary),
        prompts=asked,
        held_out=held_out,
        agreements=agreements,
        lenses=lenses,
    )


def _known(source: models.ModelSource | Server, student: remote.Known, config: Train, field: str) -> remote.Known:
    """Return the tokenizer, config and stop ids of a teacher that scores, before its weights are loaded."""
    if isinstance(source, Server):
        return remote.known_there(source, student, config)
    return remote.known(source, field=field)


def _agreed(own: remote.Known, known: Mapping[str, remote.Known]) -> dict[str, tokens.TokenizerAgreement]:
    """Compare the student's tokenizer with each teacher's, and refuse teachers that do not match it."""
    compare = lambda other: tokens.compare_tokenizers(
        own.text,
        other.text,
        student_rows=own.shape.vocab_size,
        teacher_rows=other.shape.vocab_size,
        student_eos=own.stop,
        teacher_eos=other.stop,
    )
    return {name: tokens.require(compare(other)) for name, other in known.items()}


def _prompts(plan: Plan, own: remote.Known, known: Mapping[str, remote.Known]) -> tuple[Prompts, Prompts | None]:
    """Load the training prompts and the held-out prompts (None without --eval-prompts), and check their lengths."""
    config = plan.config
    texts = {name: k.text for name, k in known.items()}
    context = min(k.shape.max_position_embeddings for k in (own, *known.values()))
    room = context - config.sampling.max_new_tokens
    asked, held_out = Prompts(load(config.data), own.text, texts, plan, room), None
    if config.eval_prompts:
        # Seed 0 selects the same random subset of held-out rows in every run.
        chosen = replace(config.data, source=config.eval_prompts, split="test", limit=config.eval_limit, seed=0)
        held_out = Prompts(load(chosen), own.text, texts, plan, room, optional=True)
    if room < 1:
        raise Refusal(
            f"--max-new-tokens {config.sampling.max_new_tokens}: the models' context of {context} tokens leaves none "
            f"for a prompt; lower it, to {context // 2} say"
        )
    asked.check()
    if held_out is not None:
        held_out.check()
    return asked, held_out


def _accelerator(plan: Plan) -> Accelerator:
    """Create the Accelerator (processes, precision, trackers) and seed the random number generators."""
    config, method = plan.config, plan.method
    for name in config.trackers:
        if name not in {str(known) for known in LoggerType}:
            raise Refusal(f"--trackers {name}: unknown; choose {', '.join(sorted(map(str, LoggerType)))}")
        if not filter_trackers([name], logging_dir=config.out):
            raise Refusal(f"--trackers {name}: not installed; pip install {name}")
    set_seed(config.seed)
    AcceleratorState._reset_state()  # an earlier run in this process may have used another precision
    # A method without the LM head leaves parameters without gradient (head, upper layers): DDP must not wait for them.
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
    plan: Plan,
    sources: Mapping[str, models.ModelSource | Server | None],
    student: PreTrainedModel | PeftModel,
    prompts: Prompts,
    *,
    size: int,
    merged: tuple[int, ...],
    on: torch.device,
    to: torch.device,
    main: bool,
) -> dict[str, AnyTeacher]:
    """Load the teachers, by route name.

    Args:
        plan: the run's plan.
        sources: where each teacher is: local weights, a server, or None for a text-only teacher.
        student: the student, for teachers that share its weights.
        prompts: training prompts; a few are used to compare a server with --teacher-local.
        size: number of common token ids.
        merged: stop ids that count as a single token.
        on: device of the teachers' weights.
        to: device of the teachers' outputs.
        main: whether this is the main process.
    """
    config = plan.config
    out: dict[str, AnyTeacher] = {}
    for name, model in plan.teachers.items():
        at = sources[name]
        if at is None:
            out[name] = opening.text_teacher(model, plan, on, field=opening.flag(name), main=main)
        elif isinstance(at, Server):
            out[name] = there = open_teacher(at, to=to, stop=merged, size=size, tops=plan.method.supports())
            if config.remote.teacher_local and not name:
                remote.compared(there, [p.teacher_ids for p in prompts.first(8)], config, on)
        else:
            out[name] = opening.teacher(model, at, student, plan, on, to, field=opening.flag(name))
    return out


def _writers(
    config: Train,
    teachers: Mapping[str, AnyTeacher],
    student: PreTrainedModel | PeftModel,
    size: int,
    stop: tuple[int, ...],
    merged: tuple[int, ...],
) -> dict[str, HFEngine | ServerEngine]:
    """Return the engines that generate the teachers' tokens in rollouts, by route name."""
    here = lambda model: HFEngine(model, size, stop, config.decode_rows, merged)

    def writer(teacher: AnyTeacher) -> HFEngine | ServerEngine:
        match teacher:
            case LocalTeacher():
                return here(teacher.model)
            case TextTeacher():
                return here(student)  # never used: a method with a text-only teacher has no teacher tokens in rollouts
        return ServerEngine(teacher.server, size, stop)

    return {name: writer(teacher) for name, teacher in teachers.items()}
