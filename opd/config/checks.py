"""Checks of a run's plan before anything loads: `check(plan)` refuses, `warnings(plan)` reports what is only risky."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from opd.config.model_names import AveragedStudent, ChatEndpoint, CurrentStudent, ScoringServer
from opd.config.plan import Plan, teacher_flag
from opd.config.train import Train
from opd.core.errors import Refusal, check_seed, finite, positive
from opd.core.sampling import Sampling
from opd.losses.terms import PolicyGradient
from opd.methods.method import Method


def check(plan: Plan) -> None:
    """Refuse impossible settings before anything loads."""
    config = plan.config
    _check_teachers(plan)
    _check_worker(plan)
    _check_engine(plan)
    _check_shard(config)
    if config.packing and config.compile:
        raise Refusal("--packing: --compile would compile attention for every set of lengths; leave one of them out")
    positive(config, "steps", "batch", "lr", "lora_alpha", "micro_batch_tokens", "chunk_mb", "decode_rows")
    positive(config, "eval_every", "eval_limit", "save_every", "keep", "rollouts_every")
    positive(config, "loss_temperature", "max_grad_norm")
    positive_or_0 = ("warmup", "weight_decay", "lora_rank", "eval_temperature", "teacher_loss_temperature")
    for name in (*positive_or_0, "staleness", "importance_cap", "save_minutes", "time_limit"):
        if not getattr(config, name) >= 0:
            raise Refusal(f"--{name.replace('_', '-')} {getattr(config, name)}: must be 0 or more")
    if not all(0 <= beta < 1 for beta in config.betas):
        raise Refusal(f"--betas {config.betas[0]} {config.betas[1]}: both must lie in [0, 1)")
    if not 0 <= config.min_lr_ratio < 1:
        raise Refusal(f"--min-lr-ratio {config.min_lr_ratio}: the last learning rate as a share of --lr, in [0, 1)")
    if config.min_lr_ratio and config.schedule == "constant":
        raise Refusal(
            f"--min-lr-ratio {config.min_lr_ratio}: --schedule constant does not fall; add --schedule cosine or linear"
        )
    finite(config, "lr", "lora_alpha", "loss_temperature", "weight_decay", "eval_temperature")
    finite(config, "teacher_loss_temperature", "save_minutes", "time_limit")
    check_seed(config.seed)
    config.sampling.check()
    config.remote.check()
    if not config.sampling.temperature > 0:
        raise Refusal(
            f"--temperature {config.sampling.temperature}: training samples; 1 is unbiased, 0 would be greedy"
        )
    policy = plan.method.rollouts
    if (reason := policy.tempering_refusal()) and not config.compares():
        s = config.sampling
        raise Refusal(
            f"--temperature {s.temperature}, --top-p {s.top_p}, --top-k {s.top_k}, --teacher-loss-temperature "
            f"{config.teacher_loss_temperature}, --loss-temperature {config.loss_temperature}: {policy} {reason}: "
            "leave them at 1, 1, 0, 0 and 1, or take another method"
        )
    if config.batch % (policy.per_prompt * policy.updates):
        raise Refusal(
            f"--batch {config.batch}: must be a multiple of {policy.per_prompt * policy.updates} "
            f"({policy.per_prompt} rollouts per prompt x {policy.updates} updates)"
        )


def _check_worker(plan: Plan) -> None:
    """Refuse rollouts that a worker process cannot generate, because it has only the student."""
    config = plan.config
    apart = f"--staleness {config.staleness}" if config.staleness else "--worker" if config.worker else ""
    policy, question = plan.method.rollouts, plan.method.asks
    if apart and (reason := policy.worker_refusal()):
        raise Refusal(
            f"{apart}: rollouts of {policy} {reason}: leave the flag out, or take a method on the student's own "
            "rollouts"
        )
    if apart and question is not None and question.changes_prompts:
        raise Refusal(f"{apart}: the prompts of {question} hold what earlier steps reflected: leave it out")
    if config.exact_staleness and not config.staleness:
        raise Refusal("--exact-staleness: --staleness is 0, which is exact; set it, or leave the flag out")
    if config.worker_device != "same" and not (apart and config.speaker.engine == "hf"):
        remedy = "add --staleness 1, or --worker, with --engine hf"
        raise Refusal(f"--worker-device {config.worker_device}: there is no worker; {remedy}")


def _check_shard(config: Train) -> None:
    """Refuse what a sharded student cannot do, and an export without shards."""
    if not config.shard and config.export != "every":
        raise Refusal(f"--export {config.export}: without --shard every checkpoint is a model folder; leave it out")
    if config.shard and (config.worker or config.staleness) and config.speaker.engine == "hf":
        raise Refusal(
            "--shard: a worker process reads whole weights; take --staleness 0 without --worker, or let a server "
            "generate (--engine http://host:port)"
        )
    if config.shard and config.compile:
        raise Refusal("--shard: --compile compiles whole layers; leave one of them out")
    if config.shard and config.teacher_device != "same":
        raise Refusal(
            f"--shard: --teacher-device {config.teacher_device}: shards lie on the training devices; leave one out"
        )


def _check_engine(plan: Plan) -> None:
    """Refuse rollouts that an engine other than hf cannot generate."""
    config = plan.config
    config.speaker.check()
    engine, policy = config.speaker.engine, plan.method.rollouts
    if engine == "hf":
        return
    if reason := policy.engine_refusal():
        raise Refusal(f"--engine {engine}: {policy} {reason}")
    if not (config.worker or config.staleness):
        return
    if engine == "vllm":
        raise Refusal(
            "--engine vllm: shares the process and the GPU with training, so that the two take turns; --staleness and "
            "--worker need a server (--engine http://host:port), or --engine hf"
        )
    if "student_alone" in plan.method.rollout_columns():
        raise Refusal(
            f"--engine {engine}: the filter compares log-probs of the weights behind each rollout, which the trainer "
            "no longer has when a server answers ahead: leave out --staleness and --worker, or switch the filter off "
            "(npd --no-filtered)"
        )


def _check_teachers(plan: Plan) -> None:
    """Refuse a missing teacher, and settings of teacher, judge or context that contradict each other."""
    config = plan.config
    teachers, context, policy = plan.teachers, plan.context, plan.method.rollouts
    if not all(model.name for model in teachers.values()):
        raise Refusal("--teacher must be given; `opd train --help` explains what can stand there")
    if config.route_column != "teacher" and not config.route:
        raise Refusal(f"--route-column {config.route_column}: there is no --route; add --route NAME=MODEL")
    for pair in config.remote.route_token_env:
        name, _, variable = pair.partition("=")
        if not (name and variable and isinstance(teachers.get(name), ScoringServer | ChatEndpoint)):
            raise Refusal(f"--route-token-env {pair}: write NAME=VARIABLE, with the NAME of a --route to a server")
    if (key := config.remote.judge_token_env) and not isinstance(plan.judge, ScoringServer | ChatEndpoint):
        raise Refusal(f"--judge-token-env {key}: no --judge is behind a server; leave it out")
    tokenizer = config.remote.teacher_tokenizer
    if tokenizer and not any(isinstance(model, ScoringServer) for model in teachers.values()):
        raise Refusal(f"--teacher-tokenizer {tokenizer}: is that of a server, and no teacher is one; leave it out")
    local = config.remote.teacher_local
    if local and not isinstance(teachers.get(""), ScoringServer):
        raise Refusal(f"--teacher-local {local}: is compared with --teacher, and that is no server here: leave it out")
    for name, model in teachers.items():
        if isinstance(model, CurrentStudent) and not context:
            raise Refusal(
                f"{teacher_flag(name)}self: the student itself; the KL between the two is 0 and nothing is learnt: "
                "give --context, what the teacher knows and the student does not, or name another teacher"
            )
    missing = [part for part in ("{prompt}", "{context}") if part not in plan.context_template]
    if missing:
        raise Refusal(f"--context-template {plan.context_template!r}: lacks {' and '.join(missing)}")
    question = plan.method.asks
    if config.judge and (question is None or not question.uses_judge):
        raise Refusal(f"--judge {config.judge}: the method asks no judge; leave it out, or take ropd or rubricem")
    if config.judge and question is not None and not question.uses_teacher:
        name, model = next(iter(teachers.items()))
        raise Refusal(
            f"{teacher_flag(name)}{model}: is never asked, for the judge is --judge {config.judge} and the method "
            "takes no answers of a teacher; add --references 1 or more after the METHOD, or name the judge as --teacher"
        )
    if not config.judge and question is not None and question.uses_judge and "" not in teachers:
        raise Refusal("--judge must be given: --route names several teachers, and no --teacher that could be the judge")
    if config.reference and "reference_logp" not in plan.method.models():
        raise Refusal(f"--reference {config.reference}: the method reads no reference model; leave it out")
    if context and question is not None:
        raise Refusal(f"--context {context}: a teacher that is asked for texts is told nothing more: leave it out")
    if context and config.teacher_prompt == "same":
        raise Refusal(f"--context {context}: is in the teacher's prompt, and --teacher-prompt same has none")
    if context == "peer" and policy.per_prompt < 2:
        raise Refusal("--context peer: another rollout of the same prompt; set --per-prompt to 2 or more (SDPO: 8)")
    if context == "peer" and policy.pooled:
        raise Refusal(f"--context peer: another rollout of the step, and {policy} is scored before its steps are known")
    if context == "peer" and policy.teacher_takes_part():
        raise Refusal(f"--context peer: is known once rollouts are written, and the teacher takes part in {policy}")
    moving = [name for name, model in teachers.items() if isinstance(model, CurrentStudent | AveragedStudent)]
    if moving and (reason := policy.moving_teacher_refusal()):
        raise Refusal(f"{teacher_flag(moving[0])}{teachers[moving[0]]}: its weights move, and it {reason}")


def check_vocabulary(method: Method, sampling: Sampling, size: int) -> None:
    """Refuse numbers of tokens, and token ids, that lie beyond a vocabulary of `size` tokens."""
    sampling.check_vocabulary(size)
    for name, value in _leaf_fields(method):
        if name == "k" and value > size:
            raise Refusal(f"--k {value}: the vocabulary has {size} tokens; lower it to {size} or less")
        if name == "ids" and max(value, default=0) >= size:
            raise Refusal(
                f"--tokens: its file lists id {max(value)}, and the vocabulary ends at {size - 1}; name a list that "
                "`opd rock` made for these models"
            )


def _leaf_fields(value: object) -> Iterator[tuple[str, Any]]:
    """Yield the names and values of all fields of a dataclass, and of those in its fields."""
    if isinstance(value, tuple):
        for item in value:
            yield from _leaf_fields(item)
    elif is_dataclass(value):
        for field in fields(value):
            yield field.name, getattr(value, field.name)
            yield from _leaf_fields(getattr(value, field.name))


def warnings(plan: Plan) -> list[str]:
    """Return warnings about settings that are allowed but bias the gradient, each with its reason."""
    config = plan.config
    out, s = [], config.sampling
    if config.tempered():
        out.append(
            f"sampling at temperature {s.temperature}, top_p {s.top_p}, top_k {s.top_k} draws from another "
            f"distribution than the loss assumes: gradients are biased ({config.loss_temperature:g}, 1, 0 is unbiased)"
        )
    if config.lora_targets != "all-linear" and not config.lora_rank:
        out.append(f"--lora-targets {config.lora_targets} is not read: --lora-rank is 0, which trains all weights")
    if plan.method.rollouts.updates > 1:
        out.append("more than one update per rollout batch: from the second on, rollouts are off policy")
    bare = [t for t in plan.method.terms if isinstance(t, PolicyGradient) and not t.corrected()]
    if config.staleness and bare:
        out.append(
            f"--staleness {config.staleness}: rollouts are of an older student, and a policy gradient without the "
            "ratio to it is biased: take async-opd, add --importance-cap 2, or match distributions (opd-full)"
        )
    return out
