"""Settings of the head-pass benchmark, and the random tensors that all its arms share."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from benchmarks.result import Clock

Objective = Literal["vopd", "reverse-kl"]
Precise = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Shape:
    """Settings of the head-pass benchmark: problem size, arms and number of rounds."""

    tokens: int = 1024
    """Number of tokens, N."""
    vocabulary: int = 49152
    """Vocabulary size, V."""
    student: int = 576
    """Width of the student's hidden states."""
    teacher: int = 576
    """Width of the teacher's hidden states."""
    chunk: int = 512
    """Tokens per chunk, for opd and Liger.  TRL uses constants of its code."""
    objective: Objective = "vopd"
    """Loss of the opd and naive arms.  The other libraries compute the loss that they support."""
    frozen: bool = False
    """Compute no gradient for the LM head."""
    rounds: int = 15
    """Alternating rounds, after a warm-up round."""
    threads: int = 1
    """Number of torch threads on a CPU."""
    clock: Clock = "wall"
    """Clock on a CPU.  cpu counts only this process's processor time, for shared machines; use it with 1 thread.  On a
    GPU, CUDA events are used instead."""
    device: Literal["cpu", "cuda"] = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")
    """Device to run on.  Default: cuda if available."""
    dtype: Precise = field(default_factory=lambda: "bfloat16" if torch.cuda.is_available() else "float32")
    """Dtype of hidden states and heads.  Default: bfloat16 with a GPU, else float32."""
    rounded: bool = False
    """Keep logits in bf16 in the arms of opd and the floor.  Default: fp32 where a GPU's matmul can return it."""
    arms: tuple[str, ...] = ()
    """Arms to run.  Empty runs all."""
    error_tokens: int = 32
    """Tokens on which loss and gradients are compared with float64.  0 skips the comparison."""
    memory: bool = True
    """Measure peak memory."""
    json: Path | None = None
    """Also write the numbers to this json file."""
    peak_of: str = ""
    """Only print the peak extra memory of this arm, in bytes."""


@dataclass(frozen=True)
class Case:
    """Hidden states [N, H], LM heads [V, H] and token ids [N] that every arm shares."""

    states: Tensor
    weight: Tensor
    teacher_states: Tensor
    teacher_weight: Tensor
    ids: Tensor

    @classmethod
    def of(cls, shape: Shape) -> "Case":
        """Create random tensors, deterministic for a shape, such that the models have entropies of a few nats."""
        g = torch.Generator().manual_seed(0)
        dtype = getattr(torch, shape.dtype)
        make = lambda *size: torch.randn(*size, generator=g).to(shape.device, dtype)
        n, v = shape.tokens, shape.vocabulary
        states, weight = make(n, shape.student), make(v, shape.student) * (3 / shape.student**0.5)
        teacher, head = make(n, shape.teacher), make(v, shape.teacher) * (3 / shape.teacher**0.5)
        ids = torch.randint(v, (n,), generator=g).to(shape.device)
        return cls(states.requires_grad_(), weight.requires_grad_(not shape.frozen), teacher, head, ids)

    def first_tokens(self, n: int, dtype: torch.dtype) -> "Case":
        """Return a copy with only the first `n` tokens, in another dtype."""
        move = lambda x, live: x.detach().to(dtype).clone().requires_grad_(live)
        return Case(
            move(self.states[:n], True),
            move(self.weight, self.weight.requires_grad),
            self.teacher_states[:n].to(dtype),
            self.teacher_weight.to(dtype),
            self.ids[:n],
        )

    def take_gradients(self) -> list[Tensor]:
        """Return the gradients of states and head, and clear them."""
        gradients = [x.grad for x in (self.states, self.weight) if x.grad is not None]
        self.states.grad = self.weight.grad = None
        return gradients
