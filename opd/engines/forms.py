"""Responses in a form that is asked for, a JSON schema: a token that could not go on to it is not drawn.

llguidance keeps the grammar, as it does in vLLM and OpenAI's own servers.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers import PreTrainedTokenizerFast

from opd.types import Refusal

COMPACT: Any = {"whitespace_flexible": False}  # no blank that a model could go on writing for ever


@dataclass(frozen=True)
class Forms:
    """A tokenizer as the grammar reads it; made once, it takes a second."""

    tokens: Any  # llguidance.LLTokenizer

    @classmethod
    def of(cls, tokenizer: Tokenizer, size: int, stop: Sequence[int]) -> "Forms":
        """For the first `size` ids, those of `stop` end a response; raises Refusal where it cannot be."""
        try:
            import llguidance.hf
        except ImportError as error:
            raise Refusal(
                "response_format (--judge-schema): needs llguidance; pip install 'opd[text]', or llguidance"
            ) from error
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise Refusal(
                f"response_format (--judge-schema): {type(tokenizer).__name__} is no fast tokenizer; schemas need one"
            )
        return cls(llguidance.hf.from_tokenizer(tokenizer, n_vocab=size, eos_token=list(stop)))

    def form(self, schema: Mapping[str, object]) -> "Form":
        """Of one response; raises Refusal for a schema that it cannot keep to."""
        from llguidance import LLMatcher

        grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=COMPACT)
        matcher = LLMatcher(self.tokens, grammar, log_level=0)
        if matcher.is_error():
            raise Refusal(f"response_format: {' '.join(matcher.get_error().split())[:200]}")
        return Form(matcher)


@dataclass(frozen=True)
class Form:
    """Where a response stands in its form."""

    matcher: Any

    def take(self, token: int) -> None:
        """The response goes on with this."""
        if not self.matcher.is_stopped():
            self.matcher.consume_token(token)


def within(logits: Float[Tensor, "B V"], forms: Sequence[Form]) -> Float[Tensor, "B V"]:
    """The logits, -inf where a token would leave the form."""
    may = np.frombuffer(b"".join(form.matcher.compute_bitmask() for form in forms), dtype=np.uint8)
    bits = np.unpackbits(may.reshape(len(forms), -1), axis=1, bitorder="little", count=logits.shape[1])
    return logits.masked_fill(torch.from_numpy(cast(np.ndarray, bits) == 0).to(logits.device), -torch.inf)
