"""Measures what really boots: the live definition of a machine, and the files that it names, against a signed manifest.

The files are taken from the live domain, never from what the caller says. Whatever else in a domain could change what
runs (firmware, further disks, passed-through devices, QEMU arguments) is refused. Checked here is what stands in the
files now: that nobody but the host's root, who is trusted, writes to them between QEMU's start and now is assumed.
"""

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit
from xml.etree import ElementTree as ET  # the XML comes from the host's libvirt, which is trusted

from cloudfit_orchestrator.model.channel import PORT_NAME
from cloudfit_orchestrator.model.errors import BadError, BadInputError, PermanentError, TemporaryError, UnknownError
from cloudfit_orchestrator.model.image import Manifest, Part
from cloudfit_orchestrator.model.one_disk import Carried, carried
from cloudfit_orchestrator.wormhole import uefi

CHUNK_BYTES = 4 << 20
NO_IMAGE = "sha256:" + "0" * 64  # of a process that was admitted without a manifest
# Devices that cannot change what a directly booted, verity-checked root runs.
_DEVICES = frozenset(
    {"emulator", "disk", "controller", "interface", "serial", "console", "channel", "rng"}
) | frozenset({"memballoon", "input", "audio", "video", "watchdog", "panic", "tpm"})
_OS = frozenset({"type", "kernel", "initrd", "cmdline", "boot", "bios"})
# What Nova adds to each domain: a screen, and the names of maker and product that the firmware shows. Other sysinfo
# (OEM strings, fw_cfg) can carry orders to a guest's first process, and is refused.
_NOVA_DEVICES = frozenset({"graphics"})
_NOVA_OS = frozenset({"smbios"})
_UEFI_OS = frozenset({"type", "loader", "nvram", "boot", "smbios"})
_ENDS = ("on_poweroff", "on_reboot", "on_crash")  # of a hypervisor's process: what follows on each
_NOVA = "metadata/{*}instance"
_NOVA_SPACE = "{http://openstack.org/xmlns/libvirt/nova/"
_VOLATILE = ("seclabel", "metadata", "resource")  # host state, and the driver's own notes, which nothing runs by
_VOLATILE_ATTRIBUTES = {
    "domain": ("id",),
    "target": ("state",),  # of the channel: whether a guest has it open
    "source": ("index",),
    "backingStore": ("index",),
    "console": ("tty",),
}
_MAX_DISKS = 2
_OURS = f"devices/channel/target[@name='{PORT_NAME}']/.."


@dataclass(frozen=True, slots=True)
class Measured:
    """What a machine is. `channel`: the unix socket at whose other end is this machine and no other."""

    machine: str
    domain: str  # sha256:… of the canonical definition
    channel: str
    isolated: bool
    nova: bool = False  # a server of Nova's: its channel was attached by an agent, and goes with each hard reboot
    once: str = ""  # of a machine that starts once, because its guest writes to what it boots from: which start it is


def measure_process(pid: int, socket: str) -> Measured:
    """A local process: nothing is measured but that it lives."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError as error:
        raise UnknownError(f"process {pid} does not run", next_command="start it and admit it again") from error
    except PermissionError:
        pass  # it lives, under another user
    return Measured(f"process-{pid}", NO_IMAGE, socket, isolated=False)


def measure_libvirt(uri: str, uuid: str, manifest: Manifest) -> Measured:
    """Measure a running or paused domain. Raises BadError naming the part that differs; UnknownError if unreachable."""
    return measure_domain(live_definition(uri, uuid), manifest)


def live_definition(uri: str, uuid: str) -> ET.Element:
    """`live_xml`, parsed."""
    return ET.fromstring(live_xml(uri, uuid))  # noqa: S314  see the import


def live_xml(uri: str, uuid: str) -> str:
    """The live XML of a domain of this host."""
    with running(uri, uuid) as domain:
        return str(domain.XMLDesc(0))


@contextlib.contextmanager
def running(uri: str, uuid: str, *, write: bool = False) -> Iterator[Any]:
    """The running or paused `libvirt.virDomain`; libvirt's errors become ours."""
    # Here and not above, so that an agent for local processes needs no libvirt.
    import libvirt  # noqa: PLC0415

    check_local(uri)
    libvirt.registerErrorHandler(lambda _context, _error: None, None)
    try:
        connection = libvirt.open(uri) if write else libvirt.openReadOnly(uri)
    except libvirt.libvirtError as error:
        raise TemporaryError(f"libvirt at {uri} does not answer: {error}", next_command="start libvirtd") from error
    try:
        domain = connection.lookupByUUIDString(uuid)
        if not domain.isActive():
            raise UnknownError(f"domain {uuid} at {uri} does not run", next_command="start it and admit it again")
        yield domain
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
            raise PermanentError(f"there is no domain {uuid} at {uri}") from error
        raise TemporaryError(f"domain {uuid} at {uri}: {error}") from error
    finally:
        connection.close()


