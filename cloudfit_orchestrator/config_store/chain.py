"""The rules of a record chain (protocol §6), as one pure step that appending and verifying share.

Trusted are only the controllers' keys. Nothing a store holds is believed because it is stored: signature, link,
order of configurations and confirmations are checked of every record, in this order.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from cloudfit_orchestrator.config_store.base import LogEntry, Verdict
from cloudfit_orchestrator.model.errors import BadError, RefusedError
from cloudfit_orchestrator.model.record import (
    NO_DIGEST,
    ConfigRecord,
    Status,
    check_confirmations,
    open_record,
    record_hash,
)
from cloudfit_orchestrator.model.signing import Verifier


@dataclass(frozen=True, slots=True)
class ChainState:
    """All that the next record is judged by."""

    group: str
    head: bytes = NO_DIGEST
    active: ConfigRecord | None = None
    newest: ConfigRecord | None = None  # newest PREPARED
    newest_hash: bytes = NO_DIGEST

    @property
    def active_c(self) -> int | None:
        """Number of the ACTIVE configuration, or None."""
        return self.active.c if self.active else None


def extend(state: ChainState, envelope: bytes, trusted: list[bytes], verifier: Verifier) -> ChainState:
    """The state after `envelope`. Raises BadError if it is wrong in itself, RefusedError if it comes too late."""
    record = open_record(envelope, trusted)
    if record.group != state.group:
        raise BadError(f"record c={record.c} is of group {record.group!r}, not {state.group!r}")
    if record.previous != state.head:
        raise RefusedError(
            f"record c={record.c} of {record.group} follows {record.previous.hex()[:16]}, "
            f"the head of the chain is {state.head.hex()[:16]}: another writer was faster",
            next_command=f"cloudfit config log {record.group}",
        )
    if record.status is Status.PREPARED:
        return _prepared(state, record, envelope)
    return _active(state, record, envelope, verifier)


def _prepared(state: ChainState, record: ConfigRecord, envelope: bytes) -> ChainState:
    if (record.prepared, record.h, record.digest, record.confirmations) != (NO_DIGEST, 0, NO_DIGEST, ()):
        raise BadError(f"PREPARED record c={record.c} of {record.group} pins a state: only ACTIVE does")
    if record.base != state.active_c:
        raise RefusedError(
            f"record c={record.c} of {record.group} is built on base {record.base}, ACTIVE is {state.active_c}",
            next_command=f"cloudfit config log {record.group}",
        )
    if state.newest is not None and record.c <= state.newest.c:
        raise RefusedError(f"configuration {record.c} of {record.group} is not newer than PREPARED {state.newest.c}")
    digest = record_hash(envelope)
    return replace(state, head=digest, newest=record, newest_hash=digest)


def _active(state: ChainState, record: ConfigRecord, envelope: bytes, verifier: Verifier) -> ChainState:
    if record.base != state.active_c:
        raise RefusedError(
            f"ACTIVE record c={record.c} of {record.group} has base {record.base}, ACTIVE is {state.active_c} already"
        )
    if state.newest is None or record.c != state.newest.c:
        newest = state.newest.c if state.newest else None
        raise RefusedError(f"c={record.c} of {record.group} is not the newest PREPARED record; that is {newest}")
    if record.prepared != state.newest_hash:
        raise BadError(f"ACTIVE record c={record.c} of {record.group} names another PREPARED record than the stored")
    pinned = state.newest.activated(
        prepared=record.prepared,
        previous=record.previous,
        h=record.h,
        digest=record.digest,
        confirmations=record.confirmations,
    )
    if pinned != record:
        raise BadError(f"ACTIVE record c={record.c} of {record.group} differs from its PREPARED record")
    check_confirmations(record, verifier)
    return replace(state, head=record_hash(envelope), active=record)


def walk(
    group: str, entries: Iterable[LogEntry], trusted: list[bytes], verifier: Verifier, remembered: bytes | None
) -> Verdict:
    """Judge a whole chain: the first record that does not hold is named, and so is a head that has vanished."""
    state = ChainState(group)
    seen = remembered is None or remembered == NO_DIGEST
    count = 0
    for count, entry in enumerate(entries, start=1):
        if entry.sequence != count:
            reason = f"record {count} is missing, the next stored is {entry.sequence}"
            return Verdict(group, count - 1, state.head, state.active_c, count, reason)
        try:
            state = extend(state, entry.envelope, trusted, verifier)
        except (BadError, RefusedError) as error:
            return Verdict(group, count - 1, state.head, state.active_c, count, error.fact)
        seen = seen or state.head == remembered
    if not seen:
        reason = f"the head seen earlier, {(remembered or b'').hex()[:16]}, is not in the chain: it was rolled back"
        return Verdict(group, count, state.head, state.active_c, count + 1, reason)
    return Verdict(group, count, state.head, state.active_c)
