"""Presets of run settings: `settings(preset, method)` returns the `Train` fields that a preset sets for a method.

The preset `paper` holds the settings of the method's publication, as far as it states them.  The preset `embedded`
holds settings tuned on the embedded pair of models.  Explicit flags override a preset.  The names are those of the
flags: fields of `Train`, `Sampling` and `Data`.
"""

import shlex
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from opd.config.data import Data
from opd.core.errors import Refusal
from opd.core.sampling import Sampling

_EVERY_LAYER = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
_LORA = dict(lora_rank=64, lora_alpha=128.0, lora_targets=_EVERY_LAYER)
# vOPD, arXiv:2605.07865, released configuration (holi-lab/vOPD, configs/training): one epoch of guanning-ai/dapo14k,
# 14,116 problems in whole batches of 4 processes x 64; TRL gives both models the same ids and trains on the EOS.
_VOPD = dict(
    lr=1e-5,
    schedule="cosine",
    **_LORA,
    batch=256,
    steps=55,
    max_new_tokens=2048,
    teacher_prompt="same",
    stop_token="train",
)
# PowerOPD, arXiv:2606.17199, Section 5 and the authors' scripts.
_POWER = dict(lr=5e-7, batch=32, steps=1500, stop_token="mask", top_p=0.95, top_k=20, max_new_tokens=1024)
# RubricEM, arXiv:2605.10899, appendix B.1: the stages of its system prompt, in other words and without search tools.
# It holds no numbers, because `--judge verifier` reads those of a question.
SCAFFOLD = (
    "Work on the question in four stages, one after another. Write every stage, however short, between its tags. "
    "First the plan, <structured_plan>...</structured_plan>: what the question asks for, openly and implicitly; a "
    "rubric for the answer, with the facts that it needs, the connections that it should make and the faults that it "
    "must avoid; and steps that satisfy the rubric. Then the research, <state_evaluation>...</state_evaluation>: take "
    "these steps, compare what you have with plan and rubric after each, and revise both where they prove wrong. Then "
    "the review, <rubric_review>...</rubric_review>: hold what you have against each point of the rubric, and state "
    "what the answer must still avoid; and <writing_plan>...</writing_plan>: the thesis and outline of the answer. "
    "Last the answer, <answer>...</answer>: write it by this outline, and nothing after it."
)
PAPER: Mapping[str, Mapping[str, Any]] = {
    **dict.fromkeys(("vopd", "vopd-topk", "opd", "opd-full"), _VOPD),
    **dict.fromkeys(("poweropd", "opd-clip", "opd-tanh", "opd-zscore"), _POWER),
    # Rethinking OPD, arXiv:2604.13016, released script on_policy_distillation.sh (thunlp/OPD): 64 prompts x 4.
    "rethinking-opd": dict(lr=1e-6, weight_decay=0.01, batch=256, per_prompt=4, max_new_tokens=7168),
    # TOP-D, arXiv:2607.04751: 512 prompts x 8 in 16 updates of 32 prompts.
    "topd": dict(lr=1e-6, batch=4096, per_prompt=8, updates=16, max_new_tokens=16384),
    # TV-OPD, arXiv:2609.08341, training set-up: 64 prompts x 1.
    "opd-tv": dict(lr=1e-6, weight_decay=0.01, batch=64, max_new_tokens=16384),
    # FiRe-OPD, arXiv:2606.02684, set-up of the experiments: three passes over DeepMath.
    "fire": dict(lr=1e-6, batch=1024, steps=165, max_new_tokens=16384),
    # IW-OPD, arXiv:2606.22600, training settings.
    "iw-opd": dict(lr=1e-5, batch=1024, max_new_tokens=16384),
    # Baseline in TrOPD's comparison, arXiv:2606.01249, which states no sampling temperature; 128 prompts x 4.
    "entropy": dict(lr=5e-6, batch=512, per_prompt=4, steps=200, max_new_tokens=8096),
    # SCOPE, arXiv:2604.10688, set-up of the experiments: 256 prompts x 8, sampled at 0.6.  As in the released code, the
    # student's logits are divided by the sampling temperature, and the teacher's are not.
    "scope": dict(
        lr=5e-5,
        weight_decay=0.01,
        batch=2048,
        temperature=0.6,
        loss_temperature=0.6,
        teacher_loss_temperature=1.0,
        max_new_tokens=12288,
    ),
    # KAT, arXiv:2606.09471, appendix C, the 1.7B student: 3 % warm-up; the response length limit is read off a figure.
    "kat": dict(lr=1e-6, schedule="cosine", warmup=12, batch=128, steps=400, top_p=0.95, max_new_tokens=2048),
    # TRB, arXiv:2605.31159, training set-up: 64 prompts x 4, one pass over 25,600 of them.
    "trb": dict(lr=1e-5, weight_decay=0.01, warmup=15, batch=256, steps=400, max_new_tokens=7168),
    # TrOPD, arXiv:2606.01249, training set-up, which states no sampling temperature: 128 prompts x 4.
    "tropd": dict(lr=5e-6, batch=512, steps=200, max_new_tokens=8096),
    # OPRD, arXiv:2606.06021, released scripts: 8 prompts x 2, 3 % warm-up.
    "oprd": dict(
        lr=1e-5,
        schedule="cosine",
        warmup=15,
        weight_decay=0.01,
        batch=16,
        per_prompt=2,
        steps=500,
        max_new_tokens=16384,
    ),
    # G-OPD, arXiv:2602.12125, released script for a single teacher.
    "g-opd": dict(lr=1e-5, weight_decay=0.01, importance_cap=5.0, batch=1024, max_new_tokens=16384),
    # OPSD, arXiv:2601.18734, released script of the 1.7B model, which samples at temperature 1.1.
    "opsd": dict(
        teacher="base", lr=2e-4, **_LORA, batch=32, temperature=1.1, top_p=0.95, top_k=20, max_new_tokens=2048
    ),
    # SDPO, arXiv:2601.20802, released script of the runs without feedback: 32 prompts x 8.
    "sdpo": dict(lr=1e-5, weight_decay=0.01, warmup=10, batch=256, max_new_tokens=8192),
    # OmniOPD, arXiv:2606.01476, Section 5 and appendix: 250 steps over 17,000 prompts, so about 64 a step.
    "omniopd": dict(lr=1e-6, batch=64, steps=250, max_new_tokens=20_000),
    # ROPD, arXiv:2605.07396, released configuration: 32 prompts x 8 in four updates of 8 prompts.
    "ropd": dict(lr=1e-6, weight_decay=0.01, batch=256, updates=4, steps=500, max_new_tokens=8192),
    # RubricEM, arXiv:2605.10899, settings of the reinforcement learning: 32 prompts x 8.
    "rubricem": dict(lr=5e-7, batch=256, steps=1400, max_new_tokens=18_432, system=SCAFFOLD),
    # AsyncOPD, arXiv:2606.24143, settings of the experiments: batches of 256 in four updates.
    "async-opd": dict(lr=3e-6, weight_decay=0.01, batch=256, updates=4, steps=200, staleness=4, max_new_tokens=16384),
    # NPD, arXiv:2605.05940, from secondary notes: lr falls from 1e-5 to 1e-6.  Batch size and response length are not
    # stated; packed sequences have 32768 tokens.
    "npd": dict(lr=1e-5, schedule="cosine", min_lr_ratio=0.1),
    # Rock Tokens, arXiv:2605.09253, second stage: a single pass over 10,000 prompts x 4, 5 % warm-up.  Betas and cosine
    # schedule are the defaults of the framework that the paper names.
    "rock-freeze": dict(
        lr=2e-6,
        schedule="cosine",
        warmup=500,
        betas=(0.9, 0.98),
        batch=4,
        per_prompt=4,
        steps=10_000,
        max_new_tokens=8000,
    ),
}

