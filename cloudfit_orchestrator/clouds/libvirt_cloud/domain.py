"""Domain XML: what a machine of ours looks like to libvirt, and what libvirt's XML says of a machine."""

import uuid
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

from cloudfit_orchestrator.clouds.base import MachineSpec, Ownership
from cloudfit_orchestrator.model.channel import PORT_NAME
from cloudfit_orchestrator.model.errors import BadInputError

NAMESPACE = "https://cloudfit.dev/xmlns/machine/1"
_TAG = f"{{{NAMESPACE}}}machine"
_UUIDS = uuid.UUID("6f0e1f5b-6d2e-5c0e-9d9b-1a5f3c1f7a52")  # namespace of our deterministic UUIDs
ROOT_PORTS = 8  # PCIe: three disks, card, serial, entropy; the rest is free for what is attached while it runs
ROOT_TARGET, STATE_TARGET, DRIVE_TARGET = "vda", "vdb", "vdc"
ET.register_namespace("cloudfit", NAMESPACE)


@dataclass(frozen=True, slots=True)
class Files:
    """Paths of a machine's files on the host."""

    kernel: Path
    initramfs: Path
    root: Path
    channel: Path
    console: Path


@dataclass(frozen=True, slots=True)
class Disk:
    """A disk as libvirt wants it named: file and format, and the files below it, nearest first."""

    path: Path
    format: str
    backing: tuple[tuple[Path, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Host:
    """What the host decides about every machine."""

    domain_type: str  # kvm | qemu | test
    label: str | None  # "+uid:+gid" that QEMU runs as, or None if it runs as we do
    emulated_console: bool = True


def machine_uuid(owner: Ownership) -> str:
    """The machine's libvirt UUID: derived, so that two creations at once cannot make two machines."""
    return str(uuid.uuid5(_UUIDS, owner.key))


def mac(owner: Ownership) -> str:
    """The machine's MAC address: 40 bits of its key below a locally administered unicast byte."""
    return "06:" + ":".join(owner.key[i : i + 2] for i in range(0, 10, 2))


def domain_xml(
    spec: MachineSpec, host: Host, files: Files, second: Disk | None, network: str | None, drive: Disk | None = None
) -> str:
    """The domain definition. `second`: the disk behind /dev/vdb; `network`: libvirt's name of the machine's network;
    `drive`: the config drive.
    """
    owner = spec.owner
    domain = ET.Element("domain", type=host.domain_type)
    _text(domain, "name", owner.name)
    _text(domain, "uuid", machine_uuid(owner))
    metadata = ET.SubElement(domain, "metadata")
    ET.SubElement(metadata, _TAG, {**owner.tags(), "fingerprint": spec.fingerprint})
    _text(domain, "memory", str(spec.memory_mib), unit="MiB")
    _text(domain, "vcpu", str(spec.cpus))
    boot = ET.SubElement(domain, "os")
    if host.domain_type == "test":
        _text(boot, "type", "hvm")
    else:
        _text(boot, "type", "hvm", arch="x86_64", machine="q35")
    _text(boot, "kernel", str(files.kernel))
    _text(boot, "initrd", str(files.initramfs))
    _text(boot, "cmdline", spec.manifest.command_line)
    features = ET.SubElement(domain, "features")
    ET.SubElement(features, "acpi")
    ET.SubElement(features, "apic")
    if host.domain_type == "kvm":
        ET.SubElement(domain, "cpu", mode="host-passthrough", migratable="off")
    elif host.domain_type == "qemu":
        ET.SubElement(domain, "cpu", mode="maximum")
    ET.SubElement(domain, "clock", offset="utc")
    _text(domain, "on_poweroff", "destroy")
    _text(domain, "on_reboot", "restart")  # QEMU boots the same kernel bytes again, those it holds in memory
    _text(domain, "on_crash", "destroy")
    domain.append(_devices(spec, files, second, network, drive))
    if host.label is not None:
        # Static and without relabelling: libvirt would else hand kernel and root image to the user that QEMU runs as,
        # and an intruder who leaves the guest could write to what other machines boot.
        label = ET.SubElement(domain, "seclabel", type="static", model="dac", relabel="no")
        _text(label, "label", host.label)
    return ET.tostring(domain, "unicode")


def _devices(
    spec: MachineSpec, files: Files, second: Disk | None, network: str | None, drive: Disk | None
) -> ET.Element:
    devices = ET.Element("devices")
    ET.SubElement(devices, "controller", type="usb", model="none")
    ET.SubElement(devices, "controller", type="pci", index="0", model="pcie-root")
    for _ in range(ROOT_PORTS):
        ET.SubElement(devices, "controller", type="pci", model="pcie-root-port")
    root = _disk(Disk(files.root, "raw"), ROOT_TARGET)
    ET.SubElement(root, "readonly")
    ET.SubElement(root, "shareable")
    devices.append(root)
    if second is not None:
        devices.append(_disk(second, STATE_TARGET))
    if drive is not None:
        third = _disk(drive, DRIVE_TARGET)
        ET.SubElement(third, "readonly")
        devices.append(third)
    if network is not None:
        card = ET.SubElement(devices, "interface", type="network")
        ET.SubElement(card, "mac", address=mac(spec.owner))
        ET.SubElement(card, "source", network=network)
        ET.SubElement(card, "model", type="virtio")
    if drive is None:  # else the agent is inside: nobody would listen
        channel = ET.SubElement(devices, "channel", type="unix")
        ET.SubElement(channel, "source", mode="bind", path=str(files.channel))
        ET.SubElement(channel, "target", type="virtio", name=PORT_NAME)
    serial = ET.SubElement(devices, "serial", type="file")
    ET.SubElement(serial, "source", path=str(files.console), append="on")
    ET.SubElement(serial, "target", port="0")
    entropy = ET.SubElement(devices, "rng", model="virtio")
    _text(entropy, "backend", "/dev/urandom", model="random")
    ET.SubElement(devices, "memballoon", model="none")
    return devices


def _disk(disk: Disk, target: str) -> ET.Element:
    element = ET.Element("disk", type="file", device="disk")
    driver = {"name": "qemu", "type": disk.format}
    if target == STATE_TARGET:
        driver |= {"cache": "writeback", "discard": "unmap"}  # the guest's flush reaches the host's disk
    ET.SubElement(element, "driver", driver)
    ET.SubElement(element, "source", file=str(disk.path))
    below = element
    for path, form in disk.backing:
        below = ET.SubElement(below, "backingStore", type="file")
        ET.SubElement(below, "format", type=form)
        ET.SubElement(below, "source", file=str(path))
    if disk.format == "qcow2":
        ET.SubElement(below, "backingStore")  # the chain ends here: libvirt must not guess formats from guests' bytes
    ET.SubElement(element, "target", dev=target, bus="virtio")
    return element


def disk_xml(disk: Disk) -> str:
    """`/dev/vdb` for attachment to a machine that runs."""
    return ET.tostring(_disk(disk, STATE_TARGET), "unicode")


def snapshot_xml(overlay: Path, *, drive: bool = False) -> str:
    """Move `/dev/vdb` on top of the prepared `overlay`, leave every other disk alone, the config `drive` too."""
    snapshot = ET.Element("domainsnapshot")
    disks = ET.SubElement(snapshot, "disks")
    ET.SubElement(disks, "disk", name=ROOT_TARGET, snapshot="no")
    if drive:
        ET.SubElement(disks, "disk", name=DRIVE_TARGET, snapshot="no")
    disk = ET.SubElement(disks, "disk", name=STATE_TARGET, snapshot="external", type="file")
    ET.SubElement(disk, "driver", type="qcow2")
    ET.SubElement(disk, "source", file=str(overlay))
    return ET.tostring(snapshot, "unicode")


@dataclass(frozen=True, slots=True)
class Seen:
    """What a domain's XML says."""

    name: str
    uuid: str
    owner: Ownership | None  # None: not ours, or its tag set is incomplete
    fingerprint: str
    channel: Path | None
    console: Path | None
    state_disk: Disk | None
    sources: frozenset[Path]  # of all its disks, with the files below them
    networks: frozenset[str]
    drive: bool = False  # has a config drive


def read_domain(xml: str) -> Seen:
    """Read a domain definition; whatever a stranger's lacks is None or empty."""
    domain = ET.fromstring(xml)  # noqa: S314  from the daemon that runs our machines
    tag = domain.find(f"metadata/{_TAG}")
    owner = None
    if tag is not None:
        try:
            owner = Ownership.from_tags(tag.attrib)
        except BadInputError:
            owner = None
    channel = next(
        (
            c.find("source")
            for c in domain.iterfind("devices/channel[@type='unix']")
            if c.find(f"target[@name='{PORT_NAME}']") is not None
        ),
        None,
    )
    console = domain.find("devices/serial[@type='file']/source")
    state = domain.find(f"devices/disk/target[@dev='{STATE_TARGET}']/..")
    return Seen(
        name=domain.findtext("name", ""),
        uuid=domain.findtext("uuid", ""),
        owner=owner,
        fingerprint=tag.get("fingerprint", "") if tag is not None else "",
        channel=_path(channel, "path"),
        console=_path(console, "path"),
        state_disk=None if state is None else _read_disk(state),
        sources=frozenset(
            Path(s.attrib["file"]) for s in domain.iterfind("devices/disk//source") if "file" in s.attrib
        ),
        networks=frozenset(
            s.attrib["network"] for s in domain.iterfind("devices/interface/source") if "network" in s.attrib
        ),
        drive=domain.find(f"devices/disk/target[@dev='{DRIVE_TARGET}']") is not None,
    )


def _read_disk(element: ET.Element) -> Disk | None:
    driver, source = element.find("driver"), element.find("source")
    path = _path(source, "file")
    if path is None:
        return None
    return Disk(path, driver.get("type", "raw") if driver is not None else "raw")


def _path(element: ET.Element | None, attribute: str) -> Path | None:
    value = None if element is None else element.get(attribute)
    return Path(value) if value else None


def _text(parent: ET.Element, tag: str, text: str, **attributes: str) -> ET.Element:
    element = ET.SubElement(parent, tag, attributes)
    element.text = text
    return element
