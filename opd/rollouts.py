"""Rollout policies: which model generates a method's rollouts, as values.

`source_of` returns which model generates a rollout.  `per_prompt` rollouts are generated for each prompt, and `updates`
optimizer steps are made on each batch.  A batch number is the number of the first step that trains on the batch.
Anything that changes over a run is a function of the step, counted from 1, and of the `Memory` that the run carries
from step to step.  The values have no state.
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
Memory = Mapping[str, Tensor]  # state that a run keeps between steps: shared by all processes, saved with checkpoints
HALVINGS = 30


@dataclass(frozen=True)
class OnPolicy:
    """The policy in which the student generates.

    `samples` tokens are sampled at each position; the response continues with the first of them.
    """

    per_prompt: int = 1
    updates: int = 1
    samples: int = 1

    def __post_init__(self) -> None:
        _counts(self)
        if self.samples < 1:
            raise ValueError(f"samples={self.samples}: at least the response's own token is drawn at each position")


@dataclass(frozen=True)
class Mixture:
    """The policy in which the student generates with probability `share`; otherwise the teacher or the data's response.

    This is GKD's lambda, arXiv:2306.13649, Algorithm 1.
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
    """The policy that samples from the distribution closest to the teacher within KL `eps` of the student (`blend`).

    TRB, arXiv:2605.31159.  eps falls linearly from `eps0` nats to 0 over the first `steps` steps; then only the student
    generates.
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
        """Return eps_k = eps0 (1 - k/K) in nats, where k = step - 1 steps have been made."""
        return self.eps0 * max(0.0, 1 - (step - 1) / self.steps)


def blend(
    student_logp: Float[Tensor, "*N V"], teacher_logp: Float[Tensor, "*N V"], eps: float
) -> tuple[Float[Tensor, "*N V"], Float[Tensor, "*N"], Float[Tensor, "*N"]]:
    """Return (log mu, b, KL(mu || p)) for mu ~ p^(1-b) q^b with the largest b in [0, 1] such that KL(mu || p) <= eps.

    Of all mu in that ball it has the least KL(mu || q).  KL grows with b, so b is computed by bisection from below.  If
    b > 0, tokens of probability 0 under either model get probability 0 under mu.  TRB, arXiv:2605.31159.
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
    """The policy in which the teacher generates the first tokens of each response and the student continues.

    The prefix has at most `length` (1 + cos(pi s/S)) / 2 tokens after s of S steps.  TrOPD, arXiv:2606.01249, Eq. 8.
    """

    length: int = 0  # tokens; 0: the maximum response length
    per_prompt: int = 1
    updates: int = 1

    def __post_init__(self) -> None:
        _counts(self)
        if self.length < 0:
            raise ValueError(f"length={self.length}: a teacher's prefix has length >= 1 token (0: --max-new-tokens)")

    def limit(self, step: int, total: int, longest: int) -> int:
        """Return the maximum number of prefix tokens, for a response of at most `longest` tokens."""
        most = min(self.length or longest, longest)
        return round(most * (1 + math.cos(math.pi * (step - 1) / total)) / 2)


@dataclass(frozen=True)
class Agreement:
    """The state of `StopOnAgreement`: the agreement of the models along some rollouts so far."""

    recent: Float[np.ndarray, "B W"]  # KL(student || teacher) of the last tokens, in nats, newest last
    low: Int[np.ndarray, " B"]  # number of consecutive windows below the threshold so far
    least: Float[np.ndarray, " B"]  # the lowest mean of a counted window; inf before the first


