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

from opd.core.errors import Refusal, foreign_errors, one_line

COMPACT: Any = {"whitespace_flexible": False}  # without optional white space, which a model could generate for ever


@dataclass(frozen=True)
class GrammarCompiler:
    """A compiler of JSON schemas for one tokenizer.  Preparing it takes about a second."""

    tokens: Any  # llguidance.LLTokenizer

    @classmethod
    def of(cls, tokenizer: Tokenizer, size: int, stop: Sequence[int]) -> "GrammarCompiler":
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
        with foreign_errors("response_format (--judge-schema): llguidance does not know this kind of tokenizer"):
            return cls(llguidance.hf.from_tokenizer(tokenizer, n_vocab=size, eos_token=list(stop)))

    def grammar(self, schema: Mapping[str, object]) -> "Grammar":
        """Return the grammar of one response.  Raises Refusal for a schema that llguidance does not support."""
        from llguidance import LLMatcher

        with foreign_errors("response_format"):
            grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=COMPACT)
            matcher = LLMatcher(self.tokens, grammar, log_level=0)
        if matcher.is_error():
            raise Refusal(f"response_format: {one_line(matcher.get_error())}")
        return Grammar(matcher)


@dataclass(frozen=True)
class Grammar:
    """The grammar state of one response."""

    matcher: Any

    def advance(self, token: int) -> None:
        """Advance the state by a token of the response."""
        if not self.matcher.is_stopped():
            self.matcher.consume_token(token)


def constrained(logits: Float[Tensor, "B V"], grammars: Sequence[Grammar]) -> Float[Tensor, "B V"]:
    """Return the logits, set to -inf at tokens that would violate the grammar of their row."""
    masks = np.frombuffer(b"".join(grammar.matcher.compute_bitmask() for grammar in grammars), dtype=np.uint8)
    bits = np.unpackbits(masks.reshape(len(grammars), -1), axis=1, bitorder="little", count=logits.shape[1])
    return logits.masked_fill(torch.from_numpy(cast(np.ndarray, bits) == 0).to(logits.device), -torch.inf)
