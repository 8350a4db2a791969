"""The state of a replica: an ordered bytes -> bytes map whose digest costs only what changed (architecture, rule 7).

Keys fall by hash into 1,024 *buckets*; a bucket's canonical encoding is a *chunk*, the unit of transfer and blame. The
content of a bucket is a hash trie (`bft/trie.py`), and the hash of a chunk is that of the trie that its entries make.
The root is a Merkle tree of two levels, 32 wide, over the chunks' hashes. The same content has the same root, whatever
its history.

A store is the tries of its last root and, beside them, what was changed since: reads look there first, and the next
root takes all of it into the tries at once, so that each node on the way is hashed once.
"""

# ruff: noqa: SLF001  (the classes of this module share one secret)

import struct
from collections.abc import Iterator, Sequence
from hashlib import blake2s
from typing import Any, ClassVar

from cloudfit_orchestrator.bft import trie
from cloudfit_orchestrator.bft.keyindex import KeyIndex
from cloudfit_orchestrator.bft.trie import BUCKET_BITS, ENTRY_OVERHEAD, Change, Node
from cloudfit_orchestrator.model.errors import BadError, BadInputError, RefusedError
from cloudfit_orchestrator.model.signing import DIGEST_BYTES, sha256

FANOUT = 32  # width of both tree levels: a changed bucket costs two node hashes of 1 KiB
BUCKETS = FANOUT * FANOUT  # 1 GiB of state gives chunks of 1 MiB; 10 MiB gives chunks of 10 KiB
MAX_KEY = 1 << 10  # bytes; longer names are data, not keys
MAX_VALUE = 256 << 10  # bytes; a client's frame is at most 1 MiB and holds a bundle of requests
MAX_SERVICE_CHUNK = 4 << 20  # bytes a service may fill one bucket with: keys can be chosen to fall into one bucket
MAX_CHUNK = 7 << 20  # bytes, library keys included: a chunk must fit into one peer frame of 8 MiB
LIBRARY_RESERVE = 256 << 10  # bytes of a bucket for the windows of 1,024 clients, should they all fall into it
MAX_CHANGES = 1 << 14  # entries changed since the last root; at more they are taken into the tries early

_LENGTH = struct.Struct(">I")
_MALFORMED = b"cloudfit/state-malformed/v2\0"
_NODE = b"cloudfit/state-node/v2\0"
_ROOT = b"cloudfit/state-root/v2\0"
_BUCKET_MASK = BUCKETS - 1
assert BUCKETS == 1 << BUCKET_BITS


def bucket_of(key: bytes) -> int:
    """The bucket that `key` falls into."""
    return trie.place(key) & _BUCKET_MASK


def chunk_hash(chunk: bytes) -> bytes:
    """The hash of the entries of a chunk, 32 bytes; of a chunk that is not canonical one that no state has."""
    try:
        digest: bytes = decode_chunk(chunk)[0]
    except BadError:
        return sha256(_MALFORMED, chunk)
    return digest


def root_of(chunk_hashes: Sequence[bytes]) -> bytes:
    """The Merkle root over all `BUCKETS` chunk hashes, in bucket order. Raises BadError if they are not so many."""
    if len(chunk_hashes) != BUCKETS or any(len(h) != DIGEST_BYTES for h in chunk_hashes):
        raise BadError(f"a state has {BUCKETS} chunk hashes of {DIGEST_BYTES} bytes, these are {len(chunk_hashes)}")
    return sha256(_ROOT, *(_node(chunk_hashes, i) for i in range(FANOUT)))


def _node(chunk_hashes: Sequence[bytes], index: int) -> bytes:
    return sha256(_NODE, *chunk_hashes[index * FANOUT : (index + 1) * FANOUT])


def encode_chunk(entries: dict[bytes, bytes]) -> bytes:
    """The chunk of a bucket's entries: `u32 length ‖ key ‖ u32 length ‖ value` each, keys ascending."""
    parts: list[bytes] = []
    for key in sorted(entries):
        value = entries[key]
        parts += (_LENGTH.pack(len(key)), key, _LENGTH.pack(len(value)), value)
    return b"".join(parts)


def decode_chunk(chunk: bytes, index: int | None = None) -> Node:
    """The content of a chunk, which comes from a stranger.

    Raises BadError unless `chunk` is canonical: keys strictly ascending, all in bucket `index` (without it: all in one
    bucket), within the limits, nothing behind the last entry.
    """
    if len(chunk) > MAX_CHUNK:
        raise BadError(f"chunk of {len(chunk)} bytes, the limit is {MAX_CHUNK}")
    items: list[tuple[bytes, bytes]] = []
    at, last = 0, None
    while at < len(chunk):
        key, at = _take(chunk, at, MAX_KEY)
        value, at = _take(chunk, at, MAX_VALUE)
        if last is not None and key <= last:
            raise BadError(f"chunk is not canonical: key {key[:16].hex()} does not follow {last[:16].hex()}")
        items.append((key, value))
        last = key
    return trie.build(items, index)


