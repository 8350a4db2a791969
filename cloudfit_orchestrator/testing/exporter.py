"""A simulated recovery machine: serves the chunks of an old disk, of which nobody believes a word."""

import random

from cloudfit_orchestrator.bft.messages import (
    MAX_CHUNKS_ASKED,
    Chunk,
    ChunkQuery,
    Frozen,
    StateIndex,
    StateQuery,
    encode,
)
from cloudfit_orchestrator.bft.store import BUCKETS, Snapshot, chunk_hash
from cloudfit_orchestrator.bft.usig.messages import decode_peer
from cloudfit_orchestrator.model.errors import BadError
from cloudfit_orchestrator.testing.disk import SimDisk

CORRUPT_SHARE = 0.3  # of a corrupt disk's chunks


class SimExporter:
    """`kind`: sound; corrupt (chunks rotten, missing, or rewritten together with the index); silent."""

    def __init__(self, name: str, kind: str, rng: random.Random) -> None:
        """Has no disk yet."""
        self.name = name
        self._kind = kind
        self._rng = rng
        self._slot = 0
        self._state: Snapshot | None = None
        self._damage: dict[int, bytes | None] = {}  # chunk -> what the disk gives in its place; None: unreadable
        self._lying = kind == "corrupt" and rng.random() < 0.5

    def attach(self, disk: SimDisk) -> None:
        """Read the old disk's newest snapshot."""
        if not disk.snapshots:
            return
        newest = max(disk.snapshots)
        self._slot, self._state = newest[1], disk.snapshots[newest]
        if self._kind == "corrupt":
            for index in range(BUCKETS):
                if self._rng.random() < CORRUPT_SHARE:
                    self._damage[index] = self._rng.choice([None, b"", b"rotten", self._state.chunk(index) + b"\0"])

    def answer(self, question: bytes) -> list[bytes]:
        """The frames that answer a learner's."""
        if self._kind == "silent" or self._state is None:
            return []
        try:
            message = decode_peer(question)
        except BadError:  # of a faulty machine
            return []
        if isinstance(message, StateQuery):
            return [encode(self._index(self._state))]
        if isinstance(message, ChunkQuery):
            wanted = [i for i in message.indices[:MAX_CHUNKS_ASKED] if 0 <= i < BUCKETS]
            return [encode(self._chunk(self._state, message.root, index)) for index in wanted]
        return []

    def _index(self, state: Snapshot) -> StateIndex:
        hashes = list(state.chunk_hashes)
        if self._lying:  # its index fits what it will send
            for index, data in self._damage.items():
                hashes[index] = chunk_hash(data or b"")
        return StateIndex(state.root, self._slot, b"".join(hashes))

    def _chunk(self, state: Snapshot, root: bytes, index: int) -> Frozen:
        data = self._damage.get(index, state.chunk(index))
        return Chunk(root, index, b"", missing=True) if data is None else Chunk(root, index, data)
