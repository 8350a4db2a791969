"""The interface of CONFIG STORAGE. Embedded SQLite implements it; a replicated store can come beside it."""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One record of a group's chain, as stored. `sequence` counts from 1 in each group."""

    sequence: int
    envelope: bytes


@dataclass(frozen=True, slots=True)
class Verdict:
    """What `verify` found: `bad_link` is None, or the sequence number of the first record that does not hold."""

    group: str
    records: int
    head: bytes
    active_c: int | None
    bad_link: int | None = None
    reason: str = ""

    @property
    def good(self) -> bool:
        """Every record and every link holds."""
        return self.bad_link is None


class ConfigStore(Protocol):
    """Records of all groups. Every write is durable when the call returns; repeating a write is no error."""

    def append_prepared(self, envelope: bytes) -> None:
        """Append a PREPARED record. Raises BadError (signature, content) or RefusedError (not built on the head)."""
        ...

    def activate(self, envelope: bytes) -> None:
        """Compare-and-swap to ACTIVE: succeeds only while ACTIVE is `base` and this c is the newest PREPARED for it.

        Raises BadError (signature, confirmations, fields that differ from PREPARED) or RefusedError (race lost).
        """
        ...

    def active(self, group: str) -> bytes | None:
        """The envelope of the ACTIVE record, or None."""
        ...

    def log(self, group: str) -> list[LogEntry]:
        """The whole chain, oldest first."""
        ...

    def head(self, group: str) -> bytes:
        """The hash of the newest envelope; NO_DIGEST for an empty chain."""
        ...

    def verify(self, group: str, remembered: bytes | None = None) -> Verdict:
        """Walk the whole chain. `remembered`: a head seen earlier, which must still be in it (else: rolled back)."""
        ...

    def groups(self) -> list[str]:
        """Names of all groups that have records."""
        ...

    def archive(self, group: str) -> None:
        """Take the chain of a destroyed group out of the way; it is kept. A group without records is no error."""
        ...
