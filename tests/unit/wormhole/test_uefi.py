"""Servers that boot by UEFI: the disk that firmware reads, what a guest wrote over it, and that there is one start."""

import asyncio
import hashlib
import os
import struct
import subprocess
import uuid
from xml.etree import ElementTree as ET

import libvirt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloudfit_orchestrator.model.errors import BadError, PermanentError, RefusedError, UnknownError
from cloudfit_orchestrator.model.image import Manifest, Part, Role, seal_manifest
from cloudfit_orchestrator.model.signing import public_bytes
from cloudfit_orchestrator.wormhole import nova, uefi
from cloudfit_orchestrator.wormhole.agent import Admission, MachineRef
from cloudfit_orchestrator.wormhole.host import HostAgent
from cloudfit_orchestrator.wormhole.identity import Identity
from tests.unit.wormhole.test_measure import UUID
from tests.unit.wormhole.test_nova import NOVA, SERIAL, SYSINFO, URI, Host, until

GLOBAL = uuid.UUID("8be4df61-93ca-11d2-aa0d-00e098032b8c")
OTHERS = uuid.UUID("d719b2cb-3d3a-4596-a3bc-dad00e67656f")
MARK = uuid.UUID("8108ac4e-9f11-4d59-850e-e21a522c59b2").bytes_le
END = struct.pack("<BBH", 0x7F, 0xFF, 4)
DEVICE = struct.pack("<BBHII", 2, 1, 12, 0x0A0341D0, 0)  # PciRoot(0)
IN_FIRMWARE = struct.pack("<BBH", 4, 6, 20) + bytes(16)
FILE = "\\EFI\\X.EFI\0".encode("utf-16-le")
ON_A_DISK = struct.pack("<BBH", 4, 4, 4 + len(FILE)) + FILE


def option(*path, data=b"", description="UEFI Misc Device"):
    nodes = b"".join((*path, END))
    return struct.pack("<IH", 1, len(nodes)) + (description + "\0").encode("utf-16-le") + nodes + data


def variables(*entries):
    """A file of variables as OVMF keeps them: (name, value, vendor, state)."""
    store = b""
    for name, value, *more in entries:
        vendor, state = (*more, GLOBAL, 0x3F)[:2] if len(more) != 1 else (more[0], 0x3F)
        label = (name + "\0").encode("utf-16-le")
        head = struct.pack("<HBBIQ16sIII", 0x55AA, state, 0, 7, 0, bytes(16), 0, len(label), len(value))
        store += head + vendor.bytes_le + label + value
        store += b"\xff" * (-len(store) % 4)
    head = bytes(40) + b"_FVH" + bytes(4) + struct.pack("<H", 72) + bytes(22)
    kind = uuid.UUID("aaf32c78-947b-439a-a180-2e144ec37792").bytes_le
    return head + kind + bytes(12) + store + b"\xff" * 4096


OWN = (
    ("BootOrder", b"\0\0\1\0"),
    ("Boot0000", option(IN_FIRMWARE, description="UiApp")),
    ("Boot0001", option(DEVICE, data=MARK)),
    ("BootNext", b"\1\0", GLOBAL, 0x3C),  # deleted
    ("DriverSettings", b"\0", OTHERS),  # another's namespace
)


@pytest.fixture
def manifest(tmp_path):
    """The image; beside it the server's files: base, overlay, firmware, variables."""
    content = {"esp": os.urandom(70_000), "root": os.urandom(200_000), "verity": os.urandom(8192), "gpt": bytes(20_480)}
    (tmp_path / "base").write_bytes(b"".join(content.values()))
    (tmp_path / "code.fd").write_bytes(b"firmware")
    (tmp_path / "vars.fd").write_bytes(variables(*OWN))
    overlay(tmp_path)
    files = {"esp": "boot.img", "gpt": "boot.img", "root": "root.img", "verity": "root.img"}
    offsets = {"esp": 0, "gpt": 70_000, "root": 0, "verity": 200_000}
    parts = tuple(
        Part(name, files[name], offsets[name], len(data), hashlib.sha256(data).hexdigest())
        for name, data in content.items()
    )
    return Manifest("replica", Role.REPLICA, False, "console=ttyS0", "00", parts, (), "debian-12")  # noqa: FBT003


