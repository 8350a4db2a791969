"""How the project opens SQLite: write-ahead log, every commit on stable storage, readable by the owner only."""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import RLock

from cloudfit_orchestrator.model.errors import PermanentError, TemporaryError

BUSY_TIMEOUT_S = 10.0  # another writer holds the lock for one fsync at a time


class Database:
    """One connection, used by many threads in turn. Raises PermanentError or TemporaryError, never sqlite3's own."""

    def __init__(self, path: Path, schema: str) -> None:
        """Open or create `path`; `schema` holds statements that are safe to repeat."""
        self.path = path
        self._lock = RLock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
            path.chmod(0o600)  # the -wal and -shm files inherit it
            self._db = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.executescript(schema)
        except (OSError, sqlite3.Error) as error:
            raise PermanentError(
                f"cannot open database {path.name}: {error}", next_command="cloudfit doctor"
            ) from error

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """A transaction that holds the write lock from its start; durable when the block ends without an error."""
        with self._lock, self._mapped():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """Reads that see the last commit."""
        with self._lock, self._mapped():
            yield self._db

    @contextmanager
    def _mapped(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            kind = TemporaryError if "locked" in str(error) else PermanentError
            raise kind(f"database {self.path.name}: {error}", next_command="cloudfit doctor") from error
        except sqlite3.DatabaseError as error:
            raise PermanentError(f"database {self.path.name}: {error}", next_command="cloudfit doctor") from error

    def close(self) -> None:
        """Close the connection."""
        with self._lock:
            self._db.close()
