"""What a run stands on: models, teacher, prompts and optimizer, opened once and checked before the first step."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from accelerate.tracking import filter_trackers
from accelerate.utils import LoggerType, set_seed
from peft import LoraConfig, PeftModel, get_peft_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from transformers import AutoConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from opd import models, prompts, tokens
from opd.collect import Collector, Rendered
from opd.config import DTYPES, Train
from opd.engines.hf import HFEngine
from opd.method import Method
from opd.runs import load_optimizer, save_optimizer
from opd.student import Student
from opd.tasks.load import load
from opd.tasks.task import Made, Task
from opd.teachers.local import LocalTeacher
from opd.types import Refusal
from opd.vocabulary import Vocabulary

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


@dataclass(frozen=True)
class Prompts:
    """A task's prompts in the order a run sees them, as both models read them."""

    task: Task
    tokenizer: Tokenizer
    teacher_tokenizer: Tokenizer
    config: Train
    room: int  # prompt tokens that leave space for the longest response

    def batch(self, step: int, count: int) -> list[Rendered]:
        """The prompts of one step: a shuffled pass after another, a pure function of (seed, step)."""
        n, first = len(self.task.prompts), (step - 1) * count
        return [self.render(self._order(i // n)[i % n]) for i in range(first, first + count)]

    def check(self, count: int = 256) -> None:
        """Refuse a prompt that does not fit before the run, not an hour into it: looks at the longest of them."""
        rows = range(len(self.task.prompts))
        if isinstance(self.task.prompts, Made):  # made when asked for, all of a kind
            rows = rows[:count]
        written = lambda p: len(p.text) + sum(len(turn["content"]) for turn in p.messages)
        for row in sorted(rows, key=lambda i: -written(self.task.prompts[i]))[:count]:
            self.render(row)

    def first(self, count: int) -> list[Rendered]:
        """The first prompts, unshuffled."""
        return [self.render(i) for i in range(min(count, len(self.task.prompts)))]

    def _order(self, epoch: int) -> Sequence[int]:
        n = len(self.task.prompts)
        if n > 1 << 24:  # procedural streams are as good as endless, and come shuffled
            return range(n)
        return np.random.default_rng([self.config.seed, epoch]).permutation(n).tolist()

    def render(self, row: int) -> Rendered:
        """One prompt's ids for each model; refuses one that does not fit."""
        prompt = self.task.prompts[row]
        arguments = prompts.template_arguments(self.config.data.template_args)
        ids = prompts.render(self.tokenizer, prompt, chat_template_kwargs=arguments, system="")
        teacher_ids = ids
        if self.config.teacher_prompt == "own":
            heard = prompts.known(self.teacher_tokenizer, arguments)
            teacher_ids = prompts.render(self.teacher_tokenizer, prompt, chat_template_kwargs=heard, system="")
        longest = max(len(ids), len(teacher_ids))
        if longest > self.room:
            raise Refusal(
                f"--prompts {self.task.name}: row {row} has {longest} tokens, and the models' context leaves "
                f"{self.room} for a prompt beside {self.config.sampling.max_new_tokens} new tokens; "
                "shorten the row, or lower --max-new-tokens"
            )
        return Rendered(prompt, ids, teacher_ids)


@dataclass(frozen=True)
class Session:
    """Everything a step needs."""

    accelerator: Accelerator
    student: torch.nn.Module  # Student, wrapped by Accelerate
    teacher: LocalTeacher
    optimizer: AcceleratedOptimizer
    vocabulary: Vocabulary
    collector: Collector
    prompts: Prompts
    held_out: Prompts | None
    agreement: tokens.Agreement

    def plain(self) -> Student:
        """The student without its wrappers."""
        return self.accelerator.unwrap_model(self.student)

    def save(self, folder: Path) -> None:
        """Model, tokenizer and optimizer state; all processes call it, the main one writes."""
        weights = self.accelerator.get_state_dict(self.student)
        whole: dict[str, Any] = get_optimizer_state_dict(self.student, self.optimizer.optimizer, options=WHOLE)
        if self.accelerator.is_main_process:
            named = {name.removeprefix("model."): x for name, x in weights.items()}
            self.plain().model.save_pretrained(str(folder), state_dict=named)
            self.collector.tokenizer.save_pretrained(folder)
            save_optimizer(whole["state"], folder / "optimizer.safetensors")

    def restore(self, folder: Path) -> int:
        """Take up the optimizer state of a checkpoint (its weights were loaded with the model); the step it was at."""
        optimizer = self.optimizer.optimizer
        whole: dict[str, Any] = get_optimizer_state_dict(self.student, optimizer, options=WHOLE)
        whole["state"] = load_optimizer(folder / "optimizer.safetensors")
        set_optimizer_state_dict(self.student, optimizer, whole, options=WHOLE)
        return json.loads((folder / "state.json").read_text())["step"]


def open_session(config: Train, method: Method, checkpoint: Path | None) -> Session:
    """Check what can be checked without weights, then load them; `checkpoint` replaces the student's own weights."""
    if config.teacher.startswith(("openai:", "http://", "https://")):
        raise Refusal(
            f"--teacher {config.teacher}: a text-only teacher gives no log-probs, and the method scores every token "
            f"with them ({', '.join(sorted(LocalTeacher.provides))}); name a model opd can load, with the student's "
            "vocabulary"
        )
    trust = config.trust_remote_code
    source = models.locate(config.student, field="student", trust_remote_code=trust)
    teacher_source = models.locate(config.teacher, field="teacher", trust_remote_code=trust)
    if source == teacher_source and checkpoint is None:
        raise Refusal(
            f"--teacher {config.teacher}: the student itself; the KL between the two is 0 and nothing is learnt"
        )
    text = models.tokenizer(source, field="student")
    teacher_text = models.tokenizer(teacher_source, field="teacher")
    shapes = [AutoConfig.from_pretrained(s.folder, **s.options()).get_text_config() for s in (source, teacher_source)]
    stops = [
        prompts.stop_ids(models.generation_config(s), t) for s, t in ((source, text), (teacher_source, teacher_text))
    ]
    agreed = tokens.require(
        tokens.agreement(
            text,
            teacher_text,
            student_rows=shapes[0].vocab_size,
            teacher_rows=shapes[1].vocab_size,
            student_eos=stops[0],
            teacher_eos=stops[1],
        )
    )
    context = min(s.max_position_embeddings for s in shapes)
    room = context - config.sampling.max_new_tokens
    reading = lambda task: Prompts(task, text, teacher_text, config, room)
    asked = reading(load(config.data))
    held_out = None
    if config.eval_prompts:
        # A random choice of the held-out rows, the same for every run.
        chosen = replace(config.data, source=config.eval_prompts, split="test", limit=config.eval_limit, seed=0)
        held_out = reading(load(chosen))
    if room < 1:
        raise Refusal(
            f"--max-new-tokens {config.sampling.max_new_tokens}: the models' context of {context} tokens leaves none "
            f"for a prompt; lower it, to {context // 2} say"
        )
    asked.check()
    if held_out is not None:
        held_out.check()

    for name in config.trackers:
        if name not in {str(known) for known in LoggerType}:
            raise Refusal(f"--trackers {name}: unknown; choose {', '.join(sorted(map(str, LoggerType)))}")
        if not filter_trackers([name], logging_dir=config.out):
            raise Refusal(f"--trackers {name}: not installed; pip install {name}")
    set_seed(config.seed)
    AcceleratorState._reset_state()  # an earlier run of this process may have had another precision
    accelerator = Accelerator(
        mixed_precision="bf16" if config.precision == "bf16" else "no",
        log_with=list(config.trackers) or None,
        project_dir=config.out,
    )
    per_update = accelerator.num_processes * method.rollouts.per_prompt * method.rollouts.updates
    if config.batch % per_update:
        raise Refusal(
            f"--batch {config.batch}: must be a multiple of {per_update} "
            f"({accelerator.num_processes} processes x {method.rollouts.per_prompt} rollouts per prompt "
            f"x {method.rollouts.updates} updates)"
        )
    device = accelerator.device
    student = Student(_trainable(config, source, checkpoint, device), checkpointing=config.gradient_checkpointing)
    on = device if config.teacher_device == "same" else models.device(config.teacher_device, field="teacher-device")
    weights = models.load(teacher_source, field="teacher", dtype=DTYPES[config.teacher_precision], device=on)
    models.small_threads(student.model, weights)
    models.verify_head(student.model, field="student")
    models.verify_head(weights, field="teacher")
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)
    wrapped, wrapped_optimizer = accelerator.prepare(student, optimizer)
    size = agreed.vocabulary
    speaker, scorer = (HFEngine(m, size, agreed.stop, config.decode_rows) for m in (student.model, weights))
    stop = agreed.stop if config.stop_token == "canonical" and set(stops[0]) != set(stops[1]) else ()
    return Session(
        accelerator=accelerator,
        student=wrapped,
        teacher=LocalTeacher(weights, to=device),
        optimizer=wrapped_optimizer,
        vocabulary=Vocabulary(size, config.loss_temperature, stop, config.chunk_mb << 20),
        collector=Collector(speaker, scorer, text),
        prompts=asked,
        held_out=held_out,
        agreement=agreed,
    )


def _trainable(
    config: Train, source: models.Source, checkpoint: Path | None, device: torch.device
) -> PreTrainedModel | PeftModel:
    start = source if checkpoint is None else models.Source(str(checkpoint))
    frozen_base = config.lora_rank > 0 and config.precision == "bf16"
    dtype = torch.bfloat16 if frozen_base else torch.float32  # what is trained stays fp32: peft keeps adapters so
    model = models.load(start, field="student", dtype=dtype, device=device)
    if config.lora_rank and checkpoint is None:
        targets = config.lora_targets if config.lora_targets == "all-linear" else config.lora_targets.split(",")
        adapter = LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # only divided by the rank: a float will do
            lora_dropout=0.0,
            target_modules=targets,
            task_type="CAUSAL_LM",
        )
        try:
            model = get_peft_model(model, adapter)
        except ValueError as error:
            raise Refusal(f"--lora-targets {config.lora_targets}: {error}") from error
    return model


def learning_rate(config: Train, update: int, total: int) -> float:
    """Of optimizer step `update` (from 1) of `total`."""
    if update <= config.warmup:
        return config.lr * update / config.warmup
    done = (update - config.warmup - 1) / max(1, total - config.warmup)
    match config.schedule:
        case "constant":
            return config.lr
        case "linear":
            return config.lr * (1 - done)
        case "cosine":
            return config.lr * (1 + math.cos(math.pi * done)) / 2
