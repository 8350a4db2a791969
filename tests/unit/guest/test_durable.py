"""The durability rule: nothing leaves before what precedes it is on disk, and many effects share one fsync."""

import asyncio
import errno
import os
import threading

from cloudfit_orchestrator.bft.effects import Append, DropSnapshots, Rewrite, SaveSnapshot
from cloudfit_orchestrator.bft.store import StateStore
from cloudfit_orchestrator.guest import durable as module
from cloudfit_orchestrator.guest.durable import Durable
from cloudfit_orchestrator.guest.wal import WriteAheadLog
from tests.unit.guest.helpers import scenario, until


class Disk:
    """A Durable that tells its story in `events`; `gate` holds fsync back, `fail` makes it fail."""

    def __init__(self, tmp_path, monkeypatch) -> None:
        self.events: list = []
        self.gate = threading.Event()
        self.gate.set()
        self.fail: int | None = None
        real = os.fdatasync

        def fdatasync(fd):
            self.gate.wait(10)
            if self.fail:
                raise OSError(self.fail, "made up")
            real(fd)
            self.events.append("sync")

        self.path = tmp_path
        self.durable = Durable(tmp_path, lambda state, _: self.events.append(state), self.events.append)
        monkeypatch.setattr(os, "fdatasync", fdatasync)

    def after(self, name) -> None:
        self.durable.after(lambda: self.events.append(name))

    def logged(self) -> list[bytes]:
        log = WriteAheadLog(self.path / "wal", read_only=True)
        try:
            return list(log.records())
        finally:
            log.close()


@scenario
async def _shares(tmp_path, monkeypatch):
    disk = Disk(tmp_path, monkeypatch)
    disk.after("nothing before me")
    assert disk.events == ["nothing before me"]
    disk.gate.clear()
    disk.durable.write(Append(b"0"))
    await asyncio.sleep(module.LINGER_S + 0.05)  # the first round is inside fsync now
    for i in range(1, 50):
        disk.durable.write(Append(b"%d" % i))
        disk.after(i)
    assert disk.events == ["nothing before me"]
    disk.gate.set()
    await until(lambda: 49 in disk.events)
    assert disk.events == ["nothing before me", "sync", "sync", *range(1, 50)]
    assert disk.logged() == [b"%d" % i for i in range(50)]
    await disk.durable.close()


def test_actions_wait_for_what_precedes_them_and_share_an_fsync(tmp_path, monkeypatch):
    _shares(tmp_path, monkeypatch)


@scenario
async def _rewrite(tmp_path, monkeypatch):
    disk = Disk(tmp_path, monkeypatch)
    for effect in (Append(b"a"), Append(b"b"), Rewrite((b"c", b"d")), Append(b"e")):
        disk.durable.write(effect)
    disk.after("done")
    await until(lambda: "done" in disk.events)
    assert disk.logged() == [b"c", b"d", b"e"]
    assert not disk.durable.stalled
    assert disk.durable._waiting_bytes == 0
    await disk.durable.close()


def test_a_rewrite_replaces_what_was_before_it_only(tmp_path, monkeypatch):
    _rewrite(tmp_path, monkeypatch)


@scenario
async def _full(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FULL_RETRY_S", 0.01)
    disk = Disk(tmp_path, monkeypatch)
    full = True
    real = WriteAheadLog._write

    def write(self, data):
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, data)

    monkeypatch.setattr(WriteAheadLog, "_write", write)
    monkeypatch.setattr(module, "MAX_WAITING_BYTES", 100)
    disk.durable.write(Append(b"x" * 60))
    disk.after("vote")
    await until(lambda: "full" in disk.events)
    disk.durable.write(Append(b"y" * 60))
    assert disk.durable.stalled
    await asyncio.sleep(0.05)  # the time in which nothing may happen
    assert disk.events == ["full"]  # said once, and no vote
    full = False
    await until(lambda: "vote" in disk.events)
    assert disk.events[:4] == ["full", "sync", "ok", "vote"]
    await until(lambda: not disk.durable.stalled)
    disk.after("another")  # what is written without anybody waiting for it may be lost
    await until(lambda: "another" in disk.events)
    await disk.durable.close()
    assert disk.logged() == [b"x" * 60, b"y" * 60]


def test_a_full_disk_silences_until_there_is_room(tmp_path, monkeypatch):
    _full(tmp_path, monkeypatch)


@scenario
async def _failed(tmp_path, monkeypatch):
    disk = Disk(tmp_path, monkeypatch)
    disk.fail = errno.EIO
    disk.durable.write(Append(b"x"))
    disk.after("vote")
    await until(lambda: disk.events)
    disk.fail = None
    disk.durable.write(Append(b"y"))
    disk.after("another")
    await asyncio.sleep(0.05)  # the time in which nothing may happen
    assert disk.events == ["failed"]
    assert disk.durable.stalled
    await disk.durable.close()


def test_a_failed_fsync_silences_for_good(tmp_path, monkeypatch):
    _failed(tmp_path, monkeypatch)


@scenario
async def _snapshots(tmp_path, monkeypatch):
    disk = Disk(tmp_path, monkeypatch)
    store = StateStore()
    for slot in (1, 2, 3):
        store.put(b"k", b"%d" % slot)
        effect = SaveSnapshot(1, slot, store.snapshot())
        disk.durable.save(effect, lambda s=slot: disk.events.append(f"saved {s}"))
    await until(lambda: "saved 3" in disk.events)
    disk.gate.clear()
    disk.durable.write(Rewrite((b"refers to 3",)))
    disk.durable.write(Append(b"x"))
    disk.durable.drop(DropSnapshots(((1, 3),)))
    assert set(disk.durable.snapshots.indexes) == {(1, 1), (1, 2), (1, 3)}
    disk.gate.set()
    await until(lambda: set(disk.durable.snapshots.indexes) == {(1, 3)})
    assert disk.events[:3] == ["saved 1", "saved 2", "saved 3"]
    await disk.durable.close()


def test_snapshots_are_saved_in_order_and_dropped_after_the_log(tmp_path, monkeypatch):
    _snapshots(tmp_path, monkeypatch)


@scenario
async def _crash(tmp_path, monkeypatch):
    disk = Disk(tmp_path, monkeypatch)
    disk.durable.write(Append(b""))  # no log record is empty: a bug of the caller
    await until(lambda: disk.events)
    assert "log record of 0 bytes" in str(disk.events[0])
    await disk.durable.close()


def test_an_unexpected_error_is_not_swallowed(tmp_path, monkeypatch):
    _crash(tmp_path, monkeypatch)


@scenario
async def _slow_rounds(tmp_path, monkeypatch):
    disk = Disk(tmp_path, monkeypatch)
    disk.durable._rounds_s.extend([0.0001, *[1.0] * 7])  # others had the processor
    disk.durable.write(Append(b"a"))
    disk.after("a")
    await asyncio.sleep(0)
    assert disk.events == ["sync", "a"]  # in the event loop: nothing else had a turn
    disk.durable._rounds_s.extend([1.0] * 8)
    disk.gate.clear()
    disk.durable.write(Append(b"b"))
    disk.after("b")
    await asyncio.sleep(0.05)  # the time in which nothing may happen
    assert disk.events == ["sync", "a"]  # in a thread: the loop is not held up
    disk.gate.set()
    await until(lambda: "b" in disk.events)
    await disk.durable.close()


def test_the_quickest_round_tells_how_quick_the_disk_is(tmp_path, monkeypatch):
    _slow_rounds(tmp_path, monkeypatch)
