"""The OpenStack driver on real clouds (make openstack-lab): a machine's life, its recovery, and nothing left of it."""

import os

import pytest
import yaml

from cloudfit_orchestrator.clouds.base import MachineState
from cloudfit_orchestrator.controller.ports import REPLICA_PORT
from cloudfit_orchestrator.model.errors import PermanentError, RefusedError, TemporaryError
from cloudfit_orchestrator.testing.openstack_proxy import Fault, Proxy
from tests.openstack.machines import GREETING, driving, greetings, listing, owner, spec_for
from tests.vm.tiny_guest import tiny_image, tiny_manifest

pytestmark = [pytest.mark.openstack, pytest.mark.timeout(1800)]

BOOTED = "DRIVER-KERNEL"
# Mounts the state disk, counts its starts there, and says what it sees.
GUEST = f"""#!/bin/sh
/bin/busybox --install -s /bin
export PATH=/bin
mkdir -p /proc /sys /dev /state
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
exec >/dev/ttyS0 2>&1 </dev/ttyS0
for m in $(cat /modules.order); do insmod /modules/$m; done
echo "{BOOTED} here"
until [ -b /dev/vdb ]; do sleep 0.1; done
mount -t ext4 /dev/vdb /state && echo start >> /state/starts && sync
echo "{GREETING} starts=$(wc -l < /state/starts) port=$(ls /dev/vport* | wc -l) net=$(ls /sys/class/net | tr '\\n' ' ')"
while true; do sleep 1000; done
"""


@pytest.fixture(scope="session")
def image():
    directory = tiny_image(GUEST)
    return directory, tiny_manifest(directory)


def test_a_machine_and_its_recovery(lab, tmp_path, image, deployment):
    with driving(lab, tmp_path) as cloud:
        spec = spec_for(cloud, lab, image, owner(deployment, 1, "op1"))
        old = cloud.create(spec)
        assert cloud.create(spec) == old
        assert greetings(lab, old)[0].startswith("starts=1 port=1")
        assert old.reference == {"driver": "libvirt", "uri": lab["libvirt_uri"], "uuid": old.id}
        cloud.admit(deployment, "ledger", [spec.network.address], REPLICA_PORT)
        paused = cloud.pause(old)
        assert paused.state is MachineState.PAUSED
        taken = cloud.snapshot(paused, "rec1")
        assert cloud.snapshot(paused, "rec1") == taken
        assert cloud.resume(paused).state is MachineState.RUNNING

        new = cloud.create(spec_for(cloud, lab, image, owner(deployment, 2, "rec1")))
        assert greetings(lab, new)[0].startswith("starts=1 "), "its own disk is fresh"
        reader_spec = spec_for(cloud, lab, image, owner(deployment, 3, "rec1", "r9"), disk=False, attach=taken)
        reader = cloud.create(reader_spec)
        assert greetings(lab, reader)[0].startswith("starts=2 "), "the old disk, with the start that stands on it"
        with pytest.raises(RefusedError, match="stands on the snapshot"):
            cloud.delete_snapshot(taken)
        cloud.destroy(reader)
        cloud.destroy(old)
        assert cloud.snapshots(deployment) == [taken], "the evidence outlives its machine"
        assert cloud.orphans(deployment, [new.owner], evidence=[old.owner]) == []

        assert cloud.stop(new).state is MachineState.STOPPED
        assert cloud.start(new).state is MachineState.RUNNING
        cloud.destroy(new)
        cloud.delete_snapshot(taken)
        cloud.delete_network(deployment, "replicas")


def test_a_running_machine_gets_the_old_disk(lab, tmp_path, image, deployment):
    with driving(lab, tmp_path) as cloud:
        old = cloud.create(spec_for(cloud, lab, image, owner(deployment, 1, "op1")))
        assert greetings(lab, old)[0].startswith("starts=1 ")
        taken = cloud.snapshot(cloud.pause(old), "rec1")
        reader = cloud.create(spec_for(cloud, lab, image, owner(deployment, 2, "rec1"), disk=False))
        greetings(lab, reader, word=BOOTED)  # a disk that is plugged in while the kernel looks for disks is lost to it
        attached = cloud.attach(reader, taken)
        assert cloud.attach(reader, taken) == attached
        assert greetings(lab, reader)[0].startswith("starts=2 ")
        cloud.destroy(reader)
        cloud.destroy(old)
        cloud.delete_snapshot(taken)
        cloud.delete_network(deployment, "replicas")


