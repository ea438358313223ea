"""Rollouts that end once student and teacher agree (KAT)."""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opd.core.types import Batch
from opd.losses.divergences import kl
from opd.methods.rollout_policies.base import DecodeHook, LogProbs, Memory, RolloutPolicy, RunState


@dataclass(frozen=True)
class AgreementState:
    """The state of `StopOnAgreement`: the agreement of the models along some rollouts so far."""

    recent: Float[np.ndarray, "B W"]  # KL(student || teacher) of the last tokens, in nats, newest last
    low: Int[np.ndarray, " B"]  # number of consecutive windows below the threshold so far
    lowest: Float[np.ndarray, " B"]  # the lowest mean of a counted window; inf before the first


@dataclass(frozen=True)
class StopOnAgreement(RolloutPolicy):
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
        super().__post_init__()
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

    def needs(self) -> frozenset[str]:
        return frozenset({"reverse_kl", "decoding"} if self.online else {"reverse_kl"})

    def engine_refusal(self) -> str:
        reason = super().engine_refusal()
        return f"{reason}: add --no-online after kat, which cuts whole rollouts, or take --engine hf" if reason else ""

    def decode_hook(self, state: RunState, logp: LogProbs) -> DecodeHook | None:
        return AgreementHook(self, self.threshold(state.step, state.memory), logp) if self.online else None

    def notes(self, state: RunState) -> dict[str, float]:
        threshold = self.threshold(state.step, state.memory)
        return {"threshold": threshold} if math.isfinite(threshold) else {}

    def reads_measured(self) -> bool:
        return not self.online  # rollouts are cut after they are measured

    def after_scoring(
        self, batch: Batch, step: int, memory: Memory, lengths: Int[Tensor, " B"]
    ) -> tuple[Batch, Memory]:
        if not self.online:
            batch = self.cut(batch, lengths, self.threshold(step, memory))
        return batch, self.remember(memory, batch)

    def threshold(self, step: int, memory: Memory) -> float:
        """Return the threshold for the mean KL over a window, in nats; -inf while none is available."""
        window_means = memory.get("least")
        if step <= self.warmup or window_means is None or len(window_means) < self.ready:
            return -math.inf
        return float(window_means.quantile(1 - self.eta))

    def remember(self, memory: Memory, batch: Batch) -> Memory:
        """Return the memory with the batch's lowest window means appended in order; only the newest `buffer` remain."""
        window_means, earlier = batch.notes["least"].double(), memory.get("least")
        new = window_means[window_means.isfinite() & batch.mask.any(1)]
        return {"least": (new if earlier is None else torch.cat((earlier, new)))[-self.buffer :]}

    def begin(self, rollouts: int) -> AgreementState:
        recent = np.zeros((rollouts, self.window))
        return AgreementState(recent, np.zeros(rollouts, dtype=np.int64), np.full(rollouts, math.inf))

    def updated(
        self,
        state: AgreementState,
        token_kl: Float[np.ndarray, " B"],
        active: Bool[np.ndarray, " B"],
        count: int | Int[np.ndarray, " B"],
        threshold: float,
    ) -> AgreementState:
        """Return the state after token number `count` (from 1) of the active rollouts; other rollouts are unchanged."""
        recent = np.where(active[:, None], np.concatenate((state.recent[:, 1:], token_kl[:, None]), 1), state.recent)
        mean = recent.mean(1)
        counted = active & (count >= self.floor + self.window)
        low = np.where(active, np.where(counted & (mean < threshold), state.low + 1, 0), state.low)
        return AgreementState(recent, low, np.where(counted, np.minimum(state.lowest, mean), state.lowest))

    def remaining(self, count: int) -> int:
        """Return how many tokens a rollout that ends at `count` keeps: those before the first low window."""
        return count - (self.patience - 1) - self.window

    def cut(self, batch: Batch, lengths: Int[Tensor, " B"], threshold: float) -> Batch:
        """Return the measured batch as if its rollouts had been stopped during generation.

        Like the online path it processes the trained tokens in order, without the terminal token of a response.
        """
        assert batch.reverse_kl is not None
        mask, terminal = batch.mask, torch.arange(batch.mask.shape[1]) == lengths[:, None] - 1
        scored = mask & ~(terminal & batch.stopped[:, None])
        order = (~scored).long().argsort(dim=1, stable=True)
        token_kl, active = batch.reverse_kl.double().gather(1, order).numpy(), scored.gather(1, order).numpy()
        state, counts = self.begin(len(mask)), mask.sum(1).numpy()
        for t in range(mask.shape[1]):
            going = active[:, t] & (state.low < self.patience)
            state = self.updated(state, token_kl[:, t], going, t + 1, threshold)
            counts = np.where(going & (state.low >= self.patience), self.remaining(t + 1), counts)
        short_mask = mask & (mask.cumsum(1) <= torch.from_numpy(counts)[:, None])
        notes = {"least": torch.from_numpy(state.lowest), "cut": (mask.sum(1) - short_mask.sum(1)).double()}
        return replace(batch, mask=short_mask, notes={**batch.notes, **notes})


@dataclass(frozen=True)
class AgreementHook(DecodeHook):
    """A hook that samples from the student and ends a response once the teacher has agreed for long enough."""

    policy: StopOnAgreement
    threshold: float  # nats
    logp: LogProbs
    state: AgreementState | None = None  # None before `begin`

    def begin(self, count: int) -> DecodeHook:
        return replace(self, state=self.policy.begin(count))

    def observe(
        self,
        student: Float[Tensor, "B V"],
        teacher: Float[Tensor, "B V"],
        rows: Int[np.ndarray, " B"],
        active: Bool[np.ndarray, " B"],
        counts: Int[np.ndarray, " n"],
    ) -> DecodeHook:
        assert self.state is not None
        token_kl, is_active = np.zeros(len(counts)), np.zeros(len(counts), dtype=bool)
        token_kl[rows] = kl(self.logp(student), self.logp(teacher)).double().cpu().numpy()
        is_active[rows] = active
        return replace(self, state=self.policy.updated(self.state, token_kl, is_active, counts, self.threshold))

    def ended(self) -> Bool[np.ndarray, " n"]:
        assert self.state is not None
        return self.state.low >= self.policy.patience

    def finish(self, response: int, count: int) -> tuple[int, dict[str, float]]:
        assert self.state is not None
        remaining = self.policy.remaining(count) if self.ended()[response] else count
        return remaining, {"least": float(self.state.lowest[response]), "cut": float(count - remaining)}
