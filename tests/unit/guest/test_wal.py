"""The write-ahead log: what was appended comes back, a torn tail is cut, a full disk changes nothing."""

import errno
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudfit_orchestrator.guest.storage import DiskFailedError, DiskFullError
from cloudfit_orchestrator.guest.wal import MAX_RECORD, WriteAheadLog
from cloudfit_orchestrator.model.errors import BadInputError


def read(path) -> list[bytes]:
    log = WriteAheadLog(path)
    try:
        return list(log.records())
    finally:
        log.close()


def test_records_come_back_in_order_and_after_reopening(tmp_path):
    log = WriteAheadLog(tmp_path / "wal")
    assert list(log.records()) == []
    log.append([b"one", b"two"])
    log.append([])
    log.append([b"three" * 1000])
    assert list(log.records()) == [b"one", b"two", b"three" * 1000]
    log.close()
    assert read(tmp_path / "wal") == [b"one", b"two", b"three" * 1000]


@given(cut=st.integers(0, 200), records=st.lists(st.binary(min_size=1, max_size=30), max_size=5))
@settings(max_examples=60, deadline=None)
def test_a_torn_tail_is_cut_and_the_log_goes_on(tmp_path_factory, cut, records):
    path = tmp_path_factory.mktemp("wal") / "wal"
    log = WriteAheadLog(path)
    log.append(records)
    log.close()
    size = path.stat().st_size
    os.truncate(path, max(0, size - cut))
    log = WriteAheadLog(path)
    kept = list(log.records())
    assert kept == records[: len(kept)]
    assert cut or kept == records
    log.append([b"next"])
    log.close()
    assert read(path) == [*kept, b"next"]


@given(at=st.integers(0, 10_000), bit=st.integers(0, 7))
@settings(max_examples=60, deadline=None)
def test_everything_behind_a_flipped_bit_is_dropped(tmp_path_factory, at, bit):
    path = tmp_path_factory.mktemp("wal") / "wal"
    log = WriteAheadLog(path)
    records = [b"record %d" % i for i in range(10)]
    log.append(records)
    log.close()
    data = bytearray(path.read_bytes())
    at %= len(data)
    data[at] ^= 1 << bit
    path.write_bytes(data)
    log = WriteAheadLog(path)
    kept = list(log.records())
    assert len(kept) < 10
    assert kept == records[: len(kept)]
    assert log.cut_bytes > 0
    log.append([b"next"])
    log.close()
    assert read(path) == [*kept, b"next"]


def test_rewrite_replaces_everything_and_appends_go_on(tmp_path):
    log = WriteAheadLog(tmp_path / "wal")
    log.append([b"old"] * 100)
    log.rewrite([b"new"])
    log.append([b"newer"])
    log.close()
    assert read(tmp_path / "wal") == [b"new", b"newer"]
    assert [p.name for p in tmp_path.iterdir()] == ["wal"]


def test_a_crash_before_the_rename_leaves_the_old_log(tmp_path):
    log = WriteAheadLog(tmp_path / "wal")
    log.append([b"old"])
    log.close()
    (tmp_path / "wal.part").write_bytes(b"half of a new one")
    assert read(tmp_path / "wal") == [b"old"]


def test_frames_of_an_older_file_never_pass(tmp_path):
    first, second = WriteAheadLog(tmp_path / "a"), WriteAheadLog(tmp_path / "b")
    first.append([b"x"])
    first.close()
    second.close()
    stale = (tmp_path / "a").read_bytes()[16:]
    with (tmp_path / "b").open("ab") as file:
        file.write(stale)
    assert read(tmp_path / "b") == []


def test_a_full_disk_changes_nothing_and_passes_when_there_is_room(tmp_path, monkeypatch):
    log = WriteAheadLog(tmp_path / "wal")
    log.append([b"before"])
    real, room = os.pwrite, 5

    def pwrite(fd, data, offset):
        nonlocal room
        if not room:
            raise OSError(errno.ENOSPC, "No space left on device")
        n, room = min(room, len(data)), 0
        return real(fd, data[:n], offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(DiskFullError):
        log.append([b"does not fit"])
    monkeypatch.undo()
    assert list(log.records()) == [b"before"]
    log.append([b"after"])
    log.close()
    assert read(tmp_path / "wal") == [b"before", b"after"]


def test_after_a_failed_fsync_the_log_refuses_until_it_is_opened_again(tmp_path, monkeypatch):
    log = WriteAheadLog(tmp_path / "wal")

    def fail(fd):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fail)
        with pytest.raises(DiskFailedError):
            log.append([b"lost?"])
    with pytest.raises(DiskFailedError):
        log.append([b"more"])
    log.close()
    WriteAheadLog(tmp_path / "wal").close()


def test_limits_and_read_only(tmp_path):
    log = WriteAheadLog(tmp_path / "wal")
    for record in (b"", bytes(MAX_RECORD + 1)):
        with pytest.raises(BadInputError):
            log.append([record])
        with pytest.raises(BadInputError):
            log.rewrite([record])
    log.append([b"kept"])
    log.close()
    with (tmp_path / "wal").open("ab") as file:
        file.write(b"torn")
    size = (tmp_path / "wal").stat().st_size
    reader = WriteAheadLog(tmp_path / "wal", read_only=True)
    assert list(reader.records()) == [b"kept"]
    assert reader.cut_bytes == 4
    with pytest.raises(DiskFailedError):
        reader.append([b"x"])
    reader.close()
    assert (tmp_path / "wal").stat().st_size == size