def check_local(uri: str) -> None:
    """Raise BadInputError unless the URI is a libvirt of this host: a standard one, or one at a socket of root's.

    A socket of anybody else's could answer with any definition.
    """
    parts = urlsplit(uri)
    query = parse_qsl(parts.query, keep_blank_values=True)
    local = not parts.netloc and parts.path in ("/system", "/session", "/default")
    if local and parts.scheme == "qemu+unix" and [name for name, _ in query] == ["socket"]:
        path = Path(query[0][1])
        if path.is_absolute() and (not path.exists() or path.stat().st_uid in (0, os.geteuid())):
            return
    elif local and "+" not in parts.scheme and not query and not parts.fragment:
        return
    raise BadInputError(
        f"{uri!r} is not a libvirt of this host",
        next_command="give the agent's own URI: qemu:///system, or qemu+unix:///system?socket=PATH, PATH being root's",
    )


def measure_domain(domain: ET.Element, manifest: Manifest) -> Measured:
    """Compare a live domain definition, and the files it names, with the manifest."""
    check_boot(domain, manifest)
    channel = channel_of(domain)
    if channel is None:
        raise BadError(f"domain definition: has no unix channel {PORT_NAME}")
    return Measured(
        domain.findtext("uuid") or "",
        canonical_digest(domain),
        channel,
        isolated=True,
        nova=is_nova(domain),
        once=domain.get("id", "") if by_uefi(domain) else "",
    )


def is_nova(domain: ET.Element) -> bool:
    """Whether Nova made the domain."""
    found = domain.find(_NOVA)
    return found is not None and found.tag.startswith(_NOVA_SPACE)


def by_uefi(domain: ET.Element) -> bool:
    """Whether a server of Nova's boots by UEFI from its own disk, which its guest writes to."""
    return is_nova(domain) and domain.find("os/loader") is not None and domain.find("os/kernel") is None


def check_boot(domain: ET.Element, manifest: Manifest, *, may_reset: bool = False) -> None:
    """Everything but the channel. Raises BadError naming the part that differs.

    `may_reset`: one that starts once only may still be reset so far; its agent is about to end that.
    """
    _check_shape(domain)
    if by_uefi(domain):
        ends = [tag for tag in _ENDS if domain.findtext(tag) != "destroy"]
        if set(ends) - ({"on_reboot"} if may_reset else set()):
            raise BadError(
                f"domain definition: {ends[-1]} is not destroy: it would start again, from what its guest wrote"
            )
        _check_uefi(domain, manifest)
        return
    command_line = domain.findtext("os/cmdline") or ""
    if command_line != manifest.command_line:
        raise BadError(
            f"command line of the domain is {command_line!r:.300}, the manifest says {manifest.command_line!r:.300}"
        )
    root = _nova_disk(domain)[0] if is_nova(domain) else _root_disk(domain)
    initramfs = _boot_file(domain, "initramfs", "initrd")
    _check_part(manifest.part("kernel"), _boot_file(domain, "kernel", "kernel"), whole=True)
    layout = carried(manifest)
    if is_nova(domain) and _size(initramfs) == layout.size:  # then nothing of the disk runs, whatever it holds
        _check_carried(manifest, initramfs, layout)
        return
    _check_part(manifest.part("initramfs"), initramfs, whole=True)
    for name in ("root", "verity"):
        _check_part(manifest.part(name), root, whole=False)  # beyond them dm-verity reads nothing


def _boot_file(domain: ET.Element, part: str, tag: str) -> str:
    path = domain.findtext(f"os/{tag}")
    if not path:
        raise BadError(f"{part}: the domain boots none directly")
    return path


