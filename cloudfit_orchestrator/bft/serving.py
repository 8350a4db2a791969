"""Answers to peers' questions: stream messages, batches, NEW-VIEWs, state. Reads only."""

from collections.abc import Iterator

from cloudfit_orchestrator.bft.configuration import Configuration
from cloudfit_orchestrator.bft.execution import Execution
from cloudfit_orchestrator.bft.messages import (
    MAX_CHUNKS_ASKED,
    MAX_FETCH,
    BatchMessage,
    Chunk,
    ChunkQuery,
    Discarded,
    Fetch,
    FetchBatches,
    FetchNewView,
    LogProof,
    PeerMessage,
    Prepare,
    StateIndex,
    StateQuery,
    StreamMessage,
)
from cloudfit_orchestrator.bft.store import BUCKETS
from cloudfit_orchestrator.bft.stream import Kept

MAX_ANSWER = 512 << 10  # bytes sent for one question; the asker asks again from where it got to


def with_batch(configuration: Configuration, kept: Kept) -> StreamMessage:
    """The message as it is sent: a PREPARE brings its batch."""
    message = kept.message
    data = configuration.batches.data(kept.header.batch) if isinstance(kept.header, Prepare) else None
    if data is None:
        return message
    return StreamMessage(
        message.c, message.replica, message.cv, message.header, message.payload, message.certificate, data
    )


def answer_fetch(configuration: Configuration, question: Fetch) -> Iterator[PeerMessage]:
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
            waiting = stream.waiting.get(cv)
            if waiting is None or stream.ended is not None:
                return
            message = waiting
        else:
            message = with_batch(configuration, kept)
        size += len(message.header) + len(message.payload) + len(message.batch)
        if size > MAX_ANSWER and cv > first:
            return
        yield message


def answer_batches(configuration: Configuration, question: FetchBatches) -> Iterator[PeerMessage]:
    """The batches that are held."""
    size = 0
    for digest in question.digests[:MAX_FETCH]:
        data = configuration.batches.data(digest)
        if data is not None:
            size += len(data)
            if size > MAX_ANSWER and size > len(data):
                return
            yield BatchMessage(data)


def answer_view(configuration: Configuration, question: FetchNewView) -> Iterator[PeerMessage]:
    """The NEW-VIEW of a view, and the COMMITs of it: each, if it stands, proves that the NEW-VIEW does."""
    if configuration.record.c == question.c:
        view = configuration.new_views.get(question.g)
        if view is not None:
            yield view.message
            for log in view.logs:
                if sum(len(message.header) + len(message.payload) for message in log) <= MAX_ANSWER:
                    yield LogProof(log)
        yield from configuration.commits.get(question.g, {}).values()


def answer_state(
    execution: Execution, question: StateQuery | ChunkQuery, now_s: float, newest: bytes
) -> Iterator[PeerMessage]:
    """The index or chunks of a kept snapshot, named by its root; of the `newest` certified one if it is not kept."""
    found = execution.by_root(question.root, now_s)
    if found is None and isinstance(question, StateQuery) and newest:
        found = execution.by_root(newest, now_s)
    if found is None:
        return
    slot, snapshot = found
    if isinstance(question, StateQuery):
        yield StateIndex(snapshot.root, slot, b"".join(snapshot.chunk_hashes))
        return
    for index in question.indices[:MAX_CHUNKS_ASKED]:
        if 0 <= index < BUCKETS:
            yield Chunk(question.root, index, snapshot.chunk(index))
