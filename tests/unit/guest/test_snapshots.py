"""Snapshots on disk: only what changed is written, garbage goes, damage is found chunk by chunk."""

import errno
import os
import random

import pytest

from cloudfit_orchestrator.bft.store import BUCKETS, StateStore, bucket_of
from cloudfit_orchestrator.guest import storage
from cloudfit_orchestrator.guest.snapshots import MAX_PACKS, SnapshotFiles
from cloudfit_orchestrator.guest.storage import DiskFullError
from cloudfit_orchestrator.model.errors import BadError


def store_of(count: int, value: bytes = b"value") -> StateStore:
    store = StateStore()
    for i in range(count):
        store.put(b"key %d" % i, value)
    return store


def flip(files: SnapshotFiles, key: tuple[int, int], chunk: int) -> None:
    path, place = files.pack_of(files.indexes[key], chunk)
    data = bytearray(path.read_bytes())
    data[place.offset + place.length // 2] ^= 1
    path.write_bytes(data)


def test_what_was_saved_is_loaded_after_a_restart(tmp_path):
    store = store_of(3000)
    files = SnapshotFiles(tmp_path / "s")
    first = store.snapshot()
    files.save(1, 64, first)
    store.put(b"key 7", b"other")
    second = store.snapshot()
    assert files.save(1, 128, second) == len(second.chunk(bucket_of(b"key 7")))
    assert files.save(1, 128, second) == 0
    again = SnapshotFiles(tmp_path / "s")
    loaded = again.load()
    assert loaded == {(1, 64): first, (1, 128): second}
    assert list(StateStore.from_snapshot(loaded[1, 128]).items()) == list(store.items())
    assert again.damaged == []


def test_dropped_snapshots_leave_no_files(tmp_path):
    store = store_of(100)
    files = SnapshotFiles(tmp_path)
    for slot in (64, 128, 192):
        store.put(b"key %d" % slot, b"changed")
        files.save(2, slot, store.snapshot())
    files.keep_only([(2, 192)])
    assert set(SnapshotFiles(tmp_path).load()) == {(2, 192)}
    files.keep_only([])
    assert list(tmp_path.iterdir()) == []


def test_garbage_is_bounded_over_many_checkpoints(tmp_path):
    dice = random.Random(1)
    store = store_of(2000)
    files = SnapshotFiles(tmp_path)
    for slot in range(64, 64 * 60, 64):
        for _ in range(50):
            store.put(b"key %d" % dice.randrange(2000), b"%d" % slot)
        snapshot = store.snapshot()
        files.save(1, slot, snapshot)
        files.keep_only([(1, slot), (1, slot - 64)])
    packs = list(tmp_path.glob("pack-*"))
    assert len(packs) <= MAX_PACKS + 2
    live = sum(len(snapshot.chunk(i)) for i in range(BUCKETS))
    assert sum(path.stat().st_size for path in packs) < 4 * live
    assert SnapshotFiles(tmp_path).load()[1, slot] == snapshot


def test_a_corrupt_chunk_is_reported_and_not_given_out(tmp_path):
    store = store_of(3000)
    files = SnapshotFiles(tmp_path)
    files.save(1, 64, store.snapshot())
    store.put(b"key 1", b"moved to a new pack")
    whole = store.snapshot()
    files.save(1, 128, whole)
    bad = bucket_of(b"key 1")
    flip(files, (1, 64), bad)
    again = SnapshotFiles(tmp_path)
    assert again.load() == {(1, 128): whole}
    assert [(d.file, d.chunk) for d in again.damaged] == [("index-1-64", bad)]
    with pytest.raises(BadError, match=f"chunk {bad}"):
        again.read(again.indexes[1, 64], bad)
    assert again.read(again.indexes[1, 64], bad - 1)
    first = store_of(3000).snapshot()
    again.save(1, 64, first)
    assert SnapshotFiles(tmp_path).load() == {(1, 64): first, (1, 128): whole}


@pytest.mark.parametrize("damage", ["flip", "truncate", "junk"])
def test_a_damaged_index_is_ignored_and_named(tmp_path, damage):
    store = store_of(10)
    files = SnapshotFiles(tmp_path)
    files.save(1, 64, store.snapshot())
    path = tmp_path / "index-1-64"
    data = path.read_bytes()
    path.write_bytes(
        {"flip": data[:100] + bytes([data[100] ^ 1]) + data[101:], "truncate": data[:-1], "junk": b"x"}[damage]
    )
    again = SnapshotFiles(tmp_path, read_only=True)
    assert again.load() == {}
    assert [d.file for d in again.damaged] == ["index-1-64"]


def test_a_missing_or_hostile_directory_is_damage_when_read_only(tmp_path):
    assert SnapshotFiles(tmp_path / "nothing", read_only=True).damaged
    (tmp_path / "d" / "index-1-1").mkdir(parents=True)
    (tmp_path / "d" / "pack-99999999999999999999999").write_bytes(b"")
    (tmp_path / "d" / "pack-x").symlink_to("/nonexistent")
    os.mkfifo(tmp_path / "d" / "index-2-2")
    (tmp_path / "d" / "index-3-3").symlink_to("/dev/zero")
    assert len(SnapshotFiles(tmp_path / "d", read_only=True).damaged) == 3


def test_a_missing_pack_is_written_again_by_the_next_save(tmp_path):
    store = store_of(100)
    snapshot = store.snapshot()
    files = SnapshotFiles(tmp_path)
    files.save(1, 64, snapshot)
    next(tmp_path.glob("pack-*")).unlink()
    again = SnapshotFiles(tmp_path)
    assert again.load() == {}
    again.save(1, 128, snapshot)
    assert SnapshotFiles(tmp_path).load()[1, 128] == snapshot


def test_a_full_disk_leaves_the_older_snapshots(tmp_path, monkeypatch):
    store = store_of(100)
    first = store.snapshot()
    files = SnapshotFiles(tmp_path)
    files.save(1, 64, first)
    store.put(b"key 1", b"x")

    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(storage.os, "fsync", full)
        with pytest.raises(DiskFullError):
            files.save(1, 128, store.snapshot())
    assert SnapshotFiles(tmp_path).load() == {(1, 64): first}
    files.save(1, 128, store.snapshot())
    assert set(SnapshotFiles(tmp_path).load()) == {(1, 64), (1, 128)}
