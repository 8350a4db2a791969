"""What boots is measured from the live definition, and each part that differs is named."""

import hashlib
import os
import subprocess
from dataclasses import replace
from xml.etree import ElementTree as ET

import pytest

from cloudfit_orchestrator.model.channel import PORT_NAME
from cloudfit_orchestrator.model.errors import BadError, BadInputError, PermanentError, UnknownError
from cloudfit_orchestrator.model.image import Manifest, Part, Role
from cloudfit_orchestrator.wormhole.measure import canonical_digest, live_xml, measure_domain, measure_process

UUID = "0b9c8a1e-6f0f-4f0e-9d53-6f0c8f2b7a10"


def xml(folder, **change):
    parts = {
        "cmdline": "console=ttyS0 quiet",
        "vda_driver": "raw",
        "readonly": "<readonly/>",
        "extra": "",
        "os_extra": "",
        "top": "",
        "volatile": "3",
        "vda_dev": "vda",
        "mode": "bind",
        "state": "connected",
    } | change
    return f"""<domain type='qemu' id='{parts["volatile"]}' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>ledger-r0</name><uuid>{UUID}</uuid>
  <metadata><c:owner xmlns:c='urn:cloudfit'>op-{parts["volatile"]}</c:owner></metadata>
  <os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type><kernel>{folder}/vmlinuz</kernel>
    <initrd>{folder}/initramfs</initrd><cmdline>{parts["cmdline"]}</cmdline><boot dev='hd'/>{parts["os_extra"]}</os>
  <devices><emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type='file' device='disk'><driver name='qemu' type='{parts["vda_driver"]}'/><source file='{folder}/root.img'/>
      <target dev='{parts["vda_dev"]}' bus='virtio'/>{parts["readonly"]}
      <alias name='virtio-disk{parts["volatile"]}'/></disk>
    <disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{folder}/state.qcow2'/>
      <target dev='vdb' bus='virtio'/></disk>
    <interface type='network'><source network='lisbon'/><target dev='vnet{parts["volatile"]}'/></interface>
    <channel type='unix'><source mode='{parts["mode"]}' path='{folder}/channel'/>
      <target type='virtio' name='{PORT_NAME}' state='{parts["state"]}'/></channel>
    <console type='file'><source path='{folder}/console.log'/></console>{parts["extra"]}</devices>
  <seclabel type='dynamic'><label>libvirt-{parts["volatile"]}</label></seclabel>{parts["top"]}
</domain>"""


@pytest.fixture
def image(tmp_path):
    kernel, initramfs, root, verity = (os.urandom(n) for n in (5000, 3000, 8192, 4096))
    (tmp_path / "vmlinuz").write_bytes(kernel)
    (tmp_path / "initramfs").write_bytes(initramfs)
    (tmp_path / "root.img").write_bytes(root + verity)

    def part(name, file, offset, data):
        return Part(name, file, offset, len(data), hashlib.sha256(data).hexdigest())

    return Manifest(
        name="replica",
        role=Role.REPLICA,
        adversary=False,
        command_line="console=ttyS0 quiet",
        verity_root="00",
        parts=(
            part("kernel", "vmlinuz", 0, kernel),
            part("initramfs", "initramfs", 0, initramfs),
            part("root", "root.img", 0, root),
            part("verity", "root.img", 8192, verity),
        ),
        packages=(),
        lineage="debian-12",
    )


def measure(folder, manifest, **change):
    return measure_domain(ET.fromstring(xml(folder, **change)), manifest)


def test_what_matches_the_manifest_is_measured_and_its_channel_found(tmp_path, image):
    measured = measure(tmp_path, image)
    assert (measured.machine, measured.channel, measured.isolated) == (UUID, f"{tmp_path}/channel", True)
    assert measured.domain.startswith("sha256:")


