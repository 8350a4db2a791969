"""Nova's servers: what they may differ in from a domain of ours, and the channel that is attached while they run."""

import asyncio
from xml.etree import ElementTree as ET

import libvirt
import pytest

from cloudfit_orchestrator.model.channel import PORT_NAME
from cloudfit_orchestrator.model.errors import BadError, BadInputError, PermanentError
from cloudfit_orchestrator.model.one_disk import carried
from cloudfit_orchestrator.wormhole import nova
from cloudfit_orchestrator.wormhole.measure import check_local, measure_domain
from tests.unit.wormhole.test_measure import UUID, image, xml  # noqa: F401  a fixture

URI = "qemu:///system"
NOVA = "<n:instance xmlns:n='http://openstack.org/xmlns/libvirt/nova/1.1'/></metadata>"
SYSINFO = "<sysinfo type='smbios'><system><entry name='product'>OpenStack Nova</entry></system></sysinfo>"
SERIAL = "<controller type='virtio-serial' index='0'/>"


def server(folder, *, serial=SERIAL, base="raw", **change):
    """The live definition of a Nova server, without our channel."""
    more = {
        "readonly": "",
        "vda_driver": "qcow2",
        "extra": serial,
        "top": SYSINFO,
        "os_extra": "<smbios mode='sysinfo'/>",
    }
    text = xml(folder, **more | change).replace("</metadata>", NOVA)
    domain = ET.fromstring(text)
    disk = domain.find("devices/disk")
    disk.find("source").set("file", f"{folder}/disk")
    below = ET.SubElement(disk, "backingStore", type="file")
    ET.SubElement(below, "format", type=base)
    ET.SubElement(below, "source", file=f"{folder}/root.img")
    devices = domain.find("devices")
    devices.remove(devices.find("channel"))
    return domain


class Host:
    """A libvirt connection with one server, or none, that calls its listeners as libvirt does."""

    def __init__(self, domain):
        self.domain, self.starts, self.attached = domain, 1, 0
        self.happened = self.hung_up = None
        self.connections = 0

    def open(self, _uri):
        self.connections += 1
        return self

    def lookupByUUIDString(self, uuid):  # noqa: N802  libvirt's name
        if self.domain is None:
            error = libvirt.libvirtError("no domain")
            error.err = (libvirt.VIR_ERR_NO_DOMAIN, 0, "no domain", 0, "", "", "", 0, 0)
            raise error
        assert uuid == UUID
        return self

    def isActive(self):  # noqa: N802
        return True

    def XMLDesc(self, _flags):  # noqa: N802
        return ET.tostring(self.domain, encoding="unicode")

    def UUIDString(self):  # noqa: N802
        return UUID

    def attachDeviceFlags(self, text, flags):  # noqa: N802
        assert flags == libvirt.VIR_DOMAIN_AFFECT_LIVE
        channel = ET.fromstring(text)
        channel.find("source").set("path", f"/run/domain-{self.starts}/{PORT_NAME}")
        self.domain.find("devices").append(channel)
        self.attached += 1

    def registerCloseCallback(self, call, _opaque):  # noqa: N802
        self.hung_up = call

    def unregisterCloseCallback(self):  # noqa: N802
        self.hung_up = None

    def setKeepAlive(self, *_):  # noqa: N802
        pass

    def domainEventRegisterAny(self, _domain, _kind, call, _opaque):  # noqa: N802
        self.happened = call

    def close(self):
        pass


@pytest.fixture
def host(tmp_path, monkeypatch):
    made = Host(server(tmp_path))
    monkeypatch.setattr(libvirt, "open", made.open)
    monkeypatch.setattr(libvirt, "openReadOnly", made.open)
    return made


def test_the_channel_is_attached_once_and_after_a_hard_reboot_again(host, tmp_path, image):  # noqa: F811
    first = nova.measure_attached(URI, UUID, image)
    assert (first.machine, first.channel, first.nova) == (UUID, f"/run/domain-1/{PORT_NAME}", True)
    assert nova.measure_attached(URI, UUID, image) == first
    assert nova.find_channel(URI, UUID) == first.channel
    assert host.attached == 1
    host.domain, host.starts = server(tmp_path, volatile="8"), 2
    again = nova.measure_attached(URI, UUID, image)
    assert (again.channel, host.attached) == (f"/run/domain-2/{PORT_NAME}", 2)
    assert again.domain == first.domain


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"cmdline": "console=ttyS0 init=/bin/sh"}, "command line"),
        ({"base": "qcow2"}, "root: .*force_raw_images"),
        ({"extra": SERIAL + "<hostdev mode='subsystem' type='pci'/>"}, "hostdev"),
        ({"top": "<sysinfo type='smbios'><oemStrings/></sysinfo>"}, "sysinfo"),
        ({"os_extra": "<loader>/usr/share/OVMF.fd</loader>"}, "loader"),
        ({"extra": "<hub><rom file='/tmp/x'/></hub>" + SERIAL}, "hub"),
        ({"extra": SERIAL + "<rng><rom file='/tmp/x'/></rng>"}, "option ROM"),
    ],
)
def test_what_boots_otherwise_is_refused_and_gets_no_channel(host, tmp_path, image, change, why):  # noqa: F811
    host.domain = server(tmp_path, **change)
    with pytest.raises(BadError, match=why):
        nova.measure_attached(URI, UUID, image)
    assert host.attached == 0


