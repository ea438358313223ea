"""What the arms of the benchmark share: its settings, and one set of random tensors."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from opd.bench.result import Clock

Objective = Literal["vopd", "reverse-kl"]
Precise = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Shape:
    """What is measured, and how often."""

    tokens: int = 1024
    """N."""
    vocabulary: int = 49152
    """V."""
    student: int = 576
    """Width of the student's hidden states."""
    teacher: int = 576
    """Width of the teacher's."""
    chunk: int = 512
    """Tokens of a chunk, of ours and of Liger's; TRL's are its own constants."""
    objective: Objective = "vopd"
    """Of ours and the naive ones; a peer computes what it can."""
    frozen: bool = False
    """No gradient for the head."""
    rounds: int = 15
    """Alternating rounds, after one to warm up."""
    threads: int = 1
    """Of torch, on a CPU."""
    clock: Clock = "wall"
    """cpu: seconds this process computed, without what others of a shared machine took; for one thread.  A GPU has its
    own events."""
    device: Literal["cpu", "cuda"] = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")
    """Where it runs."""
    dtype: Precise = field(default_factory=lambda: "bfloat16" if torch.cuda.is_available() else "float32")
    """Of hidden states and heads."""
    rounded: bool = False
    """Ours, and the floor, keep logits in bf16; fp32 where a GPU's products leave them unrounded."""
    arms: tuple[str, ...] = ()
    """Some of the arms; none: all."""
    error_tokens: int = 32
    """Tokens on which loss and gradients are compared with float64; 0: none."""
    memory: bool = True
    """Measure peak memory."""
    json: Path | None = None
    """Also write the numbers here."""
    peak_of: str = ""
    """Print the peak extra memory of one arm, in bytes, and nothing else."""


@dataclass(frozen=True)
class Case:
    """Tensors that every arm shares."""

    states: Tensor
    weight: Tensor
    teacher_states: Tensor
    teacher_weight: Tensor
    ids: Tensor

    @classmethod
    def of(cls, shape: Shape) -> "Case":
        """Random, the same for one shape; entropies of a few nats."""
        g = torch.Generator().manual_seed(0)
        dtype = getattr(torch, shape.dtype)
        make = lambda *size: torch.randn(*size, generator=g).to(shape.device, dtype)
        n, v = shape.tokens, shape.vocabulary
        states, weight = make(n, shape.student), make(v, shape.student) * (3 / shape.student**0.5)
        teacher, head = make(n, shape.teacher), make(v, shape.teacher) * (3 / shape.teacher**0.5)
        ids = torch.randint(v, (n,), generator=g).to(shape.device)
        return cls(states.requires_grad_(), weight.requires_grad_(not shape.frozen), teacher, head, ids)

    def some(self, n: int, dtype: torch.dtype) -> "Case":
        """The first tokens, by themselves."""
        move = lambda x, live: x.detach().to(dtype).clone().requires_grad_(live)
        return Case(
            move(self.states[:n], True),
            move(self.weight, self.weight.requires_grad),
            self.teacher_states[:n].to(dtype),
            self.teacher_weight.to(dtype),
            self.ids[:n],
        )

    def take_gradients(self) -> list[Tensor]:
        """Of states and head; removed here."""
        found = [x.grad for x in (self.states, self.weight) if x.grad is not None]
        self.states.grad = self.weight.grad = None
        return found
