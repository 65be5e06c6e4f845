"""Which rows are done, and how often a row was seen: on disk, so that memory stays bounded."""

import hashlib
import json
import sqlite3
from typing import Any

CACHE_KIB = 16 << 10
"""Memory for the index; the rest spills into a temporary file that ends with the process."""


def content_key(value: Any) -> str:
    """A row's id where it brings none: a hash of its content, whatever the order of its keys."""
    if not isinstance(value, bytes):
        value = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str).encode(
            errors="surrogatepass"
        )
    return hashlib.blake2b(value, digest_size=16).hexdigest()


def shard_of(key: str, count: int) -> int:
    """The shard of a row, in [0, count)."""
    digest = hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") % count


class Keys:
    """An index over rows. Owned by the job's thread."""

    def __init__(self) -> None:
        # An empty name is SQLite's private database in a temporary file.
        self._db = sqlite3.connect("", isolation_level=None)
        self._db.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
        self._db.execute("PRAGMA journal_mode = OFF")
        self._db.execute("PRAGMA synchronous = OFF")
        self._db.execute("CREATE TABLE done (key BLOB PRIMARY KEY) WITHOUT ROWID")
        self._db.execute("CREATE TABLE seen (key BLOB PRIMARY KEY, num INT) WITHOUT ROWID")

    def add_done(self, key: str) -> bool:
        """Notes that a row has its result; False if it had one already."""
        cursor = self._db.execute("INSERT OR IGNORE INTO done VALUES (?)", (_digest(key),))
        return cursor.rowcount == 1

    def is_done(self, key: str) -> bool:
        """Whether a row has its result."""
        found = self._db.execute("SELECT 1 FROM done WHERE key = ?", (_digest(key),))
        return found.fetchone() is not None

    def count(self, key: str) -> int:
        """How often this key was counted before."""
        upsert = "INSERT INTO seen VALUES (?, 0) ON CONFLICT DO UPDATE SET num = num + 1"
        return self._db.execute(f"{upsert} RETURNING num", (_digest(key),)).fetchone()[0]

    def close(self) -> None:
        """Drops the index."""
        self._db.close()


def _digest(key: str) -> bytes:
    return hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=12).digest()