def test_strangers_are_let_be(lab, tmp_path, image, deployment):
    """What a neighbour in the same project made, with our names on it, is refused and never touched."""
    who = owner(deployment, 1, "op1")
    with driving(lab, tmp_path) as cloud, listing(lab, lab["name"]) as c:
        theirs = c.block_storage.create_volume(name=who.name, size=1, metadata={"cloudfit_deployment": deployment})
        c.block_storage.wait_for_status(theirs, "available", interval=1, wait=120)
        port = c.network.create_port(network_id=lab["network"]["id"], name=who.name)
        try:
            assert cloud.orphans(deployment, []) == []
            spec = spec_for(cloud, lab, image, who)
            machine = cloud.create(spec)
            cloud.destroy(machine)
            cloud.delete_network(deployment, "replicas")
            assert c.block_storage.get_volume(theirs.id).status == "available"
            assert c.network.get_port(port.id).name == who.name
        finally:
            c.network.delete_port(port)
            c.block_storage.delete_volume(theirs)
            c.block_storage.wait_for_delete(theirs, interval=1, wait=120)


def test_what_cannot_be_scheduled_leaves_nothing(lab, tmp_path, image, deployment):
    with driving(lab, tmp_path, availability_zone="no-such-zone") as cloud:
        spec = spec_for(cloud, lab, image, owner(deployment, 1, "op1"))
        with pytest.raises(PermanentError, match="availability zone is not available"):
            cloud.create(spec)
        assert [o.kind.value for o in cloud.orphans(deployment, [spec.owner])] == []
        cloud.delete_network(deployment, "replicas")
        for orphan in cloud.orphans(deployment, []):
            cloud.sweep(deployment, [orphan])


# By hand or at night: all calls. Here: a sample that wanders over the calls, another part of them under each fault.
STRIDE = int(os.environ.get("CLOUDFIT_FAULT_STRIDE", "97"))


@pytest.mark.faults
@pytest.mark.parametrize("fault", list(Fault))
def test_a_life_with_one_call_spoilt(lab, tmp_path, image, deployment, fault):
    document = yaml.safe_load(lab["clouds_yaml"].read_text())
    entry = document["clouds"][lab["name"]]
    at, length = 1 + list(Fault).index(fault) * STRIDE // len(Fault), 0
    with Proxy(entry["auth"]["auth_url"]).serving() as proxy:
        entry["auth"]["auth_url"] = proxy.keystone
        path = tmp_path / "clouds.yaml"
        path.write_text(yaml.safe_dump({"clouds": {lab["name"]: entry}}))
        lives, spoilt = 0, []
        while lives == 0 or at <= length:
            proxy.spoil(at, fault)
            lives += 1
            _life(lab, tmp_path, path, image, owner(deployment, lives, f"op{lives}"))
            length = max(c.number for c in proxy.calls)
            spoilt.append(str(proxy.spoilt))
            at += STRIDE
    with driving(lab, tmp_path) as cloud:
        assert cloud.orphans(deployment, [], networks=["replicas"]) == []
        cloud.delete_network(deployment, "replicas")
    print(f"{lab['name']}, {fault}: {len(spoilt)} of {length} calls spoilt: {', '.join(spoilt)}")


def _life(lab, directory, clouds_yaml, image, who):
    """Create, snapshot, destroy; told "temporary", ask again, as the controller does."""

    def again(act):
        for _ in range(4):
            try:
                return act()
            except TemporaryError as error:
                last = error
        raise last

    with driving(lab, directory, clouds_yaml) as cloud:
        spec = again(lambda: spec_for(cloud, lab, image, who))
        machine = again(lambda: cloud.create(spec))
        assert machine.state is MachineState.RUNNING
        assert [m.id for m in again(lambda: cloud.machines(who.deployment))] == [machine.id]
        again(lambda: cloud.admit(who.deployment, "ledger", [spec.network.address], REPLICA_PORT))
        paused = again(lambda: cloud.pause(machine))
        taken = again(lambda: cloud.snapshot(paused, who.operation))
        again(lambda: cloud.resume(paused))
        again(lambda: cloud.destroy(machine))
        assert again(lambda: cloud.machines(who.deployment)) == []
        again(lambda: cloud.delete_snapshot(taken))