def canonical_digest(domain: ET.Element) -> str:
    """`sha256:` of the definition without what libvirt assigns at each start."""
    copy = ET.fromstring(ET.tostring(domain))  # noqa: S314
    if is_nova(copy):
        devices = copy.find("devices")
        for child in copy.findall(_OURS):
            assert devices is not None
            devices.remove(child)  # attached while it runs: the path is another at each start
    for tag in _VOLATILE:
        for child in copy.findall(tag):
            copy.remove(child)
    for parent in copy.iter():
        for child in list(parent):
            if child.tag == "alias" or (parent.tag == "interface" and child.tag == "target"):
                parent.remove(child)
    for element in copy.iter():
        for name in _VOLATILE_ATTRIBUTES.get(element.tag, ()):
            element.attrib.pop(name, None)
    for source in copy.iterfind("devices/*[@type='pty']/source"):
        source.attrib.pop("path", None)
    text = ET.canonicalize(ET.tostring(copy, encoding="unicode"), strip_text=True)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def _check_shape(domain: ET.Element) -> None:
    nova = is_nova(domain)
    foreign = [child.tag for child in domain if child.tag.startswith("{")]
    if foreign:
        raise BadError(f"domain definition: {foreign[0]} passes arguments to the hypervisor")
    if (domain.find("os") is None) or (
        extra := {child.tag for child in domain.iterfind("os/*")}
        - (_UEFI_OS if by_uefi(domain) else _OS | _NOVA_OS if nova else _OS)
    ):
        raise BadError(
            f"domain definition: boots by {sorted(extra) if domain.find('os') is not None else 'no os element'}"
        )
    for sysinfo in domain.findall("sysinfo"):
        if not nova or sysinfo.get("type") != "smbios" or {child.tag for child in sysinfo} != {"system"}:
            raise BadError("domain definition: has a sysinfo element")
    devices = {child.tag for child in domain.iterfind("devices/*")} - (_NOVA_DEVICES if nova else frozenset())
    if devices - _DEVICES:
        raise BadError(f"domain definition: has devices that no image expects: {sorted(devices - _DEVICES)}")
    if domain.find("devices/*/rom[@file]") is not None:
        raise BadError("domain definition: a device has an option ROM of its own, which would run before the kernel")
    if len(domain.findall("devices/disk")) > _MAX_DISKS:
        raise BadError(f"domain definition: has more than {_MAX_DISKS} disks")


def _root_disk(domain: ET.Element) -> str:
    disks = [disk for disk in domain.iterfind("devices/disk") if _attribute(disk, "target", "dev") == "vda"]
    if len(disks) != 1:
        raise BadError(f"root: the domain has {len(disks)} disks vda")
    disk = disks[0]
    source = _attribute(disk, "source", "file")
    if disk.get("type") != "file" or _attribute(disk, "driver", "type") != "raw" or not source:
        raise BadError("root: disk vda is no raw file")
    if disk.find("readonly") is None:
        raise BadError("root: disk vda is writable")
    return source


def _check_uefi(domain: ET.Element, manifest: Manifest) -> None:
    """What firmware boots: the disk that the manifest says, which nobody wrote over before this start, and it alone."""
    if not manifest.disk:
        raise BadError(f"esp: image {manifest.name} has no disk that UEFI boots", next_command="cloudfit image build")
    if [boot.get("dev") for boot in domain.iterfind("os/boot")] != ["hd"] or domain.find("devices/*/boot") is not None:
        raise BadError("domain definition: firmware is to boot something else than the first disk")
    if any(disk.get("device", "disk") != "disk" for disk in domain.iterfind("devices/disk")):
        raise BadError("domain definition: has a medium that firmware could boot")
    _check_firmware(domain)
    base, overlay = _nova_disk(domain)
    if overlay is None:
        raise BadError("root: disk vda has no base, so its guest writes over it: nova.conf needs images_type = qcow2")
    offset = 0
    for part in manifest.disk:
        _check_part(replace(part, offset=offset), base, whole=False)
        offset += part.size
    if Path(base).stat().st_size != offset:
        raise BadError(f"gpt: {base} has more than the {offset} bytes of the image")
    own = uefi.own_block(overlay, offset)
    if own is not None:
        ends = [sum(p.size for p in manifest.disk[: i + 1]) for i in range(len(manifest.disk))]
        name = next(p.name for p, end in zip(manifest.disk, ends, strict=True) if own < end)
        raise BadError(f"{name}: the guest wrote over its disk at {own}: what it booted from is not the image any more")


def _check_firmware(domain: ET.Element) -> None:
    loader = domain.find("os/loader")
    assert loader is not None
    if loader.get("type") != "pflash" or loader.get("readonly") != "yes" or not loader.text:
        raise BadError("firmware: the loader is no read-only flash")
    try:
        status = Path(loader.text).stat()
    except OSError as error:
        raise UnknownError(f"firmware: cannot look at {loader.text}: {error.strerror}") from error
    if status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o022:
        raise BadError(f"firmware: {loader.text} can be written by others than root")
    uefi.check_variables(domain.findtext("os/nvram") or "")


