"""What a disk refuses, as one line: `with disk(doing): ...`."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from opd.types import Refusal


@contextlib.contextmanager
def disk(doing: str) -> Iterator[None]:
    """Turn a full disk or a folder one may not write into one clear line."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EFBIG):
            raise
        raise Refusal(f"{doing}: {error.strerror}; mend that, then run the same command with --resume") from error
    except Exception as error:  # safetensors wraps the OS error in its own type, with the reason in its text
        if not any(reason in str(error) for reason in ("No space left", "File too large", "Permission denied")):
            raise
        raise Refusal(f"{doing}: {error}; mend that, then run the same command with --resume") from error


def umask() -> int:
    """Return the permission bits that new files of this process do not get."""
    current = os.umask(0o077)
    os.umask(current)
    return current


def follow_umask(folder: Path) -> None:
    """Give every file below a folder the mode that the umask asks for: safetensors makes files of mode 0600."""
    mode = 0o666 & ~umask()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)
