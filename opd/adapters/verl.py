"""verl's command for a run of opd: `python -m opd.adapters.verl RUN-FLAGS METHOD` prints it, and needs no verl.

The rewards of methods reach verl through `opd.adapters.verl_plugin`.
"""

import json
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path

from opd.adapters.fit import refuse_misfit, surroundings
from opd.cli.method_names import method_of
from opd.cli.parse import flag_name, scan_words
from opd.cli.train import TrainFlags, run_flags
from opd.config.model_names import ModelFiles, parse
from opd.config.presets import arguments
from opd.config.train import Train
from opd.core.errors import Refusal, at_least, printable
from opd.losses.estimators import Sampled
from opd.losses.reductions import Constant, SequenceMean, TokenMean
from opd.losses.surrogates import Reinforce
from opd.losses.target_distribution import Teacher
from opd.losses.terms import PolicyGradient
from opd.methods import METHODS
from opd.methods.method import Method

ENGINE = "verl"
PROG = "python -m opd.adapters.verl"
CUSTOM_LOSS = "opd_method"  # the loss of the method that METHOD_VARIABLE holds
METHOD_VARIABLE = "OPD_VERL_METHOD"  # NAME FLAGS, as after `opd train`, of a method with settings of its own
LOGGERS = ("tensorboard", "wandb", "trackio", "mlflow")
# Flags that verl's configuration expresses, and flags without influence on what is trained.
TRANSLATED = frozenset({
    "student", "teacher", "prompts", "out", "resume", "steps", "batch", "per_prompt", "importance_cap", "reduction",
    "temperature", "top_p", "top_k", "max_new_tokens", "loss_temperature", "teacher_loss_temperature", "lr", "schedule",
    "min_lr_ratio", "warmup", "betas", "weight_decay", "max_grad_norm", "lora_rank", "lora_alpha", "lora_targets",
    "precision", "teacher_precision", "micro_batch_tokens", "gradient_checkpointing", "eval_prompts", "eval_every",
    "eval_limit", "eval_temperature", "save_every", "keep", "trackers", "seed", "trust_remote_code", "engine",
})  # fmt: skip
WITHOUT_EFFECT = frozenset({"method", "quiet", "doctor", "packing"})


@dataclass(frozen=True, kw_only=True)
class ExportFlags(TrainFlags):
    """Flags of the export to verl."""

    json: bool = False
    """Print the environment and the overrides as JSON."""
    gpus: int = 8
    """GPUs of the node that train and generate."""
    teacher_gpus: int = 2
    """GPUs of the node that the teacher is split over."""


def misfits(method: Method) -> Iterator[str]:
    """Yield why the loss is more than a reward of log p and log q of the sampled tokens."""
    yield from surroundings(method, ENGINE)
    if len(method.terms) > 1:
        yield f"it sums {len(method.terms)} terms, and a distillation loss of verl is one reward"
    for term in method.terms:
        if not isinstance(term, PolicyGradient):
            yield f"{term} compares whole distributions, and verl gives a loss the sampled tokens' log-probs"
            continue
        if term.baseline is not None:
            yield f"the baseline {term.baseline} sums over the vocabulary, and verl gives the sampled tokens' log-probs"
        for name, plain in (("estimator", Sampled()), ("surrogate", Reinforce()), ("against", Teacher())):
            if getattr(term, name) != plain:
                yield f"its {name} is {getattr(term, name)}, and verl's losses have {plain}"
        for leaf in (*term.transforms, *term.weights):
            yield f"{leaf} is more than a reward of a token"
        if term.coef != 1:
            yield f"its coef is {term.coef}, and verl has no factor of a distillation loss alone; change lr instead"


def loss_name(method_name: str) -> str:
    """Return the name of a listed method among verl's distillation losses."""
    return f"opd_{method_name.replace('-', '_')}"


def method_of_words(words: str) -> Method:
    """Return the method that words of a command line describe, NAME FLAGS; refuse one that does not fit."""
    name, *flags = shlex.split(words)
    method = method_of(name, flags)
    refuse_misfit(misfits(method), ENGINE)
    return method


