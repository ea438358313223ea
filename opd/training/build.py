"""The session of a run: models, teachers, prompts and optimizer, loaded and checked before the first step."""

import os
import shutil
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, KwargsHandler, LoggerType, set_seed

from opd.config import model_names
from opd.config.checks import check_vocabulary
from opd.config.plan import Plan
from opd.config.precision import dtype_of
from opd.config.train import Train
from opd.core.errors import Refusal, renamed
from opd.data import tokenizers as tokens
from opd.data.prompt_stream import Prompts
from opd.data.tasks.load import check_columns, load
from opd.head.vocabulary import Vocabulary
from opd.models import load as models
from opd.models import lora
from opd.models.context import context_of
from opd.models.forward import compiled
from opd.models.remote.vllm_protocol import Server
from opd.models.sharding import is_sharded, shard_student
from opd.models.source import ModelSource, locate
from opd.models.student import Student
from opd.models.verify import enable_packing, verify_finite, verify_head
from opd.rollouts.collector import Collector
from opd.rollouts.engines.verify_cache import verify_cache
from opd.teachers import connect
from opd.teachers.judges.factory import open_annotator
from opd.teachers.local import LocalTeacher
from opd.training import build_teachers as opening
from opd.training import hidden_bridge as bridge
from opd.training.doctor.fit import require_room
from opd.training.launch import check_connected, check_launch, needs_cpu_backend
from opd.training.session import AnyTeacher, Session
from opd.training.setup import Setup, planned

LOOKED_AT = 64  # prompts whose lengths stand for those of all
ANSWER_TIMEOUT = timedelta(days=1)  # of the process group: the main process asks a judge hundreds of questions a step


def open_session(plan: Plan, checkpoint: Path | None = None) -> Session:
    """Open a run: first all checks that need no weights, then its models.  `checkpoint` has the student's weights."""
    config, method = plan.config, plan.method
    _check_trackers(config)
    source = locate(config.student, field="student", trust_remote_code=config.trust_remote_code)
    sources = {name: opening.source_of(name, model, source, plan) for name, model in plan.teachers.items()}
    student_info = connect.local_info(source, field="student")
    infos = {name: _info(where, student_info, config, opening.flag(name)) for name, where in sources.items()}
    agreements = {name: _compared_tokenizers(student_info, info) for name, info in infos.items()}
    stop = tuple(dict.fromkeys(id for a in agreements.values() for id in a.stop))
    differ = any(set(student_info.stop) != set(info.stop) for info in infos.values())
    size = min(a.vocabulary for a in agreements.values())
    check_vocabulary(method, config.sampling, size)
    vocabulary = Vocabulary(
        size=size,
        temperature=config.loss_temperature,
        stop=stop if config.stop_token == "canonical" and differ else (),
        chunk_bytes=config.chunk_mb << 20,
        rounded=config.logit_precision == "bf16",
    )
    teacher_configs = {opening.flag(name): info.config for name, info in infos.items()}
    lenses = bridge.plain_lenses(method, student_info.config, teacher_configs)
    prompts, held_out = _prompts(plan, student_info, infos)
    accelerator = _accelerator(plan)
    device, main = accelerator.device, accelerator.is_main_process
    setup = _sized(plan, prompts, accelerator) if config.doctor else None
    loading = torch.device("cpu") if opening.shards(config, accelerator.num_processes) else device
    student = Student(lora.trainable(config, source, checkpoint, loading), checkpointing=config.gradient_checkpointing)
    on = device if config.teacher_device == "same" else models.device(config.teacher_device, field="teacher-device")
    verify_head(student.model, field="student")
    if config.speaker.engine == "hf":
        verify_cache(student.model, field="student")
    verify_finite(student.model, student_info.tokenizer, ids=vocabulary.size, field="student")
    if config.packing:
        enable_packing(student.model, dtype_of(config.precision), field="student")
    builder = opening.ModelBuilder(
        plan, source, student.model, student_info.tokenizer, vocabulary, stop, accelerator, on
    )
    teachers, reference = _teachers(builder, student, sources, prompts)
    local = [t for t in teachers.values() if isinstance(t, LocalTeacher)]
    models.small_threads(student.model, *(t.model for t in local))
    if config.compile:
        _compile(student, local if reference is None else [*local, reference], device)
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)
    if is_sharded(student):
        wrapped, wrapped_optimizer = student, accelerator.prepare(optimizer)
    else:
        wrapped, wrapped_optimizer = accelerator.prepare(student, optimizer)
    writers = {name: builder.writer(teacher) for name, teacher in teachers.items()}
    speaker = builder.speaker()
    open_judge = lambda model: opening.text_teacher(model, plan, on, field="judge", main=main)
    return Session(
        plan=plan,
        accelerator=accelerator,
        student=wrapped,
        teachers=teachers,
        reference=reference,
        annotator=open_annotator(plan, prompts, teachers, open_judge, main=main),
        optimizer=wrapped_optimizer,
        vocabulary=vocabulary,
        collector=Collector(speaker, writers, student_info.tokenizer, vocabulary, think_end=config.data.think_end),
        prompts=prompts,
        held_out=held_out,
        agreements=agreements,
        lenses=lenses,
        setup=setup,
    )


def _sized(plan: Plan, prompts: Prompts, accelerator: Accelerator) -> Setup | None:
    """Return what the run's memory depends on, and refuse models whose weights do not fit; None if that is not known.

    Every process calls it.
    """
    longest = max(max(len(p.ids), len(p.teacher_ids)) for p in prompts.first(LOOKED_AT))
    row = longest + plan.config.sampling.max_new_tokens
    try:
        setup = planned(plan, processes=accelerator.num_processes, device=accelerator.device, row=row)
    except Refusal:  # a model that cannot be loaded, which has its message, or that is quantised
        return None
    require_room(setup, accelerator)
    return setup


