"""Executions of a fifth reading on the state disk: each property did not hold once, for the reason told."""

import os
from pathlib import Path

from cloudfit_orchestrator.bft.effects import Append, DropSnapshots, SaveSnapshot
from cloudfit_orchestrator.bft.store import StateStore
from cloudfit_orchestrator.guest.durable import Durable
from cloudfit_orchestrator.guest.snapshots import SnapshotFiles
from cloudfit_orchestrator.guest.wal import WriteAheadLog
from tests.unit.guest.helpers import scenario, until
from tests.unit.guest.test_durable import Disk


@scenario
async def _dropped(tmp_path, monkeypatch):
    disk = Disk(tmp_path, monkeypatch)
    store = StateStore()
    saved = []

    def save(slot: int) -> None:
        store.put(b"key", b"%d" % slot)
        disk.durable.save(SaveSnapshot(1, slot, store.snapshot()), lambda: saved.append(slot))

    save(64)
    save(128)
    await until(lambda: saved == [64, 128])
    disk.gate.clear()  # the log is slow
    disk.durable.write(Append(b"what no longer needs the state at 64"))
    disk.durable.drop(DropSnapshots(((1, 128),)))
    save(192)  # the next checkpoint comes first
    await until(lambda: 192 in saved)
    disk.gate.set()
    await until(lambda: (1, 64) not in disk.durable.snapshots.indexes)
    await disk.durable.close()  # waits for the job under way
    assert set(SnapshotFiles(tmp_path / "snapshots").indexes) == {(1, 128), (1, 192)}


def test_a_snapshot_saved_while_a_drop_waits_for_the_log_is_kept(tmp_path, monkeypatch):
    """Snapshots are dropped once the log is durable, saved at once: one that was saved, and told so to the core, while
    the log was slow, was removed by the order to keep those before it. The core's log was then cut to a state that
    was nowhere.
    """
    _dropped(tmp_path, monkeypatch)


class PageCache:
    """Tells what of a directory's files would outlive the machine: what was there at each file's last sync."""

    def __init__(self, monkeypatch) -> None:
        self.durable: dict[int, bytes] = {}  # inode -> content
        self.directories: set[int] = set()  # synced
        for name in ("fsync", "fdatasync"):
            monkeypatch.setattr(os, name, self._synced)

    def _synced(self, fd: int) -> None:
        status = os.fstat(fd)
        try:
            self.durable[status.st_ino] = Path(f"/proc/self/fd/{fd}").read_bytes()
        except IsADirectoryError:
            self.directories.add(status.st_ino)


@scenario
async def _after_a_restart(tmp_path, monkeypatch):
    path = tmp_path / "wal"
    log = WriteAheadLog(path)
    log.append([b"durable"])
    log._write(log._encode(b"said"))  # the process ends here, between write and fsync; the machine goes on
    log.close()

    cache = PageCache(monkeypatch)
    durable = Durable(tmp_path, lambda *_: None, lambda _: None)
    assert list(durable.log.records()) == [b"durable", b"said"]
    left = []
    durable.after(lambda: left.append(cache.durable.get(path.stat().st_ino, b"")))
    assert len(left) == 1, "nothing was written since, so nothing is waited for"
    assert left[0] == path.read_bytes(), "what was read, and is signed again, outlives the machine"
    assert {tmp_path.stat().st_ino, (tmp_path / "snapshots").stat().st_ino} <= cache.directories
    await durable.close()


def test_what_a_restart_reads_is_durable_before_anything_follows_from_it(tmp_path, monkeypatch):
    """A process that ended between write and fsync read its own unsynced records again, signed what they say at once,
    as nothing new was to be written, and lost them when the machine stopped: a replica that may say something else.
    """
    _after_a_restart(tmp_path, monkeypatch)