def _nova_disk(domain: ET.Element) -> tuple[str, str | None]:
    """The file with what Nova copied from Glance, and the overlay above it; or its raw disk, with no overlay.

    With direct kernel boot what the guest wrote above the base is not measured: dm-verity, whose root hash stands in
    the command line, reads nothing that differs. So there the comparison only tells early that a server boots an image
    that cannot work.
    """
    disks = [disk for disk in domain.iterfind("devices/disk") if _attribute(disk, "target", "dev") == "vda"]
    if len(disks) != 1:
        raise BadError(f"root: the server has {len(disks)} disks vda")
    disk = disks[0]
    base = disk.find("backingStore")
    backed = base is not None and base.find("source") is not None
    kind, overlay = _attribute(disk, "driver", "type"), None
    if disk.get("type") == "file" and kind == "raw" and not backed:
        path = _attribute(disk, "source", "file")
    elif disk.get("type") == "file" and kind == "qcow2" and base is not None and backed:
        if base.get("type") != "file" or _attribute(base, "format", "type") != "raw":
            raise BadError("root: the base of disk vda is no raw file: nova.conf needs force_raw_images = true")
        if base.find("backingStore/source") is not None:
            raise BadError("root: the base of disk vda stands on a further file")
        path, overlay = _attribute(base, "source", "file"), _attribute(disk, "source", "file") or ""
    else:
        raise BadError(
            "root: disk vda is neither a raw file nor an overlay: nova.conf needs images_type = qcow2 or raw"
        )
    if not path:
        raise BadError("root: disk vda names no file")
    return path, overlay


def channel_of(domain: ET.Element) -> str | None:
    """The socket of our channel; None if the domain has no such channel. Raises BadError if it is of another shape."""
    channels = domain.findall(_OURS)
    if not channels:
        return None
    if len(channels) != 1 or channels[0].get("type") != "unix":
        raise BadError(f"domain definition: has {len(channels)} unix channels {PORT_NAME}")
    path = _attribute(channels[0], "source", "path")
    if _attribute(channels[0], "source", "mode") != "bind" or not path:
        raise BadError(f"domain definition: channel {PORT_NAME} is not bound to a unix socket")
    return path


def _attribute(element: ET.Element, child: str, name: str) -> str | None:
    found = element.find(child)
    return None if found is None else found.get(name)


def _size(path: str) -> int:
    try:
        return Path(path).stat().st_size
    except OSError as error:
        raise UnknownError(f"initramfs: cannot read {path}: {error.strerror}") from error


def _check_carried(manifest: Manifest, path: str, layout: Carried) -> None:
    """Every byte of an initramfs that carries the root: the parts, and what the manifest says stands between them."""
    for name, offset in (
        ("root", layout.root_offset),
        ("verity", layout.root_offset),
        ("initramfs", layout.initramfs_offset),
    ):
        part = manifest.part(name)
        _check_part(replace(part, offset=offset + part.offset), path, whole=False)
    try:
        with Path(path).open("rb") as file:
            head = file.read(len(layout.head))
            file.seek(layout.root_offset + layout.root_size)
            tail = file.read(len(layout.tail))
    except OSError as error:
        raise UnknownError(f"initramfs: cannot read {path}: {error.strerror}") from error
    if (head, tail) != (layout.head, layout.tail):
        raise BadError(f"initramfs: {path} has other bytes about the root than an archive of it has")


def _check_part(part: Part, path: str, *, whole: bool) -> None:
    """`whole`: the part must be the whole file, for what is appended to it would run as well."""
    try:
        with Path(path).open("rb") as file:
            status: Any = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise BadError(f"{part.name}: {path} is no regular file")
            if status.st_size < part.offset + part.size or (whole and (part.offset, part.size) != (0, status.st_size)):
                raise BadError(
                    f"{part.name}: {path} has {status.st_size} bytes, the manifest says {part.size} at {part.offset}"
                )
            digest = _hash(file, part)
    except OSError as error:
        raise UnknownError(f"{part.name}: cannot read {path}: {error.strerror}") from error
    if digest != part.sha256:
        raise BadError(f"{part.name}: {path} has SHA-256 {digest}, the manifest says {part.sha256}")


def _hash(file: Any, part: Part) -> str:
    digest = hashlib.sha256()
    file.seek(part.offset)
    left = part.size
    while left > 0 and (chunk := file.read(min(left, CHUNK_BYTES))):
        digest.update(chunk)
        left -= len(chunk)
    return digest.hexdigest()
