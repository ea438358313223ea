"""Benchmark of rollouts in a worker process against synchronous rollouts: seconds per step, and the cost of staleness.

Speed: arms run blocks of steps in turn.  A block begins and ends with an idle worker and a full queue, so it generates
as many rollouts as it trains on.  Quality: whole runs on the same prompts, with rollouts exactly N steps off-policy.
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.result import Result, in_turn, ratio, spread, versions
from benchmarks.run import Trained, opened
from opd.config.presets import settings
from opd.config.train import Train
from opd.core.sampling import Sampling
from opd.methods import METHODS
from opd.methods.rollout_policies.base import NOTHING, Memory
from opd.training.train import train
from opd.training.trainer import Loop


@dataclass(frozen=True)
class Overlap(Trained):
    """Settings of `python -m benchmarks async`: the run, the staleness of each arm, and the number of rounds."""

    micro_batch_tokens: int = 8192
    """Padded tokens per forward pass."""
    staleness: tuple[int, ...] = (1, 4)
    """Steps by which rollouts may be off-policy; each value is an arm."""
    block: int = 10
    """Steps in a block."""
    rounds: int = 4
    """Alternating blocks of each arm, after a warm-up block.  0 skips the measurement of speed."""
    quality: int = 0
    """Steps of each run that is compared by its evaluation.  0 skips the comparison; 45 took minutes per run."""
    methods: tuple[str, ...] = ("opd", "async-opd")
    """Methods of the compared runs."""
    seeds: int = 1
    """Number of runs of each arm, with different prompts and noise."""
    held_out: int = 256
    """Number of held-out prompts."""


@dataclass
class Arm:
    """A run whose steps are executed block by block."""

    loop: Loop
    threads: int  # torch threads of this process while it trains
    step: int = 0
    computed: list[float] = field(default_factory=list)  # processor seconds per step of this process, by block
    written: list[float] = field(default_factory=list)  # processor seconds per step of the worker, by block
    memory: Memory = field(default_factory=lambda: NOTHING)

    @classmethod
    def of(cls, asked: Overlap, staleness: int, folder: Path) -> "Arm":
        """Open a run with the loss of `async-opd`, which equals `opd` without a worker."""
        config = asked.run(folder, "async-opd")
        loop = opened(replace(config, micro_batch_tokens=asked.micro_batch_tokens, staleness=staleness))
        before = torch.get_num_threads()
        loop.writing.open(0, NOTHING, {}, print)
        arm = cls(loop, torch.get_num_threads())
        torch.set_num_threads(before)  # so that the next arm starts from the default
        return arm

    def block(self, steps: int) -> None:
        """Run `steps` steps, and wait until the worker's queue is full again."""
        assert self.loop.writing.source is not None
        torch.set_num_threads(self.threads)
        before = time.process_time()
        self.loop.writing.source.numbers()
        written = 0.0
        for _ in range(steps):
            self.step += 1
            _, self.memory = self.loop.step(self.step, self.memory)
            written += self.last("worker_cpu_s")
        self.loop.writing.source.rest()
        self.computed.append((time.process_time() - before) / steps)
        self.written.append((written + self.loop.writing.source.numbers().get("worker_cpu_s", 0.0)) / steps)

    def last(self, name: str) -> float:
        """Return a number from the last line of perf.jsonl; 0 if it is missing."""
        line = (self.loop.run.folder / "perf.jsonl").read_text().splitlines()[-1]
        return float(json.loads(line).get(name, 0.0))

    def perf(self, name: str) -> float:
        """Return the median over steps of a column of perf.jsonl."""
        rows = [json.loads(line) for line in (self.loop.run.folder / "perf.jsonl").read_text().splitlines()]
        return statistics.median([row.get(name, 0.0) for row in rows])


def measured(asked: Overlap) -> Iterator[Result]:
    """Yield the tables that the settings enable."""
    if asked.rounds:
        yield speed(asked)
    if asked.quality:
        yield quality(asked)


