"""Who speaks: a method's rollout policy, as a value.

`source_of` says who writes a rollout; `per_prompt` rollouts are drawn of each prompt and `updates`
optimizer steps taken on each batch of them.  What changes over a run is a function of the step, counted from 1, and of
the `Memory` that the run carries from step to step; no value here has a state.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opd.divergences import kl
from opd.noise import uniform
from opd.types import DATA, STUDENT, TEACHER, Batch

NOTHING: Mapping[str, Tensor] = MappingProxyType({})
Memory = Mapping[str, Tensor]  # what a run remembers between steps: global over processes, saved with its checkpoints
HALVINGS = 30


@dataclass(frozen=True)
class OnPolicy:
    """The student speaks; of the `samples` tokens drawn at each position the response goes on with the first."""

    per_prompt: int = 1
    updates: int = 1
    samples: int = 1

    def __post_init__(self) -> None:
        _counts(self)
        if self.samples < 1:
            raise ValueError(f"samples={self.samples}: at least the response's own token is drawn at each position")


@dataclass(frozen=True)
class Mixture:
    """The student speaks with probability `share`; else the teacher does, or the data's own response stands.

    GKD's lambda, arXiv:2306.13649, Algorithm 1.
    """

    share: float = 0.5
    other: int = TEACHER
    per_prompt: int = 1
    updates: int = 1

    def __post_init__(self) -> None:
        _counts(self)
        if not 0 <= self.share <= 1:
            raise ValueError(f"share={self.share}: the on-policy share lies in [0, 1]")
        if self.other not in (TEACHER, DATA):
            raise ValueError(f"other={self.other}: the rest comes from TEACHER ({TEACHER}) or DATA ({DATA})")


@dataclass(frozen=True)
class Blend:
    """The policy nearest to the teacher within KL `eps` of the student speaks: `blend`.  TRB, arXiv:2605.31159.

    eps falls linearly from `eps0` nats to 0 over the first `steps` steps; then the student speaks alone.
    """

    eps0: float = 0.02
    steps: int = 50
    per_prompt: int = 1
    updates: int = 1

    def __post_init__(self) -> None:
        _counts(self)
        if not self.eps0 >= 0:
            raise ValueError(f"eps0={self.eps0}: the radius of a trust region is 0 (the student alone) or more nats")
        if self.steps < 1:
            raise ValueError(f"steps={self.steps}: the trust region closes over steps >= 1")

    def radius(self, step: int) -> float:
        """eps_k = eps0 (1 - k/K), k steps having been made, in nats."""
        return self.eps0 * max(0.0, 1 - (step - 1) / self.steps)


def blend(
    student_logp: Float[Tensor, "*N V"], teacher_logp: Float[Tensor, "*N V"], eps: float
) -> tuple[Float[Tensor, "*N V"], Float[Tensor, "*N"], Float[Tensor, "*N"]]:
    """mu ~ p^(1-b) q^b with the largest b in [0, 1] such that KL(mu || p) <= eps: (log mu, b, KL(mu || p)).

    Of all mu in that ball it has the least KL(mu || q).  KL grows with b, so bisection finds it, from below.
    Tokens that either model cannot say are left out of mu where b > 0.  TRB, arXiv:2605.31159.
    """
    both = (student_logp > -math.inf) & (teacher_logp > -math.inf)
    step = (teacher_logp - student_logp).where(both, 0)

    def at(b: Float[Tensor, "*N"]) -> tuple[Float[Tensor, "*N V"], Float[Tensor, "*N"]]:
        mixed = (student_logp + b[..., None] * step).where(both | (b == 0)[..., None], -math.inf).log_softmax(-1)
        return mixed, kl(mixed, student_logp)

    low, high = torch.zeros_like(step[..., 0]), torch.ones_like(step[..., 0])
    low = torch.where(at(high)[1] <= eps, high, low)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        inside = at(middle)[1] <= eps
        low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
    mixed, distance = at(low)
    return mixed, low, distance


@dataclass(frozen=True)
class TeacherPrefix:
    """The teacher writes the first tokens of each response, the student goes on.  TrOPD, arXiv:2606.01249, Eq. 8.

    Their number is at most `length` (1 + cos(pi s/S)) / 2 after s of S steps.
    """

    length: int = 0  # tokens; 0: the longest response there can be
    per_prompt: int = 1
    updates: int = 1

    def __post_init__(self) -> None:
        _counts(self)
        if self.length < 0:
            raise ValueError(f"length={self.length}: a teacher's prefix has length >= 1 token (0: --max-new-tokens)")

    def limit(self, step: int, total: int, longest: int) -> int:
        """Tokens that the teacher may write of a response that may have `longest`."""
        most = min(self.length or longest, longest)
        return round(most * (1 + math.cos(math.pi * (step - 1) / total)) / 2)


@dataclass(frozen=True)
class Agreement:
    """How the models have agreed along some rollouts so far."""

    recent: Float[np.ndarray, "B W"]  # KL(student || teacher) of the last tokens, nats, the newest last
    low: Int[np.ndarray, " B"]  # windows below the threshold in a row, up to now
    least: Float[np.ndarray, " B"]  # the least mean of a window that counts; inf before the first


@dataclass(frozen=True)
class StopOnAgreement:
    """The student speaks until it and the teacher have agreed for a while.  KAT, arXiv:2606.09471.

    The mean KL over the last `window` tokens is compared with a threshold, the (1 - eta) quantile of the least such
    means of earlier rollouts; after `patience` windows in a row below it the rollout ends where the first began.
    Windows count from token `floor` + `window` on, the threshold after `warmup` steps and `ready` rollouts.
    What stays depends on tokens that go: a policy gradient on them is no longer exactly on policy.
    """

    window: int = 64
    floor: int = 16
    buffer: int = 4096  # rollouts remembered
    ready: int = 512
    warmup: int = 50
    eta: float = 0.3
    patience: int = 4
    online: bool = True  # listen to the teacher while sampling; else cut once the rollouts are measured
    per_prompt: int = 1
    updates: int = 1

    def __post_init__(self) -> None:
        _counts(self)
        for name in ("window", "floor", "buffer", "ready", "patience"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}={value}: stopping on agreement needs {name} >= 1")
        if self.warmup < 0:
            raise ValueError(f"warmup={self.warmup}: steps before the first stop, 0 or more")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta={self.eta}: the threshold is a (1 - eta) quantile, eta in [0, 1]")
        if self.ready > self.buffer:
            raise ValueError(
                f"ready={self.ready}: above buffer={self.buffer}, the rollouts remembered: it would never stop"
            )

    def threshold(self, step: int, memory: Memory) -> float:
        """Of the mean KL over a window, in nats; -inf while there is none."""
        least = memory.get("least")
        if step <= self.warmup or least is None or len(least) < self.ready:
            return -math.inf
        return float(least.quantile(1 - self.eta))

    def remember(self, memory: Memory, batch: Batch) -> Memory:
        """The memory with the batch's least means in their order, the oldest beyond `buffer` gone."""
        least, before = batch.notes["least"].double(), memory.get("least")
        new = least[least.isfinite() & batch.mask.any(1)]
        return {"least": (new if before is None else torch.cat((before, new)))[-self.buffer :]}

    def begin(self, rollouts: int) -> Agreement:
        """Before the first token."""
        recent = np.zeros((rollouts, self.window))
        return Agreement(recent, np.zeros(rollouts, dtype=np.int64), np.full(rollouts, math.inf))

    def hear(
        self,
        before: Agreement,
        token_kl: Float[np.ndarray, " B"],
        active: Bool[np.ndarray, " B"],
        count: int | Int[np.ndarray, " B"],
        threshold: float,
    ) -> Agreement:
        """After token number `count` (from 1) of the active rollouts; the others stay as they are."""
        recent = np.where(active[:, None], np.concatenate((before.recent[:, 1:], token_kl[:, None]), 1), before.recent)
        mean = recent.mean(1)
        counts = active & (count >= self.floor + self.window)
        low = np.where(active, np.where(counts & (mean < threshold), before.low + 1, 0), before.low)
        return Agreement(recent, low, np.where(counts, np.minimum(before.least, mean), before.least))

    def kept(self, count: int) -> int:
        """Tokens before the first low window, when a rollout of `count` tokens ends; `floor` at least."""
        return count - (self.patience - 1) - self.window

    def cut(self, batch: Batch, lengths: Int[Tensor, " B"], threshold: float) -> Batch:
        """The measured batch as if its rollouts had been stopped while they were sampled: twin of the online path.

        It hears the trained tokens in their order, without the one that ends a response, as the online path does.
        """
        assert batch.reverse_kl is not None
        mask, terminal = batch.mask, torch.arange(batch.mask.shape[1]) == lengths[:, None] - 1
        heard = mask & ~(terminal & batch.stopped[:, None])
        order = (~heard).long().argsort(dim=1, stable=True)
        token_kl, active = batch.reverse_kl.double().gather(1, order).numpy(), heard.gather(1, order).numpy()
        state, kept = self.begin(len(mask)), mask.sum(1).numpy()
        for t in range(mask.shape[1]):
            going = active[:, t] & (state.low < self.patience)
            state = self.hear(state, token_kl[:, t], going, t + 1, threshold)
            kept = np.where(going & (state.low >= self.patience), self.kept(t + 1), kept)
        stays = mask & (mask.cumsum(1) <= torch.from_numpy(kept)[:, None])
        notes = {"least": torch.from_numpy(state.least), "cut": (mask.sum(1) - stays.sum(1)).double()}
        return replace(batch, mask=stays, notes={**batch.notes, **notes})


