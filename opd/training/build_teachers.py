"""Construction of a run's models: teachers, reference, judge and rollout engines, loaded or shared."""

from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import PeftModel
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from opd.config import model_names
from opd.config.model_names import ModelName
from opd.config.plan import Plan
from opd.config.precision import dtype_of
from opd.config.train import Train
from opd.core.errors import Refusal
from opd.core.sampling import Sampling
from opd.core.tensors import placed
from opd.data import prompts
from opd.data.prompt_stream import Prompts
from opd.head.vocabulary import Vocabulary
from opd.models import load as models
from opd.models.context import context_of
from opd.models.remote import opd_protocol as wire
from opd.models.remote.vllm_protocol import Server
from opd.models.source import ModelSource, locate
from opd.models.verify import enable_packing, verify_finite, verify_head
from opd.rollouts.engines.base import Engine, ResponseGenerator
from opd.rollouts.engines.completions import ServerEngine
from opd.rollouts.engines.hf import HFEngine
from opd.rollouts.engines.verify_cache import verify_cache
from opd.rollouts.engines.vllm import VLLMEngine
from opd.rollouts.engines.vllm_server import VLLMServer
from opd.teachers import connect
from opd.teachers.base import require
from opd.teachers.ema import Average
from opd.teachers.local import LocalTeacher, WithoutAdapter
from opd.teachers.remote import HiddenTeacher, LogpTeacher, open_teacher
from opd.teachers.text.answer_cache import AnswerCache
from opd.teachers.text.text_models import EndpointModel, InProcessModel
from opd.teachers.text.text_teacher import FailureLimit, TextTeacher
from opd.training.session import AnyTeacher


def flag(teacher: str) -> str:
    """Return the flag that named a teacher, for messages."""
    return f"route {teacher}" if teacher else "teacher"


def shards(config: Train, processes: int) -> bool:
    """Return whether the models of a run are sharded: loaded in main memory, and moved to the device in shards."""
    return config.shard and processes > 1


def source_of(name: str, model: ModelName, student: ModelSource, plan: Plan) -> ModelSource | Server | None:
    """Return where a teacher is, or None if it gives only texts; refuse one that lacks what the method needs."""
    method, field = plan.method, flag(name)
    if method.asks is not None or isinstance(model, model_names.ChatEndpoint):
        remedy = "name a model that opd can load, with the student's vocabulary"
        if method.asks is not None:
            remedy = f"leave out the terms beside {method.asks}"
        provides = TextTeacher.provides
        require(method, provides, flag=field, model=model, gives="text and no log-probs", remedy=remedy)
        return None
    if isinstance(model, model_names.ScoringServer):
        return connect.open_server(model, plan, field=field)
    if isinstance(model, model_names.StudentItself):
        return student
    config = plan.config
    source = locate(model.name, field=field, trust_remote_code=config.trust_remote_code)
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
    if isinstance(model, model_names.ChatEndpoint):
        return EndpointModel(model, config.remote.towards(field, model, plan.teachers.get("")), field=field)
    if isinstance(model, model_names.StudentItself | model_names.ScoringServer):
        url = f"openai:MODEL@{model.name.rstrip('/')}/v1"
        name = url if isinstance(model, model_names.ScoringServer) else "a model by its name"
        raise Refusal(f"--{field} {model}: the method asks for texts alone, and no token's score: write {name}")
    source = locate(model.name, field=field, trust_remote_code=config.trust_remote_code)
    if not main:
        return None
    text = models.tokenizer(source, field=field)
    dtype = dtype_of(config.teacher_precision)
    weights = models.load(source, field=field, dtype=dtype, device=on).requires_grad_(False)
    size, context = len(models.head(weights).weight), models.base(weights).config.get_text_config()
    verify_finite(weights, text, ids=min(size, len(text)), field=field)
    verify_cache(weights, field=field)
    stop = models.stop_ids(source, text)
    arguments = prompts.used_arguments(text, prompts.parse_template_arguments(config.data.template_args))
    engine = HFEngine(weights, min(size, len(text)), stop, config.decode_rows)
    name = f"{source} {wire.weights_hash(weights)}"
    return InProcessModel(name, engine, text, context_of(context).tokens, arguments)


def text_teacher(model: ModelName, plan: Plan, on: torch.device, *, field: str, main: bool) -> TextTeacher:
    """Return a teacher or judge that generates text, with its cache of answers."""
    remote = plan.config.remote
    cache = AnswerCache(Path(remote.teacher_cache or plan.config.out) / "answers.sqlite")
    failure_limit = FailureLimit(f"{field} {model}", remote.judge_failures)
    return TextTeacher(text_model(model, plan, on, field=field, main=main), cache, failure_limit)


