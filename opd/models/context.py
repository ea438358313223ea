"""The context of a model: the most tokens of prompt and response together that it reads in one way."""

from dataclasses import dataclass

from transformers import PretrainedConfig

NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length", "n_ctx")
UNLIMITED = 1 << 30  # of models without positions


@dataclass(frozen=True, order=True)
class ContextLimit:
    """The most tokens of prompt and response together, and why there may not be more."""

    tokens: int
    reason: str = ""

    def __str__(self) -> str:
        if self.tokens == UNLIMITED:
            return "any number of tokens"
        return f"{self.tokens} tokens" + (f" ({self.reason})" if self.reason else "")


def context_of(config: PretrainedConfig) -> ContextLimit:
    """Return the context of a model by its text configuration.

    The factors of longrope change for a whole row once it is longer than `original_max_position_embeddings`, also for
    its first tokens.  Their log-probs would differ from those at which they were sampled, so the context ends there.
    """
    limits = [
        ContextLimit(value) for name in NAMES if isinstance(value := getattr(config, name, None), int) and value > 0
    ]
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in (rope, *(x for x in rope.values() if isinstance(x, dict))):
        change = parameters.get("original_max_position_embeddings")
        if parameters.get("rope_type") == "longrope" and change:
            limits.append(ContextLimit(change, "longrope changes its factors there, for the tokens before, too"))
    return min(limits, default=ContextLimit(UNLIMITED))
