"""Constrained decoding by a JSON schema: a token that would violate the schema is never sampled.

llguidance implements the grammar, as in vLLM and in OpenAI's servers.
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

from opd.core.errors import Refusal

COMPACT: Any = {"whitespace_flexible": False}  # without optional white space, which a model could generate for ever


@dataclass(frozen=True)
class Forms:
    """A tokenizer prepared for grammars.  Preparing it takes about a second."""

    tokens: Any  # llguidance.LLTokenizer

    @classmethod
    def of(cls, tokenizer: Tokenizer, size: int, stop: Sequence[int]) -> "Forms":
        """Prepare the first `size` ids of a tokenizer.  The ids `stop` end a response.

        Raises Refusal if llguidance is not installed or the tokenizer is not a fast one.
        """
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
        """Return the form of one response.  Raises Refusal for a schema that llguidance does not support."""
        from llguidance import LLMatcher

        grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=COMPACT)
        matcher = LLMatcher(self.tokens, grammar, log_level=0)
        if matcher.is_error():
            raise Refusal(f"response_format: {' '.join(matcher.get_error().split())[:200]}")
        return Form(matcher)


@dataclass(frozen=True)
class Form:
    """The grammar state of one response."""

    matcher: Any

    def take(self, token: int) -> None:
        """Advance the state by a token of the response."""
        if not self.matcher.is_stopped():
            self.matcher.consume_token(token)


def within(logits: Float[Tensor, "B V"], forms: Sequence[Form]) -> Float[Tensor, "B V"]:
    """Return the logits, set to -inf at tokens that would violate the form of their row."""
    may = np.frombuffer(b"".join(form.matcher.compute_bitmask() for form in forms), dtype=np.uint8)
    bits = np.unpackbits(may.reshape(len(forms), -1), axis=1, bitorder="little", count=logits.shape[1])
    return logits.masked_fill(torch.from_numpy(cast(np.ndarray, bits) == 0).to(logits.device), -torch.inf)
