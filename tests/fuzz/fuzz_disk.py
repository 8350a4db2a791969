"""A state disk that anybody may have written: log, indexes, packs. It opens, what is wrong is named; or DiskFailed."""

import shutil
import tempfile
import zlib
from pathlib import Path

from cloudfit_orchestrator.bft.messages import ChunkQuery, FetchBatches, StateQuery, encode
from cloudfit_orchestrator.bft.store import BUCKETS, StateStore, root_of
from cloudfit_orchestrator.bft.usig.messages import Fetch
from cloudfit_orchestrator.guest.exporter import OldDisk
from cloudfit_orchestrator.guest.segments import _CHECK, _HEADER, _PIECE_MAGIC
from cloudfit_orchestrator.guest.segments import _MAGIC as _SEGMENT_MAGIC
from cloudfit_orchestrator.guest.snapshots import _ENTRY, _HEAD, _INDEX_MAGIC, SnapshotFiles
from cloudfit_orchestrator.guest.storage import DiskFailedError
from cloudfit_orchestrator.guest.wal import _FRAME, _MAGIC, WriteAheadLog
from cloudfit_orchestrator.model.signing import sha256
from tests.fuzz.choices import Choices

MEMORY = Path("/dev/shm")  # fsync is no part of what is looked for
EMPTY = StateStore().snapshot()


def run(data: bytes) -> None:
    """The first byte chooses what is hostile."""
    state = Path(tempfile.mkdtemp(prefix="cf-fuzz-", dir=MEMORY))
    try:
        choices = Choices(data)
        (_log, _entries, _index, _places)[choices.byte() % 4](state, choices)
        _export(state)
    finally:
        shutil.rmtree(state)


def _log(state: Path, choices: Choices) -> None:
    """Raw bytes where the log is."""
    path = state / "wal"
    path.write_bytes(choices.rest())
    before = path.read_bytes()
    log = WriteAheadLog(path, read_only=True)
    found = list(log.records())
    log.close()
    assert path.read_bytes() == before, "reading changed another's disk"
    log = WriteAheadLog(path)
    assert list(log.records()) == found
    log.append([b"more"])
    log.close()
    log = WriteAheadLog(path)
    assert list(log.records()) == [*found, b"more"], "what was durable is not there any more"
    log.close()


def _entries(state: Path, choices: Choices) -> None:
    """A whole log of hostile records."""
    salt, parts = choices.raw(8).ljust(8, b"\0"), []
    while choices:
        record = choices.raw(1 + choices.byte())
        if record:
            check = zlib.crc32(record, zlib.crc32(salt + len(record).to_bytes(4, "big")))
            parts.append(_FRAME.pack(len(record), check) + record)
    (state / "wal").write_bytes(_MAGIC + salt + b"".join(parts))
    log = WriteAheadLog(state / "wal")
    assert len(list(log.records())) == len(parts)
    log.close()


def _index(state: Path, choices: Choices) -> None:
    """Raw bytes where an index and a segment are."""
    folder = state / "snapshots"
    folder.mkdir()
    name = choices.pick(
        ["index-1-1", "index-", "index-1-1.part", "segment-1", "segment-x", "index-99999999999999999999-1"]
    )
    (folder / name).write_bytes(choices.rest())
    _load(folder)


def _places(state: Path, choices: Choices) -> None:
    """A whole index whose pieces lie anywhere, and segments with pieces that name each other."""
    folder = state / "snapshots"
    folder.mkdir()
    hashes = list(EMPTY.chunk_hashes)
    heads = [(choices.integer() % 4) << 32 | choices.integer() % 256 for _ in range(8)]
    for _ in heads:
        if choices.byte() & 1:
            hashes[choices.byte()] = sha256(choices.octets())
    head = _HEAD.pack(
        _INDEX_MAGIC, choices.integer() % (1 << 64), choices.integer() % (1 << 64), root_of(hashes), choices.byte()
    )
    entries = b"".join(_ENTRY.pack(digest, heads[i % 8]) for i, digest in enumerate(hashes))
    (folder / "index-1-1").write_bytes(head + entries + sha256(head, entries))
    pieces = b""
    while choices:
        body = choices.octets()
        previous = (choices.integer() % 4) << 32 | choices.integer() % 256
        rest = _HEADER.pack(choices.byte(), choices.byte(), choices.byte(), len(body), previous)
        pieces += _CHECK.pack(_PIECE_MAGIC, zlib.crc32(rest + body)) + rest + body
    for number in (1, 2):
        (folder / f"segment-{number}").write_bytes(_SEGMENT_MAGIC + pieces)
    _load(folder)


def _load(folder: Path) -> None:
    before = sorted(path.name for path in folder.iterdir())
    files = SnapshotFiles(folder, read_only=True)
    assert sorted(path.name for path in folder.iterdir()) == before, "reading changed another's disk"
    for snapshot in files.load().values():
        assert len(snapshot.chunk_hashes) == BUCKETS
    mine = SnapshotFiles(folder)
    mine.load()
    mine.save(7, 7, EMPTY)
    mine.keep_only([(7, 7)])
    assert set(SnapshotFiles(folder).load()) == {(7, 7)}, "what was saved last is not there, or what was dropped is"


def _export(state: Path) -> None:
    try:
        disk = OldDisk.read(state, "r0")
    except DiskFailedError:
        return
    for question in (StateQuery(b""), ChunkQuery(bytes(32), (0, 1, -1, BUCKETS)), Fetch(1, "r0", 0, 1 << 62)):
        for answer in disk.answer(question):
            assert encode(answer)
    assert list(disk.answer(FetchBatches(tuple(disk.batches)[:4]))) is not None


def seeds() -> list[bytes]:
    """A log with records, an index, a segment."""
    record = b"\x94\x05\x01\x01\xc4\x00"
    check = zlib.crc32(record, zlib.crc32(bytes(8) + len(record).to_bytes(4, "big")))
    log = _MAGIC + bytes(8) + _FRAME.pack(len(record), check) + record
    return [b"\0" + log, b"\0" + log[:-3], b"\1" + bytes(8) + b"\5" + record, b"\2\0CFindex2", b"\3" + bytes(range(64))]
