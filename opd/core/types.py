"""Shared data types: rollouts and batches, and the convention by which functions read batch columns.

A leaf is a pure function, such as a weight or a transform.  The names of its parameters are the columns that it reads.

Shape letters, in every signature:
    B  sequences   T  response positions, right padded   V  vocabulary   N  tokens, flat   H  hidden width

Alignment: column t is about response token t.  `student_logp[b, t]` is log p(ids[b, t] | prompt, ids[b, :t]).  The
shift happens once, in `opd.models.forward`.  Log-probs are in nats, fp32 (or wider).
"""

from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from inspect import signature

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opd.core.sampling import Prompt
from opd.core.tensors import map_tensors

STUDENT_COLUMNS = frozenset({"student_logp", "student_entropy"})  # columns that need no teacher
STUDENT, TEACHER, DATA = 0, 1, 2  # values of the `source` column: the generator of a response
RIGHT = 0.5  # outcomes above it are right


@dataclass(frozen=True)
class Others:
    """Tokens at each response position and their log-probs under a model; flat, [T * count]."""

    ids: array  # "i"
    logp: array  # "f", nats

    @classmethod
    def none(cls) -> "Others":
        """Return an empty value, without tokens."""
        return cls(array("i"), array("f"))


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """A response, with the prompt ids of both models."""

    prompt_ids: tuple[int, ...]
    teacher_prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]  # the response, including its stop token
    sampler_logp: tuple[float, ...]  # nats, under the sampled distribution (after temperature and truncation)
    index: int  # position in the step's batch, over all processes
    group: int  # the same for all rollouts of a prompt
    stopped: bool  # ended by a stop token, not by the length limit
    source: int = STUDENT
    version: int = 0  # optimizer steps already made by the weights that generated it
    outcome: float = 0.0  # verifier's score
    mask: tuple[bool, ...] = ()  # tokens trained on; empty: all of them
    prefix: int = 0  # number of leading tokens that the teacher generated
    others: Others | None = None  # additional tokens that the engine sampled; set if the method uses them
    teacher_scores: Others | None = None  # of the response's token, then of the teacher's top k; kept with a pool
    # from the sampler: a value, or one per token
    notes: Mapping[str, float | tuple[float, ...]] = field(default_factory=dict)
    teacher: str = ""  # name of the teacher that scores it (--route); "" is --teacher
    prompt: Prompt = field(default_factory=Prompt)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The rollouts of a step and the columns measured on them, as tensors.

    It is data: nothing here depends on the weights being trained.  A transform or weight reads the columns that its
    parameters name, so the field names are part of the interface.
    """

    ids: Int[Tensor, "B T"]
    mask: Bool[Tensor, "B T"]  # True on the tokens that are trained on
    group: Int[Tensor, " B"]  # the same for all rollouts of a prompt
    source: Int[Tensor, " B"]  # STUDENT, TEACHER or DATA
    stopped: Bool[Tensor, " B"]  # ended by a stop token
    outcome: Float[Tensor, " B"]  # score from a verifier, rubric or judge
    sampler_logp: Float[Tensor, "B T"]  # denominator of importance ratios only
    prefix: Int[Tensor, " B"] | None = None  # number of leading tokens that the teacher generated
    others: Int[Tensor, "B T k"] | None = None  # additional tokens sampled at each position
    others_logp: Float[Tensor, "B T k"] | None = None  # their log-probs under the sampled distribution
    # cross entropy of y without its prompt, nats per token, from y's second token on: of the generating weights
    student_alone: Float[Tensor, " B"] | None = None
    teacher_alone: Float[Tensor, " B"] | None = None  # the same quantity of the teacher
    coin: Float[Tensor, "B T"] | None = None  # U[0, 1), independent of the tokens; equal on every process
    student_logp: Float[Tensor, "B T"] | None = None  # computed by the trainer, not the engine
    student_entropy: Float[Tensor, "B T"] | None = None
    teacher_logp: Float[Tensor, "B T"] | None = None
    teacher_top: Int[Tensor, "B T k"] | None = None  # the teacher's top k, kept since the rollout entered a pool
    teacher_top_logp: Float[Tensor, "B T k"] | None = None  # their log-probs under the teacher
    teacher_entropy: Float[Tensor, "B T"] | None = None
    reverse_kl: Float[Tensor, "B T"] | None = None  # KL(student || teacher) over the whole vocabulary
    hidden_distance: Float[Tensor, "B T"] | None = None  # mean over layers of the matched hidden states
    hidden_cosine: Float[Tensor, "B T"] | None = None
    chunk: Int[Tensor, "B T"] | None = None  # audited chunks, numbered from 1 in each response; 0 outside them
    agreement: Float[Tensor, "B T"] | None = None  # sum of similarities of the chunk to a text-only teacher's texts
    verdict: Float[Tensor, " B"] | None = None  # a judge's score of the response, from 0 to 1
    judged: Bool[Tensor, " B"] | None = None  # False if the judge failed
    stage: Int[Tensor, "B T"] | None = None  # stage of the response that contains the token, from 1; 0 in padding
    stage_scores: Float[Tensor, "B K"] | None = None  # a judge's score of each stage, from 0 to 1; nan if it has none
    scores: tuple[Float[Tensor, "B T"] | None, ...] = ()  # reward - baseline at the sampled token, per term
    notes: Mapping[str, Tensor] = field(default_factory=dict)  # notes of the sampler, [B] or [B, T]; for metrics
    unfiltered: Bool[Tensor, "B T"] | None = None  # the mask before the filters of a method, once they are applied

    @property
    def valid(self) -> Bool[Tensor, "B T"]:
        """Return the mask before the filters of a method, which is `mask` until they are applied."""
        return self.mask if self.unfiltered is None else self.unfiltered

    def __getitem__(self, rows: slice | Tensor) -> "Batch":
        """Return the batch restricted to some rows."""
        return map_tensors(lambda column: column[rows], self)

    def written(self) -> Bool[Tensor, "B T"]:
        """Return the mask [B, T] of trained tokens that the student generated.

        Data responses and tokens generated by a teacher are False.
        """
        mask = self.mask & (self.source == STUDENT)[:, None]
        return mask if self.prefix is None else mask & (torch.arange(mask.shape[1]) >= self.prefix[:, None])


UNPROMPTED_COLUMNS = frozenset({"student_alone", "teacher_alone"})  # columns that need a pass without the prompt
# known before any scoring
ROLLOUT_COLUMNS = UNPROMPTED_COLUMNS | frozenset(
    {"ids", "mask", "valid", "group", "source", "stopped", "outcome", "sampler_logp", "prefix", "coin"}
)
MEASURED = frozenset({"student_logp", "student_entropy", "teacher_logp", "teacher_entropy", "reverse_kl"})
# filled from the answers of a text-only teacher or a judge
ANSWER_COLUMNS = frozenset({"chunk", "agreement", "verdict", "judged", "stage", "stage_scores"})
COLUMNS = ROLLOUT_COLUMNS | MEASURED | ANSWER_COLUMNS

Column = Callable[..., Tensor]  # a pure function; its parameters name the columns it reads


def reads(leaf: Column) -> frozenset[str]:
    """Return the names of the columns that a leaf reads, from its parameters."""
    return frozenset(signature(leaf).parameters) & COLUMNS


def call(leaf: Column, batch: Batch, *args: Tensor) -> Tensor:
    """Call a leaf with the columns it reads.  `args` come first, as positional arguments."""
    columns = {name: getattr(batch, name) for name in reads(leaf)}
    absent = [name for name, column in columns.items() if column is None]
    assert not absent, f"{leaf} reads {absent}, which nobody measured"
    return leaf(*args, **columns)


def pad(rows: list[Tensor], fill: float | int | bool) -> Tensor:
    """Stack rows of different lengths into a right-padded [B, T] tensor."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)
