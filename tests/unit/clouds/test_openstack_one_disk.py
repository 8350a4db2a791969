"""Machines whose state lies on their own disk: on clouds without Cinder, or where the spec wants it so."""

import hashlib
import subprocess
from dataclasses import replace

import pytest

from cloudfit_orchestrator.clouds.base import Demand, MachineState, OrphanKind
from cloudfit_orchestrator.model.errors import PermanentError, RefusedError
from cloudfit_orchestrator.model.image import Role
from cloudfit_orchestrator.model.one_disk import STATE_ARGUMENT, STATE_OFFSET_MIB, carried
from cloudfit_orchestrator.testing.openstack_fake import FakeOpenStack
from tests.unit.clouds.openstack_places import PLACE, driving, machine_spec, manifest, owner, quick

BARE = replace(PLACE, volume_type="")
RECOVERY = owner(incarnation=3, operation="rec", role=Role.RECOVERY)


@pytest.fixture
def fake(monkeypatch):
    quick(monkeypatch)
    with FakeOpenStack().serving() as fake:
        fake.wrong.services = {"volumev3"}
        yield fake
        assert not [call for call in fake.calls if " volume:" in call], "there is no Cinder to ask"


@pytest.fixture
def cloud(fake, tmp_path):
    with driving(tmp_path, fake, BARE) as cloud:
        yield cloud


@pytest.fixture
def recovery(tmp_path):
    directory = tmp_path / "recovery"
    directory.mkdir()
    return directory, manifest(directory, "recovery", Role.RECOVERY)


def recovery_spec(cloud, recovery, taken, who=RECOVERY, **changes):
    directory, image = recovery
    return machine_spec(directory, cloud, who, disk=False, attach=taken, manifest=image, **changes)


def left(fake):
    return {kind: [d.get("name") for d in found.values()] for kind, found in fake.objects.items() if found}


def images(fake, kind):
    return [i for i in fake.objects["images"].values() if i.get("cloudfit_kind") == kind]


def test_a_machines_life(fake, cloud, tmp_path, recovery):
    spec = machine_spec(tmp_path, cloud)
    old = cloud.create(spec)
    assert not cloud.must_pause(old)
    assert cloud.create(spec) == old
    taken = cloud.snapshot(old, "rec")
    assert cloud.find(old.owner).state is MachineState.RUNNING
    assert cloud.snapshot(old, "rec") == taken
    assert cloud.snapshots("dep") == [taken]

    new = cloud.create(machine_spec(tmp_path, cloud, owner(incarnation=2, operation="rec")))
    reader = cloud.create(recovery_spec(cloud, recovery, taken))
    assert fake.objects["servers"][reader.id]["image"]["id"] == taken.id
    with pytest.raises(RefusedError, match="stands on the snapshot"):
        cloud.delete_snapshot(taken)
    assert cloud.orphans("dep", [old.owner, new.owner, reader.owner], evidence=[old.owner]) == []
    cloud.destroy(reader)
    cloud.destroy(old)
    assert cloud.snapshots("dep") == [taken], "the evidence outlives its machine"
    assert [i["cloudfit_image"] for i in images(fake, "carrier")] == ["recovery"], "kept for the next recovery"
    assert [(o.kind, o.id) for o in cloud.orphans("dep", [new.owner])] == [(OrphanKind.SNAPSHOT, taken.id)]
    cloud.sweep("dep", cloud.orphans("dep", [new.owner]))
    assert cloud.snapshots("dep") == []
    assert cloud.stop(new).state is MachineState.STOPPED
    assert cloud.start(new).state is MachineState.RUNNING
    cloud.destroy(new)
    cloud.delete_network("dep", "dep-lisbon")
    assert left(fake) == {}


def test_a_recovery_machine_runs_nothing_of_the_old_disk(fake, cloud, tmp_path, recovery):
    taken = cloud.snapshot(cloud.create(machine_spec(tmp_path, cloud)), "rec")
    theirs = dict(fake.objects["images"][taken.id])
    cloud.create(recovery_spec(cloud, recovery, taken))
    directory, image = recovery
    booted = fake.objects["images"][taken.id]
    (kernel,) = [i for i in images(fake, "kernel") if i["cloudfit_image"] == "recovery"]
    (carrier,) = images(fake, "carrier")
    assert (booted["kernel_id"], booted["ramdisk_id"]) == (kernel["id"], carrier["id"])
    assert booted["kernel_id"] != theirs["kernel_id"]
    assert booted["os_command_line"] == image.command_line
    layout = carried(image)
    content = fake.files[carrier["id"]]
    initramfs = (directory / "initramfs").read_bytes()
    assert content == layout.head + (directory / "root.img").read_bytes() + layout.tail + initramfs
    listed = subprocess.run(["cpio", "-t", "--quiet"], input=content, capture_output=True, check=True)
    assert listed.stdout.split() == [b"root.img"]


