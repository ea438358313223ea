"""The Slurm script of docs/clusters.md, with stand-ins for Slurm: two launchers on this machine are its two nodes."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from opd.models.checkpoints import checkpoints
from tests.end_to_end.test_train import wait_for
from tests.tiny_models import logged

PAGE = Path(__file__).parents[2] / "docs" / "clusters.md"
SRUN = """#!/bin/bash
"$@" & "$@" & code=0
wait -n || code=$?
wait -n || code=$?
exit $code
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >>"$SLURM_CALLS"; fi
"""
TORCHRUN = """#!/bin/bash
exec "$PYTHON" -m torch.distributed.run "$@"
"""
STOPPED = """#!/bin/bash
mkdir -p "$RUN/checkpoints/step-000025" && exit 1
"""
REFUSED = """#!/bin/bash
exit 1
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A folder with the script for tiny models, and the commands that it calls, in front of PATH."""
    (script,) = re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    changes = {
        r"/shared": str(tmp_path),
        r":29500": f":{port}",
        r"--nproc_per_node 8": "--nproc_per_node 1",
        r"--student \S+ --teacher \S+": "--student embedded:student --teacher embedded:teacher",
        r"--prompts \S+ --eval-prompts \S+": "--prompts embedded:ledger-short",
        r"--template-args '[^']*'": "--no-doctor --lr 1e-3",
        r"--max-new-tokens 2048 --batch 256 --steps 3000 --lr 1e-6": "--max-new-tokens 16 --batch 4 --steps 30",
        r"--save-every 25": "--save-every 5",
    }
    for pattern, replacement in changes.items():
        script, count = re.subn(pattern, replacement, script)
        assert count, pattern
    (tmp_path / "opd.sbatch").write_text(script)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("torchrun", TORCHRUN)):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    variables = {"SLURM_NNODES": "2", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[0-1]", "PYTHON": sys.executable}
    variables |= {"SLURM_CALLS": str(tmp_path / "calls"), "RUN": str(tmp_path / "runs/8b"), "OMP_NUM_THREADS": "1"}
    for name, value in {**variables, "ACCELERATE_USE_CPU": "true"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def submitted(cluster: Path) -> subprocess.Popen:
    words = ["bash", "opd.sbatch"]
    return subprocess.Popen(words, cwd=cluster, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(job: subprocess.Popen) -> str:
    return "".join(job.communicate(timeout=120))


def calls(cluster: Path) -> list[str]:
    path = cluster / "calls"
    return path.read_text().splitlines() if path.exists() else []


def test_a_job_that_reaches_its_time_limit_is_requeued_and_continues(cluster):
    job = submitted(cluster)
    wait_for(cluster / "runs/8b/checkpoints/step-000005", job)
    step = [p for p in psutil.Process(job.pid).children(recursive=True) if p.name() not in ("bash", "srun")]
    for process in step:  # Slurm signals all of them
        process.send_signal(signal.SIGUSR1)
    job.wait(120)
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in step), (
        "torchrun ended before its processes"
    )
    output = ended(job)
    assert calls(cluster) == ["requeue 7"], output
    steps = len(logged(cluster / "runs/8b"))
    assert max(checkpoints(cluster / "runs/8b")) == steps < 30
    job = submitted(cluster)
    output = ended(job)
    assert job.returncode == 0 and calls(cluster) == ["requeue 7"], output
    assert len(logged(cluster / "runs/8b")) == 30 and "training in 2 processes, fsdp2" in output


@pytest.mark.parametrize(("torchrun", "expected"), [(STOPPED, ["requeue 7"]), (REFUSED, [])])
def test_only_a_job_that_made_progress_is_requeued(cluster, torchrun, expected):
    (cluster / "bin/torchrun").write_text(torchrun)
    job = submitted(cluster)
    output = ended(job)
    assert calls(cluster) == expected and job.returncode == (0 if expected else 1), output
