"""The export to verl: every flag is translated or refused; the names and the losses are those of the installed verl."""

import ast
import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Optional

import pytest
import torch

from opd.adapters import verl as adapter
from opd.config.train import Train
from opd.core.errors import Refusal
from opd.losses.reductions import LastTokens
from opd.losses.rewards import Power
from opd.methods import METHODS

REQUIRED = ["--student", "Qwen/Qwen3-4B", "--teacher", "Qwen/Qwen3-32B", "--prompts", "train.parquet"]
REASON = "the trainer is that of verl, extra `verl`"
FITTING = [name for name, factory in METHODS.items() if not any(adapter.misfits(factory()))]


def exported(words: str, capsys) -> tuple[dict[str, str], dict[str, str]]:
    """Return the environment and the overrides that the command prints for some flags and METHOD."""
    assert adapter.main([*REQUIRED, *shlex.split(words)]) == 0
    before, _, after = capsys.readouterr().out.replace("\\\n", " ").partition("python -m verl.trainer.main_ppo")
    return dict(w.split("=", 1) for w in shlex.split(before)), dict(w.split("=", 1) for w in shlex.split(after))


def refused(words: str, capsys) -> str:
    assert adapter.main([*REQUIRED, *shlex.split(words)]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1
    return err


def test_rewards_of_sampled_tokens_are_the_methods_that_fit():
    assert FITTING == [
        "poweropd", "opd", "opd-clip", "opd-tanh", "reopold", "topd", "opd-signlog", "opd-tv", "opd-plus", "pg",
    ]  # fmt: skip


@pytest.mark.parametrize("name", sorted(set(METHODS) - {*FITTING}))
def test_other_methods_are_refused_with_the_reason(name, capsys):
    more = "" if METHODS[name]().teacher is None else "--teacher Qwen/Qwen3-32B "
    assert "opd: this method does not fit verl: " in refused(f"{more}{name}", capsys)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("vopd", "the baseline Value() sums over the vocabulary"),
        ("opd-stratified", "its estimator is Stratified(k=16)"),
        ("gkd", "compares whole distributions"),
        ("--also opd:0.5 poweropd", "it sums 2 terms"),
        ("async-opd", "its surrogate is OffPolicy()"),
        ("--schedule linear opd", "--schedule linear: verl's FSDP engine"),
        ("--staleness 2 opd", "--staleness 2: verl has no counterpart; leave it out"),
        ("--context answer opd", "--context answer: verl has no counterpart"),
        ("--loss-temperature 0.5 opd", "--loss-temperature 0.5: verl divides"),
        ("--temperature 0.5 --loss-temperature 0.5 opd", "--teacher-loss-temperature 1"),
        ("--student embedded:student opd", "--student embedded:student: verl loads owner/name"),
        ("--teacher http://host:1 opd", "--teacher http://host:1: verl loads"),
        ("--prompts openai/gsm8k opd", "--prompts openai/gsm8k: verl reads .parquet"),
        ("--engine http://host:1 opd", "--engine http://host:1: verl starts vLLM itself"),
        ("--trackers clearml opd", "--trackers clearml: verl knows"),
        ("--lora-alpha 0.5 opd", "--lora-alpha 0.5: verl takes a whole number"),
        ("--gpus 0 opd", "--gpus 0: must be at least 1"),
        ("opd --alpha 2", "--alpha: unknown flag"),
    ],
)
def test_what_verl_cannot_express_is_refused(words, reason, capsys):
    assert reason in refused(words, capsys)


def test_a_denominator_without_a_name_is_refused():
    run = Train(student="a/b", teacher="c/d", prompts="p.parquet", method=METHODS["opd"]())
    with pytest.raises(Refusal, match="its denominator is LastTokens"):
        adapter.overrides(replace(run, method=replace(run.method, reduction=LastTokens())), "x", gpus=1, teacher_gpus=1)


