"""The lab's clouds are what tests of drivers need: separate, complete, clean after use. First: make openstack-lab."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import libvirt
import openstack
import pytest
from openstack.connection import Connection

from tests.openstack.lab import wiring
from tests.openstack.lab.console import run
from tests.openstack.lab.layout import DEFAULT_CLOUDS, DEFAULT_HOME, Lab
from tests.openstack.lab.state import read_state
from tests.vm.tiny_guest import tiny_image

pytestmark = pytest.mark.openstack

HOME = Path(__file__).parents[2]
TIMEOUT_S = 300.0  # a server is ACTIVE in 4 to 11 s on an idle machine; test machines are busy
SECOND_UP_S = 120.0  # 5 s on an idle machine
GREETING = "LAB-GUEST address="
PORT, CLOSED_PORT = 7777, 7778  # the guest serves both, the security group lets one through
FILTER_S = 3.0  # an answer from the guest takes milliseconds
# Takes an address by DHCP, says so on the console, and answers on a TCP port.
GUEST = f"""#!/bin/sh
/bin/busybox --install -s /bin
export PATH=/bin
mkdir -p /proc /sys /dev
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
exec >/dev/ttyS0 2>&1 </dev/ttyS0
for m in $(cat /modules.order); do insmod /modules/$m; done
printf '%s\\n' '#!/bin/sh' '[ "$1" = bound ] && ip addr add $ip/$mask dev $interface && echo "{GREETING}$ip"' >/lease
chmod 755 /lease
ip link set lo up; ip link set eth0 up
udhcpc -i eth0 -q -f -t 100 -T 2 -s /lease
while true; do echo hello | nc -l -p {CLOSED_PORT}; done &
while true; do echo hello | nc -l -p {PORT}; done
"""


@pytest.fixture(scope="session")
def lab() -> Lab:
    found = Lab(Path(os.environ.get("CLOUDFIT_LAB", DEFAULT_HOME)))
    if not found.state.exists():
        pytest.fail(f"no lab in {found.home}; run: make openstack-lab")
    return found


@pytest.fixture(params=DEFAULT_CLOUDS)
def cloud(request: pytest.FixtureRequest) -> str:
    return request.param


@contextlib.contextmanager
def connected(lab: Lab, entry: str) -> Iterator[Connection]:
    config = openstack.config.OpenStackConfig(config_files=[str(lab.clouds_yaml)])
    connection = Connection(config=config.get_one(cloud=entry))
    try:
        yield connection
    finally:
        connection.close()


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + TIMEOUT_S
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what}: not so after {TIMEOUT_S:.0f} s"
        time.sleep(1)
    return found


def test_each_cloud_answers_to_its_application_credential(lab: Lab, cloud: str) -> None:
    told = read_state(lab)["clouds"][cloud]
    with connected(lab, cloud) as operator, connected(lab, told["accounts"]["admin"]) as admin:
        assert operator.current_project_id == admin.identity.find_project("operator", ignore_missing=False).id
        assert told["flavors"].keys() <= {flavor.name for flavor in operator.compute.flavors()}
        network = operator.network.find_network(told["network"]["name"], ignore_missing=False)
        assert network.id == told["network"]["id"]
        assert told["availability_zone"] in {zone.name for zone in operator.compute.availability_zones()}
        assert told["volume_type"] in {kind.name for kind in operator.block_storage.types()}
        assert list(operator.image.images()) is not None
        assert operator.get_compute_limits().max_total_instances == told["quotas"]["instances"]
        services = list(admin.compute.services())
        assert {"nova-compute", "nova-conductor", "nova-scheduler"} <= {service.binary for service in services}
        assert all(agent.is_alive for agent in admin.network.agents())


def test_an_operator_is_no_administrator(lab: Lab, cloud: str) -> None:
    with connected(lab, cloud) as operator, pytest.raises(openstack.exceptions.ForbiddenException):
        operator.compute.create_flavor(name="of-an-intruder", ram=128, vcpus=1, disk=1)


def test_the_clouds_are_separate(lab: Lab) -> None:
    first, second = DEFAULT_CLOUDS
    with connected(lab, first) as one, connected(lab, second) as two:
        token = one.authorize()
        answer = two.session.get(
            f"{two.compute.get_endpoint()}/flavors",
            authenticated=False,
            headers={"X-Auth-Token": token},
            raise_exc=False,
        )
        assert answer.status_code == 401
        assert one.current_project_id != two.current_project_id
    uris = [read_state(lab)["clouds"][name]["libvirt_uri"] for name in DEFAULT_CLOUDS]
    assert len({*uris, "qemu:///system"}) == 3


@pytest.fixture
def leftovers(lab: Lab, cloud: str) -> Iterator[None]:
    """What the operator and the host have of a cloud is afterwards what it was before."""

    def everything() -> dict[str, set[str]]:
        with connected(lab, cloud) as operator:
            project = operator.current_project_id
            return {
                "servers": {s.id for s in operator.compute.servers()},
                "ports": {p.id for p in operator.network.ports(project_id=project)},
                "volumes": {v.id for v in operator.block_storage.volumes()},
                "images": {i.id for i in operator.image.images(owner=project)},
                "groups": {g.id for g in operator.network.security_groups(project_id=project)},
                "machines": set(domains(lab, cloud)),
            }

    before = everything()
    yield
    mine: dict[str, set[str]] = {}

    def gone() -> bool:
        now = everything()
        mine.update({kind: now[kind] - before[kind] for kind in now})
        return not any(mine.values())

    wait_for(gone, f"nothing is left of the test ({mine})")


def domains(lab: Lab, cloud: str) -> dict[str, str]:
    """UUID -> name of the machines of a cloud's own libvirtd."""
    connection = libvirt.open(read_state(lab)["clouds"][cloud]["libvirt_uri"])
    try:
        return {domain.UUIDString(): domain.name() for domain in connection.listAllDomains()}
    finally:
        connection.close()


