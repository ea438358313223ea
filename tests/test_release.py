"""What a release is made of: builds that are equal, locks that hold every package, an audit that is honest."""

import json
import re
import shutil
import subprocess
import tomllib
import zipfile
from io import BytesIO
from pathlib import Path

import pytest

from scripts import audit, release

ROOT = Path(__file__).parent.parent
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize(("file", "extras"), [("requirements.lock", ()), ("requirements-dev.lock", ("dev",))])
def test_a_lock_holds_every_requirement_with_hashes(file, extras):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(x for extra in extras for x in project["optional-dependencies"][extra])]
    text = (ROOT / file).read_text()
    blocks = re.findall(rf"^({NAME})==(\S+)((?:.*\\\n)(?:    --hash=sha256:[0-9a-f]{{64}}.*\n)+)", text, re.MULTILINE)
    locked = {canonical(name): version for name, version, _ in blocks}
    assert len(blocks) == len(re.findall(rf"^{NAME}==", text, re.MULTILINE))  # each one has a hash
    assert {canonical(re.match(NAME, line)[0]) for line in wanted} <= locked.keys()
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if not line.startswith("#"):
            name, version = line.split("==")
            if not extras and name not in locked:  # a package of development alone
                continue
            assert locked[name].partition("+")[0] == version
    assert locked["torch"].endswith("+cpu")


def test_two_builds_are_equal(tmp_path):
    """In other folders, with other file modes, an hour apart by the clock of the files."""
    pytest.importorskip("hatchling", reason="hatchling, of the extra dev, is not installed")
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("this is no clone")
    built = release.build_twice(ROOT)
    (wheel,) = (content for name, content in built.items() if name.endswith(".whl"))
    (sdist,) = (name for name in built if name.endswith(".tar.gz"))
    assert sdist.startswith("opd-")
    names = zipfile.ZipFile(BytesIO(wheel)).namelist()
    assert "opd/analysis/report/pages/page.js" in names and "opd/models/embedded/student/model.safetensors" in names
    assert not any(name.startswith(("tests/", "benchmarks/", "scripts/")) for name in names)


def test_builds_that_differ_are_refused(monkeypatch):
    builds = iter([{"a.whl": b"1", "b": b"2"}, {"a.whl": b"1", "b": b"3"}])
    monkeypatch.setattr(release, "build", lambda *arguments: next(builds))
    with pytest.raises(SystemExit, match="differ in b"):
        release.build_twice(ROOT)


SOUND = {"name": "a", "version": "1", "vulns": []}
UNSOUND = {"name": "b", "version": "2", "vulns": [{"id": "CVE-1", "fix_versions": ["3"]}]}
UNKNOWN = {"name": "c", "skip_reason": "Dependency not found on PyPI"}


@pytest.mark.parametrize(
    ("packages", "code", "says"),
    [
        ([SOUND], 0, "1 of 1 packages audited, 0 vulnerabilities"),
        ([SOUND, UNSOUND], 1, "b 2: CVE-1; fixed in 3"),
        ([SOUND, UNKNOWN], 0, "1 of 2 packages audited"),
        ([UNKNOWN, UNKNOWN], 0, "not audited: the advisory service gave no answer for any of 2 packages"),
    ],
)
def test_an_audit_says_what_it_could_not_see(packages, code, says):
    found, lines = audit.verdict(json.dumps({"dependencies": packages, "fixes": []}), "")
    assert found == code and says in "\n".join(lines)


def test_an_audit_without_its_service_is_none(monkeypatch, capsys):
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="Traceback ...\nConnectionError: no route to host\n")
    monkeypatch.setattr(audit.subprocess, "run", lambda *arguments, **options: failed)
    assert audit.main(["x.lock"]) == 0
    assert capsys.readouterr().out == "x.lock: not audited: ConnectionError: no route to host\n"
