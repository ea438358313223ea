"""A run has the same numbers on any number of processes, up to the order of sums: rollouts, losses, gradients, weights.

The processes are forks of this one, which has imported opd; none may take longer than LIMIT.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.campaigns.commands import MODELS, start_ranks
from tests.tiny_models import logged

LIMIT = 120.0  # seconds after which the processes wait for each other for ever
SIZES = "--batch 8 --steps 3 --max-new-tokens 24 --lr 1e-3 --rollouts-every 3 --no-doctor --quiet"
CASES = {
    "vopd": "vopd",
    "zscore": "opd-zscore",
    "kat": "kat --window 4 --floor 2 --ready 8 --buffer 20 --after 2",
    "LoRA": "--lora-rank 4 vopd",
    "gkd": "gkd --share 0.5",
    "ema teacher": "--teacher ema:0.1 --context answer opd",
    "teacher self": "--teacher self --context answer opd",
    "teacher base under LoRA": "--lora-rank 4 --teacher base --context answer opd",
    "npd": "npd --pool 2 --no-filtered",
    "checkpointing": "--gradient-checkpointing --micro-batch-tokens 64 opd-full",
    "packing": "--packing --micro-batch-tokens 200 --gradient-checkpointing vopd",
    "evaluations": "--eval-prompts embedded:ledger-short --eval-limit 4 --eval-every 2 topd",
    "a judge": "--judge verifier --per-prompt 4 ropd",
}


def trained(out: Path, flags: str, processes: int) -> Path:
    """Train on some processes; return the run folder."""
    words = ["train", *MODELS, *SIZES.split(), "--out", str(out), *flags.split()]
    ends = [process.outcome(LIMIT) for process in start_ranks(words, processes)]
    assert [end.code for end in ends] == [0] * processes, ends[0].output + ends[-1].output
    assert json.loads((out / "environment.json").read_text())["processes"] == processes
    return out


def assert_equal(run: Path, other: Path, tolerance: float) -> None:
    """The same rollouts, and columns and metrics that differ by less than a tolerance."""
    for file in run.glob("rollouts/*.jsonl"):
        assert file.read_text() == (other / "rollouts" / file.name).read_text()
    for file in run.glob("rollouts/*.safetensors"):
        theirs = load_file(other / "rollouts" / file.name)
        for name, x in load_file(file).items():
            if not name.startswith("alternatives"):  # tokens of almost equal rank may change places
                torch.testing.assert_close(x, theirs[name], rtol=tolerance, atol=tolerance, equal_nan=True, msg=name)
    for row, their_row in zip(logged(run), logged(other), strict=True):
        assert row == pytest.approx(their_row, rel=10 * tolerance, abs=tolerance)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one_and_sharded_they_are_the_same(case, tmp_path):
    one, two = (trained(tmp_path / str(n), CASES[case], n) for n in (1, 2))
    assert_equal(one, two, 1e-4)
    assert_equal(two, trained(tmp_path / "sharded", f"--shard {CASES[case]}", 2), 1e-5)
