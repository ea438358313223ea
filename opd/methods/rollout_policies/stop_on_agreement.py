"""Rollouts that end once student and teacher agree (KAT)."""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opd.core.types import Batch
from opd.methods.rollout_policies.base import Memory, _counts


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
