"""Snapshots on the state disk: chunks by content in few *pack* files, one *index* file for each snapshot.

A save writes one pack with the chunks that no earlier pack holds, then the index: three fsyncs, however many of the
1,024 chunks changed. Garbage goes when a pack has no reader left; what a mostly dead pack still holds is written again
by the next save, so packs stay few and at least half alive. Nothing read is trusted: each chunk is checked against its
hash, the hashes against the index's root, and the caller checks the root against certificates.

Pack `pack-N`: magic 8 ‖ chunks. Index `index-C-SLOT`: magic 8 ‖ c u64 ‖ slot u64 ‖ root 32 ‖ BUCKETS entries
(hash 32 ‖ pack u64 ‖ offset u64 ‖ length u32) ‖ SHA-256 of all that 32.
"""

import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cloudfit_orchestrator.bft import trie
from cloudfit_orchestrator.bft.store import BUCKETS, MAX_CHUNK, Snapshot, chunk_hash, decode_chunk, root_of
from cloudfit_orchestrator.guest.storage import PART, disk_errors, open_regular, sync_directory, write_durably
from cloudfit_orchestrator.model.errors import BadError
from cloudfit_orchestrator.model.signing import DIGEST_BYTES, sha256

MAX_PACKS = 16  # beyond them the oldest one's chunks are written again: bounds open files and scattered reads
MAX_INDEXES = 64  # a replica keeps three or four snapshots; an index says nothing that must be read without a bound
_INDEX_MAGIC = b"CFindex1"
_PACK_MAGIC = b"CFpack_1"
_HEAD = struct.Struct(">8sQQ32s")
_ENTRY = struct.Struct(">32sQQI")
_INDEX_BYTES = _HEAD.size + BUCKETS * _ENTRY.size + DIGEST_BYTES

