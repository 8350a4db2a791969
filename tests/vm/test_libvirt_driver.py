"""The libvirt driver on real QEMU machines."""

import concurrent.futures
import os
import shutil
import tempfile
import uuid
from dataclasses import replace
from pathlib import Path

import libvirt
import pytest

from cloudfit_orchestrator.clouds.base import MachineSpec, MachineState, NetworkSpec, Ownership, StateDisk
from cloudfit_orchestrator.clouds.libvirt_cloud.acceleration import PROBE_NAME
from cloudfit_orchestrator.clouds.libvirt_cloud.driver import LibvirtCloud
from cloudfit_orchestrator.clouds.libvirt_cloud.network import network_name
from cloudfit_orchestrator.clouds.libvirt_cloud.storage import PoolStorage
from cloudfit_orchestrator.model.errors import PermanentError, RefusedError
from cloudfit_orchestrator.model.image import Role
from tests.vm.tiny_guest import GuestShell, tiny_image, tiny_manifest

pytestmark = pytest.mark.vm
WAIT_FOR_DISK = "i=0; while [ ! -b /dev/vdb ] && [ $i -lt 300 ]; do usleep 100000; i=$((i+1)); done; [ -b /dev/vdb ]"


class Place:
    """A cloud with a deployment and subnets that no parallel test has."""

    def __init__(self, home: Path) -> None:
        self.deployment = f"t{uuid.uuid4().hex[:8]}"
        self.home = home
        self.cloud = LibvirtCloud(home=home)
        self.shells: list[GuestShell] = []
        self._third = uuid.uuid4().int % 120 * 2
        self._second = 100 + os.getpid() % 100

    def shell(self, channel: Path) -> GuestShell:
        self.shells.append(GuestShell(channel))
        return self.shells[-1]

    def network(self, index: int, host: int) -> NetworkSpec:
        net = f"10.{self._second}.{self._third + index}"
        return NetworkSpec(f"net{index}", f"{net}.{host}", 24, f"{net}.1")

    def spec(self, replica, network=None, **more) -> MachineSpec:
        image = tiny_image()
        owner = Ownership(self.deployment, "g", replica, 1, Role.REPLICA, "op")
        return MachineSpec(owner, image, tiny_manifest(image), 128, 1, network, **more)


@pytest.fixture
def place():
    home = Path(tempfile.mkdtemp(prefix="cf", dir="/tmp"))
    home.chmod(0o711)
    place = Place(home)
    yield place
    for shell in place.shells:
        shell.close()
    place.cloud.sweep(place.deployment, place.cloud.orphans(place.deployment, []))
    assert place.cloud.orphans(place.deployment, []) == []
    place.cloud.close()
    shutil.rmtree(home)


def set_up(shell, network):
    shell.check(
        f"ip link set eth0 up && ip addr add {network.address}/{network.prefix} dev eth0 && "
        f"ip route add default via {network.gateway}"
    )


def test_a_machines_life_with_snapshot_and_recovery(place):
    cloud = place.cloud
    wanted = place.spec("r1", state_disk=StateDisk(64))
    with concurrent.futures.ThreadPoolExecutor(2) as pool:  # two at once make one machine
        first, second = pool.map(cloud.create, [wanted, wanted])
    assert first.id == second.id
    machine = first
    shell = place.shell(machine.channel)
    assert shell.check("uname -r")
    assert shell.run("dd if=/dev/zero of=/dev/vda count=1")[0] != 0  # the root is read-only
    shell.check("mount -t ext4 /dev/vdb /state && echo early >/state/f && sync")
    with pytest.raises(PermanentError, match="is running"):
        cloud.snapshot(machine, "recover-1")
    machine = cloud.pause(machine)
    assert machine.state is MachineState.PAUSED
    taken = cloud.snapshot(machine, "recover-1")
    assert cloud.snapshot(machine, "recover-1") == taken
    before = taken.path.read_bytes()
    cloud.resume(machine)
    shell.check("echo late >/state/f; sync")

    reader = cloud.create(place.spec("r2"))  # a recovery machine that runs already
    eye = place.shell(reader.channel)
    eye.check("true")
    reader = cloud.attach(reader, taken)
    assert cloud.attach(reader, taken) == reader
    eye.check(WAIT_FOR_DISK)
    assert eye.check("mount -t ext4 /dev/vdb /state && cat /state/f") == "early\n"
    eye.check("echo scribble >/state/f; sync")
    assert taken.path.read_bytes() == before
    with pytest.raises(RefusedError, match="stands on it"):
        cloud.delete_snapshot(taken)

    machine = cloud.start(cloud.stop(machine))
    shell.close()
    shell = place.shell(machine.channel)
    assert shell.check("mount -t ext4 /dev/vdb /state && cat /state/f") == "late\n"
    cloud.destroy(machine)
    cloud.destroy(reader)
    assert cloud.snapshots(place.deployment) == [taken]
    assert taken.path.read_bytes() == before
    cloud.delete_snapshot(taken)
    assert list((place.home / "machines" / place.deployment).iterdir()) == []