def _take(chunk: bytes, at: int, limit: int) -> tuple[bytes, int]:
    start = at + _LENGTH.size
    if start > len(chunk):
        raise BadError("chunk ends in the middle of a length")
    (length,) = _LENGTH.unpack_from(chunk, at)
    if length > limit or start + length > len(chunk):
        raise BadError(f"chunk has a field of {length} bytes, allowed are {min(limit, len(chunk) - start)}")
    return chunk[start : start + length], start + length


class Snapshot:
    """A state that never changes: shares its tries with the store it came from. Equal if the roots are equal.

    Safe to read from another thread.
    """

    __slots__ = ("buckets", "chunk_hashes", "root")

    def __init__(self, buckets: Sequence[Node], root: bytes | None = None) -> None:
        """`buckets`: the tries of all `BUCKETS` buckets, and their root if it is known already."""
        self.buckets = tuple(buckets)
        self.chunk_hashes: tuple[bytes, ...] = tuple([node[0] for node in self.buckets])
        self.root = root_of(self.chunk_hashes) if root is None else root

    def chunk(self, index: int) -> bytes:
        """The canonical encoding of bucket `index`: entries `u32 length ‖ key ‖ u32 length ‖ value`, keys ascending."""
        return encode_chunk(trie.entries(self.buckets[index]))

    @classmethod
    def from_chunks(cls, chunks: Sequence[bytes]) -> "Snapshot":
        """The state that all `BUCKETS` chunks make. Raises BadError if one is not canonical or not in its place."""
        if len(chunks) != BUCKETS:
            raise BadError(f"a state has {BUCKETS} chunks, these are {len(chunks)}")
        return cls([decode_chunk(chunk, i) for i, chunk in enumerate(chunks)])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Snapshot) and self.root == other.root

    def __hash__(self) -> int:
        return hash(self.root)

    def __repr__(self) -> str:
        return f"Snapshot({self.root.hex()[:16]}…)"


_EMPTY_NODE = sha256(_NODE, *(trie.EMPTY[0] for _ in range(FANOUT)))


_UNCHANGED: Any = object()  # says that a key was not changed since the last root; typed as what it stands in for


