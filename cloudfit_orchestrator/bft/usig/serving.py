"""Answers to peers' questions about streams: messages and NEW-VIEWs. Reads only."""

from collections.abc import Iterator, Sequence

from cloudfit_orchestrator.bft.messages import MAX_FETCH, MAX_PEER_FRAME, Frozen
from cloudfit_orchestrator.bft.serving import MAX_ANSWER
from cloudfit_orchestrator.bft.usig.configuration import Configuration
from cloudfit_orchestrator.bft.usig.messages import Discarded, Fetch, FetchNewView, LogProof, Prepare, StreamMessage
from cloudfit_orchestrator.bft.usig.stream import Kept

# Of a whole log: two windows of the longest streams that the judge lets pass are some 3 MiB; a frame's overhead is less
# than the rest.
MAX_LOG = MAX_PEER_FRAME * 3 // 4


def with_batch(configuration: Configuration, kept: Kept) -> StreamMessage:
    """The message as it is sent: a PREPARE brings its batch."""
    message = kept.message
    data = configuration.batches.data(kept.header.batch) if isinstance(kept.header, Prepare) else None
    if data is None:
        return message
    return StreamMessage(
        message.c, message.replica, message.cv, message.header, message.payload, message.certificate, data
    )


def answer_fetch(configuration: Configuration, question: Fetch) -> Iterator[Frozen]:
    """Messages first..last of a stream, as far as they are held; the anchor with its attestation if they are not."""
    stream = configuration.streams.get(question.replica)
    if stream is None or question.first > question.last:
        return
    anchor = stream.anchor()
    if anchor is not None and question.first <= stream.base:
        proof = configuration.attestations.proof(question.replica, anchor.message.cv)
        yield Discarded(anchor.message, proof)
    size = 0
    first = max(question.first, stream.base + 1)
    for cv in range(first, min(question.last, first + MAX_FETCH - 1) + 1):
        kept = stream.kept.get(cv)
        if kept is None:
            item = stream.waiting.get(cv) if stream.ended is None else stream.breach
            if item is None or item.message.cv != cv:
                return
            message = item.message
        else:
            message = with_batch(configuration, kept)
        size += len(message.header) + len(message.payload) + len(message.batch)
        if size > MAX_ANSWER and cv > first:
            return
        yield message


def log_bytes(log: Sequence[StreamMessage]) -> int:
    """About how long a log is in a frame, or in a record of the write-ahead log."""
    return sum(len(message.header) + len(message.payload) for message in log)


def answer_view(configuration: Configuration, question: FetchNewView) -> Iterator[Frozen]:
    """The NEW-VIEW of a view, the logs of its VIEW-CHANGEs, and the COMMITs of it: each, if it stands, proves that the
    NEW-VIEW does. Of a view without one, or of the wedge (g = WEDGE), the logs of all votes that are here, those of
    closed epochs among them.
    """
    if configuration.record.c == question.c:
        view = configuration.new_views.get(question.g)
        if view is not None:
            yield view.message
        votes = configuration.votes.of(question.g)
        for log in view.logs if view is not None and view.logs else [vote.log for vote in votes if vote.log]:
            if log_bytes(log) <= MAX_LOG:
                yield LogProof(log)
        yield from configuration.commits.get(question.g, {}).values()