Key = tuple[int, int]  # (c, slot)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a chunk lies."""

    pack: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Index:
    """One persisted snapshot: its root, its chunks' hashes and places."""

    c: int
    slot: int
    root: bytes
    chunk_hashes: tuple[bytes, ...]
    places: tuple[Place, ...]


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
        self._rotten: set[Place] = set()  # seen not to verify: the next save writes those chunks again
        if not read_only:
            with disk_errors("create", directory):
                directory.mkdir(parents=True, exist_ok=True)
        for path in self._files("index-")[:MAX_INDEXES]:
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
        self._known = self._all_places()
        self._next_pack = 1 + max((_pack_number(path) for path in self._files("pack-")), default=0)
        if not read_only:
            with disk_errors("clean", directory):
                self._sweep()

    def save(self, c: int, slot: int, snapshot: Snapshot) -> int:
        """Persist durably: new chunks, then the index. Returns the bytes of chunks written.

        Safe to repeat. Raises DiskFullError or DiskFailedError, the snapshot not being there then.
        """
        weak = self._weak_packs()
        places: dict[bytes, Place] = {}
        new: list[int] = []
        offset = len(_PACK_MAGIC)
        for i, digest in enumerate(snapshot.chunk_hashes):
            known = self._known.get(digest)
            if known is not None and known.pack not in weak and known not in self._rotten:
                places[digest] = known
            elif digest not in places:
                new.append(i)
                length = len(snapshot.chunk(i))
                places[digest] = Place(self._next_pack, offset, length)
                offset += length
        if new:
            pack = self._pack_path(self._next_pack)
            with disk_errors("write snapshot pack", pack):
                write_durably(pack, _pack_parts(snapshot, new))
            self._next_pack += 1
        hashes = snapshot.chunk_hashes
        index = Index(c, slot, snapshot.root, hashes, tuple(places[digest] for digest in hashes))
        path = self._index_path((c, slot))
        with disk_errors("write snapshot index", path):
            write_durably(path, (_encode_index(index),))
        self.indexes[c, slot] = index
        self._known = self._all_places()
        return offset - len(_PACK_MAGIC)

    def keep_only(self, keep: Iterable[Key]) -> None:
        """Forget all snapshots but those in `keep`, and the packs that nobody needs any more."""
        kept = set(keep)
        with disk_errors("remove snapshots in", self._directory):
            for key in [key for key in self.indexes if key not in kept]:
                self._index_path(key).unlink(missing_ok=True)
                del self.indexes[key]
            self._known = self._all_places()
            self._sweep()

    def read(self, index: Index, chunk: int) -> bytes:
        """Chunk `chunk` of a snapshot, verified. Raises BadError if the disk holds something else, or nothing."""
        data = self.read_unchecked(index, chunk)
        if chunk_hash(data) != index.chunk_hashes[chunk]:
            raise BadError(f"chunk {chunk} of snapshot ({index.c}, {index.slot}) does not match its hash")
        return data

    def is_sound(self, index: Index, chunk: int) -> bool:
        """Whether `read` would give the chunk."""
        try:
            self.read(index, chunk)
        except BadError:
            return False
        return True

    def read_unchecked(self, index: Index, chunk: int) -> bytes:
        """What lies where the index says that the chunk is; the reader checks it. Raises BadError if nothing does."""
        place = index.places[chunk]
        if place.length > MAX_CHUNK:
            raise BadError(f"chunk {chunk} is said to have {place.length} bytes, the limit is {MAX_CHUNK}")
        try:
            with open_regular(self._pack_path(place.pack)) as file:
                return os.pread(file.fileno(), place.length, place.offset)
        except (OSError, OverflowError) as error:
            raise BadError(f"chunk {chunk} cannot be read: {error}") from error

    def load(self) -> dict[Key, Snapshot]:
        """Every snapshot that verifies completely. What does not is added to `damaged`. Equal chunks are shared."""
        buckets: dict[tuple[int, bytes], trie.Node] = {}
        loaded: dict[Key, Snapshot] = {}
        for key, index in sorted(self.indexes.items()):
            before = len(self.damaged)
            mine = [self._bucket(index, i, buckets) for i in range(BUCKETS)]
            if len(self.damaged) == before:
                whole = tuple(bucket for bucket in mine if bucket is not None)
                loaded[key] = Snapshot(whole, index.root)
        return loaded

    def pack_of(self, index: Index, chunk: int) -> tuple[Path, Place]:
        """The file and place of a chunk (for tools that look at, or damage, the disk)."""
        return self._pack_path(index.places[chunk].pack), index.places[chunk]

    def _bucket(self, index: Index, chunk: int, seen: dict[tuple[int, bytes], trie.Node]) -> trie.Node | None:
        digest = index.chunk_hashes[chunk]
        if (chunk, digest) not in seen:
            try:
                seen[chunk, digest] = trie.build(decode_chunk(self.read(index, chunk), chunk))
            except BadError as error:
                self.damaged.append(Damage(f"index-{index.c}-{index.slot}", chunk, str(error)))
                self._rotten.add(index.places[chunk])
                return None
        return seen[chunk, digest]

    def _files(self, prefix: str) -> list[Path]:
        try:
            paths = sorted(self._directory.iterdir())
        except OSError as error:
            self.damaged.append(Damage(self._directory.name, None, str(error)))
            return []
        return [path for path in paths if path.name.startswith(prefix) and not path.name.endswith(PART)]

    def _pack_path(self, number: int) -> Path:
        return self._directory / f"pack-{number}"

    def _index_path(self, key: Key) -> Path:
        return self._directory / f"index-{key[0]}-{key[1]}"

    def _all_places(self) -> dict[bytes, Place]:
        return {
            digest: place
            for _, index in sorted(self.indexes.items())
            for digest, place in zip(index.chunk_hashes, index.places, strict=True)
        }

    def _weak_packs(self) -> set[int]:
        """Packs whose chunks the next save writes again: more than half garbage, or one too many."""
        live: dict[int, dict[int, int]] = {}
        for index in self.indexes.values():
            for place in index.places:
                live.setdefault(place.pack, {})[place.offset] = place.length
        weak = set()
        for number, places in live.items():
            try:
                size = self._pack_path(number).stat().st_size
            except OSError:
                size = -1
            if 2 * sum(places.values()) < size or size < 0:
                weak.add(number)
        strong = sorted(set(live) - weak)
        weak.update(strong[: max(0, len(strong) - MAX_PACKS + 1)])
        return weak

    def _sweep(self) -> None:
        used = {place.pack for index in self.indexes.values() for place in index.places}
        swept = False
        for path in self._files("pack-"):
            if _pack_number(path) not in used:
                path.unlink(missing_ok=True)
                swept = True
        for path in self._directory.glob(f"*{PART}"):
            path.unlink(missing_ok=True)
        if swept:
            sync_directory(self._directory)


def _pack_number(path: Path) -> int:
    suffix = path.name.removeprefix("pack-")
    return int(suffix) if suffix.isascii() and suffix.isdigit() and len(suffix) < 19 else 0


def _pack_parts(snapshot: Snapshot, chunks: list[int]) -> Iterator[bytes]:
    yield _PACK_MAGIC
    for i in chunks:
        yield snapshot.chunk(i)


def _encode_index(index: Index) -> bytes:
    head = _HEAD.pack(_INDEX_MAGIC, index.c, index.slot, index.root)
    entries = b"".join(
        _ENTRY.pack(digest, place.pack, place.offset, place.length)
        for digest, place in zip(index.chunk_hashes, index.places, strict=True)
    )
    return head + entries + sha256(head, entries)


def _decode_index(data: bytes) -> Index:
    """Raises BadError unless the index is whole and its hashes make its root."""
    body, check = data[:-DIGEST_BYTES], data[-DIGEST_BYTES:]
    if len(data) != _INDEX_BYTES or sha256(body) != check:
        raise BadError("index of a snapshot is not whole")
    magic, c, slot, root = _HEAD.unpack_from(body)
    entries = list(_ENTRY.iter_unpack(body[_HEAD.size :]))
    hashes = tuple(entry[0] for entry in entries)
    if magic != _INDEX_MAGIC or root_of(hashes) != root:
        raise BadError("index of a snapshot does not make its own root")
    return Index(c, slot, root, hashes, tuple(Place(*entry[1:]) for entry in entries))