def overlay(folder, *options):
    more = ("-o", ",".join(options)) if options else ()
    command = [
        "qemu-img",
        "create",
        "-q",
        "-f",
        "qcow2",
        *more,
        "-b",
        folder / "base",
        "-F",
        "raw",
        folder / "disk",
        "1M",
    ]
    subprocess.run(command, check=True)


def guest_does(folder, *commands):
    for command in commands:
        subprocess.run(["qemu-io", "-d", "unmap", "-c", command, folder / "disk"], check=True, capture_output=True)


def server(folder, start="3", **change):
    said = {
        "loader": f"<loader readonly='yes' secure='no' type='pflash'>{folder}/code.fd</loader>",
        "boot": "<boot dev='hd'/>",
        "disk": "disk",
        "os": "",
        "crash": "destroy",
        "extra": "",
    } | change
    return ET.fromstring(f"""<domain type='kvm' id='{start}'><name>instance-1</name><uuid>{UUID}</uuid>
  <metadata>{NOVA}{SYSINFO}
  <os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type>{said["loader"]}
    <nvram template='/usr/share/OVMF/OVMF_VARS_4M.fd'>{folder}/vars.fd</nvram>{said["boot"]}<smbios mode='sysinfo'/>
    {said["os"]}</os>
  <on_poweroff>destroy</on_poweroff><on_reboot>restart</on_reboot><on_crash>{said["crash"]}</on_crash>
  <devices><emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type='file' device='{said["disk"]}'><driver name='qemu' type='qcow2'/><source file='{folder}/disk'/>
      <backingStore type='file'><format type='raw'/><source file='{folder}/base'/><backingStore/></backingStore>
      <target dev='vda' bus='virtio'/></disk>{SERIAL}{said["extra"]}</devices></domain>""")


class UefiHost(Host):
    """Whose libvirt also keeps machines from starting again."""

    versions = (9_000_000, 7_002_000)

    def __init__(self, domain, folder):
        super().__init__(domain)
        self.folder = folder

    def connect(self):
        return self

    def getLibVersion(self):  # noqa: N802
        return self.versions[0]

    def getVersion(self):  # noqa: N802
        return self.versions[1]

    def setLifecycleAction(self, event, action, flags):  # noqa: N802
        assert (event, action) == (libvirt.VIR_DOMAIN_LIFECYCLE_REBOOT, libvirt.VIR_DOMAIN_LIFECYCLE_ACTION_DESTROY)
        assert flags == libvirt.VIR_DOMAIN_AFFECT_LIVE
        assert self.attached == 0 or self.domain.findtext("on_reboot") == "destroy", "too late"
        self.domain.find("on_reboot").text = "destroy"

    def attachDeviceFlags(self, text, flags):  # noqa: N802
        super().attachDeviceFlags(text, flags)
        self.domain.find("devices/channel/source").set("path", f"{self.folder}/channel")


@pytest.fixture
def host(tmp_path, monkeypatch, manifest):
    made = UefiHost(server(tmp_path), tmp_path)
    monkeypatch.setattr(libvirt, "open", made.open)
    monkeypatch.setattr(libvirt, "openReadOnly", made.open)
    return made


def test_a_server_is_measured_and_its_only_start_noted(host, tmp_path, manifest):
    measured = nova.measure_attached(URI, UUID, manifest)
    assert (measured.machine, measured.channel, measured.once) == (UUID, f"{tmp_path}/channel", "3")
    assert host.domain.findtext("on_reboot") == "destroy"
    assert nova.find_channel(URI, UUID, "3") == measured.channel
    for again in (server(tmp_path, "4"), host.domain):
        again.set("id", "4")
        host.domain = again
        with pytest.raises(BadError, match="was started again"):
            nova.find_channel(URI, UUID, "3")
    assert host.attached == 1


@pytest.mark.parametrize(("part", "offset"), [("esp", 0), ("esp", 69_999), ("root", 70_000), ("verity", 270_000),
                                              ("verity", 278_191), ("gpt", 298_671)])  # fmt: skip