NOT_ALONE = {"engine", "loss_temperature", "teacher_loss_temperature"}  # flags with one value, for a given rest
CHANGED = {  # another value of each translated flag, where half of the default is none
    "student": "a/c", "teacher": "c/e", "prompts": "q.jsonl", "out": Path("elsewhere"), "reduction": "sequence",
    "schedule": "cosine", "betas": (0.8, 0.9), "lora_targets": "q_proj,v_proj", "precision": "bf16",
    "teacher_precision": "bf16", "eval_prompts": "held-out.parquet", "trackers": ("wandb",), "per_prompt": 4,
    "importance_cap": 3.0, "top_k": 20, "warmup": 5, "lora_rank": 8, "seed": 3, "eval_temperature": 0.7,
    "min_lr_ratio": 0.1, "weight_decay": 0.1, "resume": True, "gradient_checkpointing": True,
    "trust_remote_code": True,
}  # fmt: skip


def changed(settings, name):
    """Return settings in which one flag, also of nested settings, has another value."""
    values = {field.name: getattr(settings, field.name) for field in fields(settings)}
    if name in values:
        new = CHANGED[name] if name in CHANGED else type(values[name])(values[name] / 2)
        return replace(settings, **{name: new})
    nested = {part: value for part, value in values.items() if is_dataclass(value) and part != "method"}
    inner = {part: changed(value, name) for part, value in nested.items()}
    return next((replace(settings, **{part: value}) for part, value in inner.items() if value is not None), None)


@pytest.mark.parametrize("name", sorted(adapter.TRANSLATED - NOT_ALONE))
def test_every_translated_flag_changes_the_overrides(name):
    run = Train(
        student="a/b", teacher="c/d", prompts="p.parquet", method=METHODS["opd"](), eval_prompts="e.parquet",
        precision="fp32", teacher_precision="fp32",
    )  # fmt: skip
    other = changed(run, name)
    if name == "temperature":
        other = replace(other, loss_temperature=other.sampling.temperature, teacher_loss_temperature=1.0)
    values, others = (adapter.overrides(r, "loss", gpus=8, teacher_gpus=2) for r in (run, other))
    assert values != others


def test_the_fields_of_a_run_are_known():
    """A new flag is refused until it is translated; a name that no flag has any more does not linger."""
    names = {name for name, *_ in adapter._leaves(*[Train(student="", prompts="")] * 2)}
    assert names >= adapter.TRANSLATED | adapter.WITHOUT_EFFECT


def test_values_are_translated(capsys):
    environment, values = exported(
        "--batch 64 --per-prompt 4 --lr 2e-6 --top-k 20 --max-new-tokens 512 poweropd", capsys
    )
    assert environment == {}
    assert values["data.train_batch_size"] == values["actor_rollout_ref.actor.ppo_mini_batch_size"] == "16"
    assert values["actor_rollout_ref.rollout.n"] == "4" and values["actor_rollout_ref.rollout.top_k"] == "20"
    assert values["actor_rollout_ref.actor.optim.lr"] == "2e-06"
    assert values["distillation.distillation_loss.loss_mode"] == "opd_poweropd"
    assert values["actor_rollout_ref.actor.fsdp_config.dtype"] == "bfloat16"  # verl's GPUs, whatever is here


def test_settings_of_a_method_travel_in_the_environment(capsys):
    environment, values = exported("poweropd --alpha 2.0", capsys)
    assert environment == {"OPD_VERL_METHOD": "poweropd --alpha 2.0"}
    assert values["distillation.distillation_loss.loss_mode"] == "opd_method"
    assert values["+ray_kwargs.ray_init.runtime_env.env_vars.OPD_VERL_METHOD"] == "'poweropd --alpha 2.0'"
    assert adapter.method_of_words(environment["OPD_VERL_METHOD"]).terms[0].reward == Power(2.0)


def test_json_for_machines(capsys):
    assert adapter.main(["--json", *REQUIRED, "opd"]) == 0
    assert "trainer.nnodes=1" in json.loads(capsys.readouterr().out)["overrides"]


def test_the_module_is_a_command():
    command = [sys.executable, "-m", "opd.adapters.verl", *REQUIRED, "vopd"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "") and "does not fit verl" in done.stderr


# The contract with the installed package.


@pytest.fixture(scope="module")
def losses():
    """verl's registry of distillation losses, with the plugin as verl loads it."""
    pytest.importorskip("verl", reason=REASON, exc_type=ImportError)
    from verl.trainer.distillation import losses

    return losses


def composed(overrides: list[str]):
    """Return the configuration that verl's trainer composes from its files and the overrides."""
    import verl
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(Path(verl.__file__).parent / "trainer" / "config"), version_base=None):
        return compose("ppo_trainer", overrides)


