"""The write-ahead log: one append-only file of checked frames, cut at the first frame that is not whole.

File: magic 8 ‖ salt 8 ‖ frames; frame: `length u32 ‖ check u32 ‖ record`. The check is a CRC-32 over salt, length and
record: it finds torn writes and rot, not malice (whoever can write this disk owns the replica). The salt is new for
each file, so blocks of an older log that the file system hands out again never pass as this one's.
"""

import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from cloudfit_orchestrator.guest.storage import (
    DiskFailedError,
    DiskFullError,
    disk_errors,
    open_regular,
    sync_directory,
    write_durably,
)
from cloudfit_orchestrator.model.errors import BadInputError

MAX_RECORD = 16 << 20  # bytes; the largest is a NEW-VIEW with its view changes, a peer frame of 8 MiB and its headers
_MAGIC = b"CFwal\x00\x001"
_SALT_BYTES = 8
_HEADER_BYTES = len(_MAGIC) + _SALT_BYTES
_FRAME = struct.Struct(">II")


class WriteAheadLog:
    """Not thread-safe: one caller at a time. Every method blocks on the disk."""

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        """Open or create the log, and cut off what follows its last whole frame.

        `read_only` neither creates nor cuts (another program's disk). Raises DiskFullError, DiskFailedError.
        """
        self.path = path
        self.cut_bytes = 0  # dropped at opening: a torn tail, or everything behind rot
        self._read_only = read_only
        self._failed = False
        self._salt = b""
        with disk_errors("open log", path):
            if not read_only and not self._begins_well():
                self.cut_bytes = path.stat().st_size if path.exists() else 0
                write_durably(path, (_MAGIC, os.urandom(_SALT_BYTES)))
            self._file: BinaryIO = open_regular(path) if read_only else path.open("r+b", buffering=0)
            self._load()

    def records(self) -> Iterator[bytes]:
        """All records in order, read from the disk as the iteration goes."""
        with open_regular(self.path) as file:
            file.seek(_HEADER_BYTES)
            yield from self._frames(file, self._end)

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self._end

    def append(self, records: Iterable[bytes]) -> None:
        """Write `records` behind the others and make them durable by one fsync.

        Raises DiskFullError having changed nothing; DiskFailedError if the disk's content is unknown now: the log
        refuses everything after it.
        """
        self._usable()
        data = b"".join(self._encode(record) for record in records)
        if not data:
            return
        with disk_errors("append to log", self.path):
            try:
                self._write(data)
            except OSError:
                self._file.truncate(self._end)
                raise
            self._sync()
        self._end += len(data)

    def rewrite(self, records: Iterable[bytes]) -> None:
        """Replace the whole log, atomically and durably. Raises as `append` does."""
        self._usable()
        old_salt, self._salt = self._salt, os.urandom(_SALT_BYTES)
        try:
            with disk_errors("rewrite log", self.path):
                write_durably(self.path, (_MAGIC, self._salt, *(self._encode(record) for record in records)))
        except (DiskFullError, BadInputError):
            self._salt = old_salt
            raise
        except DiskFailedError:
            self._failed = True  # the old file or the new one: only the next start can tell
            raise
        with disk_errors("open log", self.path):
            self._file.close()
            self._file = self.path.open("r+b", buffering=0)
            self._end = self._file.seek(0, os.SEEK_END)

    def close(self) -> None:
        """Close the file; what was appended is durable already."""
        self._file.close()

    def _begins_well(self) -> bool:
        if not self.path.exists():
            return False
        with open_regular(self.path) as file:
            header = file.read(_HEADER_BYTES)
        return len(header) == _HEADER_BYTES and header.startswith(_MAGIC)

    def _usable(self) -> None:
        if self._failed or self._read_only:
            raise DiskFailedError(f"log {self.path.name} is closed for writing after a failed fsync")

    def _encode(self, record: bytes) -> bytes:
        if not 0 < len(record) <= MAX_RECORD:
            raise BadInputError(f"log record of {len(record)} bytes, allowed are 1 to {MAX_RECORD}")
        return _FRAME.pack(len(record), self._check(record)) + record

    def _check(self, record: bytes) -> int:
        return zlib.crc32(record, zlib.crc32(self._salt + len(record).to_bytes(4, "big")))

    def _write(self, data: bytes) -> None:
        view, at = memoryview(data), self._end
        while view:
            written = os.pwrite(self._file.fileno(), view, at)
            view, at = view[written:], at + written

    def _sync(self) -> None:
        try:
            os.fdatasync(self._file.fileno())
        except OSError:
            self._failed = True  # Linux may have dropped the dirty pages: a second fsync would lie
            raise

    def _load(self) -> None:
        header = self._file.read(_HEADER_BYTES)
        size = os.fstat(self._file.fileno()).st_size
        self._salt = header[len(_MAGIC) :]
        self._end = min(size, _HEADER_BYTES)
        if self._begins_well():
            with open_regular(self.path) as file:
                file.seek(_HEADER_BYTES)
                for record in self._frames(file, size):
                    self._end += _FRAME.size + len(record)
        self.cut_bytes += size - self._end
        if self._read_only:
            return
        if size > self._end:
            self._file.truncate(self._end)
        # A process that ended between write and fsync, or rename and fsync, left what only the page cache has. What
        # is read here is said again, and nothing new need be written before: so it is made durable now.
        self._sync()
        sync_directory(self.path.parent)

    def _frames(self, file: BinaryIO, end: int) -> Iterator[bytes]:
        at = _HEADER_BYTES
        while at + _FRAME.size <= end:
            length, check = _FRAME.unpack(file.read(_FRAME.size))
            if not 0 < length <= MAX_RECORD or at + _FRAME.size + length > end:
                return
            record = file.read(length)
            if len(record) != length or self._check(record) != check:
                return
            yield record
            at += _FRAME.size + length
