"""The OpenStack driver on real clouds (make openstack-lab): a machine's life, its recovery, and nothing left of it."""

import contextlib
import fcntl
import json
import os
import re
import time
from pathlib import Path

import openstack
import pytest
import yaml
from openstack.connection import Connection

from cloudfit_orchestrator.clouds.base import MachineSpec, MachineState, NetworkSpec, Ownership, StateDisk
from cloudfit_orchestrator.clouds.openstack import OpenStackCloud
from cloudfit_orchestrator.clouds.openstack_api import Api
from cloudfit_orchestrator.controller.ports import REPLICA_PORT
from cloudfit_orchestrator.model.errors import PermanentError, RefusedError, TemporaryError
from cloudfit_orchestrator.model.image import Role
from cloudfit_orchestrator.model.spec import OpenStackPlace
from cloudfit_orchestrator.testing.openstack_proxy import Fault, Proxy
from tests.openstack.lab.layout import DEFAULT_CLOUDS, DEFAULT_HOME
from tests.vm.tiny_guest import tiny_image, tiny_manifest

pytestmark = [pytest.mark.openstack, pytest.mark.timeout(1800)]

HOME = Path(os.environ.get("CLOUDFIT_LAB", DEFAULT_HOME))
GREETING, BOOTED = "DRIVER-GUEST", "DRIVER-KERNEL"
BOOT_TIMEOUT_S = 180.0
READ_TIMEOUT_S = 30.0  # a call of the lab's takes seconds at worst; what stalls is given up after this
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
def told():
    if not (HOME / "state.json").exists():
        pytest.fail(f"no lab in {HOME}; run: make openstack-lab")
    return json.loads((HOME / "state.json").read_text())


@pytest.fixture(params=DEFAULT_CLOUDS)
def lab(request, told):
    return told["clouds"][request.param] | {"name": request.param, "clouds_yaml": Path(told["clouds_yaml"])}


@pytest.fixture(scope="session")
def image():
    directory = tiny_image(GUEST)
    return directory, tiny_manifest(directory)


def place_of(lab, **changes):
    known = {
        "cloud": lab["name"],
        "region": lab["region"],
        "flavor": "cloudfit.tiny",
        "network": lab["network"]["name"],
        "availability_zone": lab["availability_zone"],
        "volume_type": lab["volume_type"],
        "hypervisor": lab["libvirt_uri"],
    }
    return OpenStackPlace(**known | changes)


def driving(lab, directory, clouds_yaml=None, **changes):
    place = place_of(lab, **changes)
    api = Api(place.cloud, place.region, files=[clouds_yaml or lab["clouds_yaml"]], read_timeout_s=READ_TIMEOUT_S)
    return OpenStackCloud(home=directory, place=place, api=api)


@contextlib.contextmanager
def listing(lab, account):
    config = openstack.config.OpenStackConfig(config_files=[str(lab["clouds_yaml"])])
    connection = Connection(config=config.get_one(cloud=account))
    try:
        yield connection
    finally:
        connection.close()


def everything(lab):
    """(kind, id) of all that the operator's project has."""
    with listing(lab, lab["name"]) as c:
        mine = {"project_id": c.current_project_id}
        found = {
            "servers": c.compute.servers(),
            "server groups": c.compute.server_groups(),
            "images": (
                i
                for hidden in (False, True)
                for i in c.image.images(is_hidden=hidden)
                if i.owner_id == c.current_project_id
            ),
            "ports": c.network.ports(**mine),
            "security groups": c.network.security_groups(**mine),
            "rules": c.network.security_group_rules(**mine),
            "volumes": c.block_storage.volumes(),
            "snapshots": c.block_storage.snapshots(),
        }
        return {(kind, o.id) for kind, objects in found.items() for o in objects}


@pytest.fixture
def deployment(lab):
    """A name of this test's own; afterwards the project has what it had before. One test a cloud at a time."""
    with (HOME / f"{lab['name']}.test-lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = everything(lab)
        yield f"t{os.urandom(4).hex()}"
        assert everything(lab) == before


def owner(deployment, incarnation, operation, replica="r0"):
    return Ownership(deployment, "ledger", replica, incarnation, Role.REPLICA, operation)


def spec_for(cloud, lab, image, who, *, disk=True, **changes):
    directory, manifest = image
    address = cloud.reserve_address(who.deployment, who.group, who.replica, who.role, who.operation)
    network = NetworkSpec("replicas", address, 24, lab["network"]["gateway"])
    state = StateDisk(256) if disk else None
    return MachineSpec(who, directory, manifest, 128, 1, network, state, **changes)


def greetings(lab, machine, count=1, word=GREETING):
    """What the guest said on its console behind `word`, once it has said it `count` times."""
    log = Path(lab["instances"], machine.id, "console.log")
    deadline = time.monotonic() + BOOT_TIMEOUT_S
    while len(found := re.findall(rf"{word} (.*)", log.read_text(errors="replace") if log.exists() else "")) < count:
        assert time.monotonic() < deadline, f"{machine.owner.name} said nothing within {BOOT_TIMEOUT_S:.0f} s"
        time.sleep(0.5)
    return found


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
