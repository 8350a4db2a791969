"""The write-ahead log, cut: what must be kept, as a new log (protocol §4), and what may be forgotten."""

from cloudfit_orchestrator.bft.configuration import Configuration
from cloudfit_orchestrator.bft.effects import DropSnapshots, Rewrite
from cloudfit_orchestrator.bft.journal import (
    Entry,
    LogAnchor,
    LogBatch,
    LogBody,
    LogDecision,
    LogEnd,
    LogMessage,
    LogRecord,
    LogState,
    LogUI,
    LogView,
    LogWedges,
    encode_entry,
)
from cloudfit_orchestrator.bft.messages import EpochEndMessage
from cloudfit_orchestrator.bft.outbox import Outbox
from cloudfit_orchestrator.bft.reconfigure import Successors
from cloudfit_orchestrator.bft.situation import Situation
from cloudfit_orchestrator.model.ui import EpochEnd

REWRITE_FACTOR = 2  # the log is rewritten when it has grown to so many times what must be kept
REWRITE_SLACK = 512  # records


def end_message(end: EpochEnd) -> EpochEndMessage:
    """EPOCH-END as it is logged and handed round."""
    return EpochEndMessage(end.c, end.replica, end.cv_end, end.last_digest, end.last_certificate, end.signature)


def epoch_end(message: EpochEndMessage) -> EpochEnd:
    """The reverse."""
    return EpochEnd(
        message.replica, message.c, message.cv_end, message.last_digest, message.last_certificate, message.signature
    )


def collect(at: Situation, successors: Successors, out: Outbox) -> None:
    """Forget what a stable checkpoint made useless; rewrite the log when it pays."""
    configuration = at.configuration
    if configuration is None:
        return
    slot = None
    if at.installed:
        slot = _settle(at, configuration, out)
        if slot is None:
            return
    else:
        _skip(configuration)
    must_keep = sum(len(stream.kept) for stream in configuration.streams.values()) + len(configuration.batches.all())
    if out.log_size > must_keep * REWRITE_FACTOR + REWRITE_SLACK:
        entries = _entries(at, configuration, successors, slot)
        out.log_size = len(entries)
        out.put(Rewrite(tuple(encode_entry(entry) for entry in entries)))


def _skip(configuration: Configuration) -> None:
    """The state is not here yet; it will be a certified one, so what comes long before the newest is of no use."""
    newest = configuration.statements.newest
    if newest is not None:
        configuration.truncate(newest.slot - configuration.record.parameters.window)


def _settle(at: Situation, configuration: Configuration, out: Outbox) -> int | None:
    """Forget old snapshots and all that precedes the own STABLE. Returns the newest durable snapshot's slot."""
    record, stable = configuration.record, at.stable_slot()
    configuration.truncate(stable - record.parameters.window)
    mine = sorted(slot for c, slot in at.execution.snapshots if c == record.c)
    saved = [slot for slot in mine if (record.c, slot) in at.saved]
    if not saved:
        return None
    # Kept: the own newest, all from the own STABLE on (a log may need the state at its h), the newest certified one,
    # what peers are fetching; and as long as none is certified, what the configuration began with.
    keep = {(record.c, slot) for slot in mine if slot >= stable or slot == mine[-1]} | at.execution.pinned(out.now_s)
    certified = [slot for slot in saved if slot in configuration.statements.certificates]
    if certified:
        keep.add((record.c, certified[-1]))
    else:
        keep.update(name for name in at.execution.snapshots if name[0] < record.c or name[1] == record.h)
    if at.execution.snapshots.keys() - keep:
        at.execution.settle(keep)
        at.saved &= keep
        out.put(DropSnapshots(tuple(sorted(keep))))
    return max(saved)


def _entries(at: Situation, configuration: Configuration, successors: Successors, slot: int | None) -> list[Entry]:
    """A log that rebuilds the present state from the persisted snapshot after `slot`, if there is one."""
    record = configuration.record
    c, streams = record.c, configuration.streams.values()
    entries: list[Entry] = [LogRecord(at.envelope)]
    entries += [LogBatch(c, data) for data in configuration.batches.all()]
    entries += [LogView(view.message) for _, view in sorted(configuration.new_views.items())]
    entries += [LogAnchor(anchor.message) for stream in streams if (anchor := stream.anchor()) is not None]
    decided = {}
    if slot is not None:
        entries.append(LogState(c, slot, at.execution.snapshots[(c, slot)].root))
        decided = {s: digest for s, digest in at.execution.history.items() if s > slot}
    decided.update(configuration.slots.decisions())
    entries += [LogDecision(c, s, digest) for s, digest in sorted(decided.items())]
    entries += _messages(at, configuration)
    if at.voice is not None:
        entries += [LogBody(c, cv, *body) for cv, body in sorted(at.voice.pending.items())]
    entries += [LogRecord(envelope) for _, (_, envelope) in sorted(successors.prepared.items())]
    entries += [LogEnd(end_message(end)) for end in configuration.votes.epoch_ends.values()]
    entries += [LogWedges(c, names) for names in successors.sets]
    return entries


def _messages(at: Situation, configuration: Configuration) -> list[Entry]:
    """Kept stream messages. Their order among streams does not matter: one that cites another's waits for it."""
    found: list[Entry] = []
    for stream in configuration.streams.values():
        for cv, kept in stream.kept.items():
            message = kept.message
            if stream.base and cv == stream.base + 1:
                continue  # the anchor itself
            if stream.replica == at.me and at.voice is not None:
                found.append(LogBody(message.c, cv, message.header, message.payload))
                found.append(LogUI(message.c, cv, message.certificate))
            else:
                found.append(LogMessage(message))
    return found
