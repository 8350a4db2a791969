"""KVM or not: decided by a guest of a few bytes that really runs, never by the presence of /dev/kvm.

The guest is a multiboot kernel that writes one word to the ACPI power port that SeaBIOS has set up. KVM works if, and
only if, the machine has powered itself off before the deadline. The domain is started with AUTODESTROY: it cannot
outlive us.
"""

import json
import struct
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import libvirt

from cloudfit_orchestrator.clouds.libvirt_cloud.connection import NOT_FOUND, Connection, trying
from cloudfit_orchestrator.clouds.libvirt_cloud.storage import Storage

PROBE_TIMEOUT_S = 5.0  # with KVM the guest is off within 0.5 s
POLL_S = 0.05
PROBE_NAME = "cloudfit-probe"
_LOAD = 0x100000
_MULTIBOOT_MAGIC, _MULTIBOOT_FLAGS = 0x1BADB002, 1 << 16
_PM1A_CONTROL, _SLEEP_S5 = 0x604, 0x2000


@dataclass(frozen=True, slots=True)
class Verdict:
    """Which accelerator machines get, and why."""

    accelerator: str  # kvm | tcg
    reason: str

    @property
    def domain_type(self) -> str:
        """Word of libvirt for it."""
        return "kvm" if self.accelerator == "kvm" else "qemu"


def guest() -> bytes:
    """The multiboot image, 64 bytes: power off, and halt for ever should that do nothing."""
    code = b"\x66\xba" + struct.pack("<H", _PM1A_CONTROL) + b"\x66\xb8" + struct.pack("<H", _SLEEP_S5) + b"\x66\xef"
    code += b"\xfa\xf4\xeb\xfd"  # cli; hlt; jmp to the hlt
    header = struct.pack(
        "<8I",
        _MULTIBOOT_MAGIC,
        _MULTIBOOT_FLAGS,
        -(_MULTIBOOT_MAGIC + _MULTIBOOT_FLAGS) & 0xFFFFFFFF,
        _LOAD,  # address of this header
        _LOAD,  # where loading begins
        0,  # load the whole file
        0,  # no bss
        _LOAD + 32,  # entry
    )
    return (header + code).ljust(64, b"\xf4")


def _domain(name: str, kernel: Path, label: str | None) -> str:
    seclabel = f"<seclabel type='static' model='dac' relabel='no'><label>{label}</label></seclabel>" if label else ""
    return (
        f"<domain type='kvm'><name>{name}</name><memory unit='MiB'>32</memory><vcpu>1</vcpu>"
        f"<os><type arch='x86_64' machine='q35'>hvm</type><kernel>{kernel}</kernel></os><features><acpi/></features>"
        "<cpu mode='host-passthrough' migratable='off'/><on_crash>destroy</on_crash>"
        "<devices><controller type='usb' model='none'/><memballoon model='none'/></devices>"
        f"{seclabel}</domain>"
    )


def probe(connection: Connection, storage: Storage, cache: Path, label: str | None) -> Verdict:
    """The verdict for this host and QEMU version, from the file `cache` or by a boot. Errors as of any libvirt call."""
    virt = connection.get()
    with trying(f"ask {connection.uri} for its version"):
        key = f"{virt.getHostname()} {connection.local_uri} qemu={virt.getVersion()} libvirt={virt.getLibVersion()}"
        offered = "<domain type='kvm'" in virt.getCapabilities()
    known = _cached(cache)
    if key in known:
        return known[key]
    verdict = _boot(virt, storage, label) if offered else Verdict("tcg", "libvirt offers no KVM on this host")
    cache.parent.mkdir(parents=True, exist_ok=True)
    fresh = cache.with_name(f".{uuid.uuid4().hex}.new")
    fresh.write_text(json.dumps({k: asdict(v) for k, v in {**_cached(cache), key: verdict}.items()}, indent=1))
    fresh.replace(cache)
    return verdict


def _cached(cache: Path) -> dict[str, Verdict]:
    try:
        return {key: Verdict(**value) for key, value in json.loads(cache.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}  # absent or spoilt: probe again


def _boot(virt: Any, storage: Storage, label: str | None) -> Verdict:
    name = f"{PROBE_NAME}-{uuid.uuid4().hex[:12]}"
    kernel = f"{name}.bin"
    storage.write(kernel, guest())
    domain = None
    try:
        with trying(f"define the probe domain {name}"):
            domain = virt.defineXML(_domain(name, storage.path(kernel), label))
        return _run(domain)
    finally:
        if domain is not None:
            _discard(domain)
        storage.remove(kernel)


def _run(domain: Any) -> Verdict:
    started = time.monotonic()
    try:
        domain.createWithFlags(libvirt.VIR_DOMAIN_START_AUTODESTROY)
        while time.monotonic() - started < PROBE_TIMEOUT_S:
            state, reason = domain.state()
            took_s = time.monotonic() - started
            if state == libvirt.VIR_DOMAIN_SHUTOFF:
                if reason == libvirt.VIR_DOMAIN_SHUTOFF_SHUTDOWN:
                    return Verdict("kvm", f"a KVM guest booted and powered off in {took_s:.1f} s")
                return Verdict("tcg", f"QEMU died when it started a KVM guest (libvirt's reason {reason})")
            time.sleep(POLL_S)
    except libvirt.libvirtError as error:
        lines = (error.get_error_message() or str(error)).strip().splitlines()
        return Verdict("tcg", f"a KVM guest cannot be started: {lines[-1][:200] if lines else 'no reason given'}")
    return Verdict("tcg", f"a KVM guest did not power off within {PROBE_TIMEOUT_S:.0f} s")


def _discard(domain: Any) -> None:
    with trying(f"remove the probe domain {domain.name()}"):
        try:
            if domain.isActive():
                domain.destroy()
        except libvirt.libvirtError as error:
            if error.get_error_code() != libvirt.VIR_ERR_OPERATION_INVALID:  # it went by itself in between
                raise
        try:
            domain.undefine()
        except libvirt.libvirtError as error:
            if error.get_error_code() not in NOT_FOUND:
                raise
