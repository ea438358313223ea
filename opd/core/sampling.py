"""The types `Prompt`, which the student responds to, and `Sampling`, the settings of its responses.

This module does not import torch, so that the command line can read flags and refuse mistakes at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from opd.core.errors import Refusal, at_least, finite


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt: chat turns or plain text, the expected answer, and the remaining columns of its row."""

    messages: tuple[Mapping[str, Any], ...] = ()  # chat turns, {"role", "content", ...}, for each model's template
    text: str = ""  # used verbatim if `messages` is empty
    answer: str = ""  # the expected answer, for the verifier
    other_answers: tuple[str, ...] = ()  # further acceptable answers: a response may match any of them
    response: str = ""  # a reference response, if the data has one
    columns: Mapping[str, object] = field(default_factory=dict)  # the rest of the row: metadata, teacher, context

    def question(self) -> str:
        """Return the text of the last turn, or the plain text."""
        return str(self.messages[-1]["content"]) if self.messages else self.text


StopToken = Literal["canonical", "train", "mask"]  # treatment of a response's terminal token
Truncated = Literal["train", "drop"]  # treatment of a response cut at the length limit


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling settings of the rollout engine.  Estimators are unbiased only at temperature 1 without truncation."""

    temperature: float = 1.0
    """Divides the logits before sampling.  0 is greedy decoding.  1 (default) keeps training unbiased."""
    top_p: float = 1.0
    """Nucleus sampling: keeps the fewest tokens with this total probability.  In (0, 1]; 1 (default) keeps all."""
    top_k: int = 0
    """Keeps only this many most probable tokens.  0 (default) keeps the whole vocabulary."""
    max_new_tokens: int = 256
    """Maximum response length, in tokens."""

    def check(self) -> None:
        """Raise Refusal if a value is out of range."""
        if not self.temperature >= 0:
            raise Refusal(f"--temperature {self.temperature}: must be 0 (greedy) or more")
        finite(self, "temperature")
        if not 0 < self.top_p <= 1:
            raise Refusal(f"--top-p {self.top_p}: a probability mass in (0, 1]")
        if self.top_k < 0:
            raise Refusal(f"--top-k {self.top_k}: a number of tokens, or 0 for the whole vocabulary")
        at_least(self, max_new_tokens=1)

    def check_vocabulary(self, size: int) -> None:
        """Raise Refusal if a value lies beyond a vocabulary of `size` tokens."""
        if self.top_k > size:
            raise Refusal(f"--top-k {self.top_k}: the vocabulary has {size} tokens; lower it, or leave it at 0 for all")
