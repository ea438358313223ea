"""The run folder: configuration, metrics, saved rollouts and checkpoints.  All files but logs are written atomically.

config.json  method.txt                     settings and method of the run
environment.json                            versions and machine, the preset, and the flags that the user set
metrics.jsonl                               reproducible metrics, a line per step
perf.jsonl                                  seconds, tokens/s, bytes; a line per step
evals/step-N.jsonl                          outcome and reverse KL of each held-out prompt
rollouts/step-N.{jsonl,safetensors}         texts and columns of sampled batches, with what both models preferred
rollouts/step-N.tokens.json                 the texts of the ids in there
checkpoints/step-N/                         a model folder for transformers, peft and vLLM: nothing else lies in it
checkpoints/step-N/training_state/          what only a resumed run reads: optimizer.safetensors, state.json, ...
base/                                       the model under the adapters of a LoRA run whose student is an adapter
"""

import contextlib
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from opd.config.train import Train
from opd.core.disk import disk, flush_to_disk, follow_umask, reading
from opd.core.errors import Refusal
from opd.core.tensors import save_tensors
from opd.core.types import Batch, Rollout
from opd.data.prompts import digest
from opd.head.backend import backend_name
from opd.losses.terms import Target
from opd.methods.method import Method
from opd.models.checkpoints import checkpoints, folder_name


def plain(value: object) -> object:
    """Convert a configuration value to JSON types: dataclasses become dicts, a method its repr, a path its text."""
    if isinstance(value, Method):
        return repr(value)  # prints as the code that makes it
    if is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def flat(value: object, path: str = "") -> list[tuple[str, object]]:
    """Return nested settings as a list of (dotted name, value)."""
    if isinstance(value, Mapping) and value:
        return [leaf for k, v in value.items() for leaf in flat(v, f"{path}.{k}" if path else str(k))]
    return [(path, value)]


def defaults() -> dict[str, object]:
    """Return the default of each setting of a run that has one, by dotted name."""
    settings = {f.name: plain(getattr(Train(student="", prompts=""), f.name)) for f in fields(Train)}
    return dict(flat(json.loads(json.dumps(settings))))


def load_json(path: Path) -> Any:
    """Return the content of a JSON file that opd wrote; refuse a damaged file."""
    with reading(path):
        return json.loads(path.read_text())


LEFT = ("answers.sqlite*", "engine", ".worker-*", ".lock")  # what a run leaves if it ends before its first step


