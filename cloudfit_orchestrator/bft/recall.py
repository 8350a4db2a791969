"""The write-ahead log, cut: what must be kept, as a new log (protocol §4), and what may be forgotten."""

from cloudfit_orchestrator.bft.effects import DropSnapshots, Rewrite
from cloudfit_orchestrator.bft.journal import (
    LogBatch,
    LogDecision,
    LogRecord,
    LogShown,
    LogState,
    LogWedges,
    encode_entry,
)
from cloudfit_orchestrator.bft.messages import Frozen
from cloudfit_orchestrator.bft.ordering import Ordering
from cloudfit_orchestrator.bft.outbox import Outbox
from cloudfit_orchestrator.bft.reconfigure import Successors
from cloudfit_orchestrator.bft.situation import Situation

REWRITE_FACTOR = 2  # the log is rewritten when it has grown to so many times what must be kept
REWRITE_SLACK = 512  # records
REWRITE_SLACK_BYTES = 16 << 20  # the same of bytes: few records may be large, and disks small


def collect(at: Situation, successors: Successors, out: Outbox, shown: int) -> None:
    """Forget what a stable checkpoint made useless; rewrite the log when it pays. `shown`: see `LogShown`."""
    ordering = at.ordering
    if ordering is None:
        return
    slot = None
    if at.installed:
        slot = _settle(at, ordering, out)
        if slot is None:
            return
    else:
        _skip(ordering)
    must_keep = ordering.kept + len(ordering.batches.all())
    too_many = out.log_size > must_keep * REWRITE_FACTOR + REWRITE_SLACK
    if too_many or out.log_bytes > max(out.kept_bytes, ordering.batches.bytes) * REWRITE_FACTOR + REWRITE_SLACK_BYTES:
        entries = [*_entries(at, ordering, successors, slot), LogShown(shown)]
        records = tuple(encode_entry(entry) for entry in entries)
        out.log_size = out.log_bytes = 0
        out.logged(*records)
        out.kept_bytes = out.log_bytes
        out.put(Rewrite(records))


def _skip(ordering: Ordering) -> None:
    """The state is not here yet; it will be a certified one, so what comes long before the newest is of no use."""
    newest = ordering.statements.newest
    if newest is not None:
        ordering.truncate(newest.slot - ordering.record.parameters.window)


def _settle(at: Situation, ordering: Ordering, out: Outbox) -> int | None:
    """Forget old snapshots and all that precedes the own STABLE. Returns the newest durable snapshot's slot."""
    record, stable = ordering.record, at.stable_slot()
    ordering.truncate(stable - record.parameters.window)
    mine = sorted(slot for c, slot in at.execution.snapshots if c == record.c)
    saved = [slot for slot in mine if (record.c, slot) in at.saved]
    if not saved:
        return None
    # Kept: the own newest, all from the own STABLE on (a log may need the state at its h), the newest certified one,
    # what peers are fetching; and as long as none is certified, what the configuration began with.
    keep = {(record.c, slot) for slot in mine if slot >= stable or slot == mine[-1]} | at.execution.pinned(out.now_s)
    certified = [slot for slot in saved if slot in ordering.statements.certificates]
    if certified:
        keep.add((record.c, certified[-1]))
    else:
        keep.update(name for name in at.execution.snapshots if name[0] < record.c or name[1] == record.h)
    if at.execution.snapshots.keys() - keep:
        at.execution.settle(keep)
        at.saved &= keep
        out.put(DropSnapshots(tuple(sorted(keep))))
    return max(saved)


def _entries(at: Situation, ordering: Ordering, successors: Successors, slot: int | None) -> list[Frozen]:
    """A log that rebuilds the present state from the persisted snapshot after `slot`, if there is one."""
    c = ordering.record.c
    entries: list[Frozen] = [LogRecord(at.envelope)]
    entries += [LogBatch(c, data) for data in ordering.batches.all()]
    decided = {}
    if slot is not None:
        # And the later ones, which are on their way to the disk: once there, older ones are dropped.
        kept = sorted(s for of, s in at.execution.snapshots if of == c and s >= slot)
        entries += [LogState(c, s, at.execution.snapshots[(c, s)].root) for s in kept]
        decided = {s: digest for s, digest in at.execution.history.items() if s > slot}
    decided.update(ordering.decisions())
    entries += [LogDecision(c, s, digest) for s, digest in sorted(decided.items())]
    entries += ordering.entries()
    entries += [LogRecord(envelope) for _, (_, envelope) in sorted(successors.prepared.items())]
    entries += [LogWedges(c, names) for names in successors.sets]
    return entries
