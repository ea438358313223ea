"""Checks with a process group or several processes: sharding, two ranks, and rollouts of a vLLM server."""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed
from torch import Tensor

from benchmarks.gpu.check import CheckRow, NotRun, end_tree
from benchmarks.gpu.size import CheckSize, random_model
from benchmarks.update import ModelUpdate
from opd.core.tensors import full
from opd.models import load as models
from opd.models.sharding import shard_student
from opd.models.source import locate
from opd.models.student import Student
from opd.teachers.local import LocalTeacher
from opd.training.run_log import lines

SHARDED, RANKS = 1e-5, 1e-3  # relative differences in fp32
MISMATCH = 0.05  # nats: mean difference of the log-probs of trainer and engine
TOKEN = {"OPD_ENGINE_TOKEN": "gpu-check"}  # of a server that only this machine reaches
READY_SECONDS = 180  # until a server has loaded its model
SHORT = "--prompts embedded:ledger-short --steps 2 --batch 8 --max-new-tokens 16 --no-doctor --quiet"
PAIR = "--student embedded:student --teacher embedded:teacher --precision fp32 --teacher-precision fp32"
Numbers = Mapping[str, float]  # a line of metrics.jsonl


def shard(cpu: bool) -> Iterator[CheckRow]:
    """Compare the gradients of sharded models, in a process group of one, with those of plain ones."""
    size, backend = CheckSize.of(cpu), "gloo" if cpu else "nccl"
    with tempfile.TemporaryDirectory() as folder:
        sources = [locate(random_model(Path(folder) / str(seed), size, seed=seed), field="model") for seed in (0, 1)]
        load = lambda i: models.load(sources[i], field="model", dtype=torch.float32, device=size.device)
        plain, teacher = load(0), load(1).requires_grad_(False)
        exact = gradients(Student(plain), LocalTeacher(teacher, to=size.device), size)
        del plain
        group = f"file://{folder}/group"
        torch.distributed.init_process_group(backend, init_method=group, rank=0, world_size=1)
        student, frozen = Student(load(0)), LocalTeacher(teacher, to=size.device)
        shard_student(student, student.model, torch.float32)
        frozen.shard(student)
        found = gradients(student, frozen, size)
        torch.distributed.destroy_process_group()
    error = max(float((found[name] - x).norm() / x.norm().clamp(min=1e-30)) for name, x in exact.items())
    what = f"gradients, {backend} in 1 process, from those without it"
    yield CheckRow.judged("--shard", f"{error:.0e}", f"< {SHARDED:.0e}", what, fine=error < SHARDED)


def gradients(student: Student, teacher: LocalTeacher, size: CheckSize) -> dict[str, Tensor]:
    """Return the gradients of an update, whole and in main memory."""
    run, _ = ModelUpdate(student, teacher, size.model["vocab_size"], size.device).of(4, 32)
    run()
    return {name: full(p.grad).cpu() for name, p in student.named_parameters() if p.grad is not None}


def ranks(cpu: bool) -> Iterator[CheckRow]:
    """Compare the metrics of two processes, without and with --shard, with those of one process."""
    if not cpu and torch.cuda.device_count() < 2:
        raise NotRun("needs 2 GPUs")
    environment = {"ACCELERATE_USE_CPU": "true"} if cpu else {"CUDA_VISIBLE_DEVICES": f"{visible(0)},{visible(1)}"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    with tempfile.TemporaryDirectory() as folder:
        run = lambda name, launcher, *flags: train(Path(folder) / name, [*PAIR.split(), *flags], launcher, environment)
        one = run("one", [])
        for flags in [["--shard"]] if cpu else [[], ["--shard"]]:
            rows = run(f"two{len(flags)}", launcher, *flags)
            names = ("loss", "grad_norm", "reverse_kl")
            pairs = [(a[name], b[name]) for a, b in zip(one, rows, strict=True) for name in names]
            error = max(abs(a - b) / max(abs(a), abs(b), 1e-3) for a, b in pairs)
            what = f"{' '.join(['loss, gradient, KL', *flags])}: from those of 1 process"
            yield CheckRow.judged("2 processes", f"{error:.0e}", f"< {RANKS:.0e}", what, fine=error < RANKS)


def train(
    out: Path, flags: list[str], launcher: list[str], environment: Mapping[str, str]
) -> list[Mapping[str, float]]:
    """Train for two steps and return the lines of metrics.jsonl.  Raises RuntimeError with the end of its output."""
    command = [sys.executable, *launcher, "-m", "opd", "train", *SHORT.split(), *flags, "--out", str(out), "opd-full"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}")
    return [*lines(out / "metrics.jsonl", "loss")]


def engine(cpu: bool) -> Iterator[CheckRow]:
    """Train two steps on rollouts of a server that takes the weights: vLLM, or on a CPU `opd serve` in its place."""
    if not cpu and find_spec("vllm") is None:
        raise NotRun("vllm is not installed: pip install 'opd[vllm]'")
    size = CheckSize.of(cpu)
    backend = "opd" if cpu else "nccl" if torch.cuda.device_count() > 1 else "ipc"
    with tempfile.TemporaryDirectory() as folder:
        student, teacher = (random_model(Path(folder) / str(seed), size, seed=seed) for seed in (0, 1))
        with server(student, backend, Path(folder) / "log") as url:
            flags = ["--student", student, "--teacher", teacher, "--max-mismatch", "1"]
            flags += ["--engine", url, "--engine-transfer", backend]
            rows = train(Path(folder) / "run", flags, [], {"CUDA_VISIBLE_DEVICES": visible(0)} | TOKEN)
    error = max(row["sampler_gap_mean"] for row in rows)
    what = f"nats: log-probs of {'opd serve' if cpu else 'vllm'} from the trainer's, weights by {backend}"
    yield CheckRow.judged("engine", f"{error:.0e}", f"< {MISMATCH}", what, fine=error < MISMATCH)


def visible(number: int) -> str:
    """Return the name of a GPU for CUDA_VISIBLE_DEVICES: the one that this process knows by `number`."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return chosen.split(",")[number] if chosen else str(number)


@contextlib.contextmanager
def server(model: str, backend: str, log: Path) -> Iterator[str]:
    """Start a server for a model and yield its address once it is ready; end it at the end of the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, variables = f"http://127.0.0.1:{port}", {**os.environ, **TOKEN}
    if backend == "opd":
        flags = ["--takes-weights", "--token-env", "OPD_ENGINE_TOKEN", "--precision", "fp32"]
        command = [sys.executable, "-m", "opd", "serve", model, *flags, "--port", str(port)]
    else:
        variables |= {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
        variables["CUDA_VISIBLE_DEVICES"] = visible(1 if backend == "nccl" else 0)
        flags = ["--weight-transfer-config", f'{{"backend": "{backend}"}}', "--enable-scale-out"]
        flags += ["--gpu-memory-utilization", "0.4", "--max-model-len", "1024", "--enforce-eager"]
        command = [str(Path(sys.executable).with_name("vllm")), "serve", model, *flags, "--port", str(port)]
    with log.open("w+") as file:
        process = subprocess.Popen(command, env=variables, stdout=file, stderr=subprocess.STDOUT)
        try:
            wait_until_ready(url, process, log)
            yield url
        finally:
            end_tree(process)


def wait_until_ready(url: str, process: subprocess.Popen, log: Path) -> None:
    """Wait for a server.  Raises RuntimeError with the end of its log if it ends or takes too long."""
    end = time.monotonic() + READY_SECONDS
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
            return
        time.sleep(0.5)
    raise RuntimeError(f"the server did not get ready: {log.read_text()[-2000:]}")
