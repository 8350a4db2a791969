"""The state of a replica: an ordered bytes -> bytes map whose digest costs only what changed (architecture, rule 7).

Keys fall by hash into 1,024 *buckets*; a bucket's canonical encoding is a *chunk*, the unit of checkpoint, transfer and
blame. The root is a Merkle tree of two levels, 32 wide, over the chunks' hashes. The same content has the same root,
whatever its history. Buckets are shared between a store, its forks and its snapshots, and copied when first changed.
"""

# ruff: noqa: SLF001  (the classes of this module share one secret)

import struct
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator, Sequence
from typing import ClassVar

from cloudfit_orchestrator.model.errors import BadError, BadInputError, RefusedError
from cloudfit_orchestrator.model.signing import DIGEST_BYTES, sha256

FANOUT = 32  # width of both tree levels: a changed bucket costs two node hashes of 1 KiB
BUCKETS = FANOUT * FANOUT  # 1 GiB of state gives chunks of 1 MiB; 10 MiB gives chunks of 10 KiB
MAX_KEY = 1 << 10  # bytes; longer names are data, not keys
MAX_VALUE = 256 << 10  # bytes; a client's frame is at most 1 MiB and holds a bundle of requests
MAX_SERVICE_CHUNK = 4 << 20  # bytes a service may fill one bucket with: keys can be chosen to fall into one bucket
MAX_CHUNK = 7 << 20  # bytes, library keys included: a chunk must fit into one peer frame of 8 MiB
LIBRARY_RESERVE = 256 << 10  # bytes of a bucket for the windows of 1,024 clients, should they all fall into it

_LENGTH = struct.Struct(">I")
_ENTRY_OVERHEAD = 2 * _LENGTH.size
_LEAF = b"cloudfit/state-leaf/v1\0"
_NODE = b"cloudfit/state-node/v1\0"
_ROOT = b"cloudfit/state-root/v1\0"

_Bucket = dict[bytes, bytes]


def bucket_of(key: bytes) -> int:
    """The bucket that `key` falls into: the first 10 bits of its SHA-256."""
    return int.from_bytes(sha256(key)[:2], "big") >> 6


def chunk_hash(chunk: bytes) -> bytes:
    """The Merkle leaf of a chunk, 32 bytes."""
    return sha256(_LEAF, chunk)


def root_of(chunk_hashes: Sequence[bytes]) -> bytes:
    """The Merkle root over all `BUCKETS` chunk hashes, in bucket order. Raises BadError if they are not so many."""
    if len(chunk_hashes) != BUCKETS or any(len(h) != DIGEST_BYTES for h in chunk_hashes):
        raise BadError(f"a state has {BUCKETS} chunk hashes of {DIGEST_BYTES} bytes, these are {len(chunk_hashes)}")
    return sha256(_ROOT, *(_node(chunk_hashes, i) for i in range(FANOUT)))


def _node(chunk_hashes: Sequence[bytes], index: int) -> bytes:
    return sha256(_NODE, *chunk_hashes[index * FANOUT : (index + 1) * FANOUT])


def _encode(bucket: _Bucket) -> bytes:
    parts: list[bytes] = []
    for key in sorted(bucket):
        value = bucket[key]
        parts += (_LENGTH.pack(len(key)), key, _LENGTH.pack(len(value)), value)
    return b"".join(parts)


def decode_chunk(chunk: bytes, index: int | None = None) -> dict[bytes, bytes]:
    """The entries of a chunk, which comes from a stranger.

    Raises BadError unless `chunk` is canonical: keys strictly ascending, all in bucket `index` (without it: all in one
    bucket), within the limits, nothing behind the last entry.
    """
    if len(chunk) > MAX_CHUNK:
        raise BadError(f"chunk of {len(chunk)} bytes, the limit is {MAX_CHUNK}")
    entries: _Bucket = {}
    at, last = 0, None
    while at < len(chunk):
        key, at = _take(chunk, at, MAX_KEY)
        value, at = _take(chunk, at, MAX_VALUE)
        if last is not None and key <= last:
            raise BadError(f"chunk is not canonical: key {key[:16].hex()} does not follow {last[:16].hex()}")
        where = bucket_of(key)
        if index is None:
            index = where
        if where != index:
            raise BadError(f"chunk {index} holds key {key[:16].hex()}, which belongs to chunk {where}")
        entries[key] = value
        last = key
    return entries


