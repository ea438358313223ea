"""Runs of several processes: they resume, on any number of processes, and N that were asked for are N or a refusal."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from tests.end_to_end.test_train import command, wait_for
from tests.tiny_models import logged

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]
LAST = "checkpoints/step-000008"


def launched(arguments: list[str], launcher: list[str], **variables: str) -> subprocess.Popen:
    """Start a run under a launcher; `arguments` begin with the interpreter, which the launcher brings itself."""
    command = [*launcher, *arguments[1:]] if launcher else arguments
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def processes(count: int) -> list[str]:
    return [*TORCHRUN, str(count)] if count > 1 else []


def ended(run: subprocess.Popen) -> str:
    """Wait for a run that succeeds; return its stdout."""
    out, err = run.communicate(timeout=400)
    assert run.returncode == 0, err
    return out


def rank_of(run: subprocess.Popen, rank: int) -> psutil.Process:
    """Return the process of a rank below a torchrun."""
    for child in psutil.Process(run.pid).children(recursive=True):
        if child.environ().get("RANK") == str(rank) and "opd" in child.cmdline():
            return child
    raise AssertionError(f"no process of rank {rank}")


def cut(arguments: list[str], out: Path, count: int) -> None:
    """Run on some processes until a rank, the last one, is killed after the checkpoint of step 4."""
    run = launched(arguments, processes(count))
    wait_for(out / "checkpoints" / "step-000004", run)
    victim = rank_of(run, count - 1) if count > 1 else psutil.Process(run.pid)
    victim.send_signal(signal.SIGKILL)
    run.communicate(timeout=120)
    assert run.returncode != 0 and not (out / LAST).exists()


@pytest.fixture(scope="module")
def whole(pair, tmp_path_factory):
    """The uninterrupted run on one process and on two."""
    folders = {count: tmp_path_factory.mktemp("whole") / str(count) for count in (1, 2)}
    for count, out in folders.items():
        printed = ended(launched(command(pair, out, "--quiet", "vopd"), processes(count)))
        assert printed == f"{out}\n"  # of the main process
        environment = json.loads((out / "environment.json").read_text())
        assert (environment["processes"], environment["engine"]) == (count, "ddp" if count > 1 else "one process")
    return folders


@pytest.mark.parametrize(("count", "line"), [(1, "training in one process"), (2, "training in 2 processes, ddp")])
def test_the_first_line_of_a_run_names_its_processes_and_their_engine(pair, tmp_path, count, line):
    run = launched(command(pair, tmp_path / "run", "--steps", "1", "--no-doctor", "vopd"), processes(count))
    _, err = run.communicate(timeout=120)
    printed = [x for x in err.splitlines() if x.startswith(("training", "step"))]
    assert run.returncode == 0 and printed[0] == line and err.count("training in") == 1, err


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (1, 2)])
def test_a_run_whose_rank_is_killed_resumes(pair, tmp_path, whole, before, after):
    """On as many processes the bytes are those of the uninterrupted run, on another number the numbers to rounding."""
    out = tmp_path / "run"
    cut(command(pair, out, "--quiet", "vopd"), out, before)
    ended(launched(command(pair, out, "--quiet", "--resume", "vopd"), processes(after)))
    same = [whole[before] / name for name in ("metrics.jsonl", f"{LAST}/model.safetensors")]
    if before == after:
        assert [(out / path.relative_to(whole[before])).read_bytes() for path in same] == [p.read_bytes() for p in same]
    for mine, wanted in zip(logged(out), logged(whole[before]), strict=True):
        assert mine == pytest.approx(wanted, rel=2e-3, abs=1e-4, nan_ok=True)
    state = f"{LAST}/training_state/optimizer.safetensors"
    assert load_file(out / state).keys() == load_file(whole[before] / state).keys()


LOST = [
    (["--num_processes", "2"], {}, "accelerate launch: it was asked for several processes and started one"),
    (["--cpu", "--num_processes", "2"], {}, "accelerate launch: it was asked for several processes and started one"),
    (
        ["--num_processes", "1"],
        {"ACCELERATE_USE_FSDP": "true"},
        "asks for FSDP, which opd does not take",
    ),
]


@pytest.mark.parametrize(("flags", "variables", "why"), LOST, ids=["accelerate", "accelerate --cpu", "FSDP"])
def test_a_launcher_that_starts_one_process_of_two_is_refused(pair, tmp_path, flags, variables, why):
    out = tmp_path / "run"
    launcher = [*ACCELERATE, *flags, "--mixed_precision", "no", "--dynamo_backend", "no"]
    run = launched(command(pair, out, "vopd"), launcher, **variables)
    _, err = run.communicate(timeout=300)
    assert run.returncode != 0 and not out.exists()
    (line,) = [line for line in err.splitlines() if line.startswith("opd: ")]
    assert why in line and "torchrun --nproc_per_node N" in line


def test_one_process_under_accelerate_launch_trains(pair, tmp_path):
    launcher = [*ACCELERATE, "--num_processes", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    ended(launched(command(pair, tmp_path / "run", "--steps", "1", "vopd"), launcher))
    assert len(logged(tmp_path / "run")) == 3  # a step, and an evaluation before and after it
