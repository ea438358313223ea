"""The nouns, and how a leaf is called: a leaf names the columns it reads as its parameters.

Shape letters, in every signature:
    B  sequences   T  response positions, right padded   V  vocabulary   N  tokens, flat   H  hidden width

Alignment: column t is about response token t.  `student_logp[b, t]` is log p(ids[b, t] | prompt, ids[b, :t]).
The shift happens once, in `vocabulary.py`.  Log-probs are in nats, fp32 (or wider).
"""

from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from inspect import signature
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opd.errors import Refusal as Refusal
from opd.errors import at_least as at_least
from opd.errors import one_line as one_line
from opd.errors import positive as positive

STUDENT, TEACHER, DATA = 0, 1, 2  # who spoke: values of the `source` column
RIGHT = 0.5  # outcomes above it are right


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One question: chat turns or plain text, the expected answer, and the other columns of its row."""

    messages: tuple[Mapping[str, str], ...] = ()  # chat turns, {"role", "content"}; rendered by each model's template
    text: str = ""  # used as it is, where there are no messages
    answer: str = ""  # what the verifier compares with
    response: str = ""  # a reference response, where the data has one
    columns: Mapping[str, object] = field(default_factory=dict)  # the rest of the row: metadata, teacher, context


StopToken = Literal["canonical", "train", "mask"]  # what becomes of a response's terminal token
Truncated = Literal["train", "drop"]  # what becomes of a response cut at the length limit


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn.  Estimators are unbiased only at temperature 1 without truncation."""

    temperature: float = 1.0
    """Divides the logits that are sampled from; 0 is greedy, 1 is unbiased for training."""
    top_p: float = 1.0
    """Nucleus: the fewest tokens of this mass; 1 keeps all."""
    top_k: int = 0
    """The most probable tokens kept; 0 keeps the whole vocabulary."""
    max_new_tokens: int = 256
    """Longest response, in tokens."""

    def check(self) -> None:
        """Refuse what cannot be sampled from."""
        if not self.temperature >= 0:
            raise Refusal(f"--temperature {self.temperature}: must be 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise Refusal(f"--top-p {self.top_p}: a probability mass in (0, 1]")
        if self.top_k < 0:
            raise Refusal(f"--top-k {self.top_k}: a number of tokens, or 0 for the whole vocabulary")
        at_least(self, max_new_tokens=1)


@dataclass(frozen=True)
class Others:
    """Tokens drawn beside the response's own, at each position so many, by whoever drew those; flat, [T * count]."""

    ids: array  # "i"
    logp: array  # "f", nats

    @classmethod
    def none(cls) -> "Others":
        """At no position."""
        return cls(array("i"), array("f"))


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One response, and the prompt as each model reads it."""

    prompt_ids: tuple[int, ...]
    teacher_prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]  # the response, its stop token included
    sampler_logp: tuple[float, ...]  # nats, of what the engine drew from (after temperature and truncation)
    index: int  # place in the step's batch, over all processes
    group: int  # rollouts of one prompt share it
    stopped: bool  # ended by a stop token, not by the length limit
    source: int = STUDENT
    version: int = 0  # steps that the weights which wrote it had made
    outcome: float = 0.0  # verifier's score
    mask: tuple[bool, ...] = ()  # tokens trained on; empty: all of them
    prefix: int = 0  # tokens at its start that the teacher wrote
    others: Others | None = None  # where a method looks at more tokens than the response's
    notes: Mapping[str, float | tuple[float, ...]] = field(default_factory=dict)  # the sampler's; one, or one a token
    teacher: str = ""  # who scores it: a name of --route; "" is --teacher
    prompt: Prompt = field(default_factory=Prompt)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rollouts and what was measured of them.  Data: nothing here depends on the weights being trained.

    Field names are the vocabulary of the toolkit: a transform or weight reads the columns its parameters name.
    """

    ids: Int[Tensor, "B T"]
    mask: Bool[Tensor, "B T"]  # True on the tokens that are trained on
    group: Int[Tensor, " B"]  # rollouts of one prompt share a group
    source: Int[Tensor, " B"]  # STUDENT, TEACHER or DATA
    stopped: Bool[Tensor, " B"]  # ended by a stop token
    outcome: Float[Tensor, " B"]  # verifier, rubric or judge
    sampler_logp: Float[Tensor, "B T"]  # denominator of importance ratios only
    prefix: Int[Tensor, " B"] | None = None  # tokens at the start of a response that the teacher wrote
    others: Int[Tensor, "B T k"] | None = None  # drawn beside each token by whoever drew it
    others_logp: Float[Tensor, "B T k"] | None = None  # log-probs that they were drawn with
    student_alone: Float[Tensor, " B"] | None = None  # cross entropy of y without its prompt, of the weights that wrote
    teacher_alone: Float[Tensor, " B"] | None = None  # the teacher's; nats a token, from the second on
    coin: Float[Tensor, "B T"] | None = None  # U[0, 1), independent of the tokens; the same on every process
    student_logp: Float[Tensor, "B T"] | None = None  # the trainer's own
    student_entropy: Float[Tensor, "B T"] | None = None
    teacher_logp: Float[Tensor, "B T"] | None = None
    teacher_entropy: Float[Tensor, "B T"] | None = None
    reverse_kl: Float[Tensor, "B T"] | None = None  # KL(student || teacher) of the whole distribution
    hidden_distance: Float[Tensor, "B T"] | None = None  # mean over layers of the matched hidden states
    hidden_cosine: Float[Tensor, "B T"] | None = None
    chunk: Int[Tensor, "B T"] | None = None  # audited chunks, numbered from 1 in each response; 0 outside
    agreement: Float[Tensor, "B T"] | None = None  # similarities of a chunk and a text-only teacher's, summed
    verdict: Float[Tensor, " B"] | None = None  # a judge's score of the response, from 0 to 1
    judged: Bool[Tensor, " B"] | None = None  # whether there is a verdict: a judge may fail
    stage: Int[Tensor, "B T"] | None = None  # the part of the response that a token stands in, from 1; 0 in padding
    stage_scores: Float[Tensor, "B K"] | None = None  # a judge's score of each part, from 0 to 1; nan where it has none
    scores: tuple[Float[Tensor, "B T"] | None, ...] = ()  # reward - baseline at the sampled token, per term
    notes: Mapping[str, Tensor] = field(default_factory=dict)  # what the sampler noted, [B] or [B, T]; for metrics

    def __getitem__(self, rows: slice | Tensor) -> "Batch":
        """The same columns on some rows."""
        column = {f.name: getattr(self, f.name) for f in fields(self)}
        cut = {k: v[rows] for k, v in column.items() if isinstance(v, Tensor)}
        notes = {k: v[rows] for k, v in self.notes.items()}
        return replace(self, **cut, scores=tuple(v if v is None else v[rows] for v in self.scores), notes=notes)

    def written(self) -> Bool[Tensor, "B T"]:
        """The trained tokens that the student's sampler drew: neither the data's, nor a teacher's."""
        own = self.mask & (self.source == STUDENT)[:, None]
        return own if self.prefix is None else own & (torch.arange(own.shape[1]) >= self.prefix[:, None])


ALONE = frozenset({"student_alone", "teacher_alone"})  # of those that are read
GIVEN = ALONE | frozenset(
    {"ids", "mask", "group", "source", "stopped", "outcome", "sampler_logp", "prefix", "coin"}
)  # known before any scoring
MEASURED = frozenset({"student_logp", "student_entropy", "teacher_logp", "teacher_entropy", "reverse_kl"})
ASKED = frozenset(
    {"chunk", "agreement", "verdict", "judged", "stage", "stage_scores"}
)  # what a text-only teacher or a judge says fills them
COLUMNS = GIVEN | MEASURED | ASKED

Column = Callable[..., Tensor]  # a pure function; which columns it reads is its signature


def reads(leaf: Column) -> frozenset[str]:
    """The columns a leaf names among its parameters."""
    return frozenset(signature(leaf).parameters) & COLUMNS


def call(leaf: Column, batch: Batch, *args: Tensor) -> Tensor:
    """Apply a leaf to the columns it names."""
    columns = {name: getattr(batch, name) for name in reads(leaf)}
    absent = [name for name, column in columns.items() if column is None]
    assert not absent, f"{leaf} reads {absent}, which nobody measured"
    return leaf(*args, **columns)


def pad(rows: list[Tensor], fill: float | int | bool) -> Tensor:
    """Stack ragged rows to the right-padded [B, T]."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)
