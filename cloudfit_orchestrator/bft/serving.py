"""Answers to peers' questions that every engine shares: batches and state. Reads only."""

from collections.abc import Iterator

from cloudfit_orchestrator.bft.batches import Batches
from cloudfit_orchestrator.bft.execution import Execution
from cloudfit_orchestrator.bft.messages import (
    MAX_CHUNKS_ASKED,
    MAX_FETCH,
    BatchMessage,
    Chunk,
    ChunkQuery,
    FetchBatches,
    Frozen,
    StateIndex,
    StateQuery,
)
from cloudfit_orchestrator.bft.store import BUCKETS

MAX_ANSWER = 512 << 10  # bytes sent for one question; the asker asks again from where it got to


def answer_batches(batches: Batches, question: FetchBatches) -> Iterator[Frozen]:
    """The batches that are held."""
    size = 0
    for digest in question.digests[:MAX_FETCH]:
        data = batches.data(digest)
        if data is not None:
            size += len(data)
            if size > MAX_ANSWER and size > len(data):
                return
            yield BatchMessage(data)


def answer_state(
    execution: Execution, question: StateQuery | ChunkQuery, now_s: float, newest: bytes
) -> Iterator[Frozen]:
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
