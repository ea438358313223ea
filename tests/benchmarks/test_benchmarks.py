"""`python -m benchmarks`: every part runs at a small size, and reports the peer that cannot."""

import json
import sys

import pytest
import torch

from benchmarks import command, growth, head, packing, rollouts, step
from benchmarks.__main__ import main
from benchmarks.case import Shape
from benchmarks.growth import Growth
from benchmarks.peers import ARMS
from benchmarks.result import Result, peak, ratio
from benchmarks.rollouts import Ragged
from benchmarks.step import Step

SMALL = Shape(tokens=64, vocabulary=512, student=16, teacher=16, chunk=32, rounds=1, memory=False)
FEW = Growth(
    tokens=(32, 64), vocabulary=(256, 512), width=8, k=(1, 2), batch=(2, 4), length=(8, 12), chunk=16, rounds=1
)


def test_the_head_and_its_error_against_float64():
    found = head.measured(Shape(**{**vars(SMALL), "arms": ("floor", "ours", "ours-torch", "naive", "careful")}))
    errors = [row["error"] for name, row in found.numbers["rows"].items() if name != "floor"]
    assert len(errors) == 4 and all(max(e.values()) < 1e-5 for e in errors)
    assert found.rows[0][0] == "floor" and found.rows[0][2].startswith("1.00")


def test_a_peer_that_cannot_run_is_reported(monkeypatch):
    def absent(case, shape):
        raise ImportError("No module named 'peer'")

    monkeypatch.setitem(ARMS, "trl-divergence", absent)
    found = head.measured(Shape(**{**vars(SMALL), "arms": ("floor", "ours", "trl-divergence")}))
    assert [row[0] for row in found.rows] == ["floor", "ours"]
    assert found.notes[0] == "trl-divergence cannot run here: ImportError: No module named 'peer'"


@pytest.mark.parametrize("missing", [False, True])
def test_a_step_beside_trl(missing, monkeypatch):
    if missing:
        monkeypatch.setitem(sys.modules, "trl", None)
    else:
        pytest.importorskip("trl", reason="the peer is trl, extra `bench`", exc_type=ImportError)
    found = step.measured(Step(batch=2, max_new_tokens=8, rounds=1))
    assert [row[0] for row in found.rows] == (["opd"] if missing else ["opd", "TRL"])
    assert ("TRL cannot run here" in found.notes[0]) == missing
    if not missing:
        ((_, theirs, _, ours),) = found.numbers["found"]  # tokens of a step
        assert 0 < theirs <= 16 and 0 < ours <= 16


def test_ragged_lengths_come_from_one_distribution():
    found = rollouts.measured(
        Ragged(requests=64, rows=16, mean=6, max_new_tokens=20, layers=1, vocabulary=64, width=64, rounds=3)
    )
    means = [torch.tensor(n).float().mean() for n in found.numbers["lengths"].values()]
    expected = 6 * (1 - (5 / 6) ** 20)  # of a geometric length cut at 20
    assert all(abs(m - expected) < 1.5 for m in means)


def test_growth_and_the_folder(tmp_path, monkeypatch):
    grown = growth.measured(FEW)
    assert len(grown.rows) == 2 * 2 + 2 + 2 + 2 + 2 and all(p["seconds"][0] > 0 for p in grown.numbers["points"])
    monkeypatch.setattr(head, "measured", lambda shape: ran)
    ran = head_result()
    monkeypatch.setattr(step, "measured", lambda asked: ran)
    monkeypatch.setattr(rollouts, "measured", lambda asked: ran)
    monkeypatch.setattr(growth, "measured", lambda asked: grown)
    assert main(["all", "--out", str(tmp_path / "b")]) == 0
    assert set(json.loads((tmp_path / "b" / "bench.json").read_text())) == {"generator", ran.title, "growth"}
    assert (tmp_path / "b" / "bench.png").stat().st_size > 10_000
    assert "| floor | 1.00 |" in (tmp_path / "b" / "bench.md").read_text()


def head_result() -> Result:
    rows = {"floor": {"seconds": [1.0]}, "ours": {"seconds": [1.1]}}
    return Result("head", ("arm", "x"), (("floor", "1.00"),), (), {"rows": rows, "shape": {"tokens": 1}})


def test_ratios_are_of_rounds():
    assert ratio([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == "2.00 [1.00, 3.00]"


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_the_peak_is_what_a_call_held_at_once():
    torch.ones(7 << 20)  # freed at once: from now on malloc takes smaller blocks from its heap
    blocks = [torch.ones(1 << 20) for _ in range(200)]
    last = blocks.pop()  # keeps the freed blocks below it in the process
    blocks.clear()
    assert 60 < peak(lambda: torch.ones(16 << 20)) / 2**20 < 80 and last.all()


def test_parts_by_name(capsys):
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {part}" in shown for part in command.PARTS)
    assert main(["hed"]) == 2
    assert "hed: no part of the benchmark (did you mean head?)" in capsys.readouterr().err


def test_mistakes_in_flags_are_one_line(capsys):
    assert main(["head", "--hlep"]) == 2
    assert capsys.readouterr().err == (
        "benchmarks: --hlep: unknown flag (did you mean --help?); `python -m benchmarks head --help` lists the flags\n"
    )


def test_only_its_own_files_are_replaced(tmp_path, capsys):
    for name in command.FILES:
        (tmp_path / name).write_text("precious\n")
        assert main(["all", "--out", str(tmp_path)]) == 2
        assert capsys.readouterr().err.startswith(f"benchmarks: --out {tmp_path / name}: exists already")
        assert (tmp_path / name).read_text() == "precious\n"
        (tmp_path / name).unlink()


def test_packed_rows_beside_rows_of_like_length():
    """Every way has the states that each sequence has alone, which the part checks before it times."""
    found = packing.measured(packing.Packing(pool=6, max_new_tokens=40, lengths=(256,), rows=2, rounds=1))
    names = ["rows of like length", "packed to 256, block mask", "packed to 8192, --packing"]
    assert [row[0] for row in found.rows][1:] == names
    whole = found.numbers["tokens"]
    assert int(found.rows[2][1]) == whole <= int(found.rows[1][1]) <= int(found.rows[0][1])


def test_first_fit_decreasing():
    assert packing.packed({0: 3, 1: 7, 2: 5, 3: 4, 4: 30}, 10) == [[4], [1, 0], [2, 3]]
