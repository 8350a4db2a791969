"""The log of state pieces on the state disk: append-only *segment* files that hold what changed in each chunk.

A *piece* is either the image of a chunk or what changed in it since an earlier piece. Each names the one before it,
so a chunk at some moment is a *chain*: an image and some changes, newest first, of which one position is remembered.
Nothing read is trusted: a chain is bounded in pieces and bytes and only leads backwards; its check finds rot, and
whoever needs more than that compares the hash of what comes out.

Segment `segment-N`: magic 8 ‖ pieces. Piece: magic 4 ‖ CRC-32 u32 of all that follows ‖ level u8 ‖ chunk u16 ‖
entries u32 ‖ length u32 ‖ previous u64 ‖ body; body: lengths of the keys ‖ lengths of the values (GONE: deleted), u32
each ‖ keys ‖ values. A position is segment u32 ‖ offset u32; 0 is none.
"""

import os
import struct
import zlib
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple, Self

from cloudfit_orchestrator.bft.store import MAX_CHUNK, MAX_KEY, MAX_VALUE
from cloudfit_orchestrator.guest.storage import open_regular, sync_directory
from cloudfit_orchestrator.model.errors import BadError

SEGMENT_BYTES = 4 << 20  # a segment that has reached it is closed: 1 GiB of state are some hundred files
FANIN = 8  # so many pieces of changes of one level become one of the next
MAX_LEVEL = 6  # 8^6 changes of one chunk: then comes an image, however few keys they were
IMAGE = 255  # the level of an image
MAX_CHAIN = (FANIN - 1) * (MAX_LEVEL + 1) + 1  # pieces
MAX_CHAIN_BYTES = 2 * MAX_CHUNK  # an image, and changes that are smaller together
WRITE_BYTES = 64 << 10  # written at once: between two writes other threads run
MAX_OPEN = 16  # files of one reader

_MAGIC = b"CFsegm_1"
_PIECE_MAGIC = b"CFp1"
_CHECK = struct.Struct(">4sI")
_HEADER = struct.Struct(">BHIIQ")
HEADER_BYTES = _CHECK.size + _HEADER.size
_AHEAD = 4096  # read with a header: most pieces of changes are smaller
_GONE = 0xFFFFFFFF

Changes = dict[bytes, bytes | None]  # None: deleted


class Piece(NamedTuple):
    """Where a piece lies, and what it is. `length`: bytes of its body."""

    position: int
    level: int
    length: int


def segment_of(position: int) -> int:
    """The number of the segment."""
    return position >> 32


def segment_path(directory: Path, number: int) -> Path:
    """The file of a segment."""
    return directory / f"segment-{number}"


def segment_number(path: Path) -> int:
    """The number of the segment in a file of that name; 0 if none can be."""
    suffix = path.name.removeprefix("segment-")
    number = int(suffix) if suffix.isascii() and suffix.isdigit() and len(suffix) <= 10 else 0
    return number if number < 1 << 32 else 0


class Writer:
    """Appends pieces behind `offset` of segment `number`, or to a new segment if `offset` is 0."""

    def __init__(self, directory: Path, number: int, offset: int) -> None:
        """Touches nothing before the first piece."""
        self._directory = directory
        self.number = number
        self.end = offset  # of the segment, with all pieces so far
        self.sizes: dict[int, int] = {}  # of the segments written to
        self.written = 0  # bytes
        self._before = (number, offset)
        self._file: BinaryIO | None = None
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0
        self._created = False

    def add(self, chunk: int, level: int, previous: int, changes: Mapping[bytes, bytes | None]) -> Piece:
        """Append a piece. Raises OSError."""
        body = encode_changes(changes)
        rest = _HEADER.pack(level, chunk, len(changes), len(body), previous)
        if self._file is None or self.end >= SEGMENT_BYTES:
            self._next_file()
        piece = Piece(self.number << 32 | self.end, level, len(body))
        self._put(_CHECK.pack(_PIECE_MAGIC, zlib.crc32(body, zlib.crc32(rest))), rest, body)
        return piece

    def finish(self) -> None:
        """Make all pieces durable. Raises OSError."""
        self._close_file()
        if self._created:
            sync_directory(self._directory)

    def abort(self) -> None:
        """Give the room of a failed write back, as far as the disk lets us."""
        with suppress(OSError):
            if self._file is not None:
                self._file.close()
            number, offset = self._before
            for new in self.sizes.keys() | {self.number}:
                if new != number or not offset:
                    segment_path(self._directory, new).unlink(missing_ok=True)
            if offset:
                os.truncate(segment_path(self._directory, number), offset)

    def _next_file(self) -> None:
        if self.end >= SEGMENT_BYTES:
            self._close_file()
            self.number, self.end = self.number + 1, 0
        path = segment_path(self._directory, self.number)
        self._file = path.open("r+b" if self.end else "wb", buffering=0)
        self._file.seek(self.end)
        if not self.end:
            self._created = True
            self._put(_MAGIC)

    def _put(self, *parts: bytes) -> None:
        self._waiting += parts
        size = sum(map(len, parts))
        self._waiting_bytes += size
        self.end += size
        self.written += size
        if self._waiting_bytes >= WRITE_BYTES:
            self._flush()

    def _flush(self) -> None:
        data = memoryview(b"".join(self._waiting))
        self._waiting, self._waiting_bytes = [], 0
        while data and self._file is not None:
            data = data[self._file.write(data) :]

    def _close_file(self) -> None:
        if self._file is not None:
            self._flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None
            self.sizes[self.number] = self.end


