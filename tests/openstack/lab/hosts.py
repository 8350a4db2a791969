"""Compute hosts of a cloud: a libvirtd and a nova-compute each. All are this machine, and do not know it.

Every cloud has one. A spare one can be had for a while, by who wants to move servers.
"""

import contextlib
import datetime as dt
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from openstack.connection import Connection

from tests.openstack.lab.console import run, say, wait_until, write
from tests.openstack.lab.databases import map_hosts
from tests.openstack.lab.infrastructure import sql
from tests.openstack.lab.layout import Cloud, Host, Lab
from tests.openstack.lab.processes import Service, check_alive, find, knowing_keys, start, stop
from tests.openstack.lab.resources import connected
from tests.openstack.lab.settings import FAKE_COMPUTE, compute_name, config_file

READY_TIMEOUT_S = 300.0  # 20 s on an idle machine; one start of a privsep daemon took 47 s on a busy one
GUEST_TIMEOUT_S = 60.0
OF_HOST = [Path("/var/lib/libvirt/qemu") / name for name in ("channel", "nvram")]  # where agents look for files
_DIRECTORIES = ("cache", "etc", "lib", "localca", "log", "run")


@contextlib.contextmanager
def spare_host(lab: Lab, cloud: Cloud) -> Iterator[Host]:
    """A second host in the cloud's zone; nothing of it is left afterwards. No server may be on it then."""
    host = cloud.spare
    name, shared = f"{cloud.name}-{compute_name(host)}", f"{cloud.name}-shared"
    prepare_libvirt(lab, host)
    try:
        # libvirt migrates machines only between hosts that share a file system which it knows to be fit for that.
        start(lab, Service(shared, ["bindfs", "-f", "-o", "subtype=glusterfs", cloud.instances, cloud.instances]))
        wait_until(cloud.instances.is_mount, READY_TIMEOUT_S, f"{cloud.instances} is shared", lab.log / f"{shared}.out")
        for service in (libvirtd(host), compute(lab, host)):
            start(lab, service)
        wait_report(lab, name, f"{cloud.databases['nova']}.services where host='{host.name}' and last_seen_up")
        map_hosts(lab, cloud)
        with connected(lab, cloud) as admin:
            admin.compute.add_host_to_aggregate(_zone(admin, cloud), host.name)
        say(f"{host.name}: ready")
        yield host
    finally:
        with connected(lab, cloud) as admin:
            zone = _zone(admin, cloud)
            if host.name in zone.hosts:
                admin.compute.remove_host_from_aggregate(zone, host.name)
            _stop(lab, name)
            for service in admin.compute.services(host=host.name):
                admin.compute.delete_service(service)
        destroy_guests(lab, host)
        _stop(lab, f"{host.process}-libvirtd", shared)


def _stop(lab: Lab, *names: str) -> None:
    stop(lab, [running for name in names if (running := find(lab, name))])


def _zone(admin: Connection, cloud: Cloud) -> Any:
    return next(a for a in admin.compute.aggregates() if a.name == cloud.availability_zone)


def destroy_guests(lab: Lab, host: Host) -> None:
    """End its machines, which would outlive their libvirtd."""
    running = find(lab, f"{host.process}-libvirtd")
    if running is None or not running.alive:
        return  # their processes are found as strays
    virsh = ["virsh", "-q", "-c", host.libvirt_uri]
    for name in run([*virsh, "list", "--name"], timeout_s=GUEST_TIMEOUT_S).split():
        run([*virsh, "destroy", name], timeout_s=GUEST_TIMEOUT_S)


def wait_report(lab: Lab, name: str, row: str) -> None:
    """Until the service has reported in the database since its start: then it takes orders from its queue."""

    def reported() -> bool:
        check_alive(lab, name)
        running = find(lab, name)
        since = dt.datetime.fromtimestamp(running.since if running else 0, dt.UTC).strftime("%Y-%m-%d %H:%M:%S")
        return sql(lab, f"select count(*) from {row} >= '{since}'").strip() != "0"

    wait_until(reported, READY_TIMEOUT_S, f"{name} reports", lab.log / f"{name}.log")