def _teachers(
    builder: opening.ModelBuilder,
    student: Student,
    sources: Mapping[str, ModelSource | Server | None],
    prompts: Prompts,
) -> tuple[dict[str, AnyTeacher], LocalTeacher | None]:
    """Return the teachers by route name, and the reference; with --shard, shard the student and all models here.

    A teacher with the student's weights comes first, because a sharded student cannot be copied.  The student is
    sharded before other models are loaded, and each of them before the next, so that main memory never holds two whole
    ones.  No device holds one.
    """
    plan, shards = builder.plan, opening.shards(builder.plan.config, builder.accelerator.num_processes)
    build = lambda name: builder.teacher(name, plan.teachers[name], sources[name], prompts)
    own = [name for name, model in plan.teachers.items() if isinstance(model, model_names.StudentItself)]
    teachers: dict[str, AnyTeacher] = {name: build(name) for name in own}
    if shards:
        shard_student(student, student.model, dtype_of(plan.config.precision))
    for name in (*own, *(name for name in plan.teachers if name not in own)):
        teacher = teachers[name] = teachers.get(name) or build(name)
        if shards and isinstance(teacher, LocalTeacher):
            teacher.shard(student)
    reference = builder.reference()
    if shards and reference is not None:
        reference.shard(student)
    return {name: teachers[name] for name in plan.teachers}, reference


def _check_trackers(config: Train) -> None:
    """Refuse a tracker that Accelerate does not know or that is not installed."""
    supported = sorted({str(tracker) for tracker in LoggerType} - {"all"})
    for name in config.trackers:
        if name not in supported:
            raise Refusal(f"--trackers {name}: unknown; choose {', '.join(supported)}")
        if name not in map(str, get_available_trackers()):
            raise Refusal(f"--trackers {name}: not installed; pip install {name.replace('_', '-')}")


def _compile(student: Student, teachers: Iterable[LocalTeacher], device: torch.device) -> None:
    """Compile the forward passes.  Raises Refusal if there is no compiler."""
    if device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise Refusal("--compile: needs a C++ compiler on a CPU, and there is no g++; install one, or leave it out")
    student.body = compiled(student.model)
    for teacher in teachers:
        teacher.body = compiled(teacher.model)


def _info(
    source: ModelSource | Server | None, student: connect.ModelInfo, config: Train, field: str
) -> connect.ModelInfo:
    """Return a teacher's tokenizer, config and stop ids before its weights: the student's if it gives only texts."""
    if source is None:
        return student
    if isinstance(source, Server):
        return connect.server_info(source, student, config)
    return connect.local_info(source, field=field)


def _compared_tokenizers(student: connect.ModelInfo, teacher: connect.ModelInfo) -> tokens.TokenizerAgreement:
    """Compare the student's tokenizer with a teacher's, and refuse a teacher that does not match it."""
    agreement = tokens.compare_tokenizers(
        student.tokenizer,
        teacher.tokenizer,
        student_rows=student.config.vocab_size,
        teacher_rows=teacher.config.vocab_size,
        student_eos=student.stop,
        teacher_eos=teacher.stop,
    )
    return tokens.require(agreement)


def _prompts(
    plan: Plan, student_info: connect.ModelInfo, teacher_infos: Mapping[str, connect.ModelInfo]
) -> tuple[Prompts, Prompts | None]:
    """Load the training prompts and the held-out prompts (None without --eval-prompts), and check their lengths."""
    config = plan.config
    check_columns(config.data, config.prompts, config.eval_prompts)
    texts = {name: info.tokenizer for name, info in teacher_infos.items()}
    configs = [info.config for info in (student_info, *teacher_infos.values())]
    if config.reference:
        reference = locate(config.reference, field="reference", trust_remote_code=config.trust_remote_code)
        configs.append(models.config(reference, field="reference").get_text_config())
    context = min(map(context_of, configs))
    room = context.tokens - config.sampling.max_new_tokens
    prompts, held_out = Prompts(load(config.data), student_info.tokenizer, texts, plan, room, str(context)), None
    if config.eval_prompts:
        # Seed 0 selects the same random subset of held-out rows in every run.
        chosen = replace(config.data, source=config.eval_prompts, split="test", limit=config.eval_limit, seed=0)
        with renamed({"--prompts": "--eval-prompts", "--split test": "its split test"}):
            held_out_task = load(chosen)
        held_out = Prompts(held_out_task, student_info.tokenizer, texts, plan, room, str(context), optional=True)
    if room < 1:
        raise Refusal(
            f"--max-new-tokens {config.sampling.max_new_tokens}: the models' context of {context} leaves none "
            f"for a prompt; lower it, to {context.tokens // 2} say"
        )
    for stream in filter(None, (prompts, held_out)):
        stream.check()
    return prompts, held_out


def _accelerator(plan: Plan) -> Accelerator:
    """Create the Accelerator (processes, precision, trackers) and seed the random number generators."""
    config, method = plan.config, plan.method
    set_seed(config.seed)
    AcceleratorState._reset_state()  # an earlier run in this process may have used another precision
    # Some parameters get no gradient: those of experts that no token reaches, of indexers that only select tokens, and
    # of the LM head for a method that does not read it.  DDP must not wait for them.  It warns once if there are none.
    warnings.filterwarnings("ignore", message=".*find_unused_parameters=True was specified in DDP")
    handlers: list[KwargsHandler] = [DistributedDataParallelKwargs(find_unused_parameters=True)]
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