@pytest.mark.parametrize("part", ["vmlinuz", "initramfs", "root.img"])
def test_a_flipped_byte_is_refused(host, tmp_path, image, part):  # noqa: F811
    data = bytearray((tmp_path / part).read_bytes())
    data[0] ^= 1
    (tmp_path / part).write_bytes(data)
    with pytest.raises(BadError, match="has SHA-256"):
        nova.measure_attached(URI, UUID, image)
    assert host.attached == 0


def carry(folder, manifest):
    """Let the initramfs carry the root, and another's disk stand below the server; where its parts begin."""
    layout = carried(manifest)
    root, own = (folder / "root.img").read_bytes(), (folder / "initramfs").read_bytes()
    (folder / "initramfs").write_bytes(layout.head + root + layout.tail + own)
    (folder / "root.img").write_bytes(b"whatever another machine left")
    return {
        "head": 20,
        "root": layout.root_offset,
        "verity": layout.root_offset + 8192,
        "tail": layout.root_offset + layout.root_size,
        "initramfs": layout.initramfs_offset,
        "end": layout.size,
    }


def test_a_root_in_the_initramfs_is_measured_there_and_the_disk_is_data(host, tmp_path, image):  # noqa: F811
    carry(tmp_path, image)
    assert nova.measure_attached(URI, UUID, image).nova
    assert host.attached == 1


@pytest.mark.parametrize("where", ["head", "root", "verity", "tail", "initramfs"])
def test_every_byte_of_an_initramfs_that_carries_the_root_counts(host, tmp_path, image, where):  # noqa: F811
    begins = carry(tmp_path, image)
    data = bytearray((tmp_path / "initramfs").read_bytes())
    data[begins[where]] ^= 1
    (tmp_path / "initramfs").write_bytes(data)
    named = "initramfs: .*about the root" if where in ("head", "tail") else f"{where}: .*SHA-256"
    with pytest.raises(BadError, match=f"^{named}"):
        nova.measure_attached(URI, UUID, image)
    assert host.attached == 0


@pytest.mark.parametrize("change", [lambda data: data + bytes(512), lambda data: data[:-1]])
def test_an_initramfs_of_another_size_carries_nothing(host, tmp_path, image, change):  # noqa: F811
    carry(tmp_path, image)
    data = (tmp_path / "initramfs").read_bytes()
    (tmp_path / "initramfs").write_bytes(change(data))
    with pytest.raises(BadError, match=r"^initramfs: .* bytes"):
        nova.measure_attached(URI, UUID, image)


def test_a_domain_that_nova_did_not_make_has_its_root_on_its_disk(tmp_path, image):  # noqa: F811
    carry(tmp_path, image)
    with pytest.raises(BadError, match=r"^initramfs: .* bytes"):
        measure_domain(ET.fromstring(xml(tmp_path)), image)


def test_without_a_virtio_serial_controller_the_error_names_the_property(host, tmp_path, image):  # noqa: F811
    host.domain = server(tmp_path, serial="")
    with pytest.raises(PermanentError, match="no virtio-serial controller") as failed:
        nova.measure_attached(URI, UUID, image)
    assert "hw_qemu_guest_agent=yes" in failed.value.next_command


@pytest.mark.parametrize(
    "uri",
    ["qemu+ssh://h/system", "qemu+ext:///system?command=/x", "qemu+unix:///system?socket=x", "qemu:///system?mode=x"],
)
def test_only_this_hosts_libvirt_is_asked(uri):
    with pytest.raises(BadInputError, match="is not a libvirt of this host"):
        check_local(uri)
    check_local("qemu+unix:///system?socket=/nonexistent/libvirt-sock")


async def until(what):
    async with asyncio.timeout(20):
        while not what():  # noqa: ASYNC110  a thread of libvirt's calls; there is nothing to await
            await asyncio.sleep(0.01)


def watched(scenario, host, gone_s=60.0):
    async def run():
        watch, started, lost = nova.Watch(gone_s=gone_s, back_off_s=(0.01, 0.02)), [], []
        watch.add(URI, UUID, lambda: started.append(1), lost.append)
        try:
            await until(lambda: host.happened and started)
            await scenario(started, lost)
        finally:
            await watch.stop()

    asyncio.run(run())


def test_a_start_is_told_and_a_migration_loses_the_guest_at_once(host):
    async def scenario(started, lost):
        host.happened(host, host, libvirt.VIR_DOMAIN_EVENT_STARTED, 0, None)
        await until(lambda: len(started) == 2)
        host.happened(host, host, libvirt.VIR_DOMAIN_EVENT_STOPPED, libvirt.VIR_DOMAIN_EVENT_STOPPED_MIGRATED, None)
        await until(lambda: lost)
        assert lost == ["it was migrated to another host"]

    watched(scenario, host)


def test_a_server_without_a_domain_is_lost_after_a_while(host):
    async def scenario(_, lost):
        host.domain = None
        host.happened(host, host, libvirt.VIR_DOMAIN_EVENT_UNDEFINED, 0, None)
        await until(lambda: lost)
        assert "no domain" in lost[0]

    watched(scenario, host, gone_s=0.05)


def test_a_restart_of_libvirtd_is_survived(host):
    async def scenario(started, lost):
        host.hung_up(host, 0, None)
        await until(lambda: len(started) == 2)
        assert lost == []

    watched(scenario, host)
