"""Builds the files of a release in dist/: `python scripts/release.py [FOLDER]`, `make release`.

It builds the committed state twice, in two folders, and refuses to write files that differ.  Beside wheel and sdist it
writes their sums (SHA256SUMS) and the list of all packages that they need, from requirements.lock (CycloneDX JSON).
"""

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run(command: Sequence[str], folder: Path, **environment: str) -> bytes:
    """Run a command in a folder, and return what it printed."""
    return subprocess.run(
        command, cwd=folder, env={**os.environ, **environment}, check=True, stdout=subprocess.PIPE
    ).stdout


def build(source: Path, commit: str, out: Path) -> dict[str, bytes]:
    """Build wheel and sdist of a commit in an empty folder, dated by the commit; return the files by name."""
    epoch = run(["git", "log", "-1", "--format=%ct", commit], source).decode().strip()
    tree = out / "tree"
    with tarfile.open(fileobj=BytesIO(run(["git", "archive", commit], source))) as archive:
        archive.extractall(tree, filter="data")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out / "dist"), str(tree)]
    run(command, out, SOURCE_DATE_EPOCH=epoch)
    return {path.name: path.read_bytes() for path in sorted((out / "dist").iterdir())}


def build_twice(source: Path, commit: str = "HEAD") -> dict[str, bytes]:
    """Return the files of two builds that are equal; raise SystemExit if they differ."""
    builds = []
    for mask in (0o022, 0o077):
        with tempfile.TemporaryDirectory(prefix=f"opd-{mask}-") as folder:
            before = os.umask(mask)
            try:
                builds.append(build(source, commit, Path(folder)))
            finally:
                os.umask(before)
    if differing := [name for name in builds[0] if builds[0][name] != builds[1].get(name)]:
        raise SystemExit(f"release: two builds of {commit} differ in {', '.join(differing)}")
    return builds[0]


def main(out: Path) -> None:
    """Write the release into a folder."""
    if run(["git", "status", "--porcelain"], ROOT):
        raise SystemExit("release: the work tree has changes; commit or remove them")
    built = build_twice(ROOT)
    out.mkdir(parents=True, exist_ok=True)
    for name, content in built.items():
        (out / name).write_bytes(content)
    sums = "".join(f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in built.items())
    (out / "SHA256SUMS").write_text(sums)
    wheel = next(name for name in built if name.endswith(".whl"))
    bill = [
        "cyclonedx_py",
        "requirements",
        "requirements.lock",
        "--pyproject",
        "pyproject.toml",
        "--mc-type",
        "library",
    ]
    bom = out.resolve() / f"{'-'.join(wheel.split('-')[:2])}.cdx.json"
    run([sys.executable, "-m", *bill, "--output-reproducible", "--output-file", str(bom)], ROOT)
    print(sums + bom.name)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "dist")
