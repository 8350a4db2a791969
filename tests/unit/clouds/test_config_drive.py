"""Config drives: what each driver makes of the same bytes, and that a guest's init finds them."""

import base64
import io
import xml.etree.ElementTree as ET
from dataclasses import replace

import pycdlib
import pytest

from cloudfit_orchestrator.clouds.config_drive import iso_image
from cloudfit_orchestrator.clouds.libvirt_cloud.domain import Disk, Files, Host, domain_xml, read_domain, snapshot_xml
from cloudfit_orchestrator.clouds.process import ProcessCloud
from cloudfit_orchestrator.guest import init
from cloudfit_orchestrator.model.channel import PORT_NAME
from cloudfit_orchestrator.model.drive import LABEL, MAGIC, USER_DATA
from cloudfit_orchestrator.testing.openstack_fake import FakeOpenStack
from tests.unit.clouds.openstack_places import driving, machine_spec, quick
from tests.unit.clouds.specs import spec

DATA = MAGIC + b' "secret": "of the machine"}'


def test_the_image_is_one_that_openstack_could_have_made():
    iso = pycdlib.PyCdlib()
    iso.open_fp(io.BytesIO(iso_image(DATA)))
    assert iso.pvd.volume_identifier.decode().rstrip() == LABEL
    found = io.BytesIO()
    iso.get_file_from_iso_fp(found, rr_path="/" + USER_DATA)
    iso.close()
    assert found.getvalue() == DATA


def test_init_finds_the_drive_among_other_disks(tmp_path):
    devices, blocks = tmp_path / "dev", tmp_path / "block"
    for name, content in {
        "vda": iso_image(DATA),  # the root's place: never looked at
        "sr0": b"",
        "vdc": bytes(1 << 16),
        "vdd": iso_image(DATA).replace(b"config-2", b"another0"),
    }.items():
        (blocks / name).mkdir(parents=True)
        devices.mkdir(exist_ok=True)
        (devices / name).write_bytes(content)
    (blocks / "vde").mkdir()  # whose device is not there
    assert init.find_drive(str(devices), str(blocks)) is None
    (devices / "sr0").write_bytes(iso_image(DATA))
    assert init.find_drive(str(devices), str(blocks)) == str(devices / "sr0")


def test_init_knows_what_the_model_says():
    assert (init.DRIVE_LABEL, init.DRIVE_FILE, init.DRIVE_MAGIC) == (LABEL, USER_DATA, MAGIC)


def test_a_fingerprint_says_whether_there_is_a_drive_and_nothing_of_it(tmp_path):
    without = spec(tmp_path)
    one, other = replace(without, drive=DATA), replace(without, drive=DATA + b"x")
    assert one.fingerprint == other.fingerprint != without.fingerprint
    assert "secret" not in repr(one)


def test_a_domain_with_a_drive_has_no_channel_for_a_host(tmp_path):
    files = Files(*(tmp_path / n for n in ("vmlinuz", "initramfs", "root.img", "sock", "log")))
    wanted, state = spec(tmp_path), Disk(tmp_path / "state.raw", "raw")
    drive = Disk(tmp_path / "drive.iso", "raw")
    xml = domain_xml(replace(wanted, drive=DATA), Host("qemu", None), files, state, "net", drive)
    third = ET.fromstring(xml).findall("devices/disk")[2]
    assert third.find("target").attrib == {"dev": "vdc", "bus": "virtio"}
    assert third.find("source").get("file") == str(drive.path)
    assert third.find("readonly") is not None
    assert PORT_NAME not in xml
    seen = read_domain(xml)
    assert seen.drive
    assert seen.state_disk == state
    assert (
        ET.fromstring(snapshot_xml(tmp_path / "top", drive=True)).find("disks/disk[@name='vdc']").get("snapshot")
        == "no"
    )
    assert "vdc" not in snapshot_xml(tmp_path / "top")
    assert not read_domain(domain_xml(wanted, Host("qemu", None), files, state, "net")).drive


def test_a_process_finds_its_drive_where_nobody_else_looks(tmp_path):
    cloud = ProcessCloud(home=tmp_path, command=["/bin/sleep", "60"])
    made = cloud.create(replace(spec(tmp_path), drive=DATA))
    try:
        file = made.console.parent / "drive" / USER_DATA
        assert file.read_bytes() == DATA
        assert file.stat().st_mode & 0o077 == 0
    finally:
        cloud.destroy(made)
    assert not file.exists()


@pytest.fixture
def fake(monkeypatch):
    quick(monkeypatch)
    with FakeOpenStack().serving() as fake:
        yield fake


def test_nova_gets_the_data_and_a_bus_that_the_guest_has_a_driver_for(fake, tmp_path):
    with driving(tmp_path, fake) as cloud:
        plain = cloud.create(machine_spec(tmp_path, cloud))
        cloud.destroy(plain)
        cloud.create(machine_spec(tmp_path, cloud, drive=DATA))
    (server,) = fake.objects["servers"].values()
    assert server["config_drive"] == "True"
    assert base64.b64decode(server["_user_data"]) == DATA
    image = fake.objects["images"][server["image"]["id"]]
    assert (image["hw_cdrom_bus"], image["hw_scsi_model"]) == ("scsi", "virtio-scsi")


def test_only_this_host_reaches_the_agents_inside(fake, tmp_path):
    def doors():
        rules = fake.objects["security_group_rules"].values()
        return {(r["remote_ip_prefix"], r["port_range_min"]) for r in rules if r["direction"] == "ingress"}

    with driving(tmp_path, fake) as cloud:
        cloud.create(machine_spec(tmp_path, cloud, drive=DATA))
        cloud.admit("dep", "ledger", ["10.1.1.1"], 7000, 7001)
        (own,) = {source for source, port in doors() if port == 7001}
        assert doors() == {("10.1.1.1/32", 7000), (own, 7000), (own, 7001)}
        cloud.admit("dep", "ledger", ["10.1.1.2"], 7000, 7001)
        assert doors() == {("10.1.1.2/32", 7000), (own, 7000), (own, 7001)}
        cloud.admit("dep", "ledger", ["10.1.1.2"], 7000)
        assert doors() == {("10.1.1.2/32", 7000), (own, 7000)}