@dataclass(frozen=True)
class Snapshot:
    """The student as it was speaks: it writes `pool` batches, and each is trained on once an epoch until the next does.

    A cycle has `epochs` over the same prompts; it begins with a snapshot, and takes another after each of the epochs
    `refresh`, and where KL(student || snapshot) on a batch exceeds `drift` nats a token.  NPD, arXiv:2605.05940.
    """

    pool: int = 16  # batches
    epochs: int = 10
    refresh: tuple[int, ...] = (5,)
    drift: float = 0.10
    per_prompt: int = 1
    updates: int = 1

    def __post_init__(self) -> None:
        _counts(self)
        for name in ("pool", "epochs"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}={value}: a cycle over a pool needs {name} >= 1")
        if any(not 0 < epoch < self.epochs for epoch in self.refresh):
            raise ValueError(f"refresh={self.refresh}: epochs after which a snapshot is taken, 1 to {self.epochs - 1}")
        if not self.drift > 0:
            raise ValueError(f"drift={self.drift}: a bound in nats, above 0; inf never refreshes early")

    def scheduled(self, step: int) -> list[int]:
        """The steps of the cycle of `step` before which a snapshot is taken, and the first of the next cycle."""
        cycle = self.pool * self.epochs
        first = (step - 1) // cycle * cycle + 1
        return [first + self.pool * epoch for epoch in (0, *sorted(self.refresh), self.epochs)]

    def start(self, step: int, memory: Memory) -> int:
        """The step before which the snapshot of `step` was taken."""
        early = memory.get("snapshot")
        found = self.scheduled(step) + ([] if early is None else [int(early)])
        return max(x for x in found if x <= step)

    def outdated(self, step: int, memory: Memory) -> int:
        """Before `step` every draw below this number is of an older snapshot than the one then due."""
        if int(memory.get("snapshot", 0)) == step:  # it came early, and takes the numbers of what was not yet used
            return min(x for x in self.scheduled(step) if x > step)
        return self.start(step, memory)

    def remember(self, memory: Memory, batch: Batch, step: int) -> Memory:
        """The memory with the step before which the next snapshot is taken, where this one has drifted too far."""
        found = drift(batch)
        return {"snapshot": torch.tensor(step + 1)} if found is not None and found > self.drift else memory


