"""The Debian packages of the lab. Their daemons are neither started nor left to start at the next boot."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.openstack.lab.console import LabError, run, say

INSTALL_TIMEOUT_S = 1800.0  # 2 minutes for some 300 packages on an idle machine with a near mirror
LOCK_TIMEOUT_S = 900  # another apt may be at work
PACKAGES = (
    "cinder-api", "cinder-scheduler", "cinder-volume", "glance-api", "keystone", "neutron-dhcp-agent",
    "neutron-linuxbridge-agent", "neutron-server", "nova-api", "nova-compute", "nova-compute-kvm", "nova-conductor",
    "nova-scheduler", "placement-api",
    "mariadb-server", "rabbitmq-server", "uwsgi-plugin-python3",
    "bindfs",  # a file system that two compute hosts share
    "genisoimage",  # config drives
    "iproute2", "libvirt-clients", "libvirt-daemon-system", "ovmf", "qemu-system-x86", "qemu-utils", "sudo", "swtpm",
    "swtpm-tools",
)  # fmt: skip
_POLICY = Path("/usr/sbin/policy-rc.d")
_UNITS = "/lib/systemd/system/"


def install() -> None:
    """Have all packages. Raises LabError."""
    before = _installed()
    missing = [name for name in PACKAGES if name not in before]
    if not missing:
        return
    say(f"installing {len(missing)} Debian packages and what they need")
    with _no_starts():
        apt = ["apt-get", "-q", "-y", "--no-install-recommends", f"-oDPkg::Lock::Timeout={LOCK_TIMEOUT_S}"]
        apt += ["-oDpkg::Options::=--force-confold", "-oDpkg::Options::=--force-unsafe-io"]
        env = os.environ | {"DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"}
        run([*apt, "update"], env=env, timeout_s=INSTALL_TIMEOUT_S)
        run([*apt, "install", *missing], env=env, timeout_s=INSTALL_TIMEOUT_S)
    fresh = sorted(_installed() - before)
    units = [name for name in _units_of(fresh) if "@" not in name]
    # The lab runs instances of its own; the packages' would take the ports and the memory at the next boot. The
    # hypervisor's are the project's: tools/bootstrap has installed them before, so they are not among the fresh ones.
    if units:
        run(["systemctl", "--root=/", "disable", *units])
    say(f"{len(fresh)} packages installed, {len(units)} units of theirs disabled")


def _installed() -> set[str]:
    lines = run(["dpkg-query", "-W", "-f=${Package} ${db:Status-Status}\n"]).splitlines()
    return {name for name, _, status in (line.partition(" ") for line in lines) if status == "installed"}


def _units_of(packages: list[str]) -> list[str]:
    files = run(["dpkg-query", "-L", *packages]).splitlines() if packages else []
    units = [f.removeprefix(_UNITS) for f in files if f.startswith(_UNITS)]
    return sorted({u for u in units if u.endswith((".service", ".socket", ".timer")) and "/" not in u})


@contextmanager
def _no_starts() -> Iterator[None]:
    """While apt works, no package may start its daemon (policy-rc.d of Debian's invoke-rc.d)."""
    if _POLICY.exists():
        if "exit 101" not in _POLICY.read_text():
            raise LabError(f"{_POLICY} allows daemons to start; move it away, then run this again")
        yield
        return
    _POLICY.touch(mode=0o755)
    _POLICY.chmod(0o755)
    _POLICY.write_text("#!/bin/sh\nexit 101\n")
    try:
        yield
    finally:
        _POLICY.unlink()