def overrides(run: Train, loss: str, *, gpus: int, teacher_gpus: int) -> dict[str, object]:
    """Return the values of verl's configuration for a run; refuse what they cannot express."""
    _refuse_untranslated(run)
    method, sampling, per_prompt = run.method, run.sampling, run.per_prompt or run.method.rollouts.per_prompt
    refuse_misfit(misfits(method), ENGINE)
    _check(run, per_prompt)
    held_out = bool(run.eval_prompts)
    return {
        "algorithm.adv_estimator": "grpo",  # needs no critic; the task's rewards are not used
        "algorithm.rollout_correction.rollout_is": "token",
        "algorithm.rollout_correction.rollout_is_threshold": run.importance_cap or 2.0,
        "data.train_files": run.prompts,
        "data.val_files": run.eval_prompts or run.prompts,
        "data.val_max_samples": run.eval_limit,
        "data.train_batch_size": run.batch // per_prompt,
        "data.max_response_length": sampling.max_new_tokens,
        "data.seed": run.seed,
        "data.trust_remote_code": run.trust_remote_code,
        "actor_rollout_ref.model.path": run.student,
        "actor_rollout_ref.model.trust_remote_code": run.trust_remote_code,
        "actor_rollout_ref.model.enable_gradient_checkpointing": run.gradient_checkpointing,
        "actor_rollout_ref.model.lora_rank": run.lora_rank,
        "actor_rollout_ref.model.lora_alpha": int(run.lora_alpha),
        "actor_rollout_ref.model.target_modules": _targets(run.lora_targets),
        **_actor(run, per_prompt),
        "actor_rollout_ref.rollout.name": "vllm",
        "actor_rollout_ref.rollout.tensor_model_parallel_size": 1,
        "actor_rollout_ref.rollout.n": per_prompt,
        "actor_rollout_ref.rollout.temperature": sampling.temperature,
        "actor_rollout_ref.rollout.top_p": sampling.top_p,
        "actor_rollout_ref.rollout.top_k": sampling.top_k or -1,
        "actor_rollout_ref.rollout.seed": run.seed,
        "actor_rollout_ref.rollout.val_kwargs.temperature": run.eval_temperature,
        "actor_rollout_ref.rollout.val_kwargs.do_sample": run.eval_temperature > 0,
        "distillation.enabled": True,
        "distillation.n_gpus_per_node": teacher_gpus,
        "distillation.nnodes": 1,
        "distillation.teacher_models.teacher_model.model_path": run.teacher,
        "distillation.teacher_models.teacher_model.inference.dtype": _dtype(run.teacher_precision),
        "distillation.teacher_models.teacher_model.inference.tensor_model_parallel_size": teacher_gpus,
        "distillation.distillation_loss.loss_mode": loss,
        "distillation.distillation_loss.use_policy_gradient": True,
        "distillation.distillation_loss.use_task_rewards": False,
        "distillation.distillation_loss.loss_max_clamp": None,
        "trainer.total_training_steps": run.steps,
        "trainer.total_epochs": run.steps,  # an epoch has a step at least, so the number of steps ends the run
        "trainer.n_gpus_per_node": gpus,
        "trainer.nnodes": 1,
        "trainer.save_freq": run.save_every,
        "trainer.test_freq": run.eval_every if held_out else -1,
        "trainer.val_before_train": held_out,
        "trainer.max_actor_ckpt_to_keep": run.keep,
        "trainer.default_local_dir": str(run.out),
        "trainer.resume_mode": "auto" if run.resume else "disable",
        "trainer.logger": ("console", *run.trackers),
    }


def _actor(run: Train, per_prompt: int) -> dict[str, object]:
    """Return the settings of the optimizer and the loss."""
    values = {
        "optim.lr": run.lr,
        "optim.lr_scheduler_type": run.schedule,
        "optim.min_lr_ratio": run.min_lr_ratio,
        "optim.lr_warmup_steps": run.warmup,
        "optim.betas": run.betas,
        "optim.weight_decay": run.weight_decay,
        "optim.clip_grad": run.max_grad_norm,
        "fsdp_config.dtype": _dtype(run.precision),
        "ppo_mini_batch_size": run.batch // per_prompt,  # one update on each batch
        "ppo_epochs": 1,
        "use_dynamic_bsz": True,
        "ppo_max_token_len_per_gpu": run.micro_batch_tokens,
        "use_kl_loss": False,
        "entropy_coeff": 0,
        **_aggregation(run),
    }
    return {f"actor_rollout_ref.actor.{name}": value for name, value in values.items()}


def _aggregation(run: Train) -> dict[str, object]:
    """Return verl's name of the loss's denominator."""
    chosen = {"method": run.method.reduction, "token": TokenMean(), "sequence": SequenceMean()}
    match chosen.get(run.reduction, Constant(run.sampling.max_new_tokens)):
        case TokenMean():
            return {"loss_agg_mode": "token-mean"}
        case SequenceMean():
            return {"loss_agg_mode": "seq-mean-token-mean"}
        case Constant(length):
            return {"loss_agg_mode": "seq-mean-token-sum-norm", "loss_scale_factor": length}
        case other:
            raise Refusal(f"METHOD: its denominator is {other}, which verl has no name for; add --reduction token")


