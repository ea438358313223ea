"""Training of a student on rollouts that a teacher scores: `train(Train(...))` returns the run folder."""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType

from opd.config import checks
from opd.config.plan import Plan, resolved
from opd.config.train import Train
from opd.core.disk import check_place
from opd.core.errors import Refusal, Stopped, foreign_errors
from opd.core.processes import is_main_process
from opd.models import lora
from opd.models.checkpoints import checkpoints, has_weights, newest_checkpoint, sealed_history
from opd.training.alarms import alarms
from opd.training.build import open_session
from opd.training.checkpoint import TrainingState, load
from opd.training.doctor.command import examine_run, static_findings
from opd.training.doctor.findings import Finding, alarming, errors
from opd.training.launch import check_launch, engine_name, keep_groups
from opd.training.progress import Progress, loading
from opd.training.run_folder import Run, plain
from opd.training.run_lock import locked
from opd.training.run_log import read
from opd.training.stops import Stops
from opd.training.trainer import Trainer

FREE = frozenset(
    {"resume", "quiet", "doctor", "out", "keep", "trackers", "remote", "worker", "worker_device"}
    | {"save_every", "save_minutes", "time_limit", "shard", "export"}
    | {f"speaker.{name}" for name in ("engine_transfer", "engine_sleep", "engine_concurrency", "engine_timeout")}
    | {"speaker.engine_token_env", "speaker.max_mismatch"}
)  # settings that may change when a run resumes
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
        Stopped: a signal or --time-limit ended the run before its last step, and it is saved.
    """
    started = time.monotonic()
    plan = resolved(config)
    checks.check(plan)
    check_launch()
    run = Run(Path(plan.config.out))
    if run.folder.exists() and not run.folder.is_dir():
        raise Refusal(f"--out {run.folder}: is a file; name a folder")
    with locked(run.folder) if is_main_process() else contextlib.nullcontext():
        return _train(plan, run, each, asked, started)


def _train(
    plan: Plan, run: Run, each: Callable[[dict[str, float]], object], asked: Mapping[str, object], started: float
) -> Path:
    """Train in a run folder that no other trainer writes to."""
    config = plan.config
    written = {f.name: plain(getattr(config, f.name)) for f in fields(config)}
    checkpoint, damaged = _continued(run, config, written)
    check_place(run.folder / "config.json", "--out")
    with loading(*plan.names(), quiet=config.quiet):
        session = open_session(plan, checkpoint if checkpoint is not None and has_weights(checkpoint) else None)
    accelerator, trainer, state = session.accelerator, Trainer(session, run, each), TrainingState()
    count, engine = accelerator.num_processes, engine_name(accelerator, sharded=session.is_sharded)
    if checkpoint is not None:
        state = load(checkpoint, len(plan.teachers))
        trainer.restore(state, checkpoint)
    findings = examine_run(trainer) if config.doctor and checkpoint is None else static_findings(session)
    _refuse(errors(findings))
    if accelerator.is_main_process:
        history = sealed_history(checkpoint) if checkpoint is not None else None
        asked = {"processes": count, "engine": engine, **asked}
        run.start(written, repr(plan.method), state.step, asked, history)
        if checkpoint is not None:  # the process before may have been killed before it did so
            run.remove_old(state.step, None if state.refused else config.keep)
    if checkpoint is None:
        lora.save_base(config, session.student, session.collector.tokenizer, accelerator)
    if config.trackers:
        with foreign_errors(f"--trackers {', '.join(config.trackers)}", "log in to it, or leave it out"):
            accelerator.init_trackers("opd", config={name: str(value) for name, value in written.items()})
    accelerator.wait_for_everyone()

    progress = Progress(config.steps, state.step, quiet=config.quiet or not accelerator.is_main_process)
    with progress, contextlib.closing(trainer.rollout_source):
        progress.say(f"training in {engine if count == 1 else f'{count} processes, {engine}'}")
        for line in (*damaged, *dict.fromkeys(map(str, alarming(findings)))):
            progress.say(line)
        if (term := plan.method.hidden()) is not None and term.bridge is not None:
            trainer.set_bridge(term.bridge, state.bridge)
        trainer.rollout_source.open(state.step, state.memory, state.rollouts, progress.say)
        code = _run_steps(trainer, progress, state, Stops(config, lambda: progress.signal, started))
    keep_groups()
    accelerator.end_training()
    if code:
        raise Stopped(f"{run.folder}: stopped before the last step", code)
    return run.folder


def _continued(run: Run, config: Train, settings: Mapping[str, object]) -> tuple[Path | None, list[str]]:
    """Return the checkpoint that the run continues from, if any, and a line for each newer one that is damaged."""
    if not run.exists() and run.empty():
        return None, []
    if not run.exists() and (config.resume or checkpoints(run.folder)):
        raise Refusal(
            f"--out {run.folder}: it has no config.json, so no run can continue there; restore the file, or "
            "name another folder"
        )
    if not (run.exists() and config.resume):
        remedy = "add --resume to go on, or name another folder" if run.exists() else "name another folder"
        raise Refusal(f"--out {run.folder}: the folder is not empty; {remedy}")
    run.matches(settings, FREE)
    checkpoint, damaged = newest_checkpoint(run.folder, history=True)
    return checkpoint, [f"{line}; the run goes on from {checkpoint}" for line in damaged]


def _run_steps(trainer: Trainer, progress: Progress, state: TrainingState, stops: Stops) -> int:
    """Train, evaluate and save from `state` to the last step.  Return the exit code of a run that stops before it."""
    config, run, accelerator, memory = trainer.config, trainer.run, trainer.session.accelerator, state.memory
    if config.eval_prompts and state.step == 0:
        progress.evaluated(0, trainer.evaluate(0))
    for step in range(state.step + 1, config.steps + 1):
        numbers, memory = trainer.step(step, memory)
        progress.stepped(step, numbers)
        if config.eval_prompts and (step % config.eval_every == 0 or step == config.steps):
            progress.evaluated(step, trainer.evaluate(step))
        saves, code = stops.after(step)
        last = step == config.steps or code
        if not progress.quiet and (step % LOOK_EVERY == 0 or last):
            for alarm in alarms(read(run.folder)):
                progress.warn(alarm.name, f"step {step}, {alarm.text}; {alarm.remedy}")
        if saves:
            began = time.monotonic()
            # A refused step leaves the weights as they were, perhaps after a bad update: older checkpoints stay.
            keep = None if trainer.guards.refused else config.keep
            with run.checkpoint(step, keep, accelerator.is_main_process) as folder:
                trainer.save(step, memory, folder)
            accelerator.wait_for_everyone()
            stops.after_save(time.monotonic() - began)
        if code:
            progress.say(f"stopped: step {step} of {config.steps} is saved; the same command with --resume continues")
            return code
    return 0


def _refuse(findings: Sequence[Finding]) -> None:
    """Raise Refusal with the first of the findings, if there is any."""
    if findings:
        count = f" (and {len(findings) - 1} more)" if len(findings) > 1 else ""
        first = str(findings[0]).removeprefix("error: ")
        raise Refusal(f"{first}{count}; `opd doctor` with these flags shows all it found, --no-doctor trains anyway")
