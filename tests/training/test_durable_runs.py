"""A run survives damage, divergence and a second trainer: whole checkpoints, fallback, the lock, time limits."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file

import opd
from opd.cli import main
from opd.core.errors import Refusal, Stopped
from opd.core.sampling import Sampling
from opd.models.checkpoints import checkpoints, damage_of, newest_checkpoint, seal
from opd.training import run_lock
from opd.training.run_folder import Run
from opd.training.run_lock import locked
from opd.training.trainer import Trainer
from tests.tiny_models import logged, small


def config(pair, out, **changes):
    return small(pair, out, **{"steps": 3, "save_every": 1, "keep": 3, "doctor": False, **changes})


@pytest.fixture(scope="module")
def finished(pair, tmp_path_factory):
    """A run of three steps with a checkpoint of each; tests take copies."""
    return opd.train(config(pair, tmp_path_factory.mktemp("runs") / "whole"))


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def files_of(folder: Path) -> dict[str, bytes]:
    """The content of the files that a run must reproduce."""
    paths = [folder / "metrics.jsonl", *(p for p in (folder / "checkpoints").rglob("*") if p.is_file())]
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths}


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 4
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zeroed(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


DAMAGE = {
    "flipped": flipped,
    "cut": cut,
    "zeroed": zeroed,
    "empty": lambda path: path.write_bytes(b""),
    "missing": Path.unlink,
    "binary": lambda path: path.write_bytes(b"\xff\xfe\x00" * 9),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a dangling link": lambda path: (path.unlink(), path.symlink_to("nowhere")),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damage_of_any_file_of_a_checkpoint_is_seen(run, damage):
    """Then the checkpoint before is the newest, and the line names the damaged one and its file."""
    third = run / "checkpoints/step-000003"
    copy = shutil.copytree(third, run / "copy")
    names = [p.relative_to(third) for p in third.rglob("*") if p.is_file()]
    assert len(names) >= 6
    for name in names:
        damage(third / name)
        found, (line,) = newest_checkpoint(run)
        assert found == run / "checkpoints/step-000002" and str(third) in line and name.name in line, line
        shutil.rmtree(third)
        shutil.copytree(copy, third)
    assert newest_checkpoint(run, history=True) == (third, [])


@pytest.mark.parametrize(
    "change", [{"step": 2}, {"step": 99}, {"step": "3"}, {"files": {}}, {"step": None}, {"digest": ""}]
)
def test_a_seal_that_was_edited_is_damage(run, change):
    path = run / "checkpoints/step-000003/training_state/state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert newest_checkpoint(run)[0] == run / "checkpoints/step-000002"


@pytest.mark.parametrize("text", ["null", "[]", "3", '"x"', "{", "[" * 100_000, '{"step": 3}{'])
def test_a_seal_of_another_form_is_damage(run, text):
    (run / "checkpoints/step-000003/training_state/state.json").write_text(text)
    assert newest_checkpoint(run)[0] == run / "checkpoints/step-000002"


def test_a_damaged_checkpoint_is_passed_over_and_the_run_ends_in_the_same_bytes(pair, finished, run, capsys):
    for name in ("model.safetensors", "training_state/optimizer.safetensors"):
        flipped(run / "checkpoints/step-000003" / name)
        opd.train(config(pair, run, resume=True, quiet=False))
        line = capsys.readouterr().err
        assert f"step-000003 is damaged: {name} was changed" in line and "goes on from" in line, line
        assert files_of(run) == files_of(finished)


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "zeroed", "flipped"])
def test_a_history_that_was_changed_is_not_continued(pair, finished, run, damage):
    """The oldest checkpoint whose steps are all in metrics.jsonl is taken; without one the run is refused."""
    DAMAGE[damage](run / "metrics.jsonl")
    whole = finished.joinpath("metrics.jsonl").read_bytes().splitlines()
    now = run.joinpath("metrics.jsonl").read_bytes().splitlines() if damage != "missing" else []
    lines = next((i for i, (a, b) in enumerate(zip(whole, now, strict=False)) if a != b), len(now))
    if lines:
        opd.train(config(pair, run, resume=True))
        assert files_of(run) == files_of(finished)
    else:
        with pytest.raises(Refusal, match=r"metrics.jsonl.*no checkpoint of this run is whole"):
            opd.train(config(pair, run, resume=True))


def test_lines_after_the_checkpoint_do_not_matter(pair, finished, run):
    shutil.rmtree(run / "checkpoints/step-000003")
    for name in ("metrics.jsonl", "perf.jsonl"):
        with (run / name).open("ab") as file:
            file.write(b'\x00\x00\x00\nnull\n{"step": "x"}\n[3]\n{"step": 1, "loss": 0.0}\n{"step": 9')
    opd.train(config(pair, run, resume=True))
    assert files_of(run) == files_of(finished)


def test_a_run_without_its_settings_is_not_started_again(pair, run):
    (run / "config.json").unlink()
    for resume in (True, False):
        with pytest.raises(Refusal, match=r"no config\.json"):
            opd.train(config(pair, run, resume=resume))


def test_a_setting_that_a_later_version_introduced_had_its_default(pair, finished, run):
    path = run / "config.json"
    settings = json.loads(path.read_text())
    del settings["stop_token"], settings["data"]["think_end"]
    path.write_text(json.dumps(settings))
    with pytest.raises(Refusal, match=r"stop_token was 'canonical' .* and is 'mask' now"):
        opd.train(config(pair, run, resume=True, stop_token="mask"))
    opd.train(config(pair, run, resume=True))
    assert files_of(run) == files_of(finished)


def test_models_are_not_read_from_damaged_weights(run, capsys):
    """A run folder gives its newest whole checkpoint; a checkpoint that the user named is refused."""
    flipped(run / "checkpoints/step-000003/model.safetensors")
    flags = ["--prompts", "embedded:ledger-short", "--limit", "2", "--max-new-tokens", "4"]
    assert main(["eval", "--model", str(run / "checkpoints/step-000003"), *flags]) == 2
    assert "model.safetensors was changed after it was saved" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="step-000003 is damaged.*step-000002 is used"):
        assert main(["eval", "--model", str(run), *flags]) == 0


def without_digests(run: Path) -> None:
    """Make the last step of a run one to do, and its checkpoints those of an earlier version."""
    for folder in checkpoints(run).values():
        state = folder / "training_state/state.json"
        state.write_text(json.dumps({"step": json.loads(state.read_text())["step"]}))
    shutil.rmtree(run / "checkpoints/step-000003")


def test_an_optimizer_that_is_not_finite_is_not_continued(pair, run):
    without_digests(run)
    path = run / "checkpoints/step-000002/training_state/optimizer.safetensors"
    state = load_file(path)
    name = sorted(state)[3]
    state[name].view(-1)[0] = float("nan")
    save_file(state, path)
    with pytest.raises(Refusal, match=f"{re.escape(name)} of optimizer.safetensors holds numbers.*not finite"):
        opd.train(config(pair, run, resume=True))


def test_checkpoints_of_an_earlier_version_are_continued(pair, finished, run):
    without_digests(run)
    opd.train(config(pair, run, resume=True))
    last = "checkpoints/step-000003/model.safetensors"
    assert files_of(run)[last] == files_of(finished)[last]


def test_checkpoints_are_sorted_by_number_and_only_they_are_removed(tmp_path):
    """The user's copies, links, files and newer folders stay."""
    run = Run(tmp_path)
    root = tmp_path / "checkpoints"
    for name in ("step-000007.bak", "step-abc", "step-", "best", "step-9999999"):
        (root / name).mkdir(parents=True)
    (root / "step-000001").write_text("a file")
    (root / "step-000002").symlink_to("nowhere")
    for step in (999_998, 999_999, 1_000_000, 1_000_001):
        with run.checkpoint(step, 2, main=True) as folder:
            (folder / "x").write_text(str(step))
            seal(folder, {"step": step})
    assert list(checkpoints(tmp_path)) == [1_000_000, 1_000_001, 9_999_999]
    assert newest_checkpoint(tmp_path)[0] == root / "step-1000001"
    others = {"step-000007.bak", "step-abc", "step-", "best", "step-000001", "step-000002", "step-9999999"}
    assert {p.name for p in root.iterdir()} == {"step-1000000", "step-1000001", *others}


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, Path.rename

    def synced(number):
        events.append(Path(os.readlink(f"/proc/self/fd/{number}")))
        fsync(number)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", lambda old, new: (events.append(("rename", new)), rename(old, new)))
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with Run(tmp_path).checkpoint(1, 2, main=True) as part:
        (part / "inner").mkdir()
        (part / "inner/x").write_text("x")
    named = events.index(("rename", tmp_path / "checkpoints/step-000001"))
    before, after = events[:named], events[named + 1 :]
    assert {part, part / "inner", part / "inner/x", tmp_path / "metrics.jsonl"} <= {*before}
    assert tmp_path / "checkpoints" in after


