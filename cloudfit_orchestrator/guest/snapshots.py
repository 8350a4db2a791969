"""Snapshots on the state disk: what changed in each chunk, in a log of segments; one *index* file for each snapshot.

A save appends, for each chunk that changed since the last save, a piece with what changed (`guest/segments.py`), makes
the log durable, then writes the index: the chunks' hashes, and where each one's newest piece lies. So it costs what
changed, not the state. Three rules keep the rest bounded:

- Of one chunk, eight pieces of changes become one of the next level; when the changes are as large as the chunk, an
  image replaces them. So a chunk is read from at most `MAX_CHAIN` pieces, twice its size, and an entry is written
  again once a level and about twice by images.
- When the log is more than three times as long as the state, the chunks whose images are oldest are written again, at
  most two bytes for each byte of changes. So whole segments at its beginning are needed no more and are removed, and
  no save waits for a great compaction.
- A chunk that was seen to be damaged gets a new image.

Nothing read is trusted: each chunk is checked against its hash, the hashes against the index's root, and the caller
checks the root against certificates.

Index `index-C-SLOT`: magic 8 ‖ c u64 ‖ slot u64 ‖ root 32 ‖ oldest segment needed u64 ‖ BUCKETS entries (hash 32 ‖
position of the newest piece u64, 0 if the chunk is empty) ‖ SHA-256 of all that 32.
"""

import struct
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cloudfit_orchestrator.bft import trie
from cloudfit_orchestrator.bft.store import BUCKETS, Snapshot, encode_chunk, root_of
from cloudfit_orchestrator.bft.trie import BUCKET_BITS, Node
from cloudfit_orchestrator.guest.segments import (
    FANIN,
    HEADER_BYTES,
    IMAGE,
    MAX_LEVEL,
    SEGMENT_BYTES,
    Changes,
    Piece,
    Reader,
    Writer,
    content_of,
    segment_number,
    segment_of,
    segment_path,
)
from cloudfit_orchestrator.guest.storage import PART, disk_errors, open_regular, sync_directory, write_durably
from cloudfit_orchestrator.model.errors import BadError
from cloudfit_orchestrator.model.signing import DIGEST_BYTES, sha256

MAX_INDEXES = 64  # read of another's disk; of its own a replica may keep one for each K slots of a window
MAX_SPAN = 3  # times the state: a longer log is cleaned; images and changes that are needed are at most twice the state
CLEANING = 2  # bytes of images written again for each byte of changes, while the log is too long: it gets shorter so
SLICE = 16  # chunks looked at before other threads are let in
_INDEX_MAGIC = b"CFindex2"
_HEAD = struct.Struct(">8sQQ32sQ")
_ENTRY = struct.Struct(">32sQ")
_INDEX_BYTES = _HEAD.size + BUCKETS * _ENTRY.size + DIGEST_BYTES
_EMPTY_HASH: bytes = trie.EMPTY[0]

Key = tuple[int, int]  # (c, slot)
Chain = tuple[Piece, ...]  # oldest first: an image, then changes; () for an empty chunk


@dataclass(frozen=True, slots=True)
class Index:
    """One persisted snapshot: its root, its chunks' hashes, the positions of their newest pieces."""

    c: int
    slot: int
    root: bytes
    oldest: int
    chunk_hashes: tuple[bytes, ...]
    heads: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Damage:
    """Something on the disk that does not verify: chunk `chunk` of snapshot (c, slot), or a whole file (chunk None)."""

    file: str
    chunk: int | None
    fact: str


