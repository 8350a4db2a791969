"""`doctor`: what is there, what is missing, and the command that mends it."""

import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass

from cloudfit_orchestrator.clouds.registry import driver
from cloudfit_orchestrator.controller.home import Home
from cloudfit_orchestrator.controller.local import agents_of_home
from cloudfit_orchestrator.launcher.sil import list_images
from cloudfit_orchestrator.model.errors import CloudfitError
from cloudfit_orchestrator.model.signing import public_bytes

PACKAGES = {  # tool -> (Debian package, what for)
    "qemu-system-x86_64": ("qemu-system-x86", "machines"),
    "qemu-img": ("qemu-utils", "snapshots"),
    "libvirtd": ("libvirt-daemon-system", "machines"),
    "virsh": ("libvirt-clients", "looking at machines"),
    "mkfs.ext4": ("e2fsprogs", "state disks"),
    "mmdebstrap": ("mmdebstrap", "building images"),
    "mkfs.erofs": ("erofs-utils", "building images"),
    "veritysetup": ("cryptsetup-bin", "building images"),
    "dnsmasq": ("dnsmasq-base", "networks"),
}
NEEDED_MIB, WANTED_MIB = 1024, 4096  # a demo's machines take 1 GiB; building images another 2
WANTED_IMAGES = ("replica", "recovery")


@dataclass(frozen=True, slots=True)
class Check:
    """One finding. `verdict`: ok | warn | fail."""

    name: str
    verdict: str
    finding: str
    fix: str = ""


def examine(home: Home, *, uri: str = "qemu:///system") -> list[Check]:
    """All checks. None of them changes anything but starting libvirt's daemons where no init system does."""
    checks = [_tool(tool, package, use) for tool, (package, use) in PACKAGES.items()]
    checks += [_disk(home)]
    checks += _guarded("libvirt", "sudo apt-get install libvirt-daemon-system", lambda: _libvirt(home, uri))
    checks += _guarded("images", "cloudfit image build", lambda: _images(home))
    checks += _guarded("agents", "cloudfit agent status", lambda: _agents(home))
    return checks


def _guarded(name: str, fix: str, check: Callable[[], list[Check]]) -> list[Check]:
    try:
        return check()
    except CloudfitError as error:
        return [Check(name, "fail", error.fact, error.next_command or fix)]


def _tool(tool: str, package: str, use: str) -> Check:
    path = shutil.which(tool, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if path:
        return Check(tool, "ok", path)
    return Check(tool, "fail", f"not found; needed for {use}", f"sudo apt-get install {package}")


def _disk(home: Home) -> Check:
    free = shutil.disk_usage(home.root).free >> 20
    verdict = "fail" if free < NEEDED_MIB else "warn" if free < WANTED_MIB else "ok"
    fix = "" if verdict == "ok" else f"make room on the file system of {home.root}, or name another --home"
    return Check("disk space", verdict, f"{free} MiB free in {home.root}", fix)


def _libvirt(home: Home, uri: str) -> list[Check]:
    if importlib.util.find_spec("libvirt") is None:
        return [Check("libvirt", "fail", "the Python module is not installed", "pip install libvirt-python")]
    cloud = driver("libvirt")(home=home.root, uri=uri)
    with cloud:
        facts = cloud.facts()
    fast = facts.accelerator == "kvm"
    hint = "" if fast else "nothing to do: machines run in software emulation, about ten times slower"
    return [
        Check("libvirt", "ok", f"{facts.uri}: {facts.version}"),
        Check("acceleration", "ok" if fast else "warn", f"{facts.accelerator}: {facts.reason}", hint),
    ]


def _images(home: Home) -> list[Check]:
    images = list_images(home.images, [public_bytes(home.image_key())])
    checks = []
    for name in WANTED_IMAGES:
        found = next((i for i in images if name in i.names), None)
        if found is None:
            checks.append(Check(f"image {name}", "warn", "not built", f"cloudfit image build {name}"))
        elif found.manifest is None:
            checks.append(Check(f"image {name}", "fail", found.problem, f"cloudfit image build {name}"))
        else:
            checks.append(Check(f"image {name}", "ok", found.digest))
    return checks


def _agents(home: Home) -> list[Check]:
    checks = []
    for agent in agents_of_home(home):
        name = f"agent {agent['cloud']}"
        if agent["running"]:
            checks.append(Check(name, "ok", f"process {agent['pid']}, {len(agent['guests'])} guests"))
        else:
            checks.append(
                Check(name, "warn", agent["reason"], "cloudfit group list: no group needs it, or apply again")
            )
    return checks
