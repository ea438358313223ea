"""Readers of a run folder: every refusal is a line that names the file, the place and the remedy."""

import json
import signal
import subprocess
import sys

import pytest
import torch

from opd.core.errors import Refusal
from opd.core.tensors import load_tensors, save_tensors
from opd.training.run_files import NUMBER, read_columns, read_object, read_rollouts, read_rows
from opd.training.run_log import read

GOOD = b'{"step": 1, "loss": 0.5}\n'


@pytest.mark.parametrize(
    ("content", "place"),
    [
        (GOOD + b"\n", r"metrics.jsonl, line 2: cannot be read: Expecting value"),
        (GOOD + b"\0\0\0\n", "line 2: "),
        (GOOD + b"\0\0\0", "line 2: .* is no line"),
        (GOOD + b"null\n", "line 2: 'null' is not an object"),
        (GOOD + b"\xff\n", r"byte 25: is not UTF-8"),
        (b'{"loss": 0.5}\n', "line 1: step is missing"),
        (b'{"step": "one"}\n', "line 1: step is 'one', and not int"),
        (b'{"step": true}\n', "line 1: step is True, and not int"),
        (b'{"step": 1, "loss": [1]}\n', "line 1: loss is .*, and not int or float"),
        (b'{"step": 1, "loss": ' + b"9" * 400 + b"}\n", "line 1: loss is a number of 400 digits"),
        (b'{"step": 1, "loss": ' + b"9" * 9000 + b"}\n", "line 1: "),
        (b"[" * 100_000 + b"\n", "line 1: cannot be read: it is nested more than 64 deep"),
        (
            b'{"step": 1, "loss": ' + b"[" * 80 + b"]" * 80 + b"}\n",
            "line 1: cannot be read: it is nested more than 64 deep",
        ),
    ],
)
def test_a_damaged_log_is_refused_with_its_place(content, place, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content)
    with pytest.raises(Refusal, match=place) as caught:
        read_rows(path, {"step": (int,)}, NUMBER, growing=True)
    message = str(caught.value)
    assert str(path) in message and "restore it" in message and "\n" not in message and len(message) < 400


def test_only_the_last_line_of_a_log_may_be_incomplete(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(GOOD + b'{"step": 2, "lo')
    assert read_rows(path, {"step": (int,)}, NUMBER, growing=True) == [{"step": 1, "loss": 0.5}]
    with pytest.raises(Refusal, match="line 2: the end of the line is missing"):
        read_rows(path, {"step": (int,)}, NUMBER, growing=False)


@pytest.mark.parametrize("steps", [(1, 2, 2, 3), (1, 3), (2, 3), (1, 2, 4, 3)])
def test_a_log_of_two_trainers_is_refused(steps, tmp_path):
    (tmp_path / "config.json").write_text('{"method": ""}')
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": s, "loss": 0.0}) + "\n" for s in steps))
    with pytest.raises(Refusal, match=r"metrics.jsonl: step \d in the place of step \d"):
        read(tmp_path)


def test_a_link_to_nothing_and_a_folder_are_no_files(tmp_path):
    (tmp_path / "config.json").symlink_to("nothing")
    (tmp_path / "environment.json").mkdir()
    for path in tmp_path.iterdir():
        with pytest.raises(Refusal, match="not a file"):
            read_object(path, {})


def test_a_flipped_bit_of_a_sealed_file_is_seen(tmp_path):
    """Any bit of it: in the numbers, the names, the shapes or the digests."""
    path = tmp_path / "x.safetensors"
    tensors = {
        "mask": torch.ones(2, 3, dtype=torch.bool),
        "ids": torch.arange(6).view(2, 3),
        "b": torch.ones((), dtype=torch.bfloat16),
    }
    save_tensors(tensors, path, sealed=True)
    assert all(torch.equal(x, tensors[name]) for name, x in load_tensors(path).items())
    assert load_tensors(path, ["ids", "other"]).keys() == {"ids"}
    raw = path.read_bytes()
    for at in range(8, len(raw)):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 4]) + raw[at + 1 :])
        try:
            loaded = load_tensors(path)
        except Exception:  # safetensors has several types
            continue
        # Only the spaces that fill the header may change, and the key of a digest, which is then none.
        assert loaded.keys() == tensors.keys() and all(torch.equal(x, tensors[name]) for name, x in loaded.items())


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: (folder / "s.jsonl").write_text(""), "s.jsonl, line 1: the end of the line is missing"),
        (lambda folder: (folder / "s.jsonl").write_text("{}\n"), "s.jsonl, line 1: answer is missing"),
        (lambda folder: _rewrite(folder / "s.jsonl", tokens=9), "s.jsonl, line 1: its prompt or tokens"),
        (lambda folder: _rewrite(folder / "s.jsonl", prompt=[1]), "s.jsonl, line 1: its prompt or tokens"),
        (lambda folder: (folder / "s.tokens.json").write_text('{"0": "a", "1": "b"}'), "the text of token 2"),
        (lambda folder: (folder / "s.tokens.json").unlink(), "s.tokens.json: No such file"),
        (lambda folder: save_tensors({"ids": torch.ones(1, 3)}, folder / "s.safetensors"), "column mask is missing"),
        (
            lambda folder: save_tensors({"mask": torch.ones(1, 3), "ids": torch.ones(1, 3)}, folder / "s.safetensors"),
            "ids is torch.float32|mask is torch.float32",
        ),
        (
            lambda folder: save_tensors(COLUMNS | {"reverse_kl": torch.ones(1, 4)}, folder / "s.safetensors"),
            r"reverse_kl is torch.float32 \[1, 4\], and the mask \[1, 3\]",
        ),
    ],
)
def test_files_of_rollouts_that_do_not_fit_are_refused(damage, says, tmp_path):
    row = {"index": 0, "prompt": "a", "answer": "", "response": "", "tokens": 3, "outcome": 0.0, "stopped": True}
    (tmp_path / "s.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "s.tokens.json").write_text('{"0": "a", "1": "b", "2": "c"}')
    save_tensors(COLUMNS, tmp_path / "s.safetensors")
    assert len(read_rollouts(tmp_path / "s").rows) == 1
    damage(tmp_path)
    with pytest.raises(Refusal, match=says):
        read_rollouts(tmp_path / "s")


def test_columns_that_are_not_named_are_not_required(tmp_path):
    save_tensors({"mask": torch.ones(1, 3, dtype=torch.bool)}, tmp_path / "s.safetensors")
    assert read_columns(tmp_path / "s.safetensors", ("reverse_kl",)).keys() == {"mask"}


COLUMNS = {"mask": torch.ones(1, 3, dtype=torch.bool), "ids": torch.arange(3)[None]}


def _rewrite(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values) + "\n")


def test_nothing_of_a_killed_writer_stays(tmp_path):
    path = tmp_path / "s.safetensors"
    code = "import os, signal, sys, pathlib, opd.core.tensors as t, torch\n"
    code += "t.os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)\n"
    code += f"t.save_tensors({{'x': torch.ones(3)}}, pathlib.Path({str(path)!r}))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    (left / ".tmpA1b2C3").write_text("the temporary file of safetensors")
    save_tensors(COLUMNS, path)
    assert [*tmp_path.iterdir()] == [path]