class SnapshotFiles:
    """The snapshots in one directory. Not thread-safe; every method blocks on the disk."""

    def __init__(self, directory: Path, *, read_only: bool = False) -> None:
        """Read the indexes; damaged ones are in `damaged` and ignored. `read_only` creates and removes nothing."""
        self._directory = directory
        self.indexes: dict[Key, Index] = {}
        self.damaged: list[Damage] = []
        if not read_only:
            with disk_errors("create", directory):
                directory.mkdir(parents=True, exist_ok=True)
        for path in self._files("index-")[: MAX_INDEXES if read_only else None]:
            try:
                with open_regular(path) as file:
                    index = _decode_index(file.read(_INDEX_BYTES + 1))
            except (OSError, BadError) as error:
                self.damaged.append(Damage(path.name, None, str(error)))
                continue
            if path == self._index_path((index.c, index.slot)):
                self.indexes[index.c, index.slot] = index
            else:  # dropping it would remove another file
                self.damaged.append(Damage(path.name, None, f"is the index of ({index.c}, {index.slot})"))
        # The tip: what the log says when all of it is read. None: a chunk not known, whose next piece is an image.
        self._tip: list[Node | None] = [None] * BUCKETS
        self._chains: list[Chain] = [()] * BUCKETS
        self._credit = 0  # bytes of old images that may be written again
        numbers = [segment_number(path) for path in self._files("segment-")]
        newest = max((segment_of(head) for index in self.indexes.values() for head in index.heads), default=0)
        self._segment, self._end = 1 + max(newest, *numbers, 0), 0  # nothing is appended to what a crash left
        self._sizes: dict[int, int] = {}
        if not read_only:
            with disk_errors("clean up in", directory):
                sync_directory(directory)  # an index is believed to be durable: its rename may not be, see `wal`
                self._sweep(newest)
                self._sizes = {segment_number(path): path.stat().st_size for path in self._files("segment-")}

    def save(self, c: int, slot: int, snapshot: Snapshot) -> int:
        """Persist durably: what changed, then the index. Returns the bytes of pieces written.

        Safe to repeat. Raises DiskFullError or DiskFailedError, the snapshot not being there then.
        """
        writer = Writer(self._directory, self._segment, self._end)
        try:
            with disk_errors("write snapshot to", segment_path(self._directory, self._segment)):
                chains = self._append(writer, snapshot)
                credit = self._clean(writer, snapshot, chains)
                writer.finish()
            oldest = min((segment_of(chain[0].position) for chain in chains if chain), default=0)
            heads = tuple(chain[-1].position if chain else 0 for chain in chains)
            index = Index(c, slot, snapshot.root, oldest, snapshot.chunk_hashes, heads)
            path = self._index_path((c, slot))
            with disk_errors("write snapshot index", path):
                write_durably(path, (_encode_index(index),))
        except BaseException:
            if (c, slot) not in self.indexes:
                self._index_path((c, slot)).unlink(missing_ok=True)  # renamed, but perhaps not durably
            writer.abort()
            raise
        self._segment, self._end = writer.number, writer.end
        self._sizes |= writer.sizes
        self._credit = credit
        self._tip, self._chains = list(snapshot.buckets), chains
        self.indexes[c, slot] = index
        return writer.written

    def keep_only(self, keep: Iterable[Key]) -> None:
        """Forget all snapshots but those in `keep`, and the segments that nobody needs any more."""
        kept = set(keep)
        with disk_errors("remove snapshots in", self._directory):
            for key in [key for key in self.indexes if key not in kept]:
                self._index_path(key).unlink(missing_ok=True)
                del self.indexes[key]
            if not self.indexes:
                self._tip, self._chains = [None] * BUCKETS, [()] * BUCKETS
                self._segment, self._end = self._segment + 1, 0
            self._sweep(self._segment)

    def bucket(self, index: Index, chunk: int) -> Node:
        """The content of a chunk of a snapshot, verified. Raises BadError if the disk holds something else."""
        with Reader(self._directory) as reader:
            return self._bucket(reader, index, chunk, None)

    def is_sound(self, index: Index, chunk: int) -> bool:
        """Whether `bucket` would give the chunk."""
        try:
            self.bucket(index, chunk)
        except BadError:
            return False
        return True

    def look_at(self, index: Index, chunk: int) -> int:
        """Bytes that a chunk takes on the disk. Raises BadError if a checksum finds rot; a forgery it does not find."""
        if not index.heads[chunk] and index.chunk_hashes[chunk] == _EMPTY_HASH:
            return 0
        with Reader(self._directory) as reader:
            return sum(link.piece.length for link in reader.chain(index.heads[chunk], chunk))

    def read_unchecked(self, index: Index, chunk: int) -> bytes:
        """The chunk as the disk tells it, or what lies where it should; the reader checks it. Raises BadError if
        nothing does.
        """
        if not index.heads[chunk]:
            return b""
        with Reader(self._directory) as reader:
            links = reader.chain(index.heads[chunk], chunk, check=False)
            try:
                return encode_chunk({k: v for k, v in content_of(links).items() if v is not None})
            except BadError:
                return links[0].body

    def load(self) -> dict[Key, Snapshot]:
        """Every snapshot that verifies completely. What does not is added to `damaged`. What is equal is shared.

        Costs the size of the newest one in full, of the others what differs.
        """
        loaded: dict[Key, Snapshot] = {}
        newest = None
        before: list[tuple[int, Node] | None] = [None] * BUCKETS  # of each chunk: a head, and what it says
        with Reader(self._directory) as reader:
            for index in sorted(self.indexes.values(), key=lambda index: max(index.heads)):
                buckets: list[Node | None] = []
                for i in range(BUCKETS):
                    try:
                        node = self._bucket(reader, index, i, before[i])
                        before[i] = index.heads[i], node
                        buckets.append(node)
                    except BadError as error:
                        self.damaged.append(Damage(f"index-{index.c}-{index.slot}", i, str(error)))
                        buckets.append(None)
                whole = [node for node in buckets if node is not None]
                if len(whole) == BUCKETS:
                    loaded[index.c, index.slot] = Snapshot(whole, index.root)
                self._tip, newest = buckets, index
            if newest is not None:
                self._chains = [self._walk(reader, newest, i) for i in range(BUCKETS)]
        return loaded

    def piece_of(self, index: Index, chunk: int) -> tuple[Path, int, int]:
        """File, offset and length of a chunk's newest piece (for tools that look at, or damage, the disk). Raises
        BadError if it has none.
        """
        with Reader(self._directory) as reader:
            piece = reader.chain(index.heads[chunk], chunk, bodies=False)[0].piece
        path = segment_path(self._directory, segment_of(piece.position))
        return path, (piece.position & 0xFFFFFFFF) + HEADER_BYTES, piece.length

    def _append(self, writer: Writer, snapshot: Snapshot) -> list[Chain]:
        """Write what changed since the tip. Returns the chains of the new tip."""
        chains: list[Chain] = []
        with Reader(self._directory) as reader:
            for i, node in enumerate(snapshot.buckets):
                if i % SLICE == 0:
                    time.sleep(0)  # lets the event loop run, which waits for nothing but the interpreter's lock
                chains.append(self._extended(writer, reader, i, node))
        return chains

    def _extended(self, writer: Writer, reader: Reader, chunk: int, node: Node) -> Chain:
        old, chain = self._tip[chunk], self._chains[chunk]
        if old is not None and old[0] == node[0]:
            return chain
        if node[0] == _EMPTY_HASH:
            return ()
        if old is None or not chain:
            return _image(writer, chunk, node)
        changes = trie.differences(old, node)
        image, later = chain[0], list(chain[1:])
        level = 0
        try:
            while len(later) >= FANIN - 1 and all(piece.level == level for piece in later[1 - FANIN :]):
                for piece in later[1 - FANIN :]:
                    for key in reader.piece(piece, chunk).changes():
                        if key not in changes:
                            changes[key] = trie.lookup(node, trie.place(key) >> BUCKET_BITS, key)
                del later[1 - FANIN :]
                level += 1
        except BadError:
            return _image(writer, chunk, node)
        size = sum(piece.length for piece in later) + sum(len(k) + len(v or b"") for k, v in changes.items())
        if level > MAX_LEVEL or size >= node[1]:
            return _image(writer, chunk, node)
        previous = (later[-1] if later else image).position
        return (image, *later, writer.add(chunk, level, previous, changes))

    def _clean(self, writer: Writer, snapshot: Snapshot, chains: list[Chain]) -> int:
        """Write the oldest images again while the log is too long. Returns the credit that is left."""
        credit = self._credit + CLEANING * writer.written
        sizes = self._sizes | writer.sizes | {writer.number: writer.end}
        limit = MAX_SPAN * sum(node[1] for node in snapshot.buckets) + SEGMENT_BYTES
        if sum(sizes.values()) <= limit:
            return min(credit, 0)
        for position, i in sorted((chain[0].position, i) for i, chain in enumerate(chains) if chain):
            if sum(size for number, size in sizes.items() if number >= segment_of(position)) <= limit:
                return min(credit, 0)
            if credit <= 0:
                break
            chains[i] = _image(writer, i, snapshot.buckets[i])
            credit -= HEADER_BYTES + chains[i][0].length
            time.sleep(0)  # as in `_append`
        return credit

    def _bucket(self, reader: Reader, index: Index, chunk: int, before: tuple[int, Node] | None) -> Node:
        """`before`: a head of the chunk in the same log, and the content that it was verified to lead to."""
        head, digest = index.heads[chunk], index.chunk_hashes[chunk]
        if before is not None and before[0] == head and before[1][0] == digest:
            return before[1]
        if not head:
            node = trie.EMPTY
        else:
            links = reader.chain(head, chunk, stop=before[0] if before is not None else 0)
            content = content_of(links)
            if before is None:
                node = trie.build(_present(content), chunk)
            else:
                if links[-1].piece.level == IMAGE:
                    content = dict.fromkeys(trie.entries(before[1])) | content
                node = trie.updated(before[1], trie.placed(content.items(), chunk))
        if node[0] == digest:
            return node
        if before is not None:
            return self._bucket(reader, index, chunk, None)
        raise BadError(f"chunk {chunk} of snapshot ({index.c}, {index.slot}) does not match its hash")

    def _walk(self, reader: Reader, index: Index, chunk: int) -> Chain:
        """The chain of a chunk of the tip; none, so that an image is next, if it is damaged."""
        if not index.heads[chunk] or self._tip[chunk] is None:
            return ()
        try:
            links = reader.chain(index.heads[chunk], chunk, bodies=False)
        except BadError as error:
            self.damaged.append(Damage(f"index-{index.c}-{index.slot}", chunk, str(error)))
            self._tip[chunk] = None
            return ()
        return tuple(link.piece for link in reversed(links))

    def _files(self, prefix: str) -> list[Path]:
        try:
            paths = sorted(self._directory.iterdir())
        except OSError as error:
            self.damaged.append(Damage(self._directory.name, None, str(error)))
            return []
        return [path for path in paths if path.name.startswith(prefix) and not path.name.endswith(PART)]

    def _index_path(self, key: Key) -> Path:
        return self._directory / f"index-{key[0]}-{key[1]}"

    def _sweep(self, newest: int) -> None:
        """Remove segments that no index and not the tip needs, and what a crash left behind segment `newest`."""
        needed = [index.oldest for index in self.indexes.values() if index.oldest]
        needed += [segment_of(chain[0].position) for chain in self._chains if chain]
        first = min(needed, default=newest + 1)
        swept = False
        for path in self._files("segment-"):
            number = segment_number(path)
            if not first <= number <= newest:
                path.unlink(missing_ok=True)
                self._sizes.pop(number, None)
                swept = True
        for path in self._directory.glob(f"*{PART}"):
            path.unlink(missing_ok=True)
        if swept:
            sync_directory(self._directory)


def _image(writer: Writer, chunk: int, node: Node) -> Chain:
    return (writer.add(chunk, IMAGE, 0, trie.entries(node)),)


def _present(content: Changes) -> list[tuple[bytes, bytes]]:
    return [(key, value) for key, value in content.items() if value is not None]


def _encode_index(index: Index) -> bytes:
    head = _HEAD.pack(_INDEX_MAGIC, index.c, index.slot, index.root, index.oldest)
    entries = b"".join(map(_ENTRY.pack, index.chunk_hashes, index.heads))
    return head + entries + sha256(head, entries)


def _decode_index(data: bytes) -> Index:
    """Raises BadError unless the index is whole and its hashes make its root."""
    body, check = data[:-DIGEST_BYTES], data[-DIGEST_BYTES:]
    if len(data) != _INDEX_BYTES or sha256(body) != check:
        raise BadError("index of a snapshot is not whole")
    magic, c, slot, root, oldest = _HEAD.unpack_from(body)
    hashes, heads = zip(*_ENTRY.iter_unpack(body[_HEAD.size :]), strict=True)
    if magic != _INDEX_MAGIC or root_of(hashes) != root:
        raise BadError("index of a snapshot does not make its own root")
    return Index(c, slot, root, oldest, hashes, heads)