def test_a_flipped_byte_of_the_disk_is_refused_by_name(host, tmp_path, manifest, part, offset):
    data = bytearray((tmp_path / "base").read_bytes())
    data[offset] ^= 1
    (tmp_path / "base").write_bytes(data)
    with pytest.raises(BadError, match=f"^{part}: .* has SHA-256"):
        nova.measure_attached(URI, UUID, manifest)
    assert host.attached == 0


@pytest.mark.parametrize(("part", "offset"), [("esp", 0), ("root", 131_072), ("verity", 270_336)])
def test_what_a_guest_wrote_over_its_disk_is_refused_by_name_and_stays_so(host, tmp_path, manifest, part, offset):
    nova.measure_attached(URI, UUID, manifest)
    block = offset // 65536 * 65536
    before = (tmp_path / "base").read_bytes()[offset : offset + 512]
    for commands in ([f"write -P 7 {offset} 512"], [f"discard {block} 64k"], [f"write -z -u {block} 64k"]):
        guest_does(tmp_path, *commands)
        with pytest.raises(BadError, match="the guest wrote over its disk at") as refused:
            nova.measure_attached(URI, UUID, manifest)
    (tmp_path / "same").write_bytes(before)
    guest_does(tmp_path, f"write -s {tmp_path}/same {offset} 512")
    with pytest.raises(BadError, match="the guest wrote over its disk"):
        nova.measure_attached(URI, UUID, manifest)
    named = "root" if part == "verity" else part  # the block's first byte is still the root's
    assert refused.value.fact.startswith(f"{named}: ")


def test_what_a_guest_wrote_behind_the_image_is_its_own(host, tmp_path, manifest):
    guest_does(tmp_path, "write -P 7 524288 65536")
    nova.measure_attached(URI, UUID, manifest)
    assert host.attached == 1


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"loader": "<loader type='rom'>/x</loader>"}, "firmware: the loader is no read-only flash"),
        ({"loader": "<loader readonly='no' type='pflash'>/x</loader>"}, "firmware: the loader is no read-only flash"),
        ({"boot": "<boot dev='network'/><boot dev='hd'/>"}, "something else than the first disk"),
        ({"boot": ""}, "something else than the first disk"),
        ({"extra": "<rng><boot order='1'/></rng>"}, "something else than the first disk"),
        ({"disk": "cdrom"}, "a medium that firmware could boot"),
        ({"os": "<cmdline>init=/bin/sh</cmdline>"}, "boots by .*cmdline"),
        ({"os": "<kernel>/x</kernel>"}, "boots by .*loader"),
        ({"crash": "restart"}, "on_crash is not destroy"),
    ],
)
def test_what_could_boot_otherwise_is_refused(host, tmp_path, manifest, change, why):
    host.domain = server(tmp_path, **change)
    with pytest.raises(BadError, match=why):
        nova.measure_attached(URI, UUID, manifest)
    assert host.attached == 0


def test_files_of_another_kind_are_refused(host, tmp_path, manifest):
    def refused(why, error=BadError):
        with pytest.raises(error, match=why):
            nova.measure_attached(URI, UUID, manifest)

    host.versions = (7_000_000, 7_002_000)
    refused("cannot keep it from starting again", PermanentError)
    host.versions = UefiHost.versions
    (tmp_path / "code.fd").chmod(0o666)
    refused("firmware: .* can be written by others")
    (tmp_path / "code.fd").unlink()
    refused("firmware: cannot look", UnknownError)
    (tmp_path / "code.fd").touch(0o644)
    (tmp_path / "vars.fd").write_bytes(bytes(100))
    refused("firmware variables: .* not known here")
    (tmp_path / "vars.fd").unlink()
    refused("cannot read .*vars.fd", UnknownError)
    (tmp_path / "vars.fd").write_bytes(variables(*OWN))
    overlay(tmp_path, "extended_l2=on")
    refused("qcow2 features 0x10")
    (tmp_path / "disk").write_bytes(b"QFI\xfb" + bytes(20))
    refused("cut short or damaged")
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    refused("no plain qcow2")
    overlay(tmp_path)
    with (tmp_path / "base").open("ab") as file:
        file.write(b"more")
    refused("gpt: .* has more than")
    host.domain.find("devices/disk/driver").set("type", "raw")
    host.domain.find("devices/disk").remove(host.domain.find("devices/disk/backingStore"))
    refused("images_type = qcow2")
    assert host.domain.findtext("on_reboot") == "restart", "what is not admitted is let be"


