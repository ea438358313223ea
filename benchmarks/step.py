"""Benchmark of a whole training step against TRL: rollouts, teacher forward, loss, backward, optimizer.

Both use the same models, prompts and limits, and minimise the reverse KL on the student's samples.  Steps alternate in
the same process: opd runs a step whenever TRL's trainer reports the end of a step.
"""

import contextlib
import io
import tempfile
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainerCallback

from benchmarks.result import CLOCKS, Clock, Result, Timed, spread, versions
from benchmarks.run import Trained, opened
from opd.methods.rollout_policies.base import NOTHING
from opd.models.source import locate
from opd.training.trainer import Trainer


@dataclass(frozen=True)
class Step(Trained, Timed):
    """Settings of `python -m benchmarks step`: the run, and the number of steps."""

    prompts: str = "embedded:ledger"
    """Prompts.  Every step uses the same ones."""
    rounds: int = 8
    """Alternating steps of each trainer, after a warm-up step."""


@dataclass
class Ours:
    """Runs and times steps of opd."""

    trainer: Trainer
    clock: Clock
    done: int = 0

    @classmethod
    def of(cls, step: Step, folder: Path) -> "Ours":
        """Open a run whose prompts are limited to those of a single step."""
        config = step.run(folder, "opd-full")
        return cls(opened(replace(config, data=replace(config.data, limit=step.batch))), step.clock)

    def step(self) -> tuple[float, float]:
        """Run a step and return its seconds and its number of trained tokens."""
        self.done += 1
        start = CLOCKS[self.clock]()
        numbers, _ = self.trainer.step(self.done, NOTHING)
        return CLOCKS[self.clock]() - start, numbers["tokens"]


class Turns(TrainerCallback):
    """A callback that times the steps of TRL's trainer and runs a step of opd after each."""

    def __init__(self, ours: Ours, prompt_tokens: int) -> None:
        self.ours, self.prompt_tokens = ours, prompt_tokens
        self.measurements: list[tuple[float, float, float, float]] = []  # seconds, tokens of TRL; then of opd
        self.start, self.tokens_seen = 0.0, 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock; the trainer has its batch of prompts."""
        self.start = CLOCKS[self.ours.clock]()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the clock at the end of the trainer's step, and run a step of opd."""
        seconds = CLOCKS[self.ours.clock]() - self.start
        read, self.tokens_seen = float(state.num_input_tokens_seen - self.tokens_seen), state.num_input_tokens_seen
        self.measurements.append((seconds, read - self.prompt_tokens, *self.ours.step()))


def measured(step: Step) -> Result:
    """Measure the tokens per second of both trainers; if TRL cannot run, only those of opd, with the reason."""
    torch.set_num_threads(step.threads)
    with tempfile.TemporaryDirectory() as folder:
        ours, reason = Ours.of(step, Path(folder) / "run"), ""
        try:
            measurements = _beside(ours, step, folder)
        except (ImportError, RuntimeError, TypeError, ValueError) as error:
            reason = f"TRL cannot run here: {type(error).__name__}: {str(error).splitlines()[0]}"
            measurements = [(0.0, 0.0, *ours.step()) for _ in range(step.rounds + 1)]
    measurements, packages = measurements[1:], versions("opd", "torch", "transformers", "trl")
    trl_speed = [tokens / seconds for seconds, tokens, *_ in measurements if seconds]
    opd_speed = [tokens / seconds for *_, seconds, tokens in measurements]
    rows = [("opd", spread(opd_speed, 0), spread([x[3] / step.batch for x in measurements], 0), "")]
    if trl_speed:
        ratios = [a / b for a, b in zip(opd_speed, trl_speed, strict=True)]
        rows.append(("TRL", spread(trl_speed, 0), spread([x[1] / step.batch for x in measurements], 0), spread(ratios)))
    notes = (
        *([reason] if reason else []),
        f"medians [min, max] of {step.rounds} alternating steps, {step.clock} clock; {step}; {packages}",
        "TRL: DistillationTrainer, beta 1, fp32, no gradient checkpointing, the batch at once; ours: opd-full",
    )
    header = ("trainer", "tokens/s", "tokens a response", "ours faster by")
    title = f"training step, {step.student} from {step.teacher}, {step.batch} responses of at most "
    numbers = {"step": vars(step), "versions": packages, "found": measurements, "refused": reason}
    return Result(f"{title}{step.max_new_tokens} tokens", header, tuple(rows), notes, numbers)


def _beside(ours: Ours, step: Step, folder: str) -> list[tuple[float, float, float, float]]:
    """Run TRL's trainer with steps of opd between its steps; return seconds and tokens of both for each round."""
    from trl import DistillationConfig, DistillationTrainer

    session = ours.trainer.session
    rendered = session.prompts.first(step.batch)
    tokenizer = session.collector.tokenizer
    prompts = [[dict(turn) for turn in p.prompt.messages] or p.prompt.text for p in rendered]
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(locate(name, field=field).folder, dtype=torch.float32)
        for name, field in ((step.student, "student"), (step.teacher, "teacher"))
    )
    turns = Turns(ours, sum(len(p.ids) for p in rendered))
    config = DistillationConfig(
        output_dir=folder,
        per_device_train_batch_size=step.batch,
        max_steps=step.rounds + 1,
        max_completion_length=step.max_new_tokens,
        beta=1.0,
        learning_rate=1e-5,
        bf16=False,
        gradient_checkpointing=False,
        shuffle_dataset=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = DistillationTrainer(
            model=student,
            teacher_model=teacher,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            processing_class=tokenizer,
            callbacks=[turns],
        )
        trainer.train()
    return turns.measurements
