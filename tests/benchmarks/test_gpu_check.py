"""The checks of scripts/gpu_check.sh: at tiny size on a CPU, and what they make of crashes, hangs and wrong numbers."""

import os
import subprocess
import sys
import time
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.gpu import check, processes
from benchmarks.gpu.check import Check, CheckRow, GPUCheck, exit_code
from opd.training.run_log import lines
from tests.campaigns.commands import start, start_ranks

ROOT = Path(__file__).parents[2]
FEW = ("device", "step", "kernels", "head", "shard")  # without those that start runs of `opd train`


def statuses(rows: list[CheckRow]) -> dict[str, str]:
    return {row.check: row.status for row in rows}


def test_the_script_on_a_cpu():
    words = ["bash", "scripts/gpu_check.sh", "--cpu", "--only", *FEW]
    done = subprocess.run(words, cwd=ROOT, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {}
    for line in done.stdout.splitlines():
        if line.startswith("│"):
            name, number, _, status, _ = (cell.strip() for cell in line.strip("│").split("│"))
            found[name] = (number, status)
    kernels = {"kernels float32", "kernels bfloat16"} if find_spec("triton") else {"kernels"}
    measured = {"bf16 loss", "bf16 gradient", "memory", "matmul share", "head pass", "plain forward", "--shard"}
    assert found.keys() >= measured | kernels and {status for _, status in found.values()} <= {"ok", "not run"}
    assert 0 < float(found["bf16 gradient"][0]) < 0.1
    assert found["torch"] == (torch.__version__, "ok")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_a_line(capsys):
    assert main(["gpu"]) == 2
    assert capsys.readouterr().err.startswith("benchmarks: no CUDA device: ")
    assert main(["gpu", "--cpu", "--only", "heads"]) == 2
    assert "--only heads: no such check; there are device, step," in capsys.readouterr().err


BROKEN = """
import os, time
from benchmarks.gpu.check import NotRun, CheckRow

def fine(cpu): yield CheckRow("fine", "1")
def wrong(cpu): yield CheckRow.judged("wrong", "3", "< 2", "a number", fine=False)
def raises(cpu): raise RuntimeError("CUDA error: an illegal memory access")
def crashes(cpu): os.abort()
def hangs(cpu): os.system("sleep 300")
def absent(cpu): raise NotRun("vllm is not installed")
"""


def test_a_broken_check_is_a_failed_row_and_the_others_run(tmp_path, monkeypatch, capsys):
    (tmp_path / "broken_checks.py").write_text(BROKEN)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    monkeypatch.setattr(check, "FEWEST_SECONDS", 1)
    names = ("hangs", "raises", "crashes", "wrong", "absent", "fine")
    limits = {name: 3 if name == "hangs" else 60 for name in names}
    monkeypatch.setattr(check, "CHECKS", {n: Check(f"broken_checks:{n}", limits[n]) for n in names})
    start = time.monotonic()
    assert main(["gpu", "--cpu"]) == 1
    shown = capsys.readouterr().out
    assert "failed: raises: exit code 1: RuntimeError: CUDA error: an illegal memory access" in shown
    assert "failed: crashes: exit code -6" in shown and "failed: hangs: did not end within 3 s" in shown
    assert "failed: wrong: a number" in shown and "not run: absent: vllm is not installed" in shown
    assert [line.split("│")[4].strip() for line in shown.splitlines() if "│ fine" in line] == ["ok"]
    assert time.monotonic() - start < 60
    assert not [p for p in psutil.Process().children(recursive=True) if p.name() == "sleep"]
    assert main(["gpu", "--cpu", "--only", "fine", "absent"]) == 0


def test_checks_end_when_their_time_is_over(monkeypatch):
    monkeypatch.setattr(check, "TOTAL_SECONDS", 0)
    result = check.measured(GPUCheck(cpu=True, only=("step", "head")))
    assert statuses(result.numbers["rows"]) == {"step": "not run", "head": "not run"} and exit_code(result) == 0


def forked(out, flags, launcher, environment):
    """`processes.train` in forks of this process."""
    words = ["train", *processes.SHORT.split(), *flags, "--out", str(out), "opd-full"]
    assert not launcher or environment == {"ACCELERATE_USE_CPU": "true"}
    runs = start_ranks(words, 2) if launcher else [start(words, environment)]
    outcomes = [run.outcome(120) for run in runs]
    assert not any(x.code for x in outcomes), outcomes
    return lines(out / "metrics.jsonl", "loss")


def test_two_processes_beside_one(monkeypatch):
    monkeypatch.setattr(processes, "train", forked)
    (row,) = processes.ranks(True)
    assert row.status == "ok" and 0 < float(row.number) < 1e-4

    def shifted(out, flags, launcher, environment):
        return [{**row, "loss": row["loss"] * (1.01 if launcher else 1)} for row in forked(out, flags, [], {})]

    monkeypatch.setattr(processes, "train", shifted)
    (row,) = processes.ranks(True)
    assert row.status == "failed" and float(row.number) == pytest.approx(0.01, rel=0.1)


def test_rollouts_of_a_server(monkeypatch):
    pytest.importorskip("uvicorn", reason="the server wants the extra `serve`")
    monkeypatch.setattr(processes, "train", forked)
    (row,) = processes.engine(True)
    assert row.status == "ok" and float(row.number) < 1e-4
    monkeypatch.setattr(processes, "train", lambda *arguments: [{"sampler_gap_mean": 0.2}])
    monkeypatch.setattr(processes, "server", lambda *arguments: nullcontext("http://127.0.0.1:1"))
    (row,) = processes.engine(True)
    assert row.status == "failed"