def test_an_image_without_a_disk_is_not_booted_by_uefi(host, manifest):
    parts = tuple(p for p in manifest.parts if p.file == "root.img")
    with pytest.raises(BadError, match="esp: image replica has no disk that UEFI boots"):
        nova.measure_attached(URI, UUID, Manifest("replica", Role.REPLICA, False, "x", "00", parts, (), "d"))  # noqa: FBT003


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        (("BootNext", b"\1\0"), "there is BootNext"),
        (("Driver0000", option(DEVICE)), "there is Driver0000"),
        (("SysPrepOrder", b"\0\0"), "there is SysPrepOrder"),
        (("BootNext", b"\1\0", GLOBAL, 0x3E), "there is BootNext"),
        (("Boot0007", option(DEVICE, data=b"c\0m\0d\0")), "Boot0007 gives what it boots words"),
        (("Boot0007", option(DEVICE, ON_A_DISK)), "Boot0007 names a file"),
        (("Boot0007", option(DEVICE, struct.pack("<BBH", 3, 24, 8) + b"evil")), "Boot0007 names a file"),
        (("Boot0007", option(struct.pack("<BBH", 5, 1, 4))), "Boot0007 has a device path with a part of kind 5.1"),
        (("Boot0007", option(struct.pack("<BBH", 1, 1, 0))), "Boot0007 has a device path with a part of kind 1.1"),
    ],
)
def test_a_variable_that_would_boot_something_else_is_refused(tmp_path, entry, why):
    path = tmp_path / "vars.fd"
    path.write_bytes(variables(*OWN))
    uefi.check_variables(str(path))
    path.write_bytes(variables(*OWN, entry))
    with pytest.raises(BadError, match=f"firmware variables: {why}"):
        uefi.check_variables(str(path))


def test_no_bytes_of_a_guest_break_the_reader_of_variables(tmp_path):
    path, good = tmp_path / "vars.fd", variables(*OWN)[:700]
    for at in range(len(good)):
        for data in (good[:at], good[:at] + b"\xff\xff" + good[at + 2 :], good[:at] + b"\0\0" + good[at + 2 :]):
            path.write_bytes(data)
            try:
                uefi.check_variables(str(path))
            except BadError:
                continue


def test_a_guest_that_is_started_again_is_lost_for_good(host, tmp_path, manifest):
    async def run():
        connections = []

        async def guest(_reader, writer):
            connections.append(writer)

        listening = await asyncio.start_unix_server(guest, tmp_path / "channel")
        key = Ed25519PrivateKey.generate()
        agent = HostAgent("a", Ed25519PrivateKey.generate(), controller_keys=[], image_keys=[public_bytes(key)])
        who, machine = Identity("ledger", "r0", 1), MachineRef("libvirt", uri=URI, uuid=UUID)
        order = Admission(who, Role.REPLICA, machine, seal_manifest(manifest, key), False, 1000.0, {})  # noqa: FBT003
        try:
            await agent.admit(order)
            agent.table.prepare(who, 1)
            await until(lambda: agent.status()["guests"][0]["connected"])
            connections[-1].close()  # of the same start: it is measured again, and served
            await until(lambda: len(connections) == 2 and agent.status()["guests"][0]["connected"])
            assert agent.status()["guests"][0]["lost"] == ""
            host.domain = server(tmp_path, "4")
            connections[-1].close()
            await until(lambda: agent.status()["guests"][0]["lost"])
            assert "was started again" in agent.status()["guests"][0]["lost"]
            assert [e["state"] for e in agent.status()["guests"][0]["epochs"]] == ["ended"]
            with pytest.raises(RefusedError, match="lost to this host"):
                agent.table.prepare(who, 2)
            assert (len(connections), host.attached) == (2, 1)
        finally:
            listening.close()
            await agent.stop()

    asyncio.run(run())