def test_a_kill_while_a_checkpoint_is_replaced_loses_none(tmp_path, monkeypatch):
    run, root = Run(tmp_path), tmp_path / "checkpoints"

    def save(text: str) -> None:
        with run.checkpoint(1, 1, main=True) as part:
            (part / "x").write_text(text)

    save("old")
    real = Path.rename

    def killed(old, new):
        real(old, new)
        if ".replaced" in str(new):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", killed)
        patch.setattr(Run, "clean", lambda self: None)  # a killed process cleans nothing
        shutil.rmtree(root / ".part-000001", ignore_errors=True)
        save("new")
    assert not (root / "step-000001").exists()
    run.clean()
    assert (root / "step-000001/x").read_text() == "old" and [p.name for p in root.iterdir()] == ["step-000001"]


@pytest.mark.parametrize("when", ["before", "within"])
def test_a_kill_while_old_checkpoints_are_removed_leaves_none(pair, tmp_path, monkeypatch, when):
    """The resumed run has nothing left to do but that."""
    calm = opd.train(config(pair, tmp_path / "calm", keep=1))
    remove, removed = shutil.rmtree, []

    def killed(path, **options):
        if Path(path).name != ".removed-000002":
            return remove(path, **options)
        removed.append(path)
        (path / "model.safetensors").unlink()
        if when == "before":
            path.rename(path.with_name("step-000002"))
        raise KeyboardInterrupt

    out = tmp_path / "killed"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        opd.train(config(pair, out, keep=1))
    assert removed and len([*(out / "checkpoints").iterdir()]) == 2
    opd.train(config(pair, out, keep=1, resume=True))
    assert files_of(out) == files_of(calm) and len([*(out / "checkpoints").iterdir()]) == 1


