"""Files that the user names: nothing of the user's is replaced, nothing is half-written, inputs stay as they are."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from opd import cli
from opd.cli import demo
from opd.core.disk import OutputFile, OutputFolder, has_mark
from opd.core.errors import Refusal

MODELS = ["--student", "embedded:student", "--teacher", "embedded:teacher"]
LEDGER = ["--prompts", "embedded:ledger-short"]
SHORT = ["--max-new-tokens", "8"]
EVAL = ["eval", "--model", "embedded:teacher", *LEDGER, "--limit", "2", *SHORT]
ROCK = ["rock", *MODELS, *LEDGER, "--rollouts", "2", "--top", "2", *SHORT, "--quiet"]
PRECIOUS = "precious\n"
WHY = "exists already, and this command did not write it; name another file, or add --overwrite to replace it"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of one step."""
    out = tmp_path_factory.mktemp("run") / "run"
    flags = [*MODELS, *LEDGER, "--out", out, "--steps", "1", "--batch", "2", *SHORT, "--quiet", "--no-doctor"]
    assert cli.main(["train", *map(str, flags), "--rollouts-every", "1", "vopd"]) == 0
    return out


def refused(capsys, words: list[object]) -> str:
    capsys.readouterr()
    assert cli.main([str(word) for word in words]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err.removeprefix("opd: ").removesuffix("\n")


def command(name: str, run: Path) -> list[object]:
    """The words of a command that writes a file, without the flag that names it."""
    return {"eval": EVAL, "rock": ROCK, "report": ["report", run], "inspect": ["inspect", run]}[name]


COMMANDS = ("eval", "rock", "report", "inspect")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_file_of_the_users_is_not_replaced(name, run, tmp_path, capsys):
    out = tmp_path / "out.json"
    out.write_text(PRECIOUS)
    words = [*command(name, run), "--out", out]
    assert refused(capsys, words) == f"--out {out}: {WHY}"
    assert out.read_text() == PRECIOUS and [*tmp_path.iterdir()] == [out]
    assert cli.main([str(word) for word in (*words, "--overwrite")]) == 0
    assert out.read_text() != PRECIOUS
    first = out.stat().st_ino
    assert cli.main([str(word) for word in words]) == 0  # its own output is replaced without a flag
    assert out.stat().st_ino != first and not [*tmp_path.glob(".*")]


def test_one_command_does_not_replace_the_output_of_another(run, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert cli.main(["report", str(run), "--out", str(page)]) == 0
    assert refused(capsys, ["inspect", run, "--out", page]).endswith(WHY)
    assert refused(capsys, [*EVAL, "--out", page]).endswith(WHY)
    assert cli.main(["inspect", str(run), "--out", str(page), "--overwrite"]) == 0
    assert refused(capsys, ["report", run, "--out", page]).endswith(WHY)


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
def test_what_is_read_is_never_replaced(name, overwrite, run, tmp_path, capsys):
    if name in ("eval", "rock"):
        source = tmp_path / "prompts.jsonl"
        source.write_text(json.dumps({"prompt": "1+1?", "answer": "2"}) + "\n")
        link = tmp_path / "link.jsonl"
        link.symlink_to(source)
        words = [*command(name, run), "--prompts", source, *overwrite]
        for out in (source, link):
            assert refused(capsys, [*words, "--out", out]) == (
                f"--out {out}: is read by the same command; name another file"
            )
        read = source
    else:
        read = run / "config.json"
        line = refused(capsys, [*command(name, run), "--out", read, *overwrite])
        assert line == f"--out {read}: is part of {run}, which is read; name another file"
    assert json.loads(read.read_text().splitlines()[0] if name in ("eval", "rock") else read.read_text())


def test_a_page_may_stand_in_the_run_folder(run):
    for _ in range(2):
        assert cli.main(["report", str(run), "--out", str(run / "report.html")]) == 0
    (run / "report.html").unlink()


def test_the_control_list_of_rock_is_not_replaced(tmp_path, capsys):
    control = tmp_path / "rocks-control.json"
    control.write_text('{"ids": []}')
    assert refused(capsys, [*ROCK, "--out", tmp_path / "rocks.json"]) == f"--out {control}: {WHY}"
    assert [*tmp_path.iterdir()] == [control]


def test_pictures_replace_only_pictures_of_a_report(run, tmp_path, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    words = ["report", str(run), "--out", str(tmp_path / "page.html"), "--static", str(folder)]
    for name in ("curves.svg", "phases.png"):
        (folder / name).write_text(PRECIOUS)
        assert refused(capsys, words) == f"--static {folder / name}: {WHY}"
        assert not (tmp_path / "page.html").exists()
        (folder / name).unlink()
    for _ in range(2):
        assert cli.main(words) == 0
    assert {p.name for p in folder.iterdir()} >= {"curves.svg", "curves.png", "phases.svg", "phases.png"}


@pytest.mark.parametrize("words", [["prune", "--model", "embedded:teacher", "--keep", "0,1"], ["demo"]])
def test_a_folder_that_holds_anything_is_not_filled(words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "accuracy", lambda *given: pytest.fail("the work began"))
    out = tmp_path / "out"
    out.write_text(PRECIOUS)
    assert refused(capsys, [*words, "--out", out]).endswith("is no folder; name a new folder")
    assert out.read_text() == PRECIOUS
    out.unlink()
    out.mkdir()
    (out / "file").write_text(PRECIOUS)
    line = refused(capsys, [*words, "--out", out])
    assert line == f"--out {out}: exists already, and is not empty; name a new folder, or remove this one"
    assert (out / "file").read_text() == PRECIOUS


def test_prune_leaves_its_neighbours_and_follows_the_umask(tmp_path):
    neighbour = tmp_path / "out.part"
    neighbour.mkdir()
    (neighbour / "file").write_text(PRECIOUS)
    (tmp_path / "out").mkdir()  # an empty folder is filled
    before = os.umask(0o027)
    try:
        words = ["prune", "--model", "embedded:teacher", "--keep", "0,1", "--out", str(tmp_path / "out")]
        assert cli.main(words) == 0
    finally:
        os.umask(before)
    assert (neighbour / "file").read_text() == PRECIOUS
    assert {p.name for p in tmp_path.iterdir()} == {"out", "out.part"}
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "out").iterdir()} == {0o640}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_place_where_nothing_can_be_written_is_refused_before_the_work(name, run, tmp_path, capsys, monkeypatch):
    for work in (
        "opd.analysis.evaluate.evaluate",
        "opd.analysis.rock_tokens.open_session",
        "opd.analysis.report.page.read",
    ):
        monkeypatch.setattr(work, lambda *given, **named: pytest.fail("the work began"))
    monkeypatch.setattr("opd.analysis.report.inspect.saved_at", lambda *given: pytest.fail("the work began"))
    (tmp_path / "file").write_text(PRECIOUS)
    for out, why in (
        (tmp_path / "file" / "out.json", "Not a directory"),
        (Path("/proc/nothing/out.json"), "No such file or directory"),
        (tmp_path, "is a folder; name a file"),
        (tmp_path / ("x" * 300), "File name too long"),
    ):
        line = refused(capsys, [*command(name, run), "--out", out])
        assert line.startswith(f"--out {out}: "[:120]) and why in line
    assert (tmp_path / "file").read_text() == PRECIOUS


def test_a_full_disk_leaves_the_earlier_file_and_loses_no_number(tmp_path):
    """A limit on file size stands in for a full disk."""
    out = tmp_path / "out.jsonl"
    earlier = json.dumps({"model": "m", "prompt": "p", "outcomes": [], "responses": []}) + "\n"
    out.write_text(earlier)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))
    words = [sys.executable, "-m", "opd", *EVAL, "--out", str(out)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=env, capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == (
        f"opd: --out {out}: File too large; mend that, then run the same command again"
    )
    assert "avg@1" in done.stdout
    assert out.read_text() == earlier and [*tmp_path.iterdir()] == [out]


def file(path: Path, **settings: object) -> OutputFile:
    return OutputFile(path=path, ours=has_mark("our mark"), **settings)


def test_a_file_has_the_mode_of_the_umask_and_its_parents_are_made(tmp_path):
    before = os.umask(0o022)
    try:
        file(tmp_path / "a" / "b" / "out").write("text")
    finally:
        os.umask(before)
    assert (tmp_path / "a" / "b" / "out").stat().st_mode & 0o777 == 0o644


def test_a_file_that_appears_during_the_work_is_not_replaced(tmp_path):
    out = file(tmp_path / "out")
    out.check()
    (tmp_path / "out").write_text(PRECIOUS)
    with pytest.raises(Refusal, match="exists already"):
        out.write("text")
    assert (tmp_path / "out").read_text() == PRECIOUS


def test_an_interrupted_write_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), file(tmp_path / "out").open() as half:
        half.write(b"half")
        raise KeyboardInterrupt
    assert not [*tmp_path.iterdir()]
    with pytest.raises(KeyboardInterrupt), OutputFolder(path=tmp_path / "out").fill() as part:
        (part / "half").write_text("half")
        raise KeyboardInterrupt
    assert not [*tmp_path.iterdir()]


def test_empty_files_marked_files_and_links(tmp_path):
    (tmp_path / "empty").touch()
    file(tmp_path / "empty").write("our mark")
    file(tmp_path / "empty").write("again, with our mark")
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    file(tmp_path / "link").write("through the link, our mark")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "empty").read_text() == "through the link, our mark"
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00" * 9)
    with pytest.raises(Refusal, match="exists already"):
        OutputFile(path=tmp_path / "binary", ours=lambda path: bool(json.loads(path.read_text()))).check()
    file(Path("/dev/null")).write("a device is written to")
    assert not Path("/dev/null").is_file()


def test_a_folder_that_is_read_keeps_its_files(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    with pytest.raises(Refusal, match="is part of"):
        file(folder / "config.json", inputs=(folder,), overwrite=True).check()
    file(folder / "new", inputs=(folder,)).write("our mark")
    file(folder / "new", inputs=(folder, "org/a-name-on-the-hub")).write("our mark")
    shutil.rmtree(folder)
