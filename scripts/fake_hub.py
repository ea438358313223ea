"""Lay out model folders as the cache of the Hugging Face hub has them, so that hub ids load without a network.

    python scripts/fake_hub.py CACHE_DIR NAME=FOLDER [NAME=FOLDER ...]
    HF_HOME=CACHE_DIR HF_HUB_OFFLINE=1 opd eval --model NAME ...

NAME is owner/name or owner/name@revision, FOLDER a saved model or embedded:NAME.  Files are blobs, a snapshot holds
links to them, and refs/ names the commit of each revision, as huggingface_hub writes them.
"""

import hashlib
import os
import shutil
import sys
from pathlib import Path

from huggingface_hub.constants import DEFAULT_REVISION
from huggingface_hub.file_download import repo_folder_name

from opd.data.hub import parse
from opd.models.source import EMBEDDED


def add(cache: Path, name: str, folder: Path) -> str:
    """Put a folder into a cache under a hub id; returns the commit, which depends on the files alone."""
    repository = parse(name)
    if repository is None:
        raise ValueError(f"{name}: write owner/name or owner/name@revision")
    root = cache / "hub" / repo_folder_name(repo_id=repository.id, repo_type="model")
    files = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    blobs = {file: hashlib.sha256(path.read_bytes()).hexdigest() for file, path in files.items()}
    commit = hashlib.sha1(repr(sorted(blobs.items())).encode()).hexdigest()  # 40 hexadecimal digits, as of git
    for file, blob in blobs.items():
        stored, link = root / "blobs" / blob, root / "snapshots" / commit / file
        for path in (stored, link):
            path.parent.mkdir(parents=True, exist_ok=True)
        if not stored.exists():
            shutil.copyfile(files[file], stored)
        if not link.is_symlink():
            link.symlink_to(os.path.relpath(stored, link.parent))
    if repository.revision != commit:
        ref = root / "refs" / (repository.revision or DEFAULT_REVISION)
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(commit)
    return commit


def main(arguments: list[str]) -> None:
    """Add each NAME=FOLDER and print its commit."""
    if len(arguments) < 2 or not all("=" in pair for pair in arguments[1:]):
        sys.exit(__doc__)
    cache, *pairs = arguments
    for pair in pairs:
        name, _, folder = pair.partition("=")
        path = EMBEDDED / folder.removeprefix("embedded:") if folder.startswith("embedded:") else Path(folder)
        if not path.is_dir():
            sys.exit(f"{pair}: there is no folder {path}")
        print(name, add(Path(cache), name, path))


if __name__ == "__main__":
    main(sys.argv[1:])