class StateStore:
    """The ordered map. Not thread-safe; a `Snapshot` of it is."""

    RESERVED: ClassVar[bytes] = b"\x00"  # keys that begin so are the library's own, e.g. the client table

    def __init__(self) -> None:
        """Empty."""
        self._buckets: list[Node] = [trie.EMPTY] * BUCKETS
        self._sizes = [0] * BUCKETS  # of the chunks, in bytes, changes included
        self._nodes = [_EMPTY_NODE] * FANOUT
        self._root: bytes | None = None
        self._changes: dict[bytes, bytes | None] = {}  # since the tries were made; None: deleted
        self._keys: KeyIndex | None = None  # all keys in order, made by the first `items` and then kept
        self._moved: set[bytes] = set()  # keys that came or went since `_keys` was made

    @classmethod
    def from_snapshot(cls, snapshot: Snapshot) -> "StateStore":
        """A store that begins with the content of `snapshot`. Costs the number of buckets."""
        store = cls()
        store._buckets = list(snapshot.buckets)
        store._sizes = [node[1] for node in snapshot.buckets]
        store._nodes = [_node(snapshot.chunk_hashes, i) for i in range(FANOUT)]
        store._root = snapshot.root
        return store

    def get(self, key: bytes) -> bytes | None:
        """The value of `key`, or None."""
        value: bytes | None = self._changes.get(key, _UNCHANGED)
        if value is not _UNCHANGED:
            return value
        way = int.from_bytes(blake2s(key).digest()[:8], "little")
        return trie.lookup(self._buckets[way & _BUCKET_MASK], way >> BUCKET_BITS, key)

    def put(self, key: bytes, value: bytes) -> bool:
        """Set `key`; False if it held that value already. Raises BadInputError, changing nothing, if the key, the value
        or its bucket would be too large.
        """
        return self._put(key, value, MAX_CHUNK)

    def put_reply(self, key: bytes, value: bytes) -> None:
        """As `put`, but leaves room in the bucket for the library's small entries, which must never fail."""
        self._put(key, value, MAX_CHUNK - LIBRARY_RESERVE)

    def delete(self, key: bytes) -> bool:
        """Remove `key`; False if it was not there."""
        old = self.get(key)
        if old is None:
            return False
        self._sizes[bucket_of(key)] -= ENTRY_OVERHEAD + len(key) + len(old)
        self._change(key, None)
        if self._keys is not None:
            self._moved.add(key)
        return True

    def items(self, prefix: bytes = b"", after: bytes | None = None) -> Iterator[tuple[bytes, bytes]]:
        """Entries whose key begins with `prefix` (and is above `after`), in key order.

        The keys are those of when the iteration began; one that was deleted since is left out.
        """
        if self._keys is None:
            self._keys = KeyIndex(sorted([key for node in self._buckets for key in trie.keys(node)]))
            self._moved = set(self._changes)
        self._settle_keys()
        return self._present(self._keys.begin_with(prefix, after))

    def _present(self, keys: Iterator[bytes]) -> Iterator[tuple[bytes, bytes]]:
        for key in keys:
            value = self.get(key)
            if value is not None:
                yield key, value

    def root(self) -> bytes:
        """The digest of the whole state, 32 bytes. Costs what changed."""
        self._fold()
        if self._root is None:
            self._root = sha256(_ROOT, *self._nodes)
        return self._root

    def snapshot(self) -> Snapshot:
        """The present state, for good. Costs what changed, and a list of the buckets."""
        root = self.root()
        return Snapshot(self._buckets, root)

    def fork(self) -> "StateStore":
        """An independent copy, e.g. for tentative execution. Costs what changed since the last root, and four lists."""
        twin = StateStore.__new__(StateStore)
        twin._buckets = list(self._buckets)
        twin._sizes = list(self._sizes)
        twin._nodes = list(self._nodes)
        twin._root = self._root
        twin._changes = dict(self._changes)
        twin._keys = self._keys
        twin._moved = set(self._moved)
        return twin

    def service_view(self) -> "ServiceView":
        """The same store as a service may see it: library keys are hidden and refused, buckets hold less."""
        return ServiceView(self)

    def _put(self, key: bytes, value: bytes, chunk_limit: int) -> bool:
        length, size = len(key), len(value)
        if length > MAX_KEY or size > MAX_VALUE:
            raise BadInputError(f"key of {length} and value of {size} bytes, the limits are {MAX_KEY} and {MAX_VALUE}")
        way = int.from_bytes(blake2s(key).digest()[:8], "little")
        index = way & _BUCKET_MASK
        old = self._changes.get(key, _UNCHANGED)
        if old is _UNCHANGED:
            old = trie.lookup(self._buckets[index], way >> BUCKET_BITS, key)
        if old == value:
            return False
        grown = ENTRY_OVERHEAD + length + size if old is None else size - len(old)
        if grown > 0 and self._sizes[index] + grown > chunk_limit:
            raise BadInputError(f"bucket {index} holds {self._sizes[index]} bytes, its limit is {chunk_limit}")
        self._sizes[index] += grown
        self._change(key, value)
        if old is None and self._keys is not None:
            self._moved.add(key)
        return True

    def _change(self, key: bytes, value: bytes | None) -> None:
        self._changes[key] = value
        if len(self._changes) >= MAX_CHANGES:
            self._fold()

    def _fold(self) -> None:
        """Take the changes into the tries."""
        if not self._changes:
            return
        parts: dict[int, list[Change]] = {}
        for key, value in self._changes.items():
            way = trie.place(key)
            parts.setdefault(way & _BUCKET_MASK, []).append((way >> BUCKET_BITS, key, value))
        for index, part in parts.items():
            self._buckets[index] = trie.updated(self._buckets[index], part)
        for i in {index // FANOUT for index in parts}:
            self._nodes[i] = _node([node[0] for node in self._buckets[i * FANOUT : (i + 1) * FANOUT]], 0)
        self._root = None
        self._changes.clear()

    def _settle_keys(self) -> None:
        if self._keys is not None and self._moved:
            here = {key for key in self._moved if self.get(key) is not None}
            self._keys = self._keys.updated(here, self._moved - here)
            self._moved = set()


class ServiceView(StateStore):
    """See `StateStore.service_view`. Holds no state of its own, but the keys that were `written` through it."""

    def __init__(self, store: StateStore) -> None:  # does not make a second map
        self._store = store
        self.written: list[bytes] = []

    def _allowed(self, key: bytes) -> bytes:
        if key.startswith(self.RESERVED):
            raise RefusedError(f"key {key[:16].hex()} is the library's own", next_command="choose another key")
        return key

    def get(self, key: bytes) -> bytes | None:
        return self._store.get(self._allowed(key))

    def put(self, key: bytes, value: bytes) -> bool:
        if key.startswith(self.RESERVED):
            self._allowed(key)
        changed = self._store._put(key, value, MAX_SERVICE_CHUNK)
        self.written.append(key)
        return changed

    def delete(self, key: bytes) -> bool:
        self.written.append(key)
        return self._store.delete(self._allowed(key))

    def items(self, prefix: bytes = b"", after: bytes | None = None) -> Iterator[tuple[bytes, bytes]]:
        if prefix.startswith(self.RESERVED):
            return iter(())
        if not prefix:  # the library's own keys come first, and may be many: none of them is looked at
            after = max(after or b"", self.RESERVED + b"\xff" * MAX_KEY)
        return self._store.items(prefix, after)

    def root(self) -> bytes:
        raise RefusedError("a service does not see the state's digest")

    def snapshot(self) -> Snapshot:
        raise RefusedError("a service takes no snapshots")

    def fork(self) -> StateStore:
        raise RefusedError("a service does not copy the state")

    def service_view(self) -> "ServiceView":
        return self
