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
from opd.training.trainer import Trainer


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

    trainer: Trainer
    threads: int  # torch threads of this process while it trains
    step: int = 0
    computed: list[float] = field(default_factory=list)  # processor seconds per step of this process, by block
    written: list[float] = field(default_factory=list)  # processor seconds per step of the worker, by block
    memory: Memory = field(default_factory=lambda: NOTHING)

    @classmethod
    def of(cls, overlap: Overlap, staleness: int, folder: Path) -> "Arm":
        """Open a run with the loss of `async-opd`, which equals `opd` without a worker."""
        config = overlap.run(folder, "async-opd")
        trainer = opened(replace(config, micro_batch_tokens=overlap.micro_batch_tokens, staleness=staleness))
        threads = torch.get_num_threads()
        trainer.rollout_source.open(0, NOTHING, {}, print)
        arm = cls(trainer, torch.get_num_threads())
        torch.set_num_threads(threads)  # so that the next arm starts from the default
        return arm

    def block(self, steps: int) -> None:
        """Run `steps` steps, and wait until the worker's queue is full again."""
        assert self.trainer.rollout_source.source is not None
        torch.set_num_threads(self.threads)
        start = time.process_time()
        self.trainer.rollout_source.source.numbers()
        written = 0.0
        for _ in range(steps):
            self.step += 1
            _, self.memory = self.trainer.step(self.step, self.memory)
            written += self.last("worker_cpu_s")
        self.trainer.rollout_source.source.rest()
        self.computed.append((time.process_time() - start) / steps)
        self.written.append((written + self.trainer.rollout_source.source.numbers().get("worker_cpu_s", 0.0)) / steps)

    def last(self, name: str) -> float:
        """Return a number from the last line of perf.jsonl; 0 if it is missing."""
        line = (self.trainer.run.folder / "perf.jsonl").read_text().splitlines()[-1]
        return float(json.loads(line).get(name, 0.0))

    def perf(self, name: str) -> float:
        """Return the median over steps of a column of perf.jsonl."""
        rows = [json.loads(line) for line in (self.trainer.run.folder / "perf.jsonl").read_text().splitlines()]
        return statistics.median([row.get(name, 0.0) for row in rows])


def measured(overlap: Overlap) -> Iterator[Result]:
    """Yield the tables that the settings enable."""
    if overlap.rounds:
        yield speed(overlap)
    if overlap.quality:
        yield quality(overlap)


def speed(overlap: Overlap) -> Result:
    """Measure the seconds per step with the wall clock, because two processes compute at the same time."""
    with tempfile.TemporaryDirectory() as folder:
        arms = {n: Arm.of(overlap, n, Path(folder) / str(n)) for n in (0, *overlap.staleness)}
        try:
            for arm in arms.values():
                assert arm.trainer.rollout_source.source is not None
                arm.trainer.rollout_source.source.rest()
            blocks: dict[str, Callable[[], object]] = {
                str(n): partial(arm.block, overlap.block) for n, arm in arms.items()
            }
            load = os.getloadavg()[0]
            seconds = in_turn(blocks, rounds=overlap.rounds, clock="wall")
            load = (load + os.getloadavg()[0]) / 2
            turns = arms[0]
            writes, trains = turns.perf("rollout_s"), turns.perf("update_s")
            waits = {n: arm.perf("wait_s") for n, arm in arms.items()}
            costs = {n: arm.perf("snapshot_s") for n, arm in arms.items()}
        finally:
            for arm in arms.values():
                arm.trainer.rollout_source.close()
    step_seconds = {n: [s / overlap.block for s in seconds[str(n)]] for n in arms}
    busiest = {n: [max(x) for x in zip(arm.computed[1:], arm.written[1:], strict=True)] for n, arm in arms.items()}
    rows = [("in turns", spread(step_seconds[0], 3), "", spread(busiest[0], 3), "", "", "")]
    rows += [
        (
            f"{n} behind",
            spread(step_seconds[n], 3),
            ratio(step_seconds[0], step_seconds[n]),
            spread(busiest[n], 3),
            ratio(busiest[0], busiest[n]),
            f"{waits[n]:.3f}",
            f"{costs[n]:.3f}",
        )
        for n in overlap.staleness
    ]
    cores = len(os.sched_getaffinity(0))
    packages = versions("opd", "torch", "transformers")
    notes = (
        f"in turns a step writes for {writes:.3f} s and trains for {trains:.3f} s; processor: seconds of the busier of "
        "the two processes, which is what a step would take were each core its own",
        f"medians [min, max] of {overlap.rounds} alternating blocks of {overlap.block} steps, wall clock, {cores} "
        f"cores, load {load:.1f}; {overlap}; {packages}",
    )
    header = ("rollouts", "seconds a step", "faster by", "processor", "faster by", "waits", "snapshot")
    numbers = {
        "seconds": step_seconds,
        "processor": busiest,
        "writes": writes,
        "trains": trains,
        "cores": cores,
        "load": load,
        "versions": packages,
    }
    return Result(f"rollouts in another process, batch {overlap.batch}", header, tuple(rows), notes, numbers)


def quality(overlap: Overlap) -> Result:
    """Compare accuracy and held-out KL of runs with different staleness after the same number of samples."""
    arms = [(name, n) for n in (0, *overlap.staleness) for name in overlap.methods if n or name != "async-opd"]  # = opd
    last_rows: dict[tuple[str, int], list[dict[str, float]]] = {arm: [] for arm in arms}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(overlap.seeds):
            for name, n in arms:
                base = Train(student=overlap.student, teacher=overlap.teacher, prompts=overlap.prompts)
                config = replace(
                    base,
                    **{
                        **settings("embedded", "opd"),
                        "method": METHODS[name](),
                        "steps": overlap.quality,
                        "batch": overlap.batch,
                        "sampling": Sampling(max_new_tokens=overlap.max_new_tokens),
                        "eval_prompts": overlap.prompts,
                        "eval_every": overlap.quality,
                        "eval_limit": overlap.held_out,
                        "staleness": n,
                        "exact_staleness": n > 0,
                        "seed": seed,
                        "out": Path(folder) / f"{name}-{n}-{seed}",
                        "save_every": overlap.quality,
                        "quiet": True,
                        "doctor": False,
                    },
                )
                lines = (train(config) / "metrics.jsonl").read_text().splitlines()
                rows = [json.loads(line) for line in lines]
                trained = [r for r in rows if "grad_norm" in r]
                last_rows[name, n].append(
                    rows[-1] | {"drift": statistics.mean(r.get("drift", 0.0) for r in trained[-10:])}
                )
    header = ("method, steps behind", "accuracy %", "held-out KL", "KL to who wrote (nats)")
    rows = []
    for (name, n), runs in last_rows.items():
        mean = lambda key, runs=runs: statistics.mean(r[key] for r in runs)
        right = ", ".join(f"{100 * r['eval_accuracy']:.1f}" for r in runs)
        kl = ", ".join(f"{r['eval_reverse_kl']:.4f} +- {r['eval_reverse_kl_se']:.4f}" for r in runs)
        rows.append((f"{name}, {n}", right, kl, f"{mean('drift'):.4f}"))
    notes = (f"{overlap.quality} steps of {overlap.batch} rollouts, seeds 0 to {overlap.seeds - 1}; {overlap}",)
    numbers = {f"{name}, {n}": runs for (name, n), runs in last_rows.items()}
    return Result("what is learnt on as many samples", header, tuple(rows), notes, numbers)
