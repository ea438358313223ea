"""Run settings by name: `METHOD -> {preset -> settings of Train}`.

`paper` is the setting of the method's own publication, as far as it states one; `embedded` is what was tuned on the
embedded pair.  What the user sets on the command line wins.
"""

from collections.abc import Mapping
from typing import Any

from opd.types import Refusal, Sampling

_EMBEDDED: Mapping[str, Any] = {
    "lr": 1e-3,
    "betas": (0.9, 0.95),
    "schedule": "linear",
    "warmup": 10,
    "steps": 45,
    "batch": 64,
    "sampling": Sampling(max_new_tokens=256),
}
# vOPD, arXiv:2605.07865, released configuration; PowerOPD, arXiv:2606.17199, Section 5 and the authors' scripts.
_VOPD = {
    "lr": 1e-5,
    "schedule": "cosine",
    "lora_rank": 64,
    "lora_alpha": 128.0,
    "lora_targets": "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
    "batch": 256,
    "sampling": Sampling(max_new_tokens=2048),
}
_POWER = {
    "lr": 5e-7,
    "batch": 32,
    "steps": 1500,
    "stop_token": "mask",
    "sampling": Sampling(top_p=0.95, top_k=20, max_new_tokens=1024),
}
PAPER: Mapping[str, Mapping[str, Any]] = {
    "vopd": _VOPD,
    "vopd-topk": _VOPD,
    "opd": _VOPD,
    "opd-full": _VOPD,
    "poweropd": _POWER,
    "opd-clip": _POWER,
    "opd-tanh": _POWER,
    "opd-zscore": _POWER,
}


def settings(preset: str, method: str) -> Mapping[str, Any]:
    """The Train fields that a preset sets for a method."""
    match preset:
        case "none":
            return {}
        case "embedded":
            return _EMBEDDED
        case "paper" if method in PAPER:
            return PAPER[method]
        case "paper":
            raise Refusal(f"--preset paper: no run settings are published for {method}; there are {', '.join(PAPER)}")
    raise Refusal(f"--preset {preset}: unknown; choose none, paper or embedded")