@pytest.mark.usefixtures("leftovers")
def test_a_server_boots_takes_an_address_and_goes(lab: Lab, cloud: str) -> None:
    told = read_state(lab)["clouds"][cloud]
    with connected(lab, cloud) as operator, contextlib.ExitStack() as stack:
        image = upload(operator, stack)
        group = operator.network.create_security_group(name="lab-test")
        stack.callback(operator.network.delete_security_group, group)
        operator.network.create_security_group_rule(
            security_group_id=group.id, direction="ingress", protocol="tcp", port_range_min=PORT, port_range_max=PORT
        )
        server = operator.compute.create_server(
            name="lab-test",
            image_id=image,
            flavor_id=told["flavors"]["cloudfit.tiny"]["id"],
            networks=[{"uuid": told["network"]["id"]}],
            security_groups=[{"name": group.name}],
            availability_zone=told["availability_zone"],
        )
        stack.callback(delete_server, operator, server)
        server = operator.compute.wait_for_server(server, wait=TIMEOUT_S)
        assert server.status == "ACTIVE"
        assert server.id in domains(lab, cloud), "the state file names another libvirtd than Nova's"
        console = Path(told["instances"], server.id, "console.log")
        line = wait_for(lambda: console_line(console), "the guest greets on its console")
        (address,) = [a["addr"] for a in server.addresses[told["network"]["name"]]]
        assert line == address
        wait_for(lambda: greets(address, PORT), f"the host reaches {address}:{PORT}")
        assert not greets(address, CLOSED_PORT), "the security group does not filter"
        assert greets(address, PORT), "it was not the security group that kept the host out"
        (port,) = operator.network.ports(device_id=server.id)
        rules = [r for r in run(["iptables-save"]).splitlines() if f"tap{port.id[:11]}" in r]
        assert rules
        assert all(r.startswith(f"-A lb-{cloud}-") for r in rules), "another cloud's agent has rules for this port"


