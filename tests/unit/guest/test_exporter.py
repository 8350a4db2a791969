"""The exporter reads disks that anybody may have written."""

import os
import random

import pytest

from cloudfit_orchestrator.bft.batch import batch_digest
from cloudfit_orchestrator.bft.journal import LogBatch, encode_entry
from cloudfit_orchestrator.bft.messages import BatchMessage, Chunk, ChunkQuery, FetchBatches, StateIndex, StateQuery
from cloudfit_orchestrator.bft.store import BUCKETS, StateStore, bucket_of, chunk_hash
from cloudfit_orchestrator.bft.usig.journal import LogBody, LogMessage, LogUI
from cloudfit_orchestrator.bft.usig.messages import Fetch, StreamMessage
from cloudfit_orchestrator.guest import exporter
from cloudfit_orchestrator.guest.exporter import OldDisk
from cloudfit_orchestrator.guest.snapshots import SnapshotFiles
from cloudfit_orchestrator.guest.wal import WriteAheadLog


@pytest.fixture
def state(tmp_path):
    store = StateStore()
    for i in range(3000):
        store.put(b"key %d" % i, b"value")
    files = SnapshotFiles(tmp_path / "snapshots")
    files.save(1, 64, store.snapshot())
    store.put(b"key 1", b"newer")
    files.save(1, 128, store.snapshot())
    log = WriteAheadLog(tmp_path / "wal")
    entries = [
        LogBody(1, 1, b"header", b"payload"),
        LogUI(1, 1, b"c" * 64),
        LogBatch(1, b"batch"),
        LogBody(1, 2, b"", b""),
    ]
    log.append([encode_entry(entry) for entry in entries])
    log.append([b"\x93\xa2\xff\xff no entry"])
    log.close()
    return tmp_path, store.snapshot()


def test_it_serves_the_newest_state_and_the_log(state):
    path, snapshot = state
    disk = OldDisk.read(path, "r1")
    (index,) = disk.answer(StateQuery(b""))
    assert isinstance(index, StateIndex)
    assert (index.root, index.slot) == (snapshot.root, 128)
    assert index.hashes == b"".join(snapshot.chunk_hashes)
    asked = b"another root".ljust(32)
    chunks = list(disk.answer(ChunkQuery(asked, (0, 7, -1, BUCKETS))))
    assert chunks == [Chunk(asked, i, snapshot.chunk(i)) for i in (0, 7)]
    assert list(disk.answer(Fetch(1, "r1", 1, 2))) == [StreamMessage(1, "r1", 1, b"header", b"payload", b"c" * 64)]
    assert list(disk.answer(FetchBatches((batch_digest(b"batch"), bytes(32))))) == [BatchMessage(b"batch")]
    assert disk.found["corrupt"] == []
    assert (disk.found["chunks"], disk.found["log_records"], disk.found["log_malformed"]) == (1024, 5, 1)


def test_an_older_state_is_served_by_its_root(state):
    path, _ = state
    disk = OldDisk.read(path, "r1")
    old = disk.files.indexes[1, 64]
    (index,) = disk.answer(StateQuery(old.root))
    assert isinstance(index, StateIndex)
    assert index.slot == 64


@pytest.mark.parametrize("where", [0, -1])  # a length, a value
def test_a_corrupt_chunk_is_named_and_sent_as_it_lies(state, where):
    path, snapshot = state
    files = SnapshotFiles(path / "snapshots", read_only=True)
    bad = bucket_of(b"key 5")
    segment, offset, length = files.piece_of(files.indexes[1, 128], bad)
    data = bytearray(segment.read_bytes())
    data[offset + where % length] ^= 1
    segment.write_bytes(data)
    disk = OldDisk.read(path, "r1")
    assert disk.found["corrupt"] == [bad]
    (chunk,) = disk.answer(ChunkQuery(snapshot.root, (bad,)))
    assert isinstance(chunk, Chunk)
    assert not chunk.missing
    assert chunk_hash(chunk.data) != snapshot.chunk_hashes[bad]


def test_an_unreadable_segment_is_missing_chunks(state):
    path, snapshot = state
    for segment in (path / "snapshots").glob("segment-*"):
        segment.unlink()
        os.mkfifo(segment)
    disk = OldDisk.read(path, "r1")
    assert disk.found["corrupt"] == [i for i in range(BUCKETS) if snapshot.chunk(i)]
    (chunk,) = disk.answer(ChunkQuery(snapshot.root, (3,)))
    assert chunk == Chunk(snapshot.root, 3, b"", missing=True)


@pytest.mark.parametrize("seed", range(20))
def test_random_damage_never_stops_it_and_changes_nothing(state, seed):
    path, _ = state
    dice = random.Random(seed)
    files = [p for p in path.rglob("*") if p.is_file()]
    for file in dice.sample(files, 2):
        data = bytearray(file.read_bytes())
        for _ in range(dice.randrange(1, 50)):
            data[dice.randrange(len(data))] = dice.randrange(256)
        file.write_bytes(data[: dice.randrange(len(data)) if dice.random() < 0.3 else len(data)])
    before = {p: p.read_bytes() for p in files}
    disk = OldDisk.read(path, "r1")
    for question in (StateQuery(b""), ChunkQuery(bytes(32), tuple(range(64))), Fetch(1, "r1", 0, 9)):
        list(disk.answer(question))
    assert {p: p.read_bytes() for p in files} == before


def test_an_empty_disk_is_an_answer_too(tmp_path):
    disk = OldDisk.read(tmp_path, "r1")
    assert list(disk.answer(StateQuery(b""))) == []
    assert list(disk.answer(ChunkQuery(bytes(32), (1,)))) == [Chunk(bytes(32), 1, b"", missing=True)]
    assert "log" in disk.found


def test_a_log_of_a_million_tiny_records_does_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(exporter, "MAX_LOG_BYTES", 1 << 20)
    log = WriteAheadLog(tmp_path / "wal")
    log.append([encode_entry(LogMessage(StreamMessage(1, "", cv, b"", b"", b""))) for cv in range(20_000)])
    log.close()
    disk = OldDisk.read(tmp_path, "r1")
    assert disk.found["log_records"] == 20_000
    assert 1000 < len(disk.streams) < (1 << 20) / 500
