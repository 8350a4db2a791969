"""The streams of one configuration as log entries, and EPOCH-END as it travels."""

from collections.abc import Sequence

from cloudfit_orchestrator.bft.messages import Frozen
from cloudfit_orchestrator.bft.usig.configuration import Configuration
from cloudfit_orchestrator.bft.usig.journal import (
    LogAnchor,
    LogBody,
    LogBreach,
    LogCited,
    LogEnd,
    LogMessage,
    LogUI,
    LogView,
)
from cloudfit_orchestrator.bft.usig.logvotes import WEDGE
from cloudfit_orchestrator.bft.usig.messages import EpochEndMessage, StreamMessage
from cloudfit_orchestrator.bft.usig.proofs import Found
from cloudfit_orchestrator.bft.usig.serving import MAX_LOG, log_bytes
from cloudfit_orchestrator.bft.usig.voice import Voice
from cloudfit_orchestrator.model.ui import EpochEnd

MAX_CITED = 8 << 20  # bytes of logs behind others' NEW-VIEWs that a log which is written anew takes over


def end_message(end: EpochEnd) -> EpochEndMessage:
    """EPOCH-END as it is logged and handed round."""
    return EpochEndMessage(end.c, end.replica, end.cv_end, end.last_digest, end.last_certificate, end.signature)


def epoch_end(message: EpochEndMessage) -> EpochEnd:
    """The reverse."""
    return EpochEnd(
        message.replica, message.c, message.cv_end, message.last_digest, message.last_certificate, message.signature
    )


def cited(c: int, g: int, logs: Sequence[tuple[StreamMessage, ...]]) -> list[LogCited]:
    """The logs behind a NEW-VIEW, one a record: together they may be longer than a record can be. Those that are too
    long to be handed on are of no use later.
    """
    return [LogCited(c, g, (log,)) for log in logs if log_bytes(log) <= MAX_LOG]


def entries(configuration: Configuration, voice: Voice | None) -> list[Frozen]:
    """Entries that rebuild the streams as they are kept."""
    c, streams = configuration.record.c, configuration.streams.values()
    found: list[Frozen] = []
    proved = _proved(configuration, voice)
    for g, view in sorted(configuration.new_views.items()):
        if g in proved:
            found += cited(c, g, view.logs)
        found.append(LogView(view.message, tuple(sorted(view.weighed.batches)), tuple(sorted(view.weighed.views))))
    found += [LogAnchor(anchor.message) for stream in streams if (anchor := stream.anchor()) is not None]
    if voice is not None:
        for g, logs in configuration.cited.items():  # of an own NEW-VIEW that is on its way
            found += cited(c, g, logs)
    found += _messages(configuration, voice)
    if voice is not None:
        found += [LogBody(c, cv, *body) for cv, body in sorted(voice.pending.items())]
    found += [LogEnd(end_message(end)) for end in configuration.votes.epoch_ends.values()]
    found += [LogBreach(stream.breach.message) for stream in streams if stream.breach is not None]
    window = configuration.record.parameters.window
    for vote in configuration.votes.of(WEDGE):  # behind the streams that they are of
        if not configuration.streams[vote.name.replica].complete(window):
            found.append(LogCited(c, WEDGE, (vote.log,)))
    return found


def _proved(configuration: Configuration, voice: Voice | None) -> set[int]:
    """The views whose logs are written down, too: own ones, as nobody else may have them, and the newest others. Their
    leaders may be faulty, and who entered them all that is left; but logs of many views are mostly the same messages.
    """
    found, room = set(), MAX_CITED
    for g, view in sorted(configuration.new_views.items(), reverse=True):
        mine = voice is not None and view.message.replica == voice.me
        room -= 0 if mine else sum(map(log_bytes, view.logs))
        if mine or room >= 0:
            found.add(g)
    return found


def news(c: int, found: Found) -> list[Frozen]:
    """What was found out of its turn, as it is logged."""
    entries: list[Frozen] = [LogAnchor(message) for message in found.jumps]
    entries += [LogView(message) for message in found.views]
    entries += [LogCited(c, WEDGE, (log,)) for log in found.logs]
    return entries + [LogBreach(message) for message in found.breaches]


def _messages(configuration: Configuration, voice: Voice | None) -> list[Frozen]:
    """Kept stream messages. Their order among streams does not matter: one that cites another's waits for it."""
    found: list[Frozen] = []
    for stream in configuration.streams.values():
        for cv, kept in stream.kept.items():
            message = kept.message
            if stream.base and cv == stream.base + 1:
                continue  # the anchor itself
            if voice is not None and stream.replica == voice.me:
                found.append(LogBody(message.c, cv, message.header, message.payload))
                found.append(LogUI(message.c, cv, message.certificate))
            else:
                found.append(LogMessage(message))
    if voice is not None:  # own ones that are certified, and in the log, but not processed yet
        found += [LogMessage(item.message) for _, item in sorted(configuration.streams[voice.me].waiting.items())]
    return found