@pytest.mark.parametrize(
    ("part", "file", "at"),
    [
        ("kernel", "vmlinuz", 0),
        ("initramfs", "initramfs", 2999),
        ("root", "root.img", 8191),
        ("verity", "root.img", 8192),
    ],
)
def test_a_flipped_byte_is_refused_naming_the_part(tmp_path, image, part, file, at):
    data = bytearray((tmp_path / file).read_bytes())
    data[at] ^= 1
    (tmp_path / file).write_bytes(data)
    with pytest.raises(BadError, match=f"^{part}: .*{file} has SHA-256"):
        measure(tmp_path, image)


@pytest.mark.parametrize(("part", "file"), [("kernel", "vmlinuz"), ("initramfs", "initramfs")])
def test_what_is_appended_to_kernel_or_initramfs_is_refused(tmp_path, image, part, file):
    with (tmp_path / file).open("ab") as out:
        out.write(b"x")
    with pytest.raises(BadError, match=f"^{part}: .* bytes"):
        measure(tmp_path, image)


def test_a_truncated_root_is_refused(tmp_path, image):
    os.truncate(tmp_path / "root.img", 10000)
    with pytest.raises(BadError, match=r"^verity: "):
        measure(tmp_path, image)


def test_a_missing_file_is_unknown_and_not_bad(tmp_path, image):
    (tmp_path / "vmlinuz").unlink()
    with pytest.raises(UnknownError, match=r"^kernel: cannot read"):
        measure(tmp_path, image)


def test_a_manifest_without_a_part_is_refused(tmp_path, image):
    with pytest.raises(BadError, match="no part 'verity'"):
        measure(tmp_path, replace(image, parts=image.parts[:3]))


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        ({"cmdline": "console=ttyS0 quiet init=/bin/sh"}, "^command line"),
        ({"readonly": ""}, "^root: disk vda is writable"),
        ({"vda_driver": "qcow2"}, "^root: disk vda is no raw file"),
        ({"vda_dev": "sda"}, "^root: the domain has 0 disks vda"),
        ({"os_extra": "<loader readonly='yes'>/x/OVMF.fd</loader>"}, r"boots by \['loader'\]"),
        ({"extra": "<hostdev mode='subsystem' type='pci'/>"}, "devices that no image expects: .'hostdev'"),
        ({"extra": "<filesystem type='mount'/>"}, "'filesystem'"),
        ({"extra": "<disk type='file'><target dev='vdc'/></disk>"}, "more than 2 disks"),
        ({"extra": f"<channel type='unix'><target name='{PORT_NAME}'/></channel>"}, "2 unix channels"),
        ({"mode": "connect"}, "not bound"),
        ({"top": "<sysinfo type='fwcfg'/>"}, "sysinfo"),
        ({"top": "<qemu:commandline><qemu:arg value='-kernel'/></qemu:commandline>"}, "passes arguments"),
    ],
)
def test_whatever_else_could_change_what_runs_is_refused(tmp_path, image, change, fact):
    with pytest.raises(BadError, match=fact):
        measure(tmp_path, image, **change)


def test_the_domain_digest_forgets_only_what_libvirt_assigns_at_each_start(tmp_path):
    def digest(**change):
        return canonical_digest(ET.fromstring(xml(tmp_path, **change)))

    assert digest() == digest(volatile="9")
    assert digest() == digest(state="disconnected")
    assert digest() != digest(cmdline="quiet")
    assert digest() != digest(readonly="")


def test_libvirt_that_is_no_libvirt_of_this_host_is_refused():
    for uri in ("qemu+ssh://root@other/system", "qemu://other/system", "esx://x/"):
        with pytest.raises(BadInputError, match="not a libvirt of this host"):
            live_xml(uri, UUID)


def test_live_definition_is_read_from_libvirt_and_an_unknown_domain_is_no_verdict():
    known = "6695eb01-f6a4-8304-79aa-97f2502e193f"  # the domain that libvirt's in-process test driver begins with
    assert known in live_xml("test:///default", known)
    with pytest.raises(PermanentError, match="no domain"):
        live_xml("test:///default", UUID)


def test_a_process_that_does_not_live_is_not_admitted():
    assert measure_process(os.getpid(), "/x").isolated is False
    gone = subprocess.Popen(["true"])
    gone.wait()
    with pytest.raises(UnknownError, match="does not run"):
        measure_process(gone.pid, "/x")
