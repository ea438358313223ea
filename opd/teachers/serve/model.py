"""The model behind a server: batched forwards under one lock, independent of HTTP."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float, Int
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from opd.config.commands import Serve
from opd.core.errors import Refusal, one_line
from opd.core.types import pad
from opd.data.prompts import short
from opd.head.inputs import Hidden
from opd.head.token_scores import TokenScores, scores
from opd.head.vocabulary import Vocabulary
from opd.models.batching import Rows, micro_batches
from opd.models.context import context_of
from opd.models.forward import final_states
from opd.models.load import base, head
from opd.models.remote import opd_protocol as wire
from opd.rollouts.engines.base import GenerateRequest, Sample
from opd.rollouts.engines.hf import HFEngine
from opd.rollouts.engines.json_schema import GrammarCompiler
from opd.rollouts.weight_sync.vllm_plugin import weights


@dataclass(frozen=True)
class ScoredSequence:
    """A sequence of token ids, and the positions of the tokens to score."""

    ids: tuple[int, ...]
    positions: Sequence[int]  # ascending positions >= 1: the first token has no prediction


class Served:
    """A frozen model that many requests share.  A lock lets one request compute at a time."""

    def __init__(
        self, model: PreTrainedModel | PeftModel, tokenizer: Tokenizer, stop: tuple[int, ...], config: Serve
    ) -> None:
        self.model, self.tokenizer, self.stop = model.requires_grad_(False), tokenizer, stop
        self.name, self.budget = config.name or config.model, config.max_batch_tokens
        self.head = head(model)
        self.rows = len(self.head.weight)
        self.context = context_of(base(model).config.get_text_config()).tokens
        self.engine = HFEngine(model, self.rows, stop, config.decode_rows)
        self.lock = threading.Lock()
        self.fingerprint = wire.weights_hash(model)
        self.version = "as loaded"  # name of the weights, set by the client that sends them
        self.is_taking = False  # True while new weights are read

    def identity(self) -> dict[str, object]:
        """Return what a client compares before it uses any number of this server."""
        return {
            "protocol": wire.VERSION,
            "model": self.name,
            "fingerprint": self.fingerprint,
            "vocabulary": wire.vocabulary_hash(self.tokenizer),
            "chat_template": wire.template_hash(self.tokenizer),
            "special_tokens": {k: str(v) for k, v in self.tokenizer.special_tokens_map.items()},
            "eos": list(self.stop),
            "rows": self.rows,
            "width": self.head.weight.shape[1],
            "context": self.context,
            "dtype": str(self.head.weight.dtype).removeprefix("torch."),
            "scale": self.head.scale,
            "softcap": self.head.softcap,
        }

    @torch.no_grad()
    def states(self, sequences: Sequence[ScoredSequence]) -> list[Float[Tensor, "_ H"]]:
        """Return the final hidden states that predict the requested tokens of each sequence, on the model's device."""
        out: dict[int, Tensor] = {}
        with self.lock:
            for group in micro_batches({i: len(a.ids) for i, a in enumerate(sequences)}, self.budget):
                chunk = [sequences[i] for i in group]
                states = final_states(self.model, self._rows(chunk))
                out |= zip(group, states.split([len(a.positions) for a in chunk]), strict=True)
        return [out[i] for i in range(len(sequences))]

    def scores(
        self, sequences: Sequence[ScoredSequence], candidates: Sequence[Int[Tensor, "_ k"]], top: int
    ) -> list[TokenScores]:
        """Return log-probs of the candidates (padded with -1) and of the `top` most probable tokens, in nats."""
        vocabulary = Vocabulary(self.rows)
        return [
            scores(Hidden(states, self.head), ids.to(states.device), vocabulary, top)
            for states, ids in zip(self.states(sequences), candidates, strict=True)
        ]

    @cached_property
    def grammar_compiler(self) -> GrammarCompiler:
        """Return the compiler of JSON schemas for this tokenizer; made once."""
        return GrammarCompiler.of(self.tokenizer, self.rows, self.stop)

    def generate(
        self, request: GenerateRequest, stop: Sequence[int], schema: Mapping[str, object] | None = None
    ) -> list[Sample]:
        """Generate one response per prompt, constrained by a schema if given.  Only the ids `stop` end a response."""
        with self.lock:
            if schema is not None:
                request = replace(request, grammars=[self.grammar_compiler.grammar(schema) for _ in request.prompts])
            return replace(self.engine, stop=tuple(dict.fromkeys(stop))).generate(request)

    @torch.no_grad()
    def take(self, files: Sequence[str]) -> None:
        """Replace the weights by those in files.  Raises Refusal unless they are finite, and the model's by name and
        shape.
        """
        with self.lock:
            self.is_taking = True
            try:
                self._take(files)
            finally:
                self.is_taking = False

    def _take(self, files: Sequence[str]) -> None:
        current = dict(weights(self.model))
        shared = {p.data_ptr() for p in self.model.parameters()}
        try:
            if special := [file for file in files if not Path(file).is_file()]:  # reading a pipe would wait for ever
                raise Refusal(f"files: {short(special[0])} is no file of this machine")
            new = {name: x for file in files for name, x in load_file(file).items()}
        except (OSError, SafetensorError) as error:
            raise Refusal(f"files: {one_line(error)}") from error
        if {k: x.shape for k, x in new.items()} != {k: x.shape for k, x in current.items()}:
            raise Refusal("files: they hold the weights of another model")
        if infinite := [name for name, x in new.items() if not x.isfinite().all()]:
            raise Refusal(f"files: {infinite[0]} holds values that are not finite; the weights stay as they were")
        if any(x.data_ptr() not in shared for x in current.values()):
            raise Refusal(f"{type(self.model).__name__}: its checkpoint has other tensors than the model: use vLLM")
        for name, x in current.items():
            x.copy_(new[name])
        self.fingerprint = wire.weights_hash(self.model)

    def _rows(self, sequences: Sequence[ScoredSequence]) -> Rows:
        device = self.model.device
        ids = [torch.tensor(a.ids) for a in sequences]
        trained = [torch.isin(torch.arange(len(a.ids)), torch.tensor(a.positions, dtype=torch.long)) for a in sequences]
        return Rows(pad(ids, 0).to(device), pad(trained, False).to(device), tuple(map(len, ids)))
