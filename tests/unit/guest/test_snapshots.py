"""Snapshots on disk: only what changed is written, garbage goes, damage is found chunk by chunk."""

import errno
import itertools
import os
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudfit_orchestrator.bft.store import BUCKETS, StateStore, bucket_of
from cloudfit_orchestrator.guest import segments, snapshots, storage
from cloudfit_orchestrator.guest.snapshots import SnapshotFiles
from cloudfit_orchestrator.guest.storage import DiskFullError
from cloudfit_orchestrator.model.errors import BadError
from tests.unit.guest.crashes import Crash, CrashDisk


def store_of(count: int, value: bytes = b"value") -> StateStore:
    store = StateStore()
    for i in range(count):
        store.put(b"key %d" % i, value)
    return store


def names_in(buckets: list[int], count: int) -> list[bytes]:
    """So many keys, that fall into these buckets."""
    fitting = (b"%d" % i for i in itertools.count() if bucket_of(b"%d" % i) in buckets)
    return list(itertools.islice(fitting, count))


def flip(files: SnapshotFiles, key: tuple[int, int], chunk: int) -> None:
    path, offset, length = files.piece_of(files.indexes[key], chunk)
    data = bytearray(path.read_bytes())
    data[offset + length // 2] ^= 1
    path.write_bytes(data)


def test_what_was_saved_is_loaded_after_a_restart(tmp_path):
    store = store_of(3000)
    files = SnapshotFiles(tmp_path / "s")
    first = store.snapshot()
    files.save(1, 64, first)
    store.put(b"key 7", b"other")
    second = store.snapshot()
    files.save(1, 128, second)
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


def written(directory: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in directory.iterdir()}


def test_the_log_its_pieces_and_its_chains_are_bounded_over_many_checkpoints(tmp_path, monkeypatch):
    monkeypatch.setattr(segments, "SEGMENT_BYTES", 4096)
    monkeypatch.setattr(snapshots, "SEGMENT_BYTES", 4096)
    dice = random.Random(1)
    names = names_in([3, 4, 5, 900], 200)
    hot = [name for name in names if bucket_of(name) != 900]  # the image of 900 would hold the log's beginning for ever
    store = StateStore()
    for name in names:
        store.put(name, bytes(100))
    files = SnapshotFiles(tmp_path)
    state = sum(map(len, map(store.snapshot().chunk, range(BUCKETS))))
    total = files.save(1, 0, store.snapshot())
    changed = 0
    for slot in range(1, 200):
        for name in dice.sample(hot, 4):
            store.put(name, dice.randbytes(100))
            changed += 100 + len(name) + segments.HEADER_BYTES
        snapshot = store.snapshot()
        total += files.save(1, slot, snapshot)
        files.keep_only([(1, slot), (1, slot - 1)])
        assert max(map(len, files._chains)) <= segments.MAX_CHAIN
    assert sum(size for name, size in written(tmp_path).items() if name.startswith("segment")) < 4 * state
    assert total - state < 8 * changed
    assert max(p.level for chain in files._chains for p in chain if p.level != segments.IMAGE) >= 1, "pieces are merged"
    assert SnapshotFiles(tmp_path).load()[1, slot] == snapshot


def test_a_hot_key_in_a_large_chunk_makes_neither_long_chains_nor_many_images(tmp_path):
    names = names_in([7], 400)
    store = StateStore()
    for name in names:
        store.put(name, bytes(200))
    files = SnapshotFiles(tmp_path)
    image = files.save(1, 0, store.snapshot())
    total = 0
    for slot in range(1, 150):
        store.put(names[0], b"%d" % slot)
        total += files.save(1, slot, store.snapshot())
        files.keep_only([(1, slot)])
    assert total < image, "150 changes of one key"
    assert len(files._chains[7]) <= 1 + (segments.FANIN - 1) * 4
    assert SnapshotFiles(tmp_path).load()[1, slot] == store.snapshot()


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_any_history_of_saves_drops_and_restarts_gives_back_what_was_saved(tmp_path_factory, data):
    directory = tmp_path_factory.mktemp("s")
    names = names_in([1, 2, 3], 12)
    store, files, kept = StateStore(), SnapshotFiles(directory), {}
    for slot in range(data.draw(st.integers(1, 40))):
        for name in data.draw(st.lists(st.sampled_from(names), max_size=6)):
            value = data.draw(st.sampled_from([b"", b"v", bytes(300), None]))
            store.put(name, value) if value is not None else store.delete(name)
        what = data.draw(st.sampled_from(["save", "save", "save", "drop", "restart", "restart without a look", "back"]))
        if what == "save":
            kept[1, slot] = store.snapshot()
            files.save(1, slot, kept[1, slot])
        elif what == "drop":
            kept = {
                key: kept[key] for key in data.draw(st.sets(st.sampled_from(sorted(kept))) if kept else st.just(()))
            }
            files.keep_only(kept)
        elif what == "back" and kept:
            store = StateStore.from_snapshot(data.draw(st.sampled_from(list(kept.values()))))
        elif what.startswith("restart"):
            files = SnapshotFiles(directory)
            if what == "restart":
                assert files.load() == kept
    files = SnapshotFiles(directory)
    loaded = files.load()
    assert loaded == kept
    assert files.damaged == []
    for key, snapshot in loaded.items():
        assert all(snapshot.chunk(i) == kept[key].chunk(i) for i in range(BUCKETS))
        assert [files.read_unchecked(files.indexes[key], i) for i in (1, 2, 3)] == [
            snapshot.chunk(i) for i in (1, 2, 3)
        ]


def test_a_corrupt_chunk_is_reported_and_not_given_out(tmp_path):
    store = store_of(3000)
    first = store.snapshot()
    files = SnapshotFiles(tmp_path)
    files.save(1, 64, first)
    store.put(b"key 1", b"behind the image")
    whole = store.snapshot()
    files.save(1, 128, whole)
    bad = bucket_of(b"key 1")
    flip(files, (1, 128), bad)
    again = SnapshotFiles(tmp_path)
    assert again.load() == {(1, 64): first}
    assert [(d.file, d.chunk) for d in again.damaged] == [("index-1-128", bad)]
    with pytest.raises(BadError, match=f"chunk {bad}"):
        again.bucket(again.indexes[1, 128], bad)
    assert again.is_sound(again.indexes[1, 64], bad), "what it is a change of is sound"
    assert again.is_sound(again.indexes[1, 128], bad - 1)
    again.save(1, 128, whole)
    assert SnapshotFiles(tmp_path).load() == {(1, 64): first, (1, 128): whole}


def test_a_rotten_image_damages_all_that_build_on_it_until_the_next_save(tmp_path):
    store = store_of(3000)
    first = store.snapshot()
    files = SnapshotFiles(tmp_path)
    files.save(1, 64, first)
    bad = bucket_of(b"key 1")
    flip(files, (1, 64), bad)
    store.put(b"key 1", b"new")
    whole = store.snapshot()
    files.save(1, 128, whole)
    again = SnapshotFiles(tmp_path)
    assert again.load() == {}
    assert [(d.file, d.chunk) for d in again.damaged] == [("index-1-64", bad), ("index-1-128", bad)]
    size = again.save(1, 192, whole)
    assert 0 < size < 1000, "the one image, not the state"
    assert SnapshotFiles(tmp_path).load() == {(1, 192): whole}


def test_a_rotten_piece_is_not_carried_on_by_merging(tmp_path):
    store = StateStore()
    names = names_in([9], 50)
    for name in names:
        store.put(name, bytes(100))
    files = SnapshotFiles(tmp_path)
    for slot in range(segments.FANIN + 1):
        store.put(names[slot], b"new")
        files.save(1, slot, store.snapshot())
        if slot == 2:
            flip(files, (1, slot), 9)
    assert SnapshotFiles(tmp_path).load()[1, slot] == store.snapshot()


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
    (tmp_path / "d" / "segment-99999999999999999999999").write_bytes(b"")
    (tmp_path / "d" / "segment-x").symlink_to("/nonexistent")
    os.mkfifo(tmp_path / "d" / "index-2-2")
    (tmp_path / "d" / "index-3-3").symlink_to("/dev/zero")
    assert len(SnapshotFiles(tmp_path / "d", read_only=True).damaged) == 3


def test_a_missing_segment_is_written_again_by_the_next_save(tmp_path):
    store = store_of(100)
    snapshot = store.snapshot()
    files = SnapshotFiles(tmp_path)
    files.save(1, 64, snapshot)
    next(tmp_path.glob("segment-*")).unlink()
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
    size = sum(written(tmp_path).values())
    assert SnapshotFiles(tmp_path).load() == {(1, 64): first}
    assert sum(written(tmp_path).values()) == size, "the failed save left nothing"
    files.save(1, 128, store.snapshot())
    assert set(SnapshotFiles(tmp_path).load()) == {(1, 64), (1, 128)}


def live(directory, names, confirm, drop):
    """A short life of a replica's snapshots: changes, saves, drops, a restart. `confirm` hears what is durable."""
    dice = random.Random(3)
    store, files = StateStore(), SnapshotFiles(directory)
    for name in names:
        store.put(name, bytes(60))
    for slot in range(12):
        for name in dice.sample(names, 5):
            store.put(name, dice.randbytes(60))
        snapshot = store.snapshot()
        files.save(1, slot, snapshot)
        confirm((1, slot), snapshot)
        keep = [(1, slot), (1, slot - 1)]
        drop(keep)
        files.keep_only(keep)
        if slot == 6:
            files = SnapshotFiles(directory)
            files.load()


@pytest.mark.parametrize("seed", range(2))
def test_a_crash_at_any_step_loses_no_snapshot_that_was_saved(tmp_path, monkeypatch, seed):
    for module in (segments, snapshots):
        monkeypatch.setattr(module, "SEGMENT_BYTES", 2048)
    names = names_in([1, 2], 40)
    crash_at, crashed, unfinished = 0, True, 0
    while crashed:
        crash_at += 1
        directory = tmp_path / f"before-{crash_at}"
        directory.mkdir()
        disk = CrashDisk(directory, seed * 1000 + crash_at)
        disk.crash_at = crash_at
        durable, begun = {}, {}

        def confirm(key, snapshot, durable=durable, begun=begun):
            durable[key] = begun[key] = snapshot

        def drop(keep, durable=durable):
            for key in durable.keys() - set(keep):
                del durable[key]

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", disk.fsync)
            try:
                live(directory, names, confirm, drop)
                crashed = False
            except Crash:
                pass
        if crashed:
            where = disk.restart(tmp_path / f"after-{crash_at}")
            files = SnapshotFiles(where)
            loaded = files.load()
            assert durable.items() <= loaded.items(), f"crash at fsync {crash_at}"
            assert all(begun[key] == snapshot for key, snapshot in loaded.items() if key in begun)
            unfinished += len(loaded.keys() - begun.keys())
            store = StateStore.from_snapshot(loaded[max(loaded)]) if loaded else StateStore()
            store.put(names[0], b"life goes on")
            files.save(2, 0, store.snapshot())
            files.keep_only([(2, 0)])
            again = SnapshotFiles(where)
            assert again.load() == {(2, 0): store.snapshot()}
            assert again.damaged == []
    assert crash_at > 30, "every step was crashed at"
    assert unfinished, "sometimes the index was there, unsaid"


def test_the_crash_test_finds_a_missing_fsync(tmp_path, monkeypatch):
    """Its disk forgets what is not synced: without the fsync of segments a saved snapshot is lost."""
    names = names_in([1, 2], 40)
    lost = 0
    for crash_at in range(2, 12):
        directory = tmp_path / f"before-{crash_at}"
        directory.mkdir()
        disk, durable = CrashDisk(directory, crash_at), {}
        disk.crash_at = crash_at

        def fsync(fd, disk=disk):
            if "segment" not in str(Path(f"/proc/self/fd/{fd}").readlink()):
                disk.fsync(fd)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            with pytest.raises(Crash):
                live(directory, names, durable.__setitem__, lambda keep, d=durable: [d.pop(k) for k in d.keys() - keep])
        loaded = SnapshotFiles(disk.restart(tmp_path / f"after-{crash_at}")).load()
        lost += not durable.items() <= loaded.items()
    assert lost