def test_the_image_holds_root_and_an_empty_state(fake, cloud, tmp_path):
    spec = machine_spec(tmp_path, cloud)
    cloud.create(spec)
    (made,) = images(fake, "single")
    packed, raw = tmp_path / "packed", tmp_path / "raw"
    packed.write_bytes(fake.files[made["id"]])
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", packed, raw], check=True)
    root = (tmp_path / "root.img").read_bytes()
    with raw.open("rb") as file:
        assert file.read(len(root) + 1) == root + b"\0"
        file.seek((STATE_OFFSET_MIB << 20) + 1080)
        assert file.read(2) == b"\x53\xef"
    assert raw.stat().st_size == (STATE_OFFSET_MIB + 256) << 20
    assert made["min_disk"] == 1
    assert made["os_hash_value"] == made["cloudfit_content"] == hashlib.sha512(packed.read_bytes()).hexdigest()
    uploads = len([c for c in fake.calls if c.startswith("PUT image:")])
    with driving(tmp_path, fake, BARE) as another:
        another.create(machine_spec(tmp_path, another, owner(replica="r2")))
    assert len([c for c in fake.calls if c.startswith("PUT image:")]) == uploads, "it is there already"


def test_an_image_that_arrives_spoilt_is_uploaded_again(fake, cloud, tmp_path):
    spec = machine_spec(tmp_path, cloud)
    cloud.destroy(cloud.create(replace(spec, state_disk=replace(spec.state_disk, size_mib=128))))
    fake.wrong.spoil_uploads = 1  # kernel and initramfs are there
    cloud.create(machine_spec(tmp_path, cloud))
    made = images(fake, "single")[-1]
    assert made["os_hash_value"] == made["cloudfit_content"]


def test_a_snapshot_that_fails_is_taken_again_and_then_told(fake, cloud, tmp_path):
    machine = cloud.create(machine_spec(tmp_path, cloud))
    fake.wrong.snapshot_fails = 1
    assert cloud.snapshot(machine, "rec1").operation == "rec1"
    fake.wrong.snapshot_fails = 2
    with pytest.raises(PermanentError, match="did not bring it to an end") as told:
        cloud.snapshot(machine, "rec2")
    assert machine.id in told.value.next_command
    assert [s.operation for s in cloud.snapshots("dep")] == ["rec1"]


def test_a_snapshot_of_a_dead_controller_is_finished(fake, cloud, tmp_path):
    """One that is queued while nobody works on it is made anew; two that are whole become one."""
    machine = cloud.create(machine_spec(tmp_path, cloud))
    first = cloud.snapshot(machine, "rec")
    fake.objects["images"][first.id]["status"] = "queued"
    second = cloud.snapshot(machine, "rec")
    assert second.id != first.id
    assert list(fake.objects["images"]).count(first.id) == 0


def test_strangers_images_are_let_be(fake, cloud, tmp_path):
    """A snapshot that the operator takes of our server inherits what our image says of itself."""
    machine = cloud.create(machine_spec(tmp_path, cloud))
    taken = cloud.snapshot(machine, "rec")
    inherited = {k: v for k, v in images(fake, "single")[0].items() if k not in ("id", "tags", "created_at")}
    theirs = fake._new("images", {**inherited, "name": machine.owner.name, "tags": []})
    fake.objects["images"][taken.id]["cloudfit_group"] = "another"
    with pytest.raises(RefusedError, match="does not carry our tags"):
        cloud.delete_snapshot(taken)
    fake.objects["images"][taken.id]["cloudfit_group"] = "ledger"
    cloud.destroy(machine)
    cloud.sweep("dep", cloud.orphans("dep", []))
    cloud.delete_network("dep", "dep-lisbon")
    assert list(fake.objects["images"]) == [theirs["id"]]


def test_no_disk_is_given_to_a_machine_that_runs(cloud, tmp_path):
    machine = cloud.create(machine_spec(tmp_path, cloud))
    taken = cloud.snapshot(machine, "rec")
    reader = cloud.create(machine_spec(tmp_path, cloud, owner(incarnation=2, operation="rec"), disk=False))
    with pytest.raises(PermanentError, match="no Cinder"):
        cloud.attach(reader, taken)