def upload(operator: Connection, stack: contextlib.ExitStack) -> str:
    """The id of an image that boots the tiny guest's kernel directly."""
    files = tiny_image(GUEST)

    def create(name: str, kind: str, **properties: str) -> str:
        container = kind if kind in ("aki", "ari") else "bare"
        with (files / {"aki": "vmlinuz", "ari": "initramfs", "raw": "root.img"}[kind]).open("rb") as data:
            image = operator.image.create_image(
                f"lab-test-{name}", data=data, disk_format=kind, container_format=container, **properties
            )
        stack.callback(operator.image.delete_image, image)
        return image.id

    kernel, ramdisk = create("kernel", "aki"), create("ramdisk", "ari")
    return create("disk", "raw", kernel_id=kernel, ramdisk_id=ramdisk, os_command_line="console=ttyS0 quiet panic=-1")


def delete_server(operator: Connection, server: Any) -> None:
    operator.compute.delete_server(server)
    operator.compute.wait_for_delete(server, wait=TIMEOUT_S)


def console_line(path: Path) -> str:
    """The address that the guest took, once it has said so."""
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return next((line.partition(GREETING)[2].strip() for line in lines if GREETING in line), "")


def greets(address: str, port: int) -> bool:
    try:
        with socket.create_connection((address, port), timeout=FILTER_S) as connection:
            return connection.recv(16) == b"hello\n"
    except OSError:
        return False


def test_a_second_up_is_quick_and_changes_nothing(lab: Lab) -> None:
    def everything() -> dict[str, tuple[int, str]]:
        paths = [lab.state, lab.clouds_yaml, *lab.run.glob("*.json"), *lab.home.glob("clouds/*/etc/**/*.conf")]
        return {str(path): (path.stat().st_mtime_ns, path.read_text()) for path in paths}

    before, began = everything(), time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "tests.openstack.lab", "up", "--home", lab.home],
        cwd=HOME, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < SECOND_UP_S
    assert done.stdout.splitlines() == [str(lab.clouds_yaml), str(lab.state)]
    assert everything() == before


def saved_table(*prefixes: str) -> str:
    """What iptables-save prints with agents of these prefixes, and libvirt, at work."""
    lines = ["# Generated by iptables-save", "*filter", ":FORWARD ACCEPT [10:100]", ":LIBVIRT_FWX - [0:0]"]
    lines += [f":{prefix}-{chain} - [0:0]" for prefix in prefixes for chain in ("FORWARD", "local")]
    lines += [":neutron-filter-top - [0:0]", "-A FORWARD -j LIBVIRT_FWX", "-A FORWARD -j neutron-filter-top"]
    lines += [f"-A FORWARD -j {prefix}-FORWARD" for prefix in prefixes]
    lines += ["-A LIBVIRT_FWX -i virbr0 -o virbr0 -j ACCEPT"]
    lines += [f'-A {prefix}-FORWARD -m comment --comment "{prefix}-local" -j ACCEPT' for prefix in prefixes]
    lines += [f"-A neutron-filter-top -j {prefix}-local" for prefix in prefixes]
    return "".join(line + "\n" for line in [*lines, "COMMIT", "*nat", ":OUTPUT ACCEPT [0:0]", "COMMIT"])


def test_removing_an_agents_chains_leaves_all_others() -> None:
    assert wiring.removal(saved_table("lb-lisbon", "lb-passau"), "lb-lisbon").splitlines() == [
        "*filter",
        ":lb-lisbon-FORWARD - [0:0]",
        ":lb-lisbon-local - [0:0]",
        "-D FORWARD -j lb-lisbon-FORWARD",
        "-D neutron-filter-top -j lb-lisbon-local",
        "-X lb-lisbon-FORWARD",
        "-X lb-lisbon-local",
        "COMMIT",
    ]
    assert wiring.removal(saved_table("lb-passau"), "lb-passau").splitlines() == [
        "*filter",
        ":lb-passau-FORWARD - [0:0]",
        ":lb-passau-local - [0:0]",
        ":neutron-filter-top - [0:0]",
        "-D FORWARD -j neutron-filter-top",
        "-D FORWARD -j lb-passau-FORWARD",
        "-X lb-passau-FORWARD",
        "-X lb-passau-local",
        "-X neutron-filter-top",
        "COMMIT",
    ]
    assert wiring.removal(saved_table("lb-passau"), "lb-lisbon") == ""
