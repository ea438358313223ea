"""The models of a run: where they come from, what is refused, and how each is loaded or shared."""

from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import PeftModel
from transformers import PreTrainedModel

from opd.config import checks
from opd.config.precision import dtype_of
from opd.config.train import Train
from opd.core.errors import Refusal
from opd.core.sampling import Sampling
from opd.data import prompts
from opd.data.prompt_stream import Prompts
from opd.methods import METHODS
from opd.methods.method import Method
from opd.models import load as models
from opd.models.remote import opd_protocol as wire
from opd.models.remote.vllm_protocol import Server
from opd.rollouts.engines.base import Engine
from opd.rollouts.engines.hf import HFEngine
from opd.rollouts.engines.vllm import VLLMEngine
from opd.rollouts.engines.vllm_server import VLLMServer
from opd.teachers import connect as remote
from opd.teachers.base import BaseTeacher
from opd.teachers.ema import Average, average_rate
from opd.teachers.judges.annotator import Annotator
from opd.teachers.judges.factory import open_annotator
from opd.teachers.local import LocalTeacher, WithoutAdapter
from opd.teachers.text.answer_cache import AnswerCache
from opd.teachers.text.text_models import AbsentModel, EndpointModel, InProcessModel
from opd.teachers.text.text_teacher import FailureLimit, TextTeacher


def flag(teacher: str) -> str:
    """The flag that named it, for messages."""
    return f"route {teacher}" if teacher else "teacher"


def _own(model: str) -> bool:
    """Whether a teacher's name stands for the student's own weights."""
    return model in ("self", "base") or average_rate(model) is not None


def source_of(name: str, model: str, student: models.ModelSource, config: Train) -> models.ModelSource | Server | None:
    """Where a teacher's tokenizer and weights come from, None where only texts matter; refuses one without a word."""
    method = checks.resolved(config)
    if method.asks is not None:
        if missing := method.needs() - TextTeacher.provides:
            raise Refusal(
                f"--{flag(name)} {model}: is asked for texts alone ({method.asks}), and other terms need more of it "
                f"({', '.join(sorted(missing))}): leave them out"
            )
        return None
    if model.startswith(("http://", "https://")):
        return remote.reached(model, config, field=flag(name))
    if model.startswith("openai:"):
        raise Refusal(
            f"--{flag(name)} {model}: a text-only teacher gives no log-probs, and the method scores every token "
            f"with them ({', '.join(sorted(method.needs()))}); name a model opd can load, with the student's "
            f"vocabulary, or take a method that only asks for texts: {', '.join(asking())}"
        )
    if _own(model):
        return student
    source = models.locate(model, field=flag(name), trust_remote_code=config.trust_remote_code)
    if source == student and not (config.told() or config.resume):
        raise Refusal(
            f"--{flag(name)} {model}: the student itself; the KL between the two is 0 and nothing is learnt: give "
            "--context, what the teacher knows and the student does not, or name another teacher"
        )
    return source


def asking() -> list[str]:
    """The listed methods of text-only teachers."""
    return [name for name, factory in METHODS.items() if factory().asks is not None]


def text_model(
    model: str, config: Train, on: torch.device, *, field: str, main: bool
) -> EndpointModel | InProcessModel | AbsentModel:
    """Return a model that generates text: behind an endpoint, or in the main process, with its own tokenizer.

    Refuses the student's own weights.
    """
    config.remote.check()
    if model.startswith("openai:"):
        return EndpointModel(model, config.remote.towards(field, model, config.routes()[""]), field=field)
    if _own(model) or model.startswith(("http://", "https://")):
        way = f"openai:MODEL@{model.rstrip('/')}/v1" if ":" in model else "a model by its name"
        raise Refusal(f"--{field} {model}: the method asks for texts alone, and no token's score: write {way}")
    source = models.locate(model, field=field, trust_remote_code=config.trust_remote_code)
    if not main:
        return AbsentModel(model)
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


def text_teacher(model: str, config: Train, on: torch.device, *, field: str, main: bool) -> TextTeacher:
    """Return a teacher or judge that generates text, with its cache of answers."""
    cache = AnswerCache(Path(config.remote.teacher_cache or config.out) / "answers.sqlite")
    failure_limit = FailureLimit(f"{field} {model}", config.remote.judge_failures)
    return TextTeacher(text_model(model, config, on, field=field, main=main), cache, failure_limit)


def annotator(
    method: Method,
    config: Train,
    prompt_stream: Prompts,
    teachers: Mapping[str, BaseTeacher],
    on: torch.device,
    *,
    main: bool,
) -> Annotator:
    """Return the object that asks the method's question, with the judge that --judge names."""
    open_judge = lambda: text_teacher(config.judge, config, on, field="judge", main=main)
    return open_annotator(method.asks, config, prompt_stream, teachers, open_judge, main=main)


def teacher(
    model: str,
    source: models.ModelSource,
    student: PreTrainedModel | PeftModel,
    config: Train,
    on: torch.device,
    to: torch.device,
    *,
    field: str,
) -> LocalTeacher:
    """A teacher in this process, its weights loaded or shared."""
    low = dtype_of(config.precision)
    rate = average_rate(model)
    if _own(model) and on != to:
        raise Refusal(f"--teacher-device {config.teacher_device}: --{field} {model} lives where the student does")
    if model == "self":
        return LocalTeacher(student, to=to, low=low)
    if rate is not None:
        return Average(student, rate, to=to, low=low)
    if model == "base" and isinstance(student, PeftModel):
        if not checks.resolved(config).rollouts.on_policy:
            raise Refusal(f"--{field} base: under an adapter it scores, but does not speak; name its folder instead")
        return WithoutAdapter(student, to=to, low=low)
    return _frozen(source, field, config, on, to)


def reference(
    method: Method,
    config: Train,
    source: models.ModelSource,
    student: PreTrainedModel | PeftModel,
    size: int,
    on: torch.device,
    to: torch.device,
) -> LocalTeacher | None:
    """The third model, for the methods that compare with it."""
    if "reference_logp" not in method.models():
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
    """A model that is never trained."""
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
    """Who writes the student's rollouts, of the first `size` ids; those of `merged` count as one."""
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