@dataclass(frozen=True)
class Run:
    """A run folder; only the main process writes to it."""

    folder: Path

    def exists(self) -> bool:
        """Return whether a run was started in this folder."""
        return (self.folder / "config.json").is_file()

    def empty(self) -> bool:
        """Return whether a run may start here: the folder is missing, or has only files of a run without a step."""
        if not self.folder.exists():
            return True
        return self.folder.is_dir() and all(any(map(p.match, LEFT)) for p in self.folder.iterdir())

    def matches(self, settings: Mapping[str, object], free: frozenset[str]) -> None:
        """Refuse to resume with settings that differ from the saved ones, except for the settings in `free`.

        A setting that the saved ones lack, because a later version introduced it, had its default.
        """
        before = defaults() | dict(flat(load_json(self.folder / "config.json")))
        served = lambda x: str(x).startswith("http")
        for name, value in flat(json.loads(json.dumps(settings))):
            was = before.get(name)
            # The address of a server may change: the trainer sends it the weights before it generates.
            moved = name == "speaker.engine" and served(was) and served(value)
            if not ({name, name.partition(".")[0]} & free or was == value or moved):
                raise Refusal(
                    f"--resume: {name} was {was!r} in {self.folder} and is {value!r} now; "
                    "repeat the run's own command, or start another --out"
                )

    def start(
        self,
        settings: Mapping[str, object],
        method: str,
        step: int,
        asked: Mapping[str, object] = MappingProxyType({}),
        history: int | None = None,
    ) -> None:
        """Write settings, method and environment (with `asked`: preset and user flags), and cut the logs to `step`.

        `history` is the length of metrics.jsonl at that step, in bytes, as far as the checkpoint knows it.
        """
        with disk(f"--out {self.folder}"):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write("config.json", json.dumps(settings, indent=2))
            self._write("method.txt", method + "\n")
            self._write("environment.json", json.dumps({**environment(), **asked}, indent=2))
            for name in ("metrics.jsonl", "perf.jsonl"):
                path = self.folder / name
                content = path.read_bytes() if path.is_file() and step > 0 else b""
                lines = content[: history if name == "metrics.jsonl" else None].splitlines(keepends=True)
                self._write(name, "".join(line.decode() for line in lines if 0 <= _step_of(line) <= step))

    def log(self, name: str, row: Mapping[str, object]) -> None:
        """Append a line to NAME.jsonl (metrics or perf)."""
        with disk(f"writing {self.folder / name}.jsonl"), (self.folder / f"{name}.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    def save_evaluation(self, step: int, rollouts: Sequence[Rollout], batch: Batch) -> None:
        """Save outcome, length and reverse KL (nats per token) of each held-out prompt, to compare runs by prompt."""
        lengths = batch.mask.sum(1)
        rows = [
            {"prompt": digest(r.prompt), "outcome": r.outcome, "length": n, "stopped": r.stopped}
            for r, n in zip(rollouts, lengths.tolist(), strict=True)
        ]
        if batch.reverse_kl is not None:
            means = batch.reverse_kl.where(batch.mask, 0).sum(1) / lengths.clamp(min=1)
            rows = [row | {"reverse_kl": kl} for row, kl in zip(rows, means.tolist(), strict=True)]
        with disk(f"writing {self.folder / 'evals'}"):
            (self.folder / "evals").mkdir(exist_ok=True)
            self._write(f"evals/step-{step:06d}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def save_rollouts(
        self,
        step: int,
        rollouts: Sequence[Rollout],
        texts: Sequence[str],  # the decoded responses
        batch: Batch,
        targets: Sequence[Target],  # of each term of the method
        others: Mapping[str, Tensor],  # more columns, [B, T, ...]
        tokens: Mapping[int, str],  # the text of every token id in the columns
    ) -> None:
        """Save the texts and per-token columns of a batch, for later inspection."""
        folder = self.folder / "rollouts"
        columns = vars(batch) | dict(others)
        for i, (target, score) in enumerate(zip(targets, batch.scores or [None] * len(targets), strict=True)):
            columns[f"weight.{i}"] = target.weight
            columns[f"advantage.{i}"] = score if target.advantage is None else target.advantage
        tensors = {k: v for k, v in columns.items() if isinstance(v, Tensor)}
        rows = [
            {
                "index": r.index,
                "prompt": r.prompt.text or list(map(dict, r.prompt.messages)),
                "answer": r.prompt.answer,
                "response": text,
                "tokens": len(r.ids),
                "outcome": r.outcome,
                "stopped": r.stopped,
            }
            for r, text in zip(rollouts, texts, strict=True)
        ]
        with disk(f"writing {folder}"):
            folder.mkdir(exist_ok=True)
            self._write(f"rollouts/step-{step:06d}.tokens.json", json.dumps(tokens))
            self._write(f"rollouts/step-{step:06d}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
            # last: it marks a complete set of files
            save_tensors(tensors, folder / f"step-{step:06d}.safetensors", sealed=True)

    @contextlib.contextmanager
    def checkpoint(self, step: int, keep: int | None, main: bool) -> Iterator[Path]:
        """Yield a temporary folder to fill, rename it once it is complete and on the disk, then remove old checkpoints.

        The newest `keep` up to this step stay; None keeps all.  A checkpoint of the same step is replaced.
        """
        root = self.folder / "checkpoints"
        final, part, replaced = root / folder_name(step), root / f".part-{step:06d}", root / f".replaced-{step:06d}"
        if not main:
            yield part
            return
        try:
            with disk(f"checkpoint {final}"):
                self.clean()
                part.mkdir(parents=True)
                yield part
                follow_umask(part)
                for path in (*part.rglob("*"), part, *self.folder.glob("*.jsonl")):
                    flush_to_disk(path)
                if final.exists():
                    final.rename(replaced)
                part.rename(final)
                flush_to_disk(root)
        finally:
            self.clean()
        self.remove_old(step, keep)

    def remove_old(self, step: int, keep: int | None) -> None:
        """Remove the checkpoints up to a step but for the newest `keep`, and what a killed process left of others."""
        self.clean()
        finished = [(saved, folder) for saved, folder in checkpoints(self.folder).items() if saved <= step]
        for saved, folder in finished[:-keep] if keep else ():
            # Part of a checkpoint must not have the name of one.
            removed = folder.rename(folder.with_name(f".removed-{saved:06d}"))
            shutil.rmtree(removed)

    def clean(self) -> None:
        """Remove what a killed process left of checkpoints being written or removed, and restore one being replaced."""
        root = self.folder / "checkpoints"
        for replaced in root.glob(".replaced-*"):
            final = root / f"step-{replaced.name.removeprefix('.replaced-')}"
            replaced.rename(final) if not final.exists() else shutil.rmtree(replaced, ignore_errors=True)
        for left in (*root.glob(".part-*"), *root.glob(".removed-*")):
            shutil.rmtree(left, ignore_errors=True)

    def _write(self, name: str, text: str) -> None:
        path = self.folder / name
        part = path.with_name(path.name + ".part")
        part.write_text(text)
        os.replace(part, path)


def _step_of(line: bytes) -> int:
    """Return the step of a log's line; -1 if the line is incomplete or no line of a log, as after a power cut."""
    with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
        if line.endswith(b"\n"):
            return int(json.loads(line)["step"])
    return -1


def environment() -> dict[str, object]:
    """Return versions and hardware for environment.json, without secrets."""
    names = ("opd", "torch", "transformers", "accelerate", "peft", "datasets")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "sweeper": backend_name(torch.device("cuda" if gpus else "cpu")),
        **{name: version(name) for name in names},
    }
