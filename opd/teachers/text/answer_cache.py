"""A cache of generated texts on disk, so that runs that share its file send the same request only once."""

import hashlib
import json
import sqlite3
import threading
from collections.abc import Sequence
from pathlib import Path

from opd.core.errors import Refusal


def cache_key(*parts: object) -> str:
    """Return the cache key of a request: a hash of model, prompt, parameters and seed as json."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class AnswerCache:
    """A SQLite file of texts by key.  Threads and processes may share it.  The first entry creates the file."""

    def __init__(self, path: Path) -> None:
        self.path, self.lock = path, threading.Lock()
        self.file: sqlite3.Connection | None = None

    def find(self, key: str) -> list[str] | None:
        """Return the texts of a key, or None if the cache has none."""
        with self.lock:
            if self.file is None and not self.path.is_file():
                return None
            rows = self._do("SELECT texts FROM answers WHERE key = ?", key)
        return self._texts(key, rows[0][0]) if rows else None

    def _texts(self, key: str, saved: object) -> list[str]:
        """Return the texts of an entry.  Raises Refusal for a damaged one."""
        digest, _, text = saved.partition(" ") if isinstance(saved, str) else ("", "", "")
        if isinstance(saved, str) and saved.startswith("["):  # an entry of before there were digests
            digest, text = _digest(key, saved), saved
        try:
            texts = json.loads(text) if digest == _digest(key, text) else None
        except (ValueError, RecursionError):
            texts = None
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise Refusal(f"--teacher-cache {self.path}: an entry is damaged; remove the file, or name another one")
        return texts

    def store(self, key: str, texts: Sequence[str]) -> None:
        """Store the texts of a key."""
        text = json.dumps(list(texts))
        with self.lock:
            self._do("INSERT OR REPLACE INTO answers VALUES (?, ?)", key, f"{_digest(key, text)} {text}")

    def drop(self, keys: Sequence[str]) -> None:
        """Delete the entries of the keys."""
        with self.lock:
            for key in keys if self.file is not None or self.path.is_file() else ():
                self._do("DELETE FROM answers WHERE key = ?", key)

    def _do(self, statement: str, *values: str) -> list[tuple[object, ...]]:
        """Execute a statement; return its rows."""
        try:
            if self.file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                # Each statement is one transaction, so that paid answers survive a killed run.
                self.file = sqlite3.connect(self.path, timeout=60, isolation_level=None, check_same_thread=False)
                self.file.execute("PRAGMA journal_mode=WAL")
                self.file.execute("PRAGMA synchronous=NORMAL")
                self.file.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, texts TEXT) WITHOUT ROWID")
            return self.file.execute(statement, values).fetchall()
        except (sqlite3.Error, OSError) as error:
            raise Refusal(
                f"--teacher-cache {self.path}: {error}; name a folder that can be written, or remove a broken file"
            ) from error


def _digest(key: str, text: str) -> str:
    """Return the digest of an entry, so that damage on the disk is no other answer."""
    return hashlib.sha256(f"{key} {text}".encode()).hexdigest()[:16]