def _take(chunk: bytes, at: int, limit: int) -> tuple[bytes, int]:
    start = at + _LENGTH.size
    if start > len(chunk):
        raise BadError("chunk ends in the middle of a length")
    (length,) = _LENGTH.unpack_from(chunk, at)
    if length > limit or start + length > len(chunk):
        raise BadError(f"chunk has a field of {length} bytes, allowed are {min(limit, len(chunk) - start)}")
    return chunk[start : start + length], start + length


class Snapshot:
    """A state that never changes: shares its buckets with the store it came from. Equal if the roots are equal.

    Safe to read from another thread.
    """

    __slots__ = ("_buckets", "chunk_hashes", "root")

    def __init__(self, buckets: tuple[_Bucket, ...], chunk_hashes: tuple[bytes, ...], root: bytes) -> None:
        """For who has checked that `chunk_hashes` are those of `buckets` and make `root`; none may change any more."""
        self._buckets = buckets
        self.chunk_hashes = chunk_hashes
        self.root = root

    def chunk(self, index: int) -> bytes:
        """The canonical encoding of bucket `index`: entries `u32 length ‖ key ‖ u32 length ‖ value`, keys ascending."""
        return _encode(self._buckets[index])

    @classmethod
    def from_chunks(cls, chunks: Sequence[bytes]) -> "Snapshot":
        """The state that all `BUCKETS` chunks make. Raises BadError if one is not canonical or not in its place."""
        if len(chunks) != BUCKETS:
            raise BadError(f"a state has {BUCKETS} chunks, these are {len(chunks)}")
        buckets = tuple(decode_chunk(chunk, i) for i, chunk in enumerate(chunks))
        hashes = tuple(chunk_hash(chunk) for chunk in chunks)
        return cls(buckets, hashes, root_of(hashes))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Snapshot) and self.root == other.root

    def __hash__(self) -> int:
        return hash(self.root)

    def __repr__(self) -> str:
        return f"Snapshot({self.root.hex()[:16]}…)"


_EMPTY_HASH = chunk_hash(b"")
_EMPTY_NODE = sha256(_NODE, *(_EMPTY_HASH for _ in range(FANOUT)))