@pytest.mark.parametrize(("refused", "left"), [(True, [1, 2, 3]), (False, [3])])
def test_a_resumed_run_keeps_what_a_refused_step_kept(pair, run, refused, left):
    seal(run / "checkpoints/step-000003", {"step": 3, "without_state": [], "refused": refused}, run)
    opd.train(config(pair, run, keep=1, resume=True))
    assert list(checkpoints(run)) == left


def test_divergence_leaves_the_checkpoints_before_it(pair, tmp_path):
    """An update of 1e30 makes all later steps refused; none of them removes a checkpoint."""
    with pytest.raises(Refusal, match="gradient was not finite 5 steps in a row") as refusal:
        opd.train(config(pair, tmp_path / "run", lr=1e30, keep=1, steps=9))
    there = checkpoints(tmp_path / "run")
    assert 1 in there and "--student" in str(refusal.value) and str(there[1]) in str(refusal.value)
    assert "whole" not in str(refusal.value)


@pytest.mark.parametrize(("field", "value"), [("exp_avg_sq", -1.0), ("exp_avg", 3e38)])
def test_weights_that_are_not_finite_are_not_saved(pair, run, field, value):
    """One number of the optimizer that a healthy gradient turns into weights without a value."""
    shutil.rmtree(run / "checkpoints/step-000003")
    second = run / "checkpoints/step-000002"
    path = second / "training_state/optimizer.safetensors"
    state = load_file(path)
    name = next(n for n in state if n.endswith(f"/{field}") and state[n].dim() == 2)
    state[name][0, 0] = value
    save_file(state, path)
    history = json.loads((second / "training_state/state.json").read_text())["history"]
    assert history["bytes"] > 0
    seal(second, {"step": 2})
    with pytest.raises(Refusal, match=r"step 3: the weights of the student are not finite .*were not saved.*--student"):
        opd.train(config(pair, run, resume=True, keep=1))
    assert list(checkpoints(run)) == [1, 2] and not damage_of(second)


