"""Files on disk: outputs that never replace a user's file, and disk errors as messages of one line."""

import contextlib
import difflib
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from opd.core.errors import Refusal, foreign_errors

RESUME = "mend that, then run the same command with --resume"
AGAIN = "mend that, then run the same command again"
HEAD = 4096  # bytes at the start of a file that are searched for its mark


@contextlib.contextmanager
def disk(doing: str, remedy: str = RESUME) -> Iterator[None]:
    """Convert a disk error, such as a full disk or a missing write permission, into a Refusal of one line."""
    try:
        yield
    except Refusal:
        raise
    except OSError as error:
        raise Refusal(f"{doing}: {error.strerror or error}; {remedy}") from error
    except Exception as error:  # safetensors wraps the OS error in its own type, with the reason in its text
        if not any(reason in str(error) for reason in ("No space left", "File too large", "Permission denied")):
            raise
        raise Refusal(f"{doing}: {error}; {remedy}") from error


def reading(path: Path) -> contextlib.AbstractContextManager[None]:
    """Turn an error while a file that opd wrote is read, such as a damaged one, into a Refusal of one line."""
    return foreign_errors(f"{path}: cannot be read", "it is damaged; restore it, or name another folder")


def follow_umask(path: Path) -> None:
    """Give a file, or every file below a folder, the mode of the umask; safetensors and tempfile give 0600."""
    umask = os.umask(0o077)
    os.umask(umask)
    for file in (path, *path.rglob("*")):
        if file.is_file():
            file.chmod(0o666 & ~umask)


def flush_to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk, so that they survive a power cut."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


@dataclass(frozen=True, kw_only=True)
class OutputFile:
    """A file that the user named, and that a command writes completely or not at all.

    >>> out = OutputFile(path=Path("report.html"), ours=has_mark("opd report"))
    >>> out.check()  # before the work
    >>> out.write(text)

    An existing file is replaced if it is empty, if `ours` recognises it as an earlier output of the same command, or if
    the user gave --overwrite.  An input of the command is never replaced.
    """

    path: Path
    ours: Callable[[Path], bool]  # whether a file is an output of this command; may raise ValueError for no
    flag: str = "--out"
    overwrite: bool = False
    inputs: tuple[str | Path, ...] = ()  # files and folders that the command reads; other names are ignored

    def check(self) -> None:
        """Refuse a file that must not be replaced, and a folder in which no file can be created."""
        path = self.path.expanduser()
        with disk(f"{self.flag} {self.path}", "name another file"):
            if path.is_dir():
                raise Refusal(f"{self.flag} {self.path}: is a folder; name a file")
            if _is_device(path):
                return
            if path.exists():
                self._check_replacement(path)
        check_place(path, self.flag)

    def write(self, text: str) -> None:
        """Replace the file by a text."""
        with self.open() as file:
            file.write(text.encode())

    @contextlib.contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Open a temporary file in the same folder, which replaces the named file when it is complete."""
        self.check()  # again: hours may have passed
        path = self.path.expanduser()
        with disk(f"{self.flag} {self.path}", AGAIN):
            if _is_device(path):
                with path.open("wb") as device:
                    yield device
                return
            target = _target(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            number, part = tempfile.mkstemp(prefix=f".{target.name[:40]}.", suffix=".part", dir=target.parent)
            try:
                with os.fdopen(number, "wb") as file:
                    yield file
                follow_umask(Path(part))
                os.replace(part, target)
            except BaseException:
                Path(part).unlink(missing_ok=True)
                raise

    def _check_replacement(self, path: Path) -> None:
        """Refuse to replace an input, or, without --overwrite, a file of another origin."""
        target, inputs = _target(path), [Path(name).expanduser() for name in self.inputs]
        if any(source.is_file() and source.samefile(target) for source in inputs):
            raise Refusal(f"{self.flag} {self.path}: is read by the same command; name another file")
        with contextlib.suppress(ValueError):  # of `ours`: neither text nor json
            if target.stat().st_size == 0 or self.ours(target):
                return
        for source in inputs:
            if source.is_dir() and target.is_relative_to(source.resolve()):
                raise Refusal(f"{self.flag} {self.path}: is part of {source}, which is read; name another file")
        if not self.overwrite:
            raise Refusal(
                f"{self.flag} {self.path}: exists already, and this command did not write it; name another file, or "
                "add --overwrite to replace it"
            )


@dataclass(frozen=True, kw_only=True)
class OutputFolder:
    """A new folder that the user named and a command fills; it never replaces a folder."""

    path: Path
    flag: str = "--out"

    def check(self) -> None:
        """Refuse a path that is not an empty or missing folder, and a parent in which no folder can be created."""
        path = self.path.expanduser()
        with disk(f"{self.flag} {self.path}", "name another folder"):
            if os.path.lexists(path) and not path.is_dir():
                raise Refusal(f"{self.flag} {self.path}: exists already, and is no folder; name a new folder")
            if path.is_dir() and any(path.iterdir()):
                raise Refusal(
                    f"{self.flag} {self.path}: exists already, and is not empty; name a new folder, or remove this one"
                )
        check_place(path, self.flag)

    @contextlib.contextmanager
    def fill(self) -> Iterator[Path]:
        """Create a temporary folder beside the named one, which gets that name when it is filled."""
        self.check()
        with disk(f"{self.flag} {self.path}", AGAIN):
            target = _target(self.path.expanduser())
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(
                prefix=f".{target.name[:40]}.", suffix=".part", dir=target.parent
            ) as holder:
                part = Path(holder) / "part"
                part.mkdir()  # with the mode of the umask; the holder has 0700
                yield part
                follow_umask(part)
                part.replace(target)


def _target(path: Path) -> Path:
    """Return the path that is written: the target of a symbolic link, so that the link is kept."""
    return Path(os.path.realpath(path))


def _is_device(path: Path) -> bool:
    """Return whether a path is a pipe, a terminal or /dev/null, which is written in place."""
    return path.exists() and not path.is_file() and not path.is_dir()


def check_place(path: Path, flag: str) -> None:
    """Refuse a path at which no file can be created; a temporary file in the nearest existing folder tests that."""
    parent = next(p for p in _target(path.expanduser()).parents if os.path.lexists(p))
    with disk(f"{flag} {path}: no file can be created in {parent}", "name another place"):
        tempfile.TemporaryFile(dir=parent).close()


def has_mark(mark: str) -> Callable[[Path], bool]:
    """Return a check for `mark` near the start of a file."""

    def check(path: Path) -> bool:
        with path.open("rb") as file:
            return mark.encode() in file.read(HEAD)

    return check


def nearest(path: Path) -> str:
    """Return the existing names that a missing path resembles, to end a clause with."""
    if not path.parent.is_dir():
        return f" (there is no folder {path.parent})"
    close = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], cutoff=0.5)
    return f" (did you mean {' or '.join(str(path.with_name(name)) for name in close)}?)" if close else ""
