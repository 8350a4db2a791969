"""The libvirt driver against libvirt's own in-process test driver, and its XML both ways."""

import os
import shutil
import tempfile
import uuid
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import libvirt
import pytest

from cloudfit_orchestrator.clouds import registry
from cloudfit_orchestrator.clouds.base import MachineState, NetworkSpec, OrphanKind, Ownership
from cloudfit_orchestrator.clouds.libvirt_cloud import acceleration, connection
from cloudfit_orchestrator.clouds.libvirt_cloud.domain import Disk, Files, Host, domain_xml, mac, read_domain
from cloudfit_orchestrator.clouds.libvirt_cloud.driver import LibvirtCloud
from cloudfit_orchestrator.clouds.libvirt_cloud.network import network_xml, read_network
from cloudfit_orchestrator.clouds.process import ProcessCloud
from cloudfit_orchestrator.model.channel import PORT_NAME
from cloudfit_orchestrator.model.errors import BadInputError, PermanentError, RefusedError, TemporaryError
from tests.unit.clouds.specs import NETWORK, owner, spec


@pytest.fixture
def deployment():
    return f"t{uuid.uuid4().hex[:8]}"


@pytest.fixture
def home():
    path = Path(tempfile.mkdtemp(prefix="cf", dir="/tmp"))  # short: it holds sockets
    yield path
    shutil.rmtree(path)


@pytest.fixture
def cloud(home, deployment):
    cloud = LibvirtCloud(uri="test:///default", home=home)
    net = replace(NETWORK, gateway=f"10.{os.getpid() % 200 + 20}.{uuid.uuid4().int % 250}.1")
    net = replace(net, address=net.gateway.removesuffix("1") + "9")
    cloud.ensure_network(deployment, net)
    with cloud:
        yield cloud
        cloud.sweep(deployment, cloud.orphans(deployment, []))


def files(tmp_path):
    return Files(*(tmp_path / n for n in ("vmlinuz", "initramfs", "root.img", "sock", "log")))


def test_the_domain_boots_exactly_what_the_manifest_names(tmp_path):
    wanted = spec(tmp_path)
    second = Disk(tmp_path / "top.qcow2", "qcow2", ((tmp_path / "state.raw", "raw"),))
    xml = domain_xml(wanted, Host("qemu", "+64055:+64055"), files(tmp_path), second, "net")
    domain = ET.fromstring(xml)
    assert domain.findtext("os/cmdline") == wanted.manifest.command_line
    assert domain.findtext("os/kernel") == str(tmp_path / "vmlinuz")
    root, state = domain.findall("devices/disk")
    assert root.find("readonly") is not None
    assert root.find("shareable") is not None
    assert root.find("source").get("file") == str(tmp_path / "root.img")
    assert state.find("readonly") is None
    assert state.find("backingStore/format").get("type") == "raw"  # pinned: a guest's bytes must not choose it
    assert state.find("backingStore/backingStore") is not None
    assert domain.find("devices/channel/target").get("name") == PORT_NAME
    assert domain.find("devices/graphics") is None
    assert domain.find("seclabel").get("relabel") == "no"
    seen = read_domain(xml)
    assert (seen.owner, seen.fingerprint) == (wanted.owner, wanted.fingerprint)
    assert (seen.channel, seen.console) == (tmp_path / "sock", tmp_path / "log")
    assert seen.sources == {tmp_path / n for n in ("root.img", "top.qcow2", "state.raw")}


def test_an_incomplete_tag_set_is_nobodys(tmp_path):
    xml = domain_xml(spec(tmp_path), Host("qemu", None), files(tmp_path), None, None)
    assert read_domain(xml).owner == owner()
    for tag in owner().tags():
        assert read_domain(xml.replace(f" {tag}=", f" not-{tag}=")).owner is None


def test_addresses_and_names_are_derived_from_the_identity_alone():
    assert mac(owner()) == mac(owner(operation="op-2"))
    assert mac(owner()) != mac(owner(incarnation=2))
    assert int(mac(owner())[:2], 16) & 3 == 2  # locally administered, unicast
    twins = [Ownership("a-b", "c", "r", 1, owner().role, "o"), Ownership("a", "b-c", "r", 1, owner().role, "o")]
    assert twins[0].name != twins[1].name
    with pytest.raises(BadInputError, match="lower case"):
        owner(replica="../r1")


def test_a_network_reads_back_as_written():
    seen = read_network(network_xml("dep", NETWORK))
    assert (seen.deployment, seen.short, seen.gateway, seen.prefix) == ("dep", "lisbon", "10.77.1.1", 24)


@pytest.mark.parametrize(
    "bad",
    [NetworkSpec("n", "10.1.1.1", 24, "10.1.1.1"), NetworkSpec("n", "10.1.2.9", 24, "10.1.1.1"),
     NetworkSpec("n", "x", 24, "10.1.1.1"), NetworkSpec("n", "10.1.1.255", 24, "10.1.1.1")],
)  # fmt: skip
def test_a_subnet_that_cannot_work_is_refused(cloud, deployment, bad):
    with pytest.raises(BadInputError, match="network n"):
        cloud.ensure_network(deployment, bad)