def compute(lab: Lab, host: Host) -> Service:
    """Its nova-compute."""
    name = compute_name(host)
    program = Path("nova-compute") if host.cloud.real else lab.bin / FAKE_COMPUTE
    service = knowing_keys(lab, host.cloud, name, config_file(host.cloud, "nova", name), program=str(program))
    return service if host.cloud.real else replace(service, files=[*service.files, program])


def libvirtd(host: Host) -> Service:
    """A libvirtd that sees its own directories where the host's has them: in a mount namespace of its own.

    `slave`: volumes mounted on the host later are seen in it, nothing goes the other way. Only the sockets of channels
    and the variables of UEFI firmware are where the host has its own: an agent of this host opens what libvirt names,
    and names of machines begin with their cloud's. The spare host has no agent, and names that the first one has, too.
    """
    home = host.home
    places = {
        "run": "/run/libvirt",
        "lib": "/var/lib/libvirt",
        "log": "/var/log/libvirt",
        "cache": "/var/cache/libvirt",
        "etc": "/etc/libvirt",
        "localca": "/var/lib/swtpm-localca",  # made by root here, by another user for the host's own
    }
    # A host of its own has a name of its own; Nova and Placement know it by that.
    script = ["set -e", f"echo {host.name} >/proc/sys/kernel/hostname"] if host.letter else ["set -e"]
    for path in () if host.letter else OF_HOST:
        inside = home / "lib/qemu" / path.name
        for directory in (path, inside):
            directory.mkdir(parents=True, exist_ok=True)
        script.append(f"mount --bind {path} {inside}")
    for name, place in places.items():
        Path(place).mkdir(parents=True, exist_ok=True)
        script.append(f"mount --rbind {home / name} {place}")
    script.append(f"exec libvirtd -f /etc/libvirt/libvirtd.conf -p {home}/run/libvirtd.pid")
    command = ["unshare", "--mount", "--uts", "--propagation", "slave", "sh", "-c", "\n".join(script)]
    files = [home / "etc" / name for name in ("qemu.conf", "libvirtd.conf")]
    return Service(f"{host.process}-libvirtd", command, files=files)


def prepare_libvirt(lab: Lab, host: Host) -> None:
    """Its directories and files. Its machines run as root, without security drivers, cgroups or namespaces: nothing
    here isolates them.
    """
    for name in _DIRECTORIES:
        (host.home / name).mkdir(parents=True, exist_ok=True)
    (host.cloud.home / "mounts" / compute_name(host)).mkdir(parents=True, exist_ok=True)
    etc = host.home / "etc"
    qemu = {
        "user": "root",
        "group": "libvirt-qemu",  # libvirtd gives it the directory of channels, which machines of the host's also use
        "dynamic_ownership": 0,
        "remember_owner": 0,
        "security_driver": "none",
        "stdio_handler": "file",  # no virtlogd
        "swtpm_user": "root",
        "swtpm_group": "root",
    }
    daemon = {
        "listen_tls": 0,
        "listen_tcp": 0,
        "auth_unix_ro": "none",
        "auth_unix_rw": "none",
        "unix_sock_group": "root",
        "host_uuid": str(uuid.uuid5(uuid.NAMESPACE_URL, host.libvirt_uri)),  # libvirt does not migrate to the same host
        "log_outputs": f"3:file:{lab.log / host.process}-libvirtd.log",
    }
    lists = "namespaces = []\ncgroup_controllers = []\n"
    write(etc / "qemu.conf", _text(qemu) + lists)
    write(etc / "libvirtd.conf", _text(daemon))


def _text(options: dict[str, object]) -> str:
    return "".join(f"{k} = {v}\n" if isinstance(v, int) else f'{k} = "{v}"\n' for k, v in options.items())
