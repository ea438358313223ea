"""The lock of a run folder, so that two trainers never write to it: `with locked(folder): ...`."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from opd.core.disk import disk
from opd.core.errors import Refusal
from opd.core.processes import cleaned_up

NAME = ".lock"
TOUCH_EVERY = 20.0  # seconds between signs of life in the lock file, for hosts that the file system does not lock out
DEAD_AFTER = 75.0  # seconds without a sign of life after which the holder on another host counts as dead
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL}  # of file systems that lock no files


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock."""

    pid: int
    host: str
    boot: str  # id of the host's current boot: names of hosts may repeat
    since: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a run folder; create the folder, and remove it again if nothing was written to it.

    The kernel releases the lock when the process ends, however it ends.  A file system may not lock files between
    hosts; there the holder's signs of life decide.  Raises Refusal that names the holder if another process has it.
    """
    created = not folder.exists()

    def remove() -> None:
        with contextlib.suppress(OSError):
            (folder / NAME).unlink()
        if created:
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()

    with disk(f"--out {folder}", "name another folder"):
        folder.mkdir(parents=True, exist_ok=True)
        number = _acquire(folder / NAME, folder)
    ended = threading.Event()
    thread = threading.Thread(target=_touch, args=(folder / NAME, ended), daemon=True)
    try:
        thread.start()
        with cleaned_up(remove):
            yield
    finally:
        ended.set()
        os.close(number)


def _acquire(path: Path, folder: Path) -> int:
    """Return the descriptor of the lock file, locked and with this process in it."""
    while True:
        number = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                holder = _holder(number)
                os.close(number)
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    raise _refusal(folder, holder) from error
                raise
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(number), path.stat()):
                break
        os.close(number)  # the holder before removed the file in the meantime
    try:
        holder, me = _holder(number), _me()
        if holder is not None and holder.boot != me.boot and _shows_life(path, holder):
            raise _refusal(folder, holder)
        os.ftruncate(number, 0)
        os.pwrite(number, json.dumps(asdict(me)).encode(), 0)
    except BaseException:
        os.close(number)
        raise
    return number


def _refusal(folder: Path, holder: Holder | None) -> Refusal:
    return Refusal(
        f"--out {folder}: another trainer writes to it ({holder or 'its process is not known'}); wait until it ends, "
        "stop it, or name another folder"
    )


def _me() -> Holder:
    boot = Path("/proc/sys/kernel/random/boot_id")
    host = socket.gethostname()
    text = boot.read_text().strip() if boot.is_file() else host
    return Holder(os.getpid(), host, text, time.strftime("%Y-%m-%d %H:%M:%S"))


def _holder(number: int) -> Holder | None:
    """Return the process in a lock file; None if there is none, as while the file is being written."""
    try:
        return Holder(**json.loads(os.pread(number, 4096, 0)))
    except (ValueError, TypeError):
        return None


def _shows_life(path: Path, holder: Holder) -> bool:
    """Return whether a holder on another host is alive; wait for a sign of life unless the last one is too old."""
    last = path.stat().st_mtime
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f"{NAME}.") as file:
        now = os.fstat(file.fileno()).st_mtime  # the clock of the file system, as that of the last sign
    print(f"waiting up to {DEAD_AFTER:.0f} s: {path.parent} was in use by {holder}", file=sys.stderr, flush=True)
    end = time.monotonic() + DEAD_AFTER - (now - last)
    while time.monotonic() < end:
        if path.stat().st_mtime != last:
            return True
        time.sleep(1)
    return False


def _touch(path: Path, ended: threading.Event) -> None:
    while not ended.wait(TOUCH_EVERY):
        with contextlib.suppress(OSError):
            os.utime(path)