Rollouts = OnPolicy | Mixture | Blend | TeacherPrefix | StopOnAgreement | Snapshot


def source_of(who: Rollouts, step: int, rollout: int, seed: int) -> int:
    """Who writes a rollout: the student, as far as anyone does, but for the rest of a mixture."""
    if not isinstance(who, Mixture):
        return STUDENT
    coin = uniform(seed, step, rollout, -1)  # token -1: a draw that no token uses
    return STUDENT if coin < who.share else who.other


def draw_of(who: Rollouts, step: int, memory: Memory) -> int:
    """Which draw a step trains on: the number of the step that is the first to do so; its noise is keyed by it."""
    if not isinstance(who, Snapshot):
        return step
    start = who.start(step, memory)
    return start + (step - start) % who.pool


def opened(who: Rollouts, step: int, memory: Memory) -> range:
    """The draws that may be written once the weights before `step` are there."""
    if not isinstance(who, Snapshot):
        return range(step, step + 1)
    if who.start(step, memory) < step:
        return range(0)
    return range(step, min(step + who.pool, *(x for x in who.scheduled(step) if x > step)))


def prompts_of(who: Rollouts, draw: int) -> int:
    """Whose prompts a draw answers, as a step counted from 1: an epoch later they are the same."""
    if not isinstance(who, Snapshot):
        return draw
    return (draw - 1) // (who.pool * who.epochs) * who.pool + (draw - 1) % who.pool + 1


def drift(batch: Batch) -> float | None:
    """E_mu[rho log rho - rho + 1], rho = p / mu: KL(student || who wrote it) a token, in nats; None if not measured.

    Every summand is >= 0.
    """
    if batch.student_logp is None or not (own := batch.written()).any():
        return None
    gap = (batch.student_logp - batch.sampler_logp)[own].double()
    return float((gap.exp() * gap - torch.expm1(gap)).mean())


def listens(who: Rollouts) -> bool:
    """Whether the teacher reads along while the student writes."""
    return isinstance(who, Blend) or (isinstance(who, StopOnAgreement) and who.online)


def _counts(who: Rollouts) -> None:
    for name in ("per_prompt", "updates"):
        if (value := getattr(who, name)) < 1:
            raise ValueError(f"{name}={value}: a rollout batch needs {name} >= 1")