@dataclass(frozen=True)
class ModelBuilder:
    """The construction of the models that a run uses beside its student, each on its device."""

    plan: Plan
    source: ModelSource  # of the student
    student: PreTrainedModel | PeftModel
    tokenizer: Tokenizer  # of the student
    vocabulary: Vocabulary
    stop: tuple[int, ...]  # ids that end a response
    accelerator: Accelerator  # its device is that of the student, and of all teachers' outputs
    on: torch.device  # of the weights of frozen models

    def teacher(
        self, name: str, model: ModelName, source: ModelSource | Server | None, prompt_stream: Prompts
    ) -> AnyTeacher:
        """Return the teacher of a route; a few prompts are used to compare a server with --teacher-local."""
        plan, field = self.plan, flag(name)
        if source is None:
            return text_teacher(model, plan, self.on, field=field, main=self.accelerator.is_main_process)
        if not isinstance(source, Server):
            return self._local_teacher(model, source, field)
        size, stop, device = self.vocabulary.size, self.vocabulary.stop, self.accelerator.device
        teacher = open_teacher(source, to=device, stop=stop, size=size, tops=plan.method.supports())
        if plan.config.remote.teacher_local and not name:
            texts = [p.teacher_ids for p in prompt_stream.first(8)]
            connect.verify_local_copy(teacher, texts, plan.config, self.on)
        return teacher

    def _local_teacher(self, model: ModelName, source: ModelSource, field: str) -> LocalTeacher:
        """Return a teacher in this process, with its own weights or the student's."""
        config, student, to = self.plan.config, self.student, self.accelerator.device
        low = dtype_of(config.precision)
        if isinstance(model, model_names.StudentItself) and placed(self.on) != placed(to):
            raise Refusal(f"--teacher-device {config.teacher_device}: --{field} {model} lives where the student does")
        if isinstance(model, model_names.CurrentStudent):
            return LocalTeacher(student, to=to, low=low)
        if isinstance(model, model_names.AveragedStudent):
            return Average(student, model.rate, to=to, low=low)
        if isinstance(model, model_names.InitialStudent) and isinstance(student, PeftModel):
            if not self.plan.method.rollouts.on_policy:
                raise Refusal(
                    f"--{field} base: under an adapter it scores, but does not speak; name its folder instead"
                )
            return WithoutAdapter(student, to=to, low=low)
        teacher = self._frozen(source, field)
        if not self.plan.method.rollouts.on_policy:
            verify_cache(teacher.model, field=field)
        return teacher

    def reference(self) -> LocalTeacher | None:
        """Return the reference model, for methods that compare with it."""
        config, size = self.plan.config, self.vocabulary.size
        if "reference_logp" not in self.plan.method.models():
            return None
        if not config.reference and isinstance(self.student, PeftModel):
            low = dtype_of(config.precision)
            return WithoutAdapter(self.student, to=self.accelerator.device, low=low, own_prompt=False)
        source = self.source
        if config.reference:
            source = locate(config.reference, field="reference", trust_remote_code=config.trust_remote_code)
        reference = self._frozen(source, "reference", own_prompt=False)
        if len(reference.head.weight) < size:
            raise Refusal(
                f"--reference {config.reference}: its head has {len(reference.head.weight)} rows, and student and "
                f"teacher share {size} ids; name a model of their vocabulary"
            )
        return reference

    def _frozen(self, source: ModelSource, field: str, *, own_prompt: bool = True) -> LocalTeacher:
        """Return a teacher whose weights are loaded and never trained."""
        config = self.plan.config
        on = torch.device("cpu") if shards(config, self.accelerator.num_processes) else self.on
        weights = models.load(source, field=field, dtype=dtype_of(config.teacher_precision), device=on)
        verify_head(weights, field=field)
        verify_finite(weights, self.tokenizer, ids=self.vocabulary.size, field=field)
        if self.plan.config.packing:
            enable_packing(weights, torch.float32, field=field)
        return LocalTeacher(weights.requires_grad_(False), to=self.accelerator.device, own_prompt=own_prompt)

    def speaker(self) -> Engine:
        """Return the engine that generates the student's rollouts."""
        config, size = self.plan.config, self.vocabulary.size
        how, dtype = config.speaker, dtype_of(config.precision)
        if how.engine == "hf":
            return self._engine(self.student)
        engine: VLLMEngine | VLLMServer
        if how.engine == "vllm":
            rows, processes = config.decode_rows, self.accelerator.num_processes
            engine = VLLMEngine(
                self.student, self.source, size, self.stop, how, dtype=dtype, rows=rows, processes=processes
            )
        else:
            folder, retries = Path(config.out), config.remote.teacher_retries
            engine = VLLMServer(self.student, size, self.stop, how, retries, folder=folder, dtype=dtype)
            if config.sampling != Sampling(max_new_tokens=config.sampling.max_new_tokens) and not engine.processed():
                raise Refusal(
                    f"--engine {how.engine}: its log-probs are not of what it draws from, which --temperature, --top-p "
                    "and --top-k change: start it with --logprobs-mode processed_logprobs, or sample at 1, 1, 0"
                )
        engine.merged = self.vocabulary.stop
        return engine

    def writer(self, teacher: AnyTeacher) -> ResponseGenerator:
        """Return the engine that generates a teacher's tokens in rollouts."""
        if isinstance(teacher, HiddenTeacher | LogpTeacher):
            return ServerEngine(teacher.server, self.vocabulary.size, self.stop)
        # That of a text-only teacher is never used: its methods have no teacher tokens in rollouts.
        return self._engine(teacher.model if isinstance(teacher, LocalTeacher) else self.student)

    def _engine(self, model: PreTrainedModel | PeftModel) -> HFEngine:
        return HFEngine(model, self.vocabulary.size, self.stop, self.plan.config.decode_rows, self.vocabulary.stop)
