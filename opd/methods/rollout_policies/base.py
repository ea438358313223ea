"""What every rollout policy shares: its counts, and the memory that a run carries from step to step."""

from collections.abc import Mapping
from types import MappingProxyType

from torch import Tensor

NOTHING: Mapping[str, Tensor] = MappingProxyType({})
Memory = Mapping[str, Tensor]  # state that a run keeps between steps: shared by all processes, saved with checkpoints


def _counts(who: object) -> None:
    for name in ("per_prompt", "updates"):
        if (value := getattr(who, name)) < 1:
            raise ValueError(f"{name}={value}: a rollout batch needs {name} >= 1")