class StateStore:
    """The ordered map. Not thread-safe; a `Snapshot` of it is."""

    RESERVED: ClassVar[bytes] = b"\x00"  # keys that begin so are the library's own, e.g. the client table

    def __init__(self) -> None:
        """Empty."""
        self._buckets: list[_Bucket] = [{} for _ in range(BUCKETS)]
        self._sizes = [0] * BUCKETS  # of the chunks, in bytes
        self._hashes = [_EMPTY_HASH] * BUCKETS
        self._nodes = [_EMPTY_NODE] * FANOUT
        self._own = set(range(BUCKETS))  # buckets that nobody shares: they may be changed in place
        self._stale: set[int] = set()  # buckets changed since their hash was made
        self._root: bytes | None = None
        self._keys: list[bytes] | None = None  # all keys in order, made by the first `items` and then kept

    @classmethod
    def from_snapshot(cls, snapshot: Snapshot) -> "StateStore":
        """A store that begins with the content of `snapshot`."""
        store = cls.__new__(cls)
        store._buckets = list(snapshot._buckets)
        store._sizes = [sum(_ENTRY_OVERHEAD + len(k) + len(v) for k, v in b.items()) for b in store._buckets]
        store._hashes = list(snapshot.chunk_hashes)
        store._nodes = [_node(store._hashes, i) for i in range(FANOUT)]
        store._own = set()
        store._stale = set()
        store._root = snapshot.root
        store._keys = None
        return store

    def get(self, key: bytes) -> bytes | None:
        """The value of `key`, or None."""
        return self._buckets[bucket_of(key)].get(key)

    def put(self, key: bytes, value: bytes) -> None:
        """Set `key`. Raises BadInputError, changing nothing, if the key, the value or its bucket would be too large."""
        self._put(key, value, MAX_CHUNK)

    def put_reply(self, key: bytes, value: bytes) -> None:
        """As `put`, but leaves room in the bucket for the library's small entries, which must never fail."""
        self._put(key, value, MAX_CHUNK - LIBRARY_RESERVE)

    def delete(self, key: bytes) -> bool:
        """Remove `key`; False if it was not there."""
        index = bucket_of(key)
        old = self._buckets[index].get(key)
        if old is None:
            return False
        del self._writable(index)[key]
        self._sizes[index] -= _ENTRY_OVERHEAD + len(key) + len(old)
        if self._keys is not None:
            del self._keys[bisect_left(self._keys, key)]
        return True

    def items(self, prefix: bytes = b"", after: bytes | None = None) -> Iterator[tuple[bytes, bytes]]:
        """Entries whose key begins with `prefix` (and is above `after`), in key order.

        The keys are those of when the iteration began; one that was deleted since is left out.
        """
        if self._keys is None:
            self._keys = sorted(key for bucket in self._buckets for key in bucket)
        keys = self._keys
        start = bisect_left(keys, prefix)
        end = bisect_left(keys, prefix + b"\xff" * (MAX_KEY + 1 - len(prefix)), lo=start)
        if after is not None:
            start = max(start, bisect_right(keys, after))
        return self._present(keys[start:end])

    def _present(self, keys: list[bytes]) -> Iterator[tuple[bytes, bytes]]:
        for key in keys:
            value = self.get(key)
            if value is not None:
                yield key, value

    def root(self) -> bytes:
        """The digest of the whole state, 32 bytes. Costs the size of the changed buckets."""
        if self._root is None or self._stale:
            for index in self._stale:
                self._hashes[index] = chunk_hash(_encode(self._buckets[index]))
            for node in {index // FANOUT for index in self._stale}:
                self._nodes[node] = _node(self._hashes, node)
            self._stale.clear()
            self._root = sha256(_ROOT, *self._nodes)
        return self._root

    def snapshot(self) -> Snapshot:
        """The present state, for good. Costs the size of what changed; later changes copy the buckets they touch."""
        root = self.root()
        self._own.clear()
        return Snapshot(tuple(self._buckets), tuple(self._hashes), root)

    def fork(self) -> "StateStore":
        """An independent copy, e.g. for tentative execution. Costs two lists of references."""
        twin = StateStore.__new__(StateStore)
        self._own.clear()
        twin._buckets = list(self._buckets)
        twin._sizes = list(self._sizes)
        twin._hashes = list(self._hashes)
        twin._nodes = list(self._nodes)
        twin._own = set()
        twin._stale = set(self._stale)
        twin._root = self._root
        twin._keys = None
        return twin

    def service_view(self) -> "StateStore":
        """The same store as a service may see it: library keys are hidden and refused, buckets hold less."""
        return _ServiceView(self)

    def _put(self, key: bytes, value: bytes, chunk_limit: int) -> None:
        if len(key) > MAX_KEY or len(value) > MAX_VALUE:
            raise BadInputError(
                f"key of {len(key)} and value of {len(value)} bytes, the limits are {MAX_KEY} and {MAX_VALUE}"
            )
        index = bucket_of(key)
        old = self._buckets[index].get(key)
        if old == value:
            return
        grown = len(value) - len(old) if old is not None else _ENTRY_OVERHEAD + len(key) + len(value)
        if grown > 0 and self._sizes[index] + grown > chunk_limit:
            raise BadInputError(f"bucket {index} holds {self._sizes[index]} bytes, its limit is {chunk_limit}")
        self._writable(index)[key] = value
        self._sizes[index] += grown
        if old is None and self._keys is not None:
            insort(self._keys, key)

    def _writable(self, index: int) -> _Bucket:
        if index not in self._own:
            self._buckets[index] = dict(self._buckets[index])
            self._own.add(index)
        self._stale.add(index)
        return self._buckets[index]


class _ServiceView(StateStore):
    """See `StateStore.service_view`. Holds no state of its own."""

    def __init__(self, store: StateStore) -> None:  # does not make a second map
        self._store = store

    def _allowed(self, key: bytes) -> bytes:
        if key.startswith(self.RESERVED):
            raise RefusedError(f"key {key[:16].hex()} is the library's own", next_command="choose another key")
        return key

    def get(self, key: bytes) -> bytes | None:
        return self._store.get(self._allowed(key))

    def put(self, key: bytes, value: bytes) -> None:
        self._store._put(self._allowed(key), value, MAX_SERVICE_CHUNK)

    def delete(self, key: bytes) -> bool:
        return self._store.delete(self._allowed(key))

    def items(self, prefix: bytes = b"", after: bytes | None = None) -> Iterator[tuple[bytes, bytes]]:
        return (item for item in self._store.items(prefix, after) if not item[0].startswith(self.RESERVED))

    def root(self) -> bytes:
        raise RefusedError("a service does not see the state's digest")

    def snapshot(self) -> Snapshot:
        raise RefusedError("a service takes no snapshots")

    def fork(self) -> StateStore:
        raise RefusedError("a service does not copy the state")

    def service_view(self) -> StateStore:
        return self
