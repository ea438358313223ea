"""The session of a run: models, teachers, prompts and optimizer, loaded and checked before the first step."""

import os
import shutil
from collections.abc import Iterable, Mapping
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
from opd.teachers import connect
from opd.teachers.local import LocalTeacher
from opd.teachers.remote import open_teacher
from opd.teachers.text.text_teacher import TextTeacher
from opd.training import build_teachers as opening
from opd.training import hidden_bridge as bridge
from opd.training.launch import check_connected, check_launch, needs_cpu_backend
from opd.training.session import AnyTeacher, Session

ANSWER_TIMEOUT = timedelta(days=1)  # of the process group: the main process asks a judge hundreds of questions a step


def open_session(plan: Plan, checkpoint: Path | None = None) -> Session:
    """Load models, teachers, prompts and optimizer; checks that need no weights come first.

    If `checkpoint` is given, the student's weights come from it.
    """
    config, method = plan.config, plan.method
    source = models.locate(config.student, field="student", trust_remote_code=config.trust_remote_code)
    sources = {name: opening.source_of(name, model, source, plan) for name, model in plan.teachers.items()}
    student_info = connect.local_info(source, field="student")
    teacher_infos = {
        name: student_info if s is None else _info(s, student_info, config, opening.flag(name))
        for name, s in sources.items()
    }
    agreements = _compared_tokenizers(student_info, teacher_infos)
    size = min(a.vocabulary for a in agreements.values())
    stop = tuple(dict.fromkeys(id for a in agreements.values() for id in a.stop))
    lenses = bridge.plain_lenses(
        method, student_info.config, {opening.flag(name): info.config for name, info in teacher_infos.items()}
    )
    prompts, held_out = _prompts(plan, student_info, teacher_infos)
    accelerator = _accelerator(plan)
    device = accelerator.device
    student = Student(lora.trainable(config, source, checkpoint, device), checkpointing=config.gradient_checkpointing)
    on = device if config.teacher_device == "same" else models.device(config.teacher_device, field="teacher-device")
    models.verify_head(student.model, field="student")
    differ = any(set(student_info.stop) != set(info.stop) for info in teacher_infos.values())
    merged = stop if config.stop_token == "canonical" and differ else ()
    main = accelerator.is_main_process
    teachers = _teachers(plan, sources, student.model, prompts, size=size, merged=merged, on=on, to=device, main=main)
    local = {name: t for name, t in teachers.items() if isinstance(t, LocalTeacher)}
    reference = opening.reference(plan, source, student.model, size, on, device)
    frozen = {**{opening.flag(name): t for name, t in local.items()}, **({"reference": reference} if reference else {})}
    for field, model in (("student", student.model), *((field, t.model) for field, t in frozen.items())):
        models.verify_finite(model, student_info.tokenizer, ids=size, field=field)
    models.small_threads(student.model, *(t.model for t in local.values()))
    if config.compile:
        _compile(student, frozen.values(), device)
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
        annotator=opening.annotator(plan, prompts, teachers, on, main=main),
        optimizer=wrapped_optimizer,
        vocabulary=vocabulary,
        collector=Collector(speaker, writers, student_info.tokenizer, vocabulary, think_end=config.data.think_end),
        prompts=prompts,
        held_out=held_out,
        agreements=agreements,
        lenses=lenses,
    )


def _compile(student: Student, teachers: Iterable[LocalTeacher], device: torch.device) -> None:
    """Compile the forward passes.  Raises Refusal if there is no compiler."""
    if device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise Refusal("--compile: needs a C++ compiler on a CPU, and there is no g++; install one, or leave it out")
    student.body = compiled(student.model)
    for teacher in teachers:
        teacher.body = compiled(teacher.model)


def _info(
    source: models.ModelSource | Server, student: connect.ModelInfo, config: Train, field: str
) -> connect.ModelInfo:
    """Return the tokenizer, config and stop ids of a teacher that scores, before its weights are loaded."""
    if isinstance(source, Server):
        return connect.server_info(source, student, config)
    return connect.local_info(source, field=field)