_EMBEDDED = dict(lr=1e-3, betas=(0.9, 0.95), schedule="linear", warmup=10, steps=45, batch=64, max_new_tokens=256)
EMBEDDED: Mapping[str, Mapping[str, Any]] = {
    "async-opd": {"staleness": 4, "lr": 3e-4},  # 1e-3 degrades the student (docs/LOG.md)
    "omniopd": {"lr": 5e-4},
    "oprd": {"lr": 1e-4},
    "ropd": {"judge": "verifier", "lr": 5e-4},  # the embedded teacher cannot generate JSON
    "rubricem": {"judge": "verifier", "lr": 5e-4},
    # The template uses only characters of the embedded tokenizer.  The embedded models cannot read a solution in a
    # prompt: these runs demonstrate a step, but they degrade the student (docs/LOG.md).
    **{name: {"context_template": "{context} {prompt}"} for name in ("opsd", "sdft", "sdpo")},
}
# Flags of the methods themselves.
PAPER_ARGUMENTS: Mapping[str, Mapping[str, Any]] = {
    "vopd-topk": {"k": 100},  # released configuration; the paper's k is 20, the method's default
    "topd": {"future": True, "whiten": True, "clip": 0.2},
}
EMBEDDED_ARGUMENTS: Mapping[str, Mapping[str, Any]] = {
    "kat": {"window": 8, "floor": 8, "buffer": 512, "ready": 64, "after": 4},  # responses are 50 to 160 tokens
    "npd": {"pool": 4},
    "trb": {"anneal": 20},
    "omniopd": {"chunks": 8, "length": 1, "texts": 4},  # audits the same share of a response as the paper
    "oprd": {"bridge_rank": 8},  # the two models have different shapes and no common ancestor
    # Stage tags of the embedded task.  Its models generate solutions only, so they cannot reflect.
    "rubricem": {"tags": ("<plan>", "<work>", "<check>", "<answer>"), "references": 2, "reflections": 0},
}
ARGUMENTS = {"paper": PAPER_ARGUMENTS, "embedded": EMBEDDED_ARGUMENTS}
_SAMPLING = {field.name: field.default for field in fields(Sampling)}
_PARTS = {"sampling": Sampling, "data": Data}  # settings of a run that have fields of their own


