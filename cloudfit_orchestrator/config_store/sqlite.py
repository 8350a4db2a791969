"""Embedded CONFIG STORAGE: one SQLite file, one writer at a time, compare-and-swap inside its write transaction."""

import sqlite3
from pathlib import Path

from cloudfit_orchestrator.config_store.base import LogEntry, Verdict
from cloudfit_orchestrator.config_store.chain import ChainState, extend, walk
from cloudfit_orchestrator.config_store.database import Database
from cloudfit_orchestrator.model.errors import BadError
from cloudfit_orchestrator.model.record import NO_DIGEST, ConfigRecord, Status, open_record, record_hash
from cloudfit_orchestrator.model.signing import Ed25519Verifier, Verifier

_SCHEMA = """
CREATE TABLE IF NOT EXISTS records (
  grp TEXT NOT NULL, life INTEGER NOT NULL, sequence INTEGER NOT NULL, c INTEGER NOT NULL, status TEXT NOT NULL,
  hash BLOB NOT NULL, envelope BLOB NOT NULL, PRIMARY KEY (grp, life, sequence), UNIQUE (grp, life, status, c)
) STRICT;
"""
_LIVE = 0  # `life` of the chain in use; an archived chain has 1, 2, …


class SqliteConfigStore:
    """See `ConfigStore`. `trusted`: raw public keys of the controllers that may write records."""

    def __init__(self, path: Path, trusted: list[bytes], verifier: Verifier | None = None) -> None:
        """Open or create the file at `path` (0600)."""
        self._db = Database(path, _SCHEMA)
        self._trusted = trusted
        self._verifier = verifier or Ed25519Verifier()

    def append_prepared(self, envelope: bytes) -> None:
        """See `ConfigStore.append_prepared`."""
        self._append(envelope, Status.PREPARED)

    def activate(self, envelope: bytes) -> None:
        """See `ConfigStore.activate`."""
        self._append(envelope, Status.ACTIVE)

    def active(self, group: str) -> bytes | None:
        """See `ConfigStore.active`."""
        with self._db.read() as db:
            row = _newest(db, group, Status.ACTIVE)
        return row[0] if row else None

    def log(self, group: str) -> list[LogEntry]:
        """See `ConfigStore.log`."""
        with self._db.read() as db:
            rows = db.execute(
                "SELECT sequence, envelope FROM records WHERE grp=? AND life=? ORDER BY sequence", (group, _LIVE)
            ).fetchall()
        return [LogEntry(sequence, envelope) for sequence, envelope in rows]

    def head(self, group: str) -> bytes:
        """See `ConfigStore.head`."""
        with self._db.read() as db:
            return _head(db, group)

    def verify(self, group: str, remembered: bytes | None = None) -> Verdict:
        """See `ConfigStore.verify`."""
        return walk(group, self.log(group), self._trusted, self._verifier, remembered)

    def groups(self) -> list[str]:
        """See `ConfigStore.groups`."""
        with self._db.read() as db:
            return [g for (g,) in db.execute("SELECT DISTINCT grp FROM records WHERE life=? ORDER BY grp", (_LIVE,))]

    def archive(self, group: str) -> None:
        """See `ConfigStore.archive`."""
        with self._db.write() as db:
            (last,) = db.execute("SELECT COALESCE(MAX(life), 0) FROM records WHERE grp=?", (group,)).fetchone()
            db.execute("UPDATE records SET life=? WHERE grp=? AND life=?", (last + 1, group, _LIVE))

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def _append(self, envelope: bytes, status: Status) -> None:
        record = open_record(envelope, self._trusted)
        if record.status is not status:
            raise BadError(f"record c={record.c} of {record.group} is {record.status}, not {status}")
        digest = record_hash(envelope)
        with self._db.write() as db:
            known = "SELECT envelope FROM records WHERE grp=? AND life=? AND hash=?"
            if db.execute(known, (record.group, _LIVE, digest)).fetchone() == (envelope,):
                return  # written before a crash, or repeated
            extend(self._state(db, record.group), envelope, self._trusted, self._verifier)
            db.execute(
                "INSERT INTO records SELECT ?, ?, COALESCE(MAX(sequence), 0) + 1, ?, ?, ?, ? FROM records "
                "WHERE grp=? AND life=?",
                (record.group, _LIVE, record.c, status.value, digest, envelope, record.group, _LIVE),
            )

    def _state(self, db: sqlite3.Connection, group: str) -> ChainState:
        def opened(status: Status) -> tuple[ConfigRecord | None, bytes]:
            row = _newest(db, group, status)
            return (open_record(row[0], self._trusted), record_hash(row[0])) if row else (None, NO_DIGEST)

        newest, newest_hash = opened(Status.PREPARED)
        return ChainState(group, _head(db, group), opened(Status.ACTIVE)[0], newest, newest_hash)


def _newest(db: sqlite3.Connection, group: str, status: Status) -> tuple[bytes] | None:
    query = "SELECT envelope FROM records WHERE grp=? AND life=? AND status=? ORDER BY sequence DESC LIMIT 1"
    row: tuple[bytes] | None = db.execute(query, (group, _LIVE, status.value)).fetchone()
    return row


def _head(db: sqlite3.Connection, group: str) -> bytes:
    query = "SELECT envelope FROM records WHERE grp=? AND life=? ORDER BY sequence DESC LIMIT 1"
    row = db.execute(query, (group, _LIVE)).fetchone()
    return record_hash(row[0]) if row else NO_DIGEST