@dataclass(frozen=True)
class StopOnAgreement:
    """The policy in which the student generates until student and teacher agree for a while.  KAT, arXiv:2606.09471.

    The mean KL over the last `window` tokens is compared with a threshold: the (1 - eta) quantile of the lowest such
    means of earlier rollouts.  After `patience` consecutive windows below it, the rollout ends where the first of them
    began.  Windows count from token `floor` + `window` on.  The threshold applies after `warmup` steps and `ready`
    rollouts.  The kept tokens depend on removed tokens, so a policy gradient on them is no longer exactly on policy.
    """

    window: int = 64
    floor: int = 16
    buffer: int = 4096  # number of rollouts remembered
    ready: int = 512
    warmup: int = 50
    eta: float = 0.3
    patience: int = 4
    online: bool = True  # score with the teacher during generation; else cut after the rollouts are measured
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
        """Return the threshold for the mean KL over a window, in nats; -inf while none is available."""
        least = memory.get("least")
        if step <= self.warmup or least is None or len(least) < self.ready:
            return -math.inf
        return float(least.quantile(1 - self.eta))

    def remember(self, memory: Memory, batch: Batch) -> Memory:
        """Return the memory with the batch's lowest window means appended in order; only the newest `buffer` remain."""
        least, before = batch.notes["least"].double(), memory.get("least")
        new = least[least.isfinite() & batch.mask.any(1)]
        return {"least": (new if before is None else torch.cat((before, new)))[-self.buffer :]}

    def begin(self, rollouts: int) -> Agreement:
        """Return the state before the first token."""
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
        """Return the state after token number `count` (from 1) of the active rollouts; other rollouts are unchanged."""
        recent = np.where(active[:, None], np.concatenate((before.recent[:, 1:], token_kl[:, None]), 1), before.recent)
        mean = recent.mean(1)
        counts = active & (count >= self.floor + self.window)
        low = np.where(active, np.where(counts & (mean < threshold), before.low + 1, 0), before.low)
        return Agreement(recent, low, np.where(counts, np.minimum(before.least, mean), before.least))

    def kept(self, count: int) -> int:
        """Return the number of tokens to keep when a rollout of `count` tokens ends.

        These are the tokens before the first low window, at least `floor`.
        """
        return count - (self.patience - 1) - self.window

    def cut(self, batch: Batch, lengths: Int[Tensor, " B"], threshold: float) -> Batch:
        """Return the measured batch as if its rollouts had been stopped during generation.

        This is the offline twin of the online path.  Like the online path it processes the trained tokens in order,
        without the terminal token of a response.
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
    """The policy in which a frozen snapshot of the student generates a pool of rollouts.  NPD, arXiv:2605.05940.

    A snapshot generates `pool` batches.  Each is trained on once per epoch, until the next snapshot replaces them.  A
    cycle has `epochs` epochs over the same prompts and begins with a new snapshot.  Another snapshot is taken after
    each epoch in `refresh`, and when KL(student || snapshot) on a batch exceeds `drift` nats per token.
    """

    pool: int = 16  # number of batches per epoch
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
        """Return the steps before which a snapshot is scheduled, in the cycle of `step`.

        The first step of the next cycle is included.
        """
        cycle = self.pool * self.epochs
        first = (step - 1) // cycle * cycle + 1
        return [first + self.pool * epoch for epoch in (0, *sorted(self.refresh), self.epochs)]

    def start(self, step: int, memory: Memory) -> int:
        """Return the step before which the snapshot used at `step` was taken."""
        early = memory.get("snapshot")
        found = self.scheduled(step) + ([] if early is None else [int(early)])
        return max(x for x in found if x <= step)

    def outdated(self, step: int, memory: Memory) -> int:
        """Return a batch number; before `step`, batches with lower numbers come from a snapshot older than required."""
        if int(memory.get("snapshot", 0)) == step:  # an early snapshot reuses the numbers of the unused batches
            return min(x for x in self.scheduled(step) if x > step)
        return self.start(step, memory)

    def remember(self, memory: Memory, batch: Batch, step: int) -> Memory:
        """Return the memory; if this snapshot has drifted too far, it holds the step before which to take the next."""
        found = drift(batch)
        return {"snapshot": torch.tensor(step + 1)} if found is not None and found > self.drift else memory


Rollouts = OnPolicy | Mixture | Blend | TeacherPrefix | StopOnAgreement | Snapshot


def source_of(who: Rollouts, step: int, rollout: int, seed: int) -> int:
    """Return which model generates a rollout: STUDENT, or for some rollouts of a `Mixture` its `other` source."""
    if not isinstance(who, Mixture):
        return STUDENT
    coin = uniform(seed, step, rollout, -1)  # key -1: no token uses this noise
    return STUDENT if coin < who.share else who.other


def draw_of(who: Rollouts, step: int, memory: Memory) -> int:
    """Return the number of the batch that a step trains on.  The batch's sampling noise is keyed by this number."""
    if not isinstance(who, Snapshot):
        return step
    start = who.start(step, memory)
    return start + (step - start) % who.pool


def opened(who: Rollouts, step: int, memory: Memory) -> range:
    """Return the numbers of the batches that may be generated once the weights before `step` are available."""
    if not isinstance(who, Snapshot):
        return range(step, step + 1)
    if who.start(step, memory) < step:
        return range(0)
    return range(step, min(step + who.pool, *(x for x in who.scheduled(step) if x > step)))


def prompts_of(who: Rollouts, draw: int) -> int:
    """Return the step, counted from 1, whose prompts a batch uses.

    Under `Snapshot`, the epochs of a cycle use the same prompts.
    """
    if not isinstance(who, Snapshot):
        return draw
    return (draw - 1) // (who.pool * who.epochs) * who.pool + (draw - 1) % who.pool + 1


def drift(batch: Batch) -> float | None:
    """Return KL(student || generating weights) per token, in nats, or None if it was not measured.

    The estimate is E_mu[rho log rho - rho + 1], rho = p / mu, whose summands are all >= 0.
    """
    if batch.student_logp is None or not (own := batch.written()).any():
        return None
    gap = (batch.student_logp - batch.sampler_logp)[own].double()
    return float((gap.exp() * gap - torch.expm1(gap)).mean())


def listens(who: Rollouts) -> bool:
    """Return True if the teacher scores rollouts while the student generates them."""
    return isinstance(who, Blend) or (isinstance(who, StopOnAgreement) and who.online)


def _counts(who: Rollouts) -> None:
    for name in ("per_prompt", "updates"):
        if (value := getattr(who, name)) < 1:
            raise ValueError(f"{name}={value}: a rollout batch needs {name} >= 1")