def arguments(preset: str, method: str) -> list[str]:
    """Return the method flags that a preset sets.  Put the user's flags after them, so that those override."""
    return _words(ARGUMENTS.get(preset, {}).get(method, {}))


def run_arguments(preset: str, method: str) -> list[str]:
    """Return the run flags that a preset sets for a method, to stand before the user's as `arguments` do."""
    return _words(_chosen(preset, method))


def spelled(preset: str, method: str) -> str:
    """Return the run flags that a preset sets for a method, as command-line text; "" if it sets none."""
    chosen = _chosen(preset, method) if preset != "paper" or method in PAPER else {}
    return shlex.join(_words({name: value for name, value in chosen.items() if value != _SAMPLING.get(name)}))


def settings(preset: str, method: str) -> Mapping[str, Any]:
    """Return the `Train` fields that a preset sets for a method.  Raises Refusal for an unknown preset."""
    settings = dict(_chosen(preset, method))
    for part, kind in _PARTS.items():
        if values := {f.name: settings.pop(f.name) for f in fields(kind) if f.name in settings}:
            settings[part] = kind(**values)
    return settings


def _chosen(preset: str, method: str) -> Mapping[str, Any]:
    match preset:
        case "none":
            return {}
        case "embedded":
            return {**_EMBEDDED, **EMBEDDED.get(method, {})}
        case "paper" if method in PAPER:
            return PAPER[method]
        case "paper":
            raise Refusal(f"--preset paper: has no settings for {method}; there are {', '.join(PAPER)}")
    raise Refusal(f"--preset {preset}: unknown; choose none, paper or embedded")


def _words(values: Mapping[str, Any]) -> list[str]:
    """Return command-line words of flags and their values.  A flag that is True stands without a value."""
    words = lambda value: () if value is True else map(str, value if isinstance(value, tuple) else (value,))
    return [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", *words(value))]
