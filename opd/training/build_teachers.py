"""Construction of a run's models: teachers, reference, judge and rollout engine, loaded or shared."""

from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import PeftModel
from transformers import PreTrainedModel

from opd.config.model_names import (
    AveragedStudent,
    ChatEndpoint,
    CurrentStudent,
    InitialStudent,
    ModelName,
    ScoringServer,
    StudentItself,
)
from opd.config.plan import Plan
from opd.config.precision import dtype_of
from opd.config.train import Train
from opd.core.errors import Refusal
from opd.core.sampling import Sampling
from opd.data import prompts
from opd.data.prompt_stream import Prompts
from opd.models import load as models
from opd.models.remote import opd_protocol as wire
from opd.models.remote.vllm_protocol import Server
from opd.rollouts.engines.base import Engine
from opd.rollouts.engines.hf import HFEngine
from opd.rollouts.engines.vllm import VLLMEngine
from opd.rollouts.engines.vllm_server import VLLMServer
from opd.teachers import connect
from opd.teachers.base import BaseTeacher, require
from opd.teachers.ema import Average
from opd.teachers.judges.annotator import Annotator
from opd.teachers.judges.factory import open_annotator
from opd.teachers.local import LocalTeacher, WithoutAdapter
from opd.teachers.text.answer_cache import AnswerCache
from opd.teachers.text.text_models import EndpointModel, InProcessModel
from opd.teachers.text.text_teacher import FailureLimit, TextTeacher


def flag(teacher: str) -> str:
    """Return the flag that named a teacher, for messages."""
    return f"route {teacher}" if teacher else "teacher"


def source_of(
    name: str, model: ModelName, student: models.ModelSource, plan: Plan
) -> models.ModelSource | Server | None:
    """Return where a teacher's tokenizer and weights come from; None if only its texts are read.

    Raises Refusal if the teacher does not provide what the method needs.
    """
    method, field = plan.method, flag(name)
    if method.asks is not None or isinstance(model, ChatEndpoint):
        remedy = "name a model that opd can load, with the student's vocabulary"
        if method.asks is not None:
            remedy = f"leave out the terms beside {method.asks}"
        provides = TextTeacher.provides
        require(method, provides, flag=field, model=model, gives="text and no log-probs", remedy=remedy)
        return None
    if isinstance(model, ScoringServer):
        return connect.open_server(model, plan, field=field)
    if isinstance(model, StudentItself):
        return student
    config = plan.config
    source = models.locate(model.name, field=field, trust_remote_code=config.trust_remote_code)
    if source == student and not (plan.context or config.resume):
        raise Refusal(
            f"--{field} {model}: the student itself; the KL between the two is 0 and nothing is learnt: give "
            "--context, what the teacher knows and the student does not, or name another teacher"
        )
    return source


def text_model(
    model: ModelName, plan: Plan, on: torch.device, *, field: str, main: bool
) -> EndpointModel | InProcessModel | None:
    """Return a model that generates text: behind an endpoint, or loaded in the main process and None in the others.

    Raises Refusal for the student's own weights and for a server that is not OpenAI-compatible.
    """
    config = plan.config
    config.remote.check()
    if isinstance(model, ChatEndpoint):
        return EndpointModel(model, config.remote.towards(field, model, plan.teachers[""]), field=field)
    if isinstance(model, StudentItself | ScoringServer):
        url = f"openai:MODEL@{model.name.rstrip('/')}/v1"
        name = url if isinstance(model, ScoringServer) else "a model by its name"
        raise Refusal(f"--{field} {model}: the method asks for texts alone, and no token's score: write {name}")
    source = models.locate(model.name, field=field, trust_remote_code=config.trust_remote_code)
    if not main:
        return None
    text = models.tokenizer(source, field=field)
    weights = models.load(source, field=field, dtype=dtype_of(config.teacher_precision), device=on).requires_grad_(
        False
    )
    size, context = len(models.head(weights).weight), models.base(weights).config.get_text_config()
    models.verify_finite(weights, text, ids=min(size, len(text)), field=field)
    stop = models.stop_ids(source, text)
    arguments = prompts.used_arguments(text, prompts.parse_template_arguments(config.data.template_args))
    engine = HFEngine(weights, min(size, len(text)), stop, config.decode_rows)
    name = f"{source} {wire.weights_hash(weights)}"
    return InProcessModel(name, engine, text, context.max_position_embeddings, arguments)