def test_verl_loads_the_losses_as_a_plugin(losses):
    """In a process that has imported nothing of opd: verl hides the errors of its plugins."""
    code = "from verl.trainer.distillation.losses import DISTILLATION_LOSS_REGISTRY as r; print(*r)"
    environment = {**os.environ, "OPD_VERL_METHOD": "poweropd --alpha 2.0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)
    names = {*map(adapter.loss_name, FITTING), "opd_method"}
    assert names <= set(done.stdout.split()), done.stderr


def test_verls_configuration_has_every_override(losses, capsys):
    from omegaconf import OmegaConf
    from verl.utils.config import omega_conf_to_dataclass

    _, values = exported(
        "--batch 64 --per-prompt 4 --lr 2e-6 --lora-rank 8 --lora-targets q_proj,v_proj --trackers wandb "
        "--eval-prompts held-out.parquet --reduction constant --schedule cosine --min-lr-ratio 0.1 opd-clip",
        capsys,
    )
    config = composed([f"{key}={value}" for key, value in values.items()])  # a name that verl lacks raises
    for key, value in values.items():
        found = OmegaConf.select(config, key)
        written = adapter.hydra(OmegaConf.to_container(found) if OmegaConf.is_config(found) else found)
        assert written == value or float(written) == float(value), key
    distillation = omega_conf_to_dataclass(config.distillation)
    assert distillation.teacher_models["default"].model_path == "Qwen/Qwen3-32B"
    assert distillation.distillation_loss.loss_settings.use_estimator
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    assert (actor.optim.lr, actor.loss_scale_factor) == (2e-6, 256)


def test_the_environment_of_a_method_reaches_the_workers(losses, capsys):
    from omegaconf import OmegaConf
    from verl.trainer.constants_ppo import get_ppo_ray_runtime_env

    _, values = exported("poweropd --alpha 2.0", capsys)
    key = "+ray_kwargs.ray_init.runtime_env.env_vars.OPD_VERL_METHOD"
    config = composed([f"{key}={values[key]}"])
    merged = OmegaConf.merge(get_ppo_ray_runtime_env(config), config.ray_kwargs.ray_init.runtime_env)  # as run_ppo does
    assert merged.env_vars.OPD_VERL_METHOD == "poweropd --alpha 2.0"


@pytest.fixture
def batch(losses):
    """Two rollouts as verl carries them, nested; the student's logits, and log q of the sampled tokens."""
    from tensordict import TensorDict
    from verl.utils import tensordict_utils

    torch.manual_seed(0)
    prompts, responses, vocabulary = [3, 2], [4, 6], 50
    nest = lambda rows: torch.nested.as_nested_tensor(rows, layout=torch.jagged)
    ids = [torch.randint(0, vocabulary, (p + r,)) for p, r in zip(prompts, responses, strict=True)]
    logits = [torch.randn(len(row), vocabulary, requires_grad=True) for row in ids]
    following = [row.roll(-1)[:, None] for row in ids]
    logp = [z.log_softmax(-1).gather(-1, y)[:, 0] for z, y in zip(logits, following, strict=True)]
    teacher_logp = [torch.randn(z.shape).log_softmax(-1).gather(-1, y) for z, y in zip(logits, following, strict=True)]
    old, mask = torch.zeros(2, max(responses)), torch.zeros(2, max(responses))
    for i, (p, r) in enumerate(zip(prompts, responses, strict=True)):
        old[i, :r], mask[i, :r] = logp[i].detach()[p - 1 : -1], 1
    mask[1, 2] = 0  # the answer of a tool
    columns = {
        "prompts": nest([row[:p] for row, p in zip(ids, prompts, strict=True)]),
        "responses": nest([row[p:] for row, p in zip(ids, prompts, strict=True)]),
        "teacher_logprobs": nest(teacher_logp),
        "old_log_probs": old,
        "response_mask": mask,
        "advantages": torch.zeros_like(mask),
    }
    data = TensorDict(columns, batch_size=2)
    tensordict_utils.assign_non_tensor(data, dp_size=1, batch_num_tokens=int(mask.sum()), global_batch_size=2)
    kept = [mask[i, :r].bool() for i, r in enumerate(responses)]
    pairs = [(a[p - 1 : -1], b[p - 1 : -1, 0]) for a, b, p in zip(logp, teacher_logp, prompts, strict=True)]
    return data, logits, nest(logp), pairs, kept


def settings(losses, name, **changes):
    """Return verl's actor and distillation settings, as its trainer makes them, with a loss."""
    from verl.workers.config import DistillationConfig, DistillationLossConfig, FSDPActorConfig

    loss = dict(loss_mode=name, use_policy_gradient=True, use_task_rewards=False, loss_max_clamp=None, **changes)
    distillation = DistillationConfig(enabled=False, distillation_loss=DistillationLossConfig(**loss))
    sizes = dict(ppo_micro_batch_size_per_gpu=1, ppo_mini_batch_size=2, rollout_n=1)
    return FSDPActorConfig(strategy="fsdp", loss_agg_mode="token-mean", **sizes), distillation


@pytest.mark.parametrize("name", FITTING)
def test_the_gradient_through_verls_loss_is_the_definition(losses, batch, name):
    """-mean over the trained tokens of r(log p, log q) grad log p."""
    data, logits, logp, pairs, kept = batch
    actor, distillation = settings(losses, adapter.loss_name(name))
    loss, metrics = losses.distillation_ppo_loss(actor, distillation, {"log_probs": logp}, data)
    mine = torch.autograd.grad(loss, logits, retain_graph=True)
    reward, count = METHODS[name]().terms[0].reward, sum(int(k.sum()) for k in kept)
    terms = [(-reward(p.detach(), q) * p)[k].sum() / count for (p, q), k in zip(pairs, kept, strict=True)]
    for a, b in zip(mine, torch.autograd.grad(sum(terms), logits), strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-8) and b.any()
    kl = torch.cat([(p.detach() - q)[k] for (p, q), k in zip(pairs, kept, strict=True)]).mean()
    assert metrics["distillation/reverse_kl"].aggregate() == pytest.approx(float(kl))


def test_a_reward_is_not_backpropagated_as_a_loss(losses, batch):
    data, _, logp, _, _ = batch
    actor, distillation = settings(losses, "opd_opd")
    object.__setattr__(distillation.distillation_loss, "use_policy_gradient", False)
    with pytest.raises(Refusal, match="use_policy_gradient=False"):
        losses.distillation_ppo_loss(actor, distillation, {"log_probs": logp}, data)


@pytest.fixture(scope="module")
def patched(losses, tmp_path_factory):
    """A copy of the installed verl with the patch of the documents."""
    import verl

    folder = tmp_path_factory.mktemp("patched")
    shutil.copytree(Path(verl.__file__).parent, folder / "verl")
    diff = Path(__file__).parents[2] / "docs" / "verl-hooks.patch"
    subprocess.run(["patch", "--strip=1", "--fuzz=0", "--input", str(diff)], cwd=folder, check=True)
    return folder


def test_the_patch_of_the_documents_makes_vopd_fit(patched):
    script = Path(__file__).with_name("verl_patched.py")
    environment = {**os.environ, "PYTHONPATH": f"{patched}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    run = dict(capture_output=True, text=True, env=environment, timeout=300)
    done = subprocess.run([sys.executable, str(script)], **run)
    assert done.returncode == 0 and float(done.stdout.split()[-1]) < 1e-6, done.stderr


def test_the_patch_of_the_documents_keeps_the_token_beside_the_top_k(patched):
    """vLLM names a token of rank 40 before the two best; verl itself drops it.  To import its module takes vLLM."""
    source = ast.parse((patched / "verl/workers/rollout/vllm_rollout/utils.py").read_text())
    names = {"RequestOutput": object, "Optional": Optional}
    (function,) = (x for x in source.body if getattr(x, "name", "") == "extract_prompt_logprobs")
    exec(compile(ast.Module([function], []), "utils", "exec"), names)
    entry = lambda logprob, rank: SimpleNamespace(logprob=logprob, rank=rank)
    position = {"7": entry(-9.0, 40), "1": entry(-0.1, 1), "2": entry(-3.0, 2)}
    for k, ids, logprobs in ((2, [1, 2, 7], [-0.1, -3.0, -9.0]), (0, [7], [-9.0])):
        found = {}
        names["extract_prompt_logprobs"](SimpleNamespace(prompt_logprobs=[None, position]), k, found)
        assert found == {"prompt_ids": [ids, [0] * (k + 1)], "prompt_logprobs": [logprobs, [0.0] * (k + 1)]}