def _check(run: Train, per_prompt: int) -> None:
    """Refuse values of translated flags that verl has no counterpart of."""
    at_least(run, steps=1, batch=1, per_prompt=0)
    for flag, name in (("--student", run.student), ("--teacher", run.teacher)):
        if not isinstance(parse(name), ModelFiles) or name.endswith(".gguf") or re.search("^embedded:|@", name):
            raise Refusal(f"{flag} {name}: verl loads owner/name from the hub, or a folder that transformers saved")
    for flag, path in (("--prompts", run.prompts), ("--eval-prompts", run.eval_prompts)):
        if path and Path(path).suffix not in (".parquet", ".json", ".jsonl"):
            raise Refusal(f"{flag} {path}: verl reads .parquet, .json and .jsonl, with messages in the column prompt")
    if run.batch % per_prompt:
        raise Refusal(f"--batch {run.batch}: must be a multiple of {per_prompt}, the rollouts per prompt")
    if run.loss_temperature != run.sampling.temperature or run.teacher_temperature() != 1:
        raise Refusal(
            f"--temperature {run.sampling.temperature}, --loss-temperature {run.loss_temperature}: verl divides the "
            "student's logits in the loss by the sampling temperature, too, and the teacher's never; set both to 1, or "
            "to another value together with --teacher-loss-temperature 1"
        )
    if run.schedule == "linear":
        raise Refusal("--schedule linear: verl's FSDP engine has constant and cosine")
    if run.speaker.engine not in ("hf", "vllm"):
        raise Refusal(f"--engine {run.speaker.engine}: verl starts vLLM itself; leave it out")
    if unknown := set(run.trackers) - {*LOGGERS}:
        raise Refusal(f"--trackers {', '.join(sorted(unknown))}: verl knows {', '.join(LOGGERS)}")
    if run.lora_alpha != int(run.lora_alpha):
        raise Refusal(f"--lora-alpha {run.lora_alpha}: verl takes a whole number")


def _refuse_untranslated(run: Train) -> None:
    """Refuse a flag that is not at its default and that verl's configuration cannot express."""
    for name, value, default in _leaves(run, Train(student="", prompts="")):
        if name not in TRANSLATED | WITHOUT_EFFECT and value != default:
            raise Refusal(f"{flag_name(name)} {value}: verl has no counterpart; leave it out")


def _leaves(settings: object, defaults: object) -> Iterator[tuple[str, object, object]]:
    """Yield the name, value and default of each flag, also of nested settings."""
    for field in fields(settings):  # type: ignore[arg-type]
        value, default = getattr(settings, field.name), getattr(defaults, field.name)
        if is_dataclass(value) and field.name != "method":
            yield from _leaves(value, default)
        else:
            yield field.name, value, default


def _targets(names: str) -> object:
    return names if names == "all-linear" else tuple(names.split(","))


def _dtype(precision: str) -> str:
    return {"bf16": "bfloat16", "fp32": "float32"}[precision]


def hydra(value: object) -> str:
    """Return a value as Hydra's command line reads it."""
    if value is None:
        return "null"
    if isinstance(value, tuple | list):
        return f"[{','.join(map(hydra, value))}]"
    if isinstance(value, str) and not re.fullmatch(r"[\w./+-]+", value):
        escaped = value.replace("\\", "\\\\").replace("'", "\\'")
        return f"'{escaped}'"
    return str(value)


def export(flags: ExportFlags, method_words: Sequence[str]) -> tuple[Mapping[str, str], list[str]]:
    """Return the environment variables and the Hydra overrides of a run; `method_words` are METHOD and its flags."""
    name, *method_flags = method_words
    at_least(flags, gpus=1, teacher_gpus=1)
    machines = {"gpus": flags.gpus, "teacher_gpus": flags.teacher_gpus}
    if name in METHODS and METHODS[name]() == flags.run.method:
        values, environment = overrides(flags.run, loss_name(name), **machines), {}
    else:
        words = shlex.join([name, *arguments(flags.preset, name), *method_flags])
        values, environment = overrides(flags.run, CUSTOM_LOSS, **machines), {METHOD_VARIABLE: words}
        values[f"+ray_kwargs.ray_init.runtime_env.env_vars.{METHOD_VARIABLE}"] = words
    return environment, [f"{key}={hydra(value)}" for key, value in values.items()]


def main(args: list[str]) -> int:
    """Print verl's command for a run.  Returns 2 after printing a line about an error that the user can fix."""
    try:
        flags = run_flags(args, ExportFlags, PROG, "Print the command with which verl makes a run of opd:")
        words = scan_words(ExportFlags, args)
        on_gpus = {name: "bf16" for name in ("precision", "teacher_precision") if flag_name(name) not in words.present}
        flags = replace(flags, run=replace(flags.run, **on_gpus))
        environment, settings = export(flags, words.remaining)
    except Refusal as error:
        print(f"opd: {printable(error)}", file=sys.stderr)
        return 2
    if flags.json:
        print(json.dumps({"environment": environment, "overrides": settings}, indent=2))
        return 0
    variables = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
    command = " ".join([*variables, "python -m verl.trainer.main_ppo"])
    print(" \\\n  ".join([command, *map(shlex.quote, settings)]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