def test_time_limit_and_save_minutes(pair, tmp_path, monkeypatch):
    """With a clock on which a step takes 20 s and a checkpoint 15 s."""
    seconds = [0.0]
    for module in ("stops", "train"):
        monkeypatch.setattr(f"opd.training.{module}.time", SimpleNamespace(monotonic=lambda: seconds[0]))

    def slow(function, cost):
        def call(*args):
            seconds[0] += cost
            return function(*args)

        return call

    monkeypatch.setattr(Trainer, "step", slow(Trainer.step, 20))
    monkeypatch.setattr(Trainer, "save", slow(Trainer.save, 15))
    changes = {"steps": 14, "save_every": 14, "keep": 14}
    with pytest.raises(Stopped) as stop:
        opd.train(config(pair, tmp_path / "run", **changes, save_minutes=1.0, time_limit=5.0))
    assert stop.value.code == 75 and 240 < seconds[0] <= 300
    done = list(checkpoints(tmp_path / "run"))
    assert done[:3] == [3, 6, 9] and done[-1] == logged(tmp_path / "run")[-1]["step"]
    monkeypatch.undo()
    for name, resume in (("run", True), ("whole", False)):  # resumed, with other limits
        opd.train(config(pair, tmp_path / name, **changes, resume=resume))
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()


HOLD = """
import sys, time
from pathlib import Path
from opd.training.run_lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that trains in tmp_path/run."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "run"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_two_trainers_never_share_a_folder(pair, tmp_path, holder):
    for resume in (False, True):
        with pytest.raises(Refusal, match=rf"another trainer writes to it \(process {holder.pid} on .*, since "):
            opd.train(config(pair, tmp_path / "run", resume=resume))
    assert [p.name for p in (tmp_path / "run").iterdir()] == [".lock"]  # nothing but the holder's
    holder.kill()
    holder.wait()
    assert (tmp_path / "run/.lock").exists()  # left by the dead process, and taken over
    opd.train(config(pair, tmp_path / "run", steps=1))
    assert not (tmp_path / "run/.lock").exists()


def test_a_refused_run_leaves_no_folder(pair, tmp_path):
    with pytest.raises(Refusal):
        opd.train(config(pair, tmp_path / "a/run", prompts=str(tmp_path / "none.jsonl")))
    assert not (tmp_path / "a/run").exists()


@pytest.mark.parametrize("alive", [True, False])
def test_a_holder_on_another_host_counts_by_its_signs_of_life(tmp_path, monkeypatch, alive):
    """Where the file system does not lock between hosts: the holder touches the file, or is dead."""
    monkeypatch.setattr(run_lock, "DEAD_AFTER", 2.0)
    lock = tmp_path / ".lock"
    lock.write_text(json.dumps({"pid": 7, "host": "elsewhere", "boot": "another", "since": "now"}))
    if alive:
        monkeypatch.setattr(run_lock.time, "sleep", lambda seconds: os.utime(lock, (1, time.time() + 5)))
        with pytest.raises(Refusal, match="process 7 on elsewhere"), locked(tmp_path):
            raise AssertionError
        assert lock.exists()
    else:
        began = time.monotonic()
        with locked(tmp_path):
            assert json.loads(lock.read_text())["pid"] == os.getpid() and time.monotonic() - began > 1
        os.utime(tmp_path)
        lock.write_text(json.dumps({"pid": 7, "host": "elsewhere", "boot": "another", "since": "now"}))
        os.utime(lock, (1, 1))
        began = time.monotonic()
        with locked(tmp_path):  # its last sign is hours old: no wait
            assert time.monotonic() - began < 1


def test_a_file_system_without_locks_is_used(tmp_path, monkeypatch):
    def refuses(number, how):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(run_lock.fcntl, "lockf", refuses)
    with locked(tmp_path / "run"):
        assert (tmp_path / "run/.lock").exists()


def test_resume_auto_is_resume(pair, tmp_path, capsys):
    words = f"train --student {pair[0]} --teacher {pair[1]} --prompts embedded:ledger-short --out {tmp_path / 'run'}"
    words += " --batch 8 --max-new-tokens 8 --quiet --steps 1 --resume auto vopd"
    for _ in range(2):  # it starts the run, then finds it complete
        assert main(words.split()) == 0
    assert list(checkpoints(tmp_path / "run")) == [1]


def test_steps_that_train_nothing_end_the_run_with_the_reason(pair, tmp_path):
    changes = {"steps": 30, "save_every": 4, "truncated": "drop", "sampling": Sampling(max_new_tokens=1)}
    with pytest.raises(Refusal, match=r"no token was trained on in 10 steps.*% of the responses were cut.*--truncated"):
        opd.train(config(pair, tmp_path / "run", **changes))
    assert list(checkpoints(tmp_path / "run")) == [4, 8]
