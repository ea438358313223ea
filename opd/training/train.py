"""Training of a student on rollouts that a teacher scores: `train(Train(...))` returns the run folder."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType

import torch
from accelerate.utils import gather_object

from opd.config import checks
from opd.config.plan import resolved
from opd.config.train import Train
from opd.core.disk import check_place
from opd.core.errors import Refusal, foreign_errors
from opd.models import lora
from opd.models.source import newest_checkpoint
from opd.training.alarms import alarms
from opd.training.build import open_session
from opd.training.checkpoint import TrainingState, load
from opd.training.doctor.command import examine_run, static_findings
from opd.training.doctor.findings import Finding, alarming, errors
from opd.training.progress import Progress, loading
from opd.training.run_folder import Run, plain
from opd.training.run_log import read
from opd.training.trainer import Trainer

FREE = frozenset(
    {"resume", "quiet", "doctor", "out", "keep", "trackers", "remote", "worker", "worker_device"}
    | {f"speaker.{name}" for name in ("engine_transfer", "engine_sleep", "engine_concurrency", "engine_timeout")}
    | {"speaker.engine_token_env", "speaker.max_mismatch"}
)  # settings that may change when a run resumes
# Keep process groups alive longer than the DDP-wrapped student.  If DDP's reducer were the last owner, it would wait
# for the group's threads while it holds the GIL, which these threads may need: a deadlock.
_GROUPS: list[object] = []
LOOK_EVERY = 10  # steps between checks of the logs for alarms


def train(
    config: Train,
    each: Callable[[dict[str, float]], object] = lambda row: None,
    asked: Mapping[str, object] = MappingProxyType({}),
) -> Path:
    """Train a student and return the run folder.

    Args:
        config: settings of the run.
        each: called by the main process with each line of metrics.jsonl after it is written.
        asked: how the run was requested (preset, user flags); added to environment.json.

    Raises:
        Refusal: the settings, models or data cannot be used; the message says what to change.
    """
    plan = resolved(config)
    checks.check(plan)
    config, run = plan.config, Run(Path(config.out))
    written = {f.name: plain(getattr(config, f.name)) for f in fields(config)}
    if run.exists() and config.resume:
        run.matches(written, FREE)
    elif run.folder.exists() and not run.folder.is_dir():
        raise Refusal(f"--out {run.folder}: is a file; name a folder")
    elif not run.empty():
        raise Refusal(f"--out {run.folder}: the folder is not empty; add --resume to go on, or name another folder")
    check_place(run.folder / "config.json", "--out")
    checkpoint = newest_checkpoint(run.folder)
    with loading(*plan.names(), quiet=config.quiet):
        session = open_session(plan, checkpoint)
    accelerator, trainer, state = session.accelerator, Trainer(session, run, each), TrainingState()
    if checkpoint is not None:
        state = load(checkpoint, len(plan.teachers))
        trainer.restore(state, checkpoint)
    findings = examine_run(trainer) if config.doctor and checkpoint is None else static_findings(session)
    _refuse(errors(findings))
    if accelerator.is_main_process:
        run.start(written, repr(plan.method), state.step, {"processes": accelerator.num_processes, **asked})
    if checkpoint is None:
        lora.save_base(config, session.student, session.collector.tokenizer, accelerator)
    if config.trackers:
        with foreign_errors(f"--trackers {', '.join(config.trackers)}", "log in to it, or leave it out"):
            accelerator.init_trackers("opd", config={name: str(value) for name, value in written.items()})
    accelerator.wait_for_everyone()

    progress = Progress(config.steps, state.step, quiet=config.quiet or not accelerator.is_main_process)
    with progress, contextlib.closing(trainer.rollout_source):
        for line in dict.fromkeys(map(str, alarming(findings))):
            progress.say(line)
        if (term := plan.method.hidden()) is not None and term.bridge is not None:
            trainer.set_bridge(term.bridge, state.bridge)
        trainer.rollout_source.open(state.step, state.memory, state.rollouts, progress.say)
        _run_steps(trainer, progress, state)
    if accelerator.num_processes > 1:
        _GROUPS.append(torch.distributed.group.WORLD)
    accelerator.end_training()
    return run.folder


def _run_steps(trainer: Trainer, progress: Progress, state: TrainingState) -> None:
    """Train, evaluate and save from `state` to the last step, or until the user interrupts the run."""
    config, run, accelerator, memory = trainer.config, trainer.run, trainer.session.accelerator, state.memory
    if config.eval_prompts and state.step == 0:
        progress.evaluated(0, trainer.evaluate(0))
    for step in range(state.step + 1, config.steps + 1):
        numbers, memory = trainer.step(step, memory)
        progress.stepped(step, numbers)
        if config.eval_prompts and (step % config.eval_every == 0 or step == config.steps):
            progress.evaluated(step, trainer.evaluate(step))
        # All processes must agree to stop, because a signal may reach any of them at any time.
        stops = any(gather_object([progress.interrupted]))
        last = step == config.steps or stops
        if not progress.quiet and (step % LOOK_EVERY == 0 or last):
            for alarm in alarms(read(run.folder)):
                progress.warn(alarm.name, f"step {step}, {alarm.text}; {alarm.remedy}")
        if last or step % config.save_every == 0:
            with run.checkpoint(step, config.keep, accelerator.is_main_process) as folder:
                trainer.save(step, memory, folder)
            accelerator.wait_for_everyone()
        if stops and step < config.steps:
            progress.say(f"interrupted: step {step} is saved; the same command with --resume goes on from there")
            return


def _refuse(findings: Sequence[Finding]) -> None:
    """Raise Refusal with the first of the findings, if there is any."""
    if findings:
        count = f" (and {len(findings) - 1} more)" if len(findings) > 1 else ""
        first = str(findings[0]).removeprefix("error: ")
        raise Refusal(f"{first}{count}; `opd doctor` with these flags shows all it found, --no-doctor trains anyway")
