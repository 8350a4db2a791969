"""Executions of a sixth reading in the guest: each property did not hold once, for the reason told."""

from cloudfit_orchestrator.bft.effects import Certify, DropSnapshots, SaveSnapshot
from cloudfit_orchestrator.bft.store import StateStore
from cloudfit_orchestrator.guest import durable as durable_module
from cloudfit_orchestrator.guest.snapshots import SnapshotFiles
from cloudfit_orchestrator.guest.storage import DiskFullError
from tests.unit.guest.helpers import scenario, until
from tests.unit.guest.test_certifier import certifier, digest
from tests.unit.guest.test_durable import Disk


@scenario
async def test_what_waited_for_the_disk_until_its_epoch_was_over_is_certified_in_no_other():
    """A body of the last configuration waited for a slow disk until the next was ACTIVE. When the channel was lost and
    came again the counter of the new epoch was spent on it, as it stood at the same number: the replica's own next body
    was refused, and it was silent for as long as the configuration lasted.
    """
    async with certifier() as (c, core, agent):
        c.want_session(1)
        await until(lambda: core.named("session"))
        c.certify(Certify(1, 1, digest(1)))
        await until(lambda: len(core.named("certified")) == 1)
        agent.certified.clear()  # of the new epoch
        c.want_session(2)
        await until(lambda: len(core.named("session")) == 2)
        c.certify(Certify(1, 2, digest(2)))  # the disk has written it now
        c.certify(Certify(2, 1, digest(3)))
        await until(lambda: len(core.named("certified")) == 2)
        await agent.drop()
        await agent.dial()
        c.certify(Certify(2, 2, digest(4)))
        await until(lambda: len(core.named("certified")) == 3)
        assert [made for _, made, _ in agent.certified] == [digest(3), digest(4)]
        assert core.errors == []


@scenario
async def _again(tmp_path, monkeypatch):
    monkeypatch.setattr(durable_module, "FULL_RETRY_S", 0.01)
    disk = Disk(tmp_path, monkeypatch)
    store, saved = StateStore(), []

    def save(slot: int) -> None:
        store.put(b"key", b"%d" % slot)
        disk.durable.save(SaveSnapshot(1, slot, store.snapshot()), lambda: saved.append(slot))

    save(64)
    await until(lambda: saved == [64])
    real = SnapshotFiles.save

    def full(self, c, slot, snapshot):
        if 64 in [slot for _, slot in self.indexes]:
            raise DiskFullError("made up")
        return real(self, c, slot, snapshot)

    monkeypatch.setattr(SnapshotFiles, "save", full)
    save(128)  # what the configuration begins with, say: nobody asks for another before something is executed
    disk.durable.drop(DropSnapshots(((1, 128),)))
    await until(lambda: saved == [64, 128])
    await disk.durable.close()
    assert set(SnapshotFiles(tmp_path / "snapshots").indexes) == {(1, 128)}


def test_a_snapshot_that_made_room_for_an_order_to_make_room_is_saved_behind_it(tmp_path, monkeypatch):
    """A save on a full disk gave way to a drop that waited behind it, and was forgotten: the core makes another one,
    but not before it has executed K slots. A group that was idle until its next reconfiguration had no state on its
    disks then that could be confirmed: it was wedged, and stood still for good.
    """
    _again(tmp_path, monkeypatch)


def test_all_snapshots_of_the_own_disk_are_read_however_many(tmp_path):
    """Beyond 64 they were left out by their names, the newest among them, and what they lay in was removed. As many are
    kept where a window has more checkpoints, and a faulty member lets none be certified: who stopped then had no state.
    """
    files, store = SnapshotFiles(tmp_path), StateStore()
    for slot in range(1, 100):
        store.put(b"key %d" % (slot % 7), b"%d" % slot)
        files.save(1, slot, store.snapshot())
    again = SnapshotFiles(tmp_path)
    assert again.load()[1, 99] == store.snapshot()
    assert len(again.indexes) == 99
    assert again.damaged == []
    assert len(SnapshotFiles(tmp_path, read_only=True).indexes) == 64