def test_a_machines_life_repeated_at_each_step(cloud, deployment, home, tmp_path):
    wanted = spec(tmp_path, owner(deployment))
    assert cloud.find(wanted.owner) is None
    machine = cloud.create(wanted)
    assert cloud.create(wanted) == machine
    assert cloud.find(wanted.owner) == machine
    assert cloud.machines(deployment) == [machine]
    assert machine.state_disk.stat().st_size == 16 << 20
    for act, state in (
        (cloud.pause, MachineState.PAUSED),
        (cloud.resume, MachineState.RUNNING),
        (cloud.stop, MachineState.STOPPED),
        (cloud.start, MachineState.RUNNING),
    ):
        assert act(machine).state is state
        assert act(machine).state is state
    with pytest.raises(RefusedError, match="another specification"):
        cloud.create(replace(wanted, memory_mib=256))
    with pytest.raises(RefusedError, match="still used"):
        cloud.delete_network(deployment, "lisbon")
    cloud.destroy(machine)
    cloud.destroy(machine)
    assert cloud.find(wanted.owner) is None
    assert list((home / "machines" / deployment).iterdir()) == []
    with pytest.raises(PermanentError, match="does not exist"):
        cloud.start(machine)


def test_a_machine_without_its_network_is_not_made(cloud, deployment, tmp_path):
    elsewhere = NetworkSpec("porto", "10.9.9.9", 24, "10.9.9.1")
    with pytest.raises(PermanentError, match="porto"):
        cloud.create(spec(tmp_path, owner(deployment), network=elsewhere))


def test_a_domain_that_wears_our_name_is_never_touched(cloud, deployment, tmp_path):
    wanted = spec(tmp_path, owner(deployment))
    stranger = cloud._connection.get().defineXML(
        f"<domain type='test'><name>{wanted.owner.name}</name><memory>8192</memory><os><type>hvm</type></os></domain>"
    )
    try:
        for act in (lambda: cloud.create(wanted), lambda: cloud.find(wanted.owner)):
            with pytest.raises(RefusedError, match=f"{wanted.owner.name}.*not touched"):
                act()
        assert cloud.machines(deployment) == []
        assert stranger.isPersistent()
    finally:
        stranger.undefine()


def test_what_a_death_half_way_left_is_an_orphan_and_goes(cloud, deployment, tmp_path):
    wanted = spec(tmp_path, owner(deployment))
    cloud._files(deployment).claim(wanted)
    cloud._files(deployment).state_disk(wanted.owner, 16)
    assert [o.kind for o in cloud.orphans(deployment, [], networks=["lisbon"])] == [OrphanKind.DISK]
    assert cloud.orphans(deployment, [wanted.owner], networks=["lisbon"]) == []
    cloud.sweep(deployment, cloud.orphans(deployment, []))
    assert cloud.orphans(deployment, []) == []


def test_a_libvirtd_that_is_down_is_one_clear_error_with_the_next_command(tmp_path):
    uri = f"qemu+unix:///system?socket={tmp_path}/absent"
    with pytest.raises(PermanentError, match="libvirtd does not answer") as caught:
        LibvirtCloud(uri=uri, home=tmp_path).machines("dep")
    assert "libvirtd" in caught.value.next_command


def test_daemons_that_cannot_be_started_name_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(connection, "_init_runs", lambda: False)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(connection.shutil, "which", lambda name, path: f"/usr/sbin/{name}")
    with pytest.raises(PermanentError, match="only root") as caught:
        connection.ensure_daemons(tmp_path)
    assert caught.value.next_command == "sudo sh -c 'virtlogd -d; libvirtd -d'"


def test_libvirts_errors_are_told_apart():
    def raised(code, text):
        error = libvirt.libvirtError(text)
        error.err = (code, 0, text, 0, "", None, None, 0, 0)
        return connection.translate(error, "start x")

    assert isinstance(raised(libvirt.VIR_ERR_OPERATION_TIMEOUT, "late"), TemporaryError)
    assert isinstance(raised(libvirt.VIR_ERR_XML_ERROR, "bad"), PermanentError)
    full = raised(libvirt.VIR_ERR_SYSTEM_ERROR, "write: No space left on device")
    assert isinstance(full, PermanentError)
    assert "free space" in full.next_command


def test_the_probe_guest_is_a_multiboot_image_of_a_few_bytes():
    image = acceleration.guest()
    words = [int.from_bytes(image[i : i + 4], "little") for i in (0, 4, 8)]
    assert words[0] == 0x1BADB002
    assert sum(words) % 2**32 == 0
    assert len(image) == 64


def test_drivers_are_declared():
    assert registry.driver("libvirt") is LibvirtCloud
    assert registry.driver("process") is ProcessCloud
    with pytest.raises(BadInputError, match="libvirt, openstack, process"):
        registry.driver("nimbus")