def speed(asked: Overlap) -> Result:
    """Measure the seconds per step with the wall clock, because two processes compute at the same time."""
    with tempfile.TemporaryDirectory() as folder:
        arms = {n: Arm.of(asked, n, Path(folder) / str(n)) for n in (0, *asked.staleness)}
        try:
            for arm in arms.values():
                assert arm.loop.writing.source is not None
                arm.loop.writing.source.rest()
            blocks: dict[str, Callable[[], object]] = {
                str(n): partial(arm.block, asked.block) for n, arm in arms.items()
            }
            load = os.getloadavg()[0]
            seconds = in_turn(blocks, rounds=asked.rounds, clock="wall")
            load = (load + os.getloadavg()[0]) / 2
            turns = arms[0]
            writes, trains = turns.perf("rollout_s"), turns.perf("update_s")
            waits = {n: arm.perf("wait_s") for n, arm in arms.items()}
            costs = {n: arm.perf("snapshot_s") for n, arm in arms.items()}
        finally:
            for arm in arms.values():
                arm.loop.writing.close()
    each = {n: [s / asked.block for s in seconds[str(n)]] for n in arms}
    busiest = {n: [max(x) for x in zip(arm.computed[1:], arm.written[1:], strict=True)] for n, arm in arms.items()}
    rows = [("in turns", spread(each[0], 3), "", spread(busiest[0], 3), "", "", "")]
    rows += [
        (
            f"{n} behind",
            spread(each[n], 3),
            ratio(each[0], each[n]),
            spread(busiest[n], 3),
            ratio(busiest[0], busiest[n]),
            f"{waits[n]:.3f}",
            f"{costs[n]:.3f}",
        )
        for n in asked.staleness
    ]
    cores = len(os.sched_getaffinity(0))
    known = versions("opd", "torch", "transformers")
    notes = (
        f"in turns a step writes for {writes:.3f} s and trains for {trains:.3f} s; processor: seconds of the busier of "
        "the two processes, which is what a step would take were each core its own",
        f"medians [min, max] of {asked.rounds} alternating blocks of {asked.block} steps, wall clock, {cores} cores, "
        f"load {load:.1f}; {asked}; {known}",
    )
    header = ("rollouts", "seconds a step", "faster by", "processor", "faster by", "waits", "snapshot")
    numbers = {
        "seconds": each,
        "processor": busiest,
        "writes": writes,
        "trains": trains,
        "cores": cores,
        "load": load,
        "versions": known,
    }
    return Result(f"rollouts in another process, batch {asked.batch}", header, tuple(rows), notes, numbers)


def quality(asked: Overlap) -> Result:
    """Compare accuracy and held-out KL of runs with different staleness after the same number of samples."""
    arms = [(name, n) for n in (0, *asked.staleness) for name in asked.methods if n or name != "async-opd"]  # = opd
    found: dict[tuple[str, int], list[dict[str, float]]] = {arm: [] for arm in arms}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(asked.seeds):
            for name, n in arms:
                base = Train(student=asked.student, teacher=asked.teacher, prompts=asked.prompts)
                config = replace(
                    base,
                    **{
                        **settings("embedded", "opd"),
                        "method": METHODS[name](),
                        "steps": asked.quality,
                        "batch": asked.batch,
                        "sampling": Sampling(max_new_tokens=asked.max_new_tokens),
                        "eval_prompts": asked.prompts,
                        "eval_every": asked.quality,
                        "eval_limit": asked.held_out,
                        "staleness": n,
                        "exact_staleness": n > 0,
                        "seed": seed,
                        "out": Path(folder) / f"{name}-{n}-{seed}",
                        "save_every": asked.quality,
                        "quiet": True,
                        "doctor": False,
                    },
                )
                lines = (train(config) / "metrics.jsonl").read_text().splitlines()
                rows = [json.loads(line) for line in lines]
                trained = [r for r in rows if "grad_norm" in r]
                found[name, n].append(rows[-1] | {"drift": statistics.mean(r.get("drift", 0.0) for r in trained[-10:])})
    header = ("method, steps behind", "accuracy %", "held-out KL", "KL to who wrote (nats)")
    rows = []
    for (name, n), runs in found.items():
        mean = lambda key, runs=runs: statistics.mean(r[key] for r in runs)
        right = ", ".join(f"{100 * r['eval_accuracy']:.1f}" for r in runs)
        kl = ", ".join(f"{r['eval_reverse_kl']:.4f} +- {r['eval_reverse_kl_se']:.4f}" for r in runs)
        rows.append((f"{name}, {n}", right, kl, f"{mean('drift'):.4f}"))
    notes = (f"{asked.quality} steps of {asked.batch} rollouts, seeds 0 to {asked.seeds - 1}; {asked}",)
    numbers = {f"{name}, {n}": runs for (name, n), runs in found.items()}
    return Result("what is learnt on as many samples", header, tuple(rows), notes, numbers)
