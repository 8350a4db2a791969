"""Measures what really boots: the live definition of a machine, and the files that it names, against a signed manifest.

The files are taken from the live domain, never from what the caller says. Whatever else in a domain could change what
runs (firmware, further disks, passed-through devices, QEMU arguments) is refused. Checked here is what stands in the
files now: that nobody but the host's root, who is trusted, writes to them between QEMU's start and now is assumed.
"""

import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET  # the XML comes from the host's libvirt, which is trusted

from cloudfit_orchestrator.model.channel import PORT_NAME
from cloudfit_orchestrator.model.errors import BadError, BadInputError, PermanentError, TemporaryError, UnknownError
from cloudfit_orchestrator.model.image import Manifest, Part

CHUNK_BYTES = 4 << 20
NO_IMAGE = "sha256:" + "0" * 64  # of a process that was admitted without a manifest
# Devices that cannot change what a directly booted, verity-checked root runs.
_DEVICES = frozenset(
    {"emulator", "disk", "controller", "interface", "serial", "console", "channel", "rng"}
) | frozenset({"memballoon", "input", "audio", "video", "watchdog", "panic", "tpm"})
_OS = frozenset({"type", "kernel", "initrd", "cmdline", "boot", "bios"})
_VOLATILE = ("seclabel", "metadata", "resource")  # host state, and the driver's own notes, which nothing runs by
_VOLATILE_ATTRIBUTES = {
    "domain": ("id",),
    "target": ("state",),  # of the channel: whether a guest has it open
    "source": ("index",),
    "backingStore": ("index",),
    "console": ("tty",),
}
_MAX_DISKS = 2


@dataclass(frozen=True, slots=True)
class Measured:
    """What a machine is. `channel`: the unix socket at whose other end is this machine and no other."""

    machine: str
    domain: str  # sha256:… of the canonical definition
    channel: str
    isolated: bool


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
    domain = ET.fromstring(live_xml(uri, uuid))  # noqa: S314  see the import
    return measure_domain(domain, manifest)


def live_xml(uri: str, uuid: str) -> str:
    """The live XML of a domain of this host."""
    # Here and not above, so that an agent for local processes needs no libvirt.
    import libvirt  # noqa: PLC0415

    if "+" in uri.partition(":")[0] or not uri.endswith(("///system", "///session", "///default")):
        raise BadInputError(
            f"{uri!r} is not a libvirt of this host", next_command="give the agent's own URI: qemu:///system"
        )
    libvirt.registerErrorHandler(lambda _context, _error: None, None)
    try:
        connection = libvirt.openReadOnly(uri)
    except libvirt.libvirtError as error:
        raise TemporaryError(f"libvirt at {uri} does not answer: {error}", next_command="start libvirtd") from error
    try:
        domain = connection.lookupByUUIDString(uuid)
        if not domain.isActive():
            raise UnknownError(f"domain {uuid} at {uri} does not run", next_command="start it and admit it again")
        return str(domain.XMLDesc(0))
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
            raise PermanentError(f"there is no domain {uuid} at {uri}") from error
        raise TemporaryError(f"domain {uuid} at {uri}: {error}") from error
    finally:
        connection.close()


def measure_domain(domain: ET.Element, manifest: Manifest) -> Measured:
    """Compare a live domain definition, and the files it names, with the manifest."""
    _check_shape(domain)
    command_line = domain.findtext("os/cmdline") or ""
    if command_line != manifest.command_line:
        raise BadError(
            f"command line of the domain is {command_line!r:.300}, the manifest says {manifest.command_line!r:.300}"
        )
    root = _root_disk(domain)
    for name, path in (("kernel", domain.findtext("os/kernel")), ("initramfs", domain.findtext("os/initrd"))):
        if not path:
            raise BadError(f"{name}: the domain boots none directly")
        _check_part(manifest.part(name), path, whole=True)
    for name in ("root", "verity"):
        _check_part(manifest.part(name), root, whole=False)  # beyond them dm-verity reads nothing
    return Measured(domain.findtext("uuid") or "", canonical_digest(domain), _channel(domain), isolated=True)


def canonical_digest(domain: ET.Element) -> str:
    """`sha256:` of the definition without what libvirt assigns at each start."""
    copy = ET.fromstring(ET.tostring(domain))  # noqa: S314
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
    foreign = [child.tag for child in domain if child.tag.startswith("{")]
    if foreign:
        raise BadError(f"domain definition: {foreign[0]} passes arguments to the hypervisor")
    if (domain.find("os") is None) or (extra := {child.tag for child in domain.iterfind("os/*")} - _OS):
        raise BadError(
            f"domain definition: boots by {sorted(extra) if domain.find('os') is not None else 'no os element'}"
        )
    if domain.find("sysinfo") is not None:
        raise BadError("domain definition: has a sysinfo element")
    devices = {child.tag for child in domain.iterfind("devices/*")}
    if devices - _DEVICES:
        raise BadError(f"domain definition: has devices that no image expects: {sorted(devices - _DEVICES)}")
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


def _channel(domain: ET.Element) -> str:
    channels = [c for c in domain.iterfind("devices/channel") if _attribute(c, "target", "name") == PORT_NAME]
    if len(channels) != 1 or channels[0].get("type") != "unix":
        raise BadError(f"domain definition: has {len(channels)} unix channels {PORT_NAME}")
    path = _attribute(channels[0], "source", "path")
    if _attribute(channels[0], "source", "mode") != "bind" or not path:
        raise BadError(f"domain definition: channel {PORT_NAME} is not bound to a unix socket")
    return path


def _attribute(element: ET.Element, child: str, name: str) -> str | None:
    found = element.find(child)
    return None if found is None else found.get(name)


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