class Reader:
    """Reads pieces; a context manager that closes its files."""

    def __init__(self, directory: Path) -> None:
        """Opens nothing yet."""
        self._directory = directory
        self._files: dict[int, BinaryIO] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with ExitStack() as stack:
            for file in self._files.values():
                stack.callback(file.close)
        self._files.clear()

    def chain(self, head: int, chunk: int, *, stop: int = 0, bodies: bool = True, check: bool = True) -> list["Link"]:
        """The pieces from `head` on, newest first, to the image, or to the one behind which nothing is newer than
        `stop`. Without `bodies` headers only, which `check` cannot check. Raises BadError if this is no chain.
        """
        links: list[Link] = []
        position, size = head, 0
        while True:
            link = self._read(position, chunk, bodies=bodies, check=check and bodies)
            links.append(link)
            size += link.piece.length
            if link.piece.level == IMAGE or 0 < link.previous <= stop:
                return links
            if len(links) == MAX_CHAIN or size > MAX_CHAIN_BYTES or not 0 < link.previous < position:
                raise BadError(f"chunk {chunk} is not a chain of pieces that ends")
            position = link.previous

    def piece(self, piece: Piece, chunk: int) -> "Link":
        """One piece. Raises BadError if it is not there."""
        return self._read(piece.position, chunk, bodies=True, check=True)

    def _read(self, position: int, chunk: int, *, bodies: bool, check: bool) -> "Link":
        data = self._pread(position, _AHEAD if bodies else HEADER_BYTES)
        if len(data) < HEADER_BYTES:
            raise BadError(f"chunk {chunk} has a piece behind the end of its segment")
        magic, crc = _CHECK.unpack_from(data)
        level, owner, entries, length, previous = _HEADER.unpack_from(data, _CHECK.size)
        if magic != _PIECE_MAGIC or owner != chunk or length > MAX_CHUNK or not (level <= MAX_LEVEL or level == IMAGE):
            raise BadError(f"chunk {chunk} has no piece where one should be")
        piece = Piece(position, level, length)
        if not bodies:
            return Link(piece, previous, entries, b"")
        end = HEADER_BYTES + length
        if len(data) < end:
            data += self._pread(position + len(data), end - len(data))
        if len(data) < end or (check and zlib.crc32(memoryview(data)[_CHECK.size : end]) != crc):
            raise BadError(f"chunk {chunk} has a piece that is not whole")
        return Link(piece, previous, entries, data[HEADER_BYTES:end])

    def _pread(self, position: int, length: int) -> bytes:
        number, offset = segment_of(position), position & 0xFFFFFFFF
        try:
            file = self._files.get(number)
            if file is None:
                if len(self._files) >= MAX_OPEN:
                    self._files.pop(next(iter(self._files))).close()
                file = self._files[number] = open_regular(segment_path(self._directory, number))
            return os.pread(file.fileno(), length, offset)
        except OSError as error:
            raise BadError(f"segment {number} cannot be read: {error.strerror}") from error


class Link(NamedTuple):
    """A piece of a chain as it was read."""

    piece: Piece
    previous: int
    entries: int
    body: bytes

    def changes(self) -> Changes:
        """What the piece says. Raises BadError if its body is malformed."""
        return decode_changes(self.body, self.entries)


def content_of(links: list[Link]) -> Changes:
    """What a chain says altogether, newest first as `Reader.chain` gives it. Raises BadError for a malformed piece."""
    found: Changes = {}
    for link in reversed(links):
        found.update(link.changes())
    return found


def encode_changes(changes: Mapping[bytes, bytes | None]) -> bytes:
    """The body of a piece."""
    values = changes.values()
    lengths = [_GONE if value is None else len(value) for value in values]
    head = struct.pack(f">{2 * len(changes)}I", *map(len, changes), *lengths)
    return b"".join((head, *changes, *filter(None, values)))


def decode_changes(body: bytes, entries: int) -> Changes:
    """Raises BadError unless `body` has exactly so many entries, within the limits."""
    if 2 * 4 * entries > len(body):
        raise BadError(f"piece of {len(body)} bytes cannot hold {entries} entries")
    lengths = struct.unpack_from(f">{2 * entries}I", body)
    sizes = [0 if length == _GONE else length for length in lengths]
    if any(size > MAX_KEY for size in sizes[:entries]) or any(size > MAX_VALUE for size in sizes[entries:]):
        raise BadError("piece has a key or a value over the limit")
    at = 8 * entries
    if at + sum(sizes) != len(body):
        raise BadError("piece does not end with its last value")
    parts = []
    for size in sizes:
        parts.append(body[at : at + size])
        at += size
    values = [
        None if length == _GONE else part for part, length in zip(parts[entries:], lengths[entries:], strict=True)
    ]
    return dict(zip(parts, values, strict=False))