def text_teacher(model: ModelName, plan: Plan, on: torch.device, *, field: str, main: bool) -> TextTeacher:
    """Return a teacher or judge that generates text, with its cache of answers."""
    remote = plan.config.remote
    cache = AnswerCache(Path(remote.teacher_cache or plan.config.out) / "answers.sqlite")
    failure_limit = FailureLimit(f"{field} {model}", remote.judge_failures)
    return TextTeacher(text_model(model, plan, on, field=field, main=main), cache, failure_limit)


def annotator(
    plan: Plan, prompt_stream: Prompts, teachers: Mapping[str, BaseTeacher], on: torch.device, *, main: bool
) -> Annotator:
    """Return the object that asks the method's question, with the judge that --judge names."""
    open_judge = lambda model: text_teacher(model, plan, on, field="judge", main=main)
    return open_annotator(plan, prompt_stream, teachers, open_judge, main=main)


def teacher(
    model: ModelName,
    source: models.ModelSource,
    student: PreTrainedModel | PeftModel,
    plan: Plan,
    on: torch.device,
    to: torch.device,
    *,
    field: str,
) -> LocalTeacher:
    """Return a teacher in this process, with its own weights or the student's."""
    config = plan.config
    low = dtype_of(config.precision)
    if isinstance(model, StudentItself) and on != to:
        raise Refusal(f"--teacher-device {config.teacher_device}: --{field} {model} lives where the student does")
    if isinstance(model, CurrentStudent):
        return LocalTeacher(student, to=to, low=low)
    if isinstance(model, AveragedStudent):
        return Average(student, model.rate, to=to, low=low)
    if isinstance(model, InitialStudent) and isinstance(student, PeftModel):
        if not plan.method.rollouts.on_policy:
            raise Refusal(f"--{field} base: under an adapter it scores, but does not speak; name its folder instead")
        return WithoutAdapter(student, to=to, low=low)
    return _frozen(source, field, config, on, to)


def reference(
    plan: Plan,
    source: models.ModelSource,
    student: PreTrainedModel | PeftModel,
    size: int,
    on: torch.device,
    to: torch.device,
) -> LocalTeacher | None:
    """Return the reference model, for methods that compare with it."""
    config = plan.config
    if "reference_logp" not in plan.method.models():
        return None
    if not config.reference and isinstance(student, PeftModel):
        return WithoutAdapter(student, to=to, low=dtype_of(config.precision), own_prompt=False)
    if config.reference:
        source = models.locate(config.reference, field="reference", trust_remote_code=config.trust_remote_code)
    reference = _frozen(source, "reference", config, on, to, own_prompt=False)
    if len(reference.head.weight) < size:
        raise Refusal(
            f"--reference {config.reference}: its head has {len(reference.head.weight)} rows, and student and teacher "
            f"share {size} ids; name a model of their vocabulary"
        )
    return reference


def _frozen(
    source: models.ModelSource,
    field: str,
    config: Train,
    on: torch.device,
    to: torch.device,
    *,
    own_prompt: bool = True,
) -> LocalTeacher:
    """Return a teacher whose weights are loaded and never trained."""
    weights = models.load(source, field=field, dtype=dtype_of(config.teacher_precision), device=on)
    models.verify_head(weights, field=field)
    return LocalTeacher(weights.requires_grad_(False), to=to, own_prompt=own_prompt)


def speaker(
    config: Train,
    source: models.ModelSource,
    student: PreTrainedModel | PeftModel,
    size: int,
    stop: tuple[int, ...],
    merged: tuple[int, ...],
    accelerator: Accelerator,
) -> Engine:
    """Return the engine that generates the student's rollouts.

    It samples the first `size` token ids; the ids in `merged` count as a single token.
    """
    how = config.speaker
    if how.engine == "hf":
        return HFEngine(student, size, stop, config.decode_rows, merged)
    if accelerator.num_processes > 1:
        raise Refusal(f"--engine {how.engine}: one process trains beside it; start one, or take --engine hf")
    dtype = dtype_of(config.precision)
    if how.engine == "vllm":
        engine = VLLMEngine(student, source, size, stop, how, dtype=dtype, rows=config.decode_rows)
        engine.merged = merged
        return engine
    server = VLLMServer(student, size, stop, how, config.remote.teacher_retries, folder=Path(config.out), dtype=dtype)
    server.merged = merged
    plain = Sampling(max_new_tokens=config.sampling.max_new_tokens)
    if config.sampling != plain and not server.processed():
        raise Refusal(
            f"--engine {how.engine}: its log-probs are not of what it draws from, which --temperature, --top-p and "
            "--top-k change: start it with --logprobs-mode processed_logprobs, or sample at 1, 1, 0"
        )
    return server