def _compared_tokenizers(
    student_info: connect.ModelInfo, teacher_infos: Mapping[str, connect.ModelInfo]
) -> dict[str, tokens.TokenizerAgreement]:
    """Compare the student's tokenizer with each teacher's, and refuse teachers that do not match it."""
    compare = lambda other: tokens.compare_tokenizers(
        student_info.tokenizer,
        other.tokenizer,
        student_rows=student_info.config.vocab_size,
        teacher_rows=other.config.vocab_size,
        student_eos=student_info.stop,
        teacher_eos=other.stop,
    )
    return {name: tokens.require(compare(other)) for name, other in teacher_infos.items()}


def _prompts(
    plan: Plan, student_info: connect.ModelInfo, teacher_infos: Mapping[str, connect.ModelInfo]
) -> tuple[Prompts, Prompts | None]:
    """Load the training prompts and the held-out prompts (None without --eval-prompts), and check their lengths."""
    config = plan.config
    texts = {name: info.tokenizer for name, info in teacher_infos.items()}
    context = min(info.config.max_position_embeddings for info in (student_info, *teacher_infos.values()))
    room = context - config.sampling.max_new_tokens
    prompts, held_out = Prompts(load(config.data), student_info.tokenizer, texts, plan, room), None
    if config.eval_prompts:
        # Seed 0 selects the same random subset of held-out rows in every run.
        chosen = replace(config.data, source=config.eval_prompts, split="test", limit=config.eval_limit, seed=0)
        held_out = Prompts(load(chosen), student_info.tokenizer, texts, plan, room, optional=True)
    if room < 1:
        raise Refusal(
            f"--max-new-tokens {config.sampling.max_new_tokens}: the models' context of {context} tokens leaves none "
            f"for a prompt; lower it, to {context // 2} say"
        )
    prompts.check()
    if held_out is not None:
        held_out.check()
    return prompts, held_out


def _accelerator(plan: Plan) -> Accelerator:
    """Create the Accelerator (processes, precision, trackers) and seed the random number generators."""
    config, method = plan.config, plan.method
    for name in config.trackers:
        if name not in {str(tracker) for tracker in LoggerType}:
            raise Refusal(f"--trackers {name}: unknown; choose {', '.join(sorted(map(str, LoggerType)))}")
        if not filter_trackers([name], logging_dir=config.out):
            raise Refusal(f"--trackers {name}: not installed; pip install {name}")
    set_seed(config.seed)
    AcceleratorState._reset_state()  # an earlier run in this process may have used another precision
    # A method without the LM head leaves parameters without gradient (head, upper layers): DDP must not wait for them.
    handlers: list[KwargsHandler] = [DistributedDataParallelKwargs(find_unused_parameters=method.headless())]
    if method.asks is not None:
        handlers.append(InitProcessGroupKwargs(timeout=ANSWER_TIMEOUT))
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
        source = sources[name]
        if source is None:
            out[name] = opening.text_teacher(model, plan, on, field=opening.flag(name), main=main)
        elif isinstance(source, Server):
            out[name] = server_teacher = open_teacher(
                source, to=to, stop=merged, size=size, tops=plan.method.supports()
            )
            if config.remote.teacher_local and not name:
                connect.verify_local_copy(server_teacher, [p.teacher_ids for p in prompts.first(8)], config, on)
        else:
            out[name] = opening.teacher(model, source, student, plan, on, to, field=opening.flag(name))
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
    engine = lambda model: HFEngine(model, size, stop, config.decode_rows, merged)

    def writer(teacher: AnyTeacher) -> HFEngine | ServerEngine:
        match teacher:
            case LocalTeacher():
                return engine(teacher.model)
            case TextTeacher():
                return engine(
                    student
                )  # never used: a method with a text-only teacher has no teacher tokens in rollouts
        return ServerEngine(teacher.server, size, stop)

    return {name: writer(teacher) for name, teacher in teachers.items()}
