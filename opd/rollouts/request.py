"""A request to a `Collector`: the prompts, the policy and the settings of a rollout batch."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from opd.core.sampling import Sampling
from opd.data.prompts import Rendered
from opd.methods.rollout_policies.base import Memory, RolloutPolicy, RunState


@dataclass(frozen=True, kw_only=True)
class RolloutRequest:
    """A request to generate `policy.per_prompt` rollouts for each prompt."""

    prompts: Sequence[Rendered]  # this process's share of the prompts
    policy: RolloutPolicy
    sampling: Sampling
    seed: int  # the run's seed
    step: int  # the batch number, which keys the noise
    first: int = 0  # batch index of the first rollout
    total: int = 1  # number of steps in the run
    memory: Memory = field(default_factory=dict)  # what the run carries from step to step
    unprompted: bool = False  # also note the student's cross entropy of each response without its prompt

    def run_state(self) -> RunState:
        """Return the values that the policy's answers depend on."""
        return RunState(self.step, self.total, self.sampling.max_new_tokens, self.memory)