def test_machines_of_two_networks_talk_over_the_host(place):
    cloud, specs = place.cloud, [place.network(i, 10) for i in range(2)]
    for network in specs:
        cloud.ensure_network(place.deployment, network)
        cloud.ensure_network(place.deployment, network)
    machines = [cloud.create(place.spec(f"r{i}", network)) for i, network in enumerate(specs)]
    shells = [place.shell(m.channel) for m in machines]
    for shell, network in zip(shells, specs, strict=True):
        set_up(shell, network)
    shells[1].check("(echo across | nc -l -p 7000) & usleep 300000")
    assert shells[0].check(f"timeout 20 nc {specs[1].address} 7000 </dev/null") == "across\n"
    with pytest.raises(RefusedError, match="still used"):
        cloud.delete_network(place.deployment, "net0")
    with pytest.raises(RefusedError, match="asked for"):
        cloud.ensure_network(place.deployment, replace(specs[0], prefix=25))


def test_a_strangers_network_is_refused_and_stays(place):
    name = network_name(place.deployment, "net0")
    stranger = place.cloud._connection.get().networkDefineXML(f"<network><name>{name}</name></network>")
    try:
        for act in (place.cloud.ensure_network, lambda d, n: place.cloud.delete_network(d, n.name)):
            with pytest.raises(RefusedError, match="not touched"):
                act(place.deployment, place.network(0, 9))
        assert stranger.name() == name
    finally:
        stranger.undefine()


def test_the_accelerator_is_chosen_by_a_boot_and_nothing_stays_behind(place):
    verdict = place.cloud.acceleration()
    assert verdict.accelerator in {"kvm", "tcg"}
    assert verdict.reason
    again = LibvirtCloud(home=place.home)
    assert again.acceleration() == verdict
    again.close()
    assert (place.home / "acceleration.json").exists()
    names = [p.name for p in (place.home / "machines/probe").iterdir()]
    assert not [n for n in names if n.startswith(PROBE_NAME)]


def test_files_that_the_hypervisor_cannot_reach_are_named_before_anything_is_made(place):
    closed = place.home / "closed"
    shutil.copytree(tiny_image(), closed)
    closed.chmod(0o700)
    wanted = replace(place.spec("r1"), image_dir=closed)
    with pytest.raises(PermanentError, match=f"cannot enter {closed}"):
        place.cloud.create(wanted)
    assert place.cloud.find(wanted.owner) is None


def test_a_remote_hosts_storage_works_through_libvirt_alone(place):
    cloud, name = place.cloud, f"cloudfit-{place.deployment}"
    user = tuple(int(x) for x in cloud._label().replace("+", "").split(":"))
    storage = PoolStorage(cloud._connection, name, place.home / "machines" / place.deployment, user)
    cloud._storage = lambda _deployment: storage
    try:
        machine = cloud.create(place.spec("r1", state_disk=StateDisk(64)))
        shell = place.shell(machine.channel)
        shell.check("mount -t ext4 /dev/vdb /state && echo early >/state/f && sync")
        taken = cloud.snapshot(cloud.pause(machine), "op")
        cloud.resume(machine)
        shell.check("echo late >/state/f; sync")
        reader = cloud.create(place.spec("r2", attach=taken))
        assert place.shell(reader.channel).check("mount -t ext4 /dev/vdb /state && cat /state/f") == "early\n"
        for gone in (machine, reader):
            cloud.destroy(gone)
        cloud.delete_snapshot(taken)
        assert {n for n in storage.names() if not n.startswith("image-")} == set()
    finally:
        del cloud._storage
        cloud.sweep(place.deployment, cloud.orphans(place.deployment, []))
        pool = cloud._connection.get().storagePoolLookupByName(name)
        pool.destroy()
        pool.undefine()


def test_a_remote_host_that_is_down_is_worth_a_retry(tmp_path):
    from cloudfit_orchestrator.model.errors import TemporaryError

    with (
        pytest.raises(TemporaryError, match="connect to"),
        LibvirtCloud(uri="qemu+ssh://nobody@127.0.0.1:1/system", home=tmp_path) as cloud,
    ):
        cloud.machines("dep")


def test_the_libvirt_binding_is_thread_safe_for_reads(place):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(found == [] for found in pool.map(place.cloud.machines, [place.deployment] * 32))
    assert libvirt.getVersion() > 0