def test_what_does_not_fit_is_told_before(fake, cloud, tmp_path):
    spec = machine_spec(tmp_path, cloud)
    old = replace(spec, manifest=replace(spec.manifest, command_line="console=ttyS0 quiet"))
    with pytest.raises(PermanentError, match="knows no state behind its root") as told:
        cloud.create(old)
    assert told.value.next_command == "cloudfit image build replica"
    fake.flavors[0]["disk"] = 1
    with pytest.raises(PermanentError, match="a disk of 1 GiB, the machine wants 2"):
        cloud.create(replace(spec, state_disk=replace(spec.state_disk, size_mib=1024)))
    assert left(fake).get("servers") is None


def test_the_spec_may_want_it_where_there_is_cinder(monkeypatch, tmp_path, recovery):
    quick(monkeypatch)
    with FakeOpenStack().serving() as fake, driving(tmp_path, fake, replace(BARE, state="instance")) as cloud:
        machine = cloud.create(machine_spec(tmp_path, cloud))
        taken = cloud.snapshot(machine, "rec")
        reader = cloud.create(recovery_spec(cloud, recovery, taken))
        for each in (reader, machine):
            cloud.destroy(each)
        cloud.delete_snapshot(taken)
        assert cloud.orphans("dep", [], networks=["replicas"]) == []
        assert not [call for call in fake.calls if " volume:" in call]


def test_machines_of_both_kinds_after_cinder_came(fake, cloud, tmp_path):
    """New ones get volumes, old ones are snapshot as they are."""
    old = cloud.create(machine_spec(tmp_path, cloud))
    fake.wrong.services = set()
    with driving(tmp_path, fake, BARE) as later:
        new = later.create(machine_spec(tmp_path, later, owner(replica="r2")))
        assert (later.must_pause(old), later.must_pause(new)) == (False, True)
        taken = [later.snapshot(old, "rec1"), later.snapshot(later.pause(new), "rec2")]
        assert {s.format for s in later.snapshots("dep")} == {"glance", "cinder"}
        for machine in (old, new):
            later.destroy(machine)
        assert {o.id for o in later.orphans("dep", [], networks=["x"]) if o.kind is OrphanKind.SNAPSHOT} == {
            s.id for s in taken
        }
        later.sweep("dep", later.orphans("dep", []))
        later.delete_network("dep", "dep-lisbon")
    assert left(fake) == {}
    fake.calls.clear()


def test_a_volume_that_the_spec_wants_is_missed_clearly(fake, tmp_path):
    with driving(tmp_path, fake, replace(PLACE, state="volume")) as cloud:
        with pytest.raises(PermanentError, match="the catalogue has no endpoint for volume") as told:
            cloud.create(machine_spec(tmp_path, cloud))
        assert "catalog list" in told.value.next_command
    assert left(fake).get("servers") is None


def findings(cloud, **changes):
    demand = Demand(2, 384, 1, 256, 30 << 20, STATE_ARGUMENT, STATE_ARGUMENT)
    found = cloud.preflight(replace(demand, **changes))
    return [(f.name, f.verdict, f.finding) for f in found if f.verdict != "ok" or f.name == "state"]


def test_preflight_says_what_is_used_and_what_is_missing(fake, cloud, tmp_path):
    def interesting(**changes):
        return [f for f in findings(cloud, **changes) if f[0] in ("state", "flavor")]

    used = (
        "state",
        "ok",
        "on the machine's own disk, snapshots are server images: the catalogue has no volume service",
    )
    assert interesting() == [used]
    assert not [f for f in cloud.preflight(Demand(1, 384, 1, 256)) if f.name in ("service volume", "volume type")]
    assert interesting(command_line="quiet")[1:] == [
        ("state", "fail", f"the image knows no state behind its root: {STATE_ARGUMENT} is not in its command line")
    ]
    assert [f[1] for f in interesting(recovery_command_line="quiet")] == ["ok", "fail"]
    assert [f[1] for f in interesting(recovery_command_line="")] == ["ok", "warn"]
    assert [f[1] for f in interesting(root_bytes=300 << 20)] == ["ok", "fail"]
    assert interesting(state_mib=1024)[1:] == [("flavor", "fail", "a disk of 1 GiB, the machine wants 2")]
    with driving(tmp_path, fake, replace(PLACE, state="volume")) as wanting:
        assert ("service volume", "fail", "not in the catalogue of this region") in findings(wanting)
    with driving(tmp_path, fake, PLACE) as typed:
        assert ("state", "warn", "volume_type is not used") in findings(typed)
