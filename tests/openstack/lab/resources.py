"""What is in a cloud when tests begin: catalogue, accounts, flavors, network, zone, volume type, quotas.

All by openstacksdk, as an administrator would; each is looked up before it is made, so any step can be repeated.
"""

import contextlib
import hashlib
import ipaddress
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openstack
from openstack.connection import Connection

from tests.openstack.lab.console import write
from tests.openstack.lab.layout import NEIGHBOUR, NETWORK, OPERATOR, Cloud, Lab
from tests.openstack.lab.settings import PHYSICAL_NETWORK, SERVICE_USER

DOMAIN = "default"
CREDENTIAL = "cloudfit-lab"
VOLUME_TYPE = "replicas"
# name -> (memory in MiB, virtual CPUs, root disk in GiB)
FLAVORS = {"cloudfit.tiny": (128, 1, 1), "cloudfit.small": (384, 1, 1), "cloudfit.medium": (512, 1, 2)}
# Enough for several groups on a real cloud, few enough that a leak is found; a fake cloud is there for large numbers.
QUOTAS = {
    True: {
        "instances": 20, "cores": 20, "ram": 12288, "server_groups": 10, "server_group_members": 10,
        "volumes": 40, "snapshots": 40, "gigabytes": 200,
        "port": 60, "security_group": 10, "security_group_rule": 100,
    },
    False: {
        "instances": 5000, "cores": 5000, "ram": -1, "server_groups": 1000, "server_group_members": 10,
        "volumes": 100, "snapshots": 100, "gigabytes": -1,
        "port": -1, "security_group": -1, "security_group_rule": -1,
    },
}  # fmt: skip
OF_COMPUTE = ("instances", "cores", "ram", "server_groups", "server_group_members")
OF_VOLUMES = ("volumes", "snapshots", "gigabytes")
OF_NETWORK = ("port", "security_group", "security_group_rule")
POOL = (10, -57)  # first and last of the addresses that Neutron gives, x.199; the others are for fixed addresses
HTTP_TIMEOUT_S = 300


@contextlib.contextmanager
def connected(lab: Lab, cloud: Cloud, account: str = "admin") -> Iterator[Connection]:
    """A connection of an account in its project of the same name, by password."""
    connection = openstack.connect(
        auth_url=cloud.auth_url,
        username=account,
        password=lab.password,
        project_name=account,
        user_domain_name="Default",
        project_domain_name="Default",
        region_name=cloud.region,
        identity_api_version="3",
        api_timeout=HTTP_TIMEOUT_S,
    )
    try:
        yield connection
    finally:
        connection.close()


def make_catalogue(lab: Lab, cloud: Cloud) -> None:
    """Services, endpoints, and accounts; needs nothing but Keystone."""
    services = (
        ("image", "glance", ""),
        ("placement", "placement", ""),
        ("compute", "nova", "/v2.1"),
        ("network", "neutron", ""),
        ("volumev3", "cinderv3", "/v3/%(project_id)s"),
    )
    with connected(lab, cloud) as admin:
        identity = admin.identity
        roles = {role.name: role for role in identity.roles()}
        roles.setdefault("service", None)
        if roles["service"] is None:
            roles["service"] = identity.create_role(name="service")
        for account, project, names in (
            (SERVICE_USER, "service", ("admin", "service")),
            (OPERATOR, OPERATOR, ("member",)),
            (NEIGHBOUR, NEIGHBOUR, ("member",)),
        ):
            place = identity.find_project(project, domain_id=DOMAIN) or identity.create_project(
                name=project, domain_id=DOMAIN
            )
            user = identity.find_user(account, domain_id=DOMAIN) or identity.create_user(
                name=account, password=lab.password, domain_id=DOMAIN
            )
            for name in names:
                identity.assign_project_role_to_user(place, user, roles[name])
        known = {service.type: service for service in identity.services()}
        for kind, name, path in services:
            service = known.get(kind) or identity.create_service(type=kind, name=name)
            there = {endpoint.interface for endpoint in identity.endpoints(service_id=service.id)}
            url = cloud.url(name.removesuffix("v3")) + path
            for interface in {"public", "internal", "admin"} - there:
                identity.create_endpoint(service_id=service.id, interface=interface, region_id=cloud.region, url=url)


def wanted() -> str:
    """Changes with what `make_resources` makes, and with what is told of it."""
    modules = (Path(__file__).with_name(f"{name}.py") for name in ("resources", "layout", "state"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in modules)).hexdigest()


def make_resources(lab: Lab, cloud: Cloud) -> dict[str, Any]:
    """Everything else; what tests need to know of it, for the state file. Repeating it mends what is missing."""
    with connected(lab, cloud) as admin:
        network, subnet = _network(cloud, admin)
        _zone(cloud, admin)
        if not admin.block_storage.find_type(VOLUME_TYPE):
            admin.block_storage.create_type(name=VOLUME_TYPE, extra_specs={"volume_backend_name": "nfs"})
        quotas = QUOTAS[cloud.real]
        for account in (OPERATOR, NEIGHBOUR):
            project = admin.identity.find_project(account, domain_id=DOMAIN, ignore_missing=False).id
            admin.set_compute_quotas(project, **{k: quotas[k] for k in OF_COMPUTE})
            admin.set_volume_quotas(project, **{k: quotas[k] for k in OF_VOLUMES})
            admin.set_network_quotas(project, **{k: quotas[k] for k in OF_NETWORK})
        flavors = {name: _flavor(admin, name) for name in FLAVORS}
    return {
        "network": {
            "name": NETWORK,
            "id": network.id,
            "subnet_id": subnet.id,
            "cidr": cloud.subnet,
            "gateway": cloud.host_address,
            "dhcp_pool": subnet.allocation_pools[0],
            "host_address": cloud.host_address,
            "host_interface": cloud.host_link,
        },
        "flavors": flavors,
        "availability_zone": cloud.availability_zone,
        "volume_type": VOLUME_TYPE,
        "quotas": quotas,
    }


def _network(cloud: Cloud, admin: Connection) -> tuple[Any, Any]:
    network = admin.network.find_network(NETWORK) or admin.network.create_network(
        name=NETWORK,
        provider_network_type="flat",
        provider_physical_network=PHYSICAL_NETWORK,
        is_shared=True,
    )
    addresses = ipaddress.IPv4Network(cloud.subnet)
    subnet = admin.network.find_subnet(NETWORK, network_id=network.id) or admin.network.create_subnet(
        network_id=network.id,
        name=NETWORK,
        ip_version=4,
        cidr=cloud.subnet,
        gateway_ip=cloud.host_address,
        enable_dhcp=True,
        allocation_pools=[{"start": str(addresses[POOL[0]]), "end": str(addresses[POOL[1]])}],
    )
    return network, subnet


def wake_network(lab: Lab, cloud: Cloud) -> None:
    """Ask for networks first: Debian 12's Neutron answers a listing of ports by 500 until it was asked for others."""
    with connected(lab, cloud) as admin:
        list(admin.network.networks())


def _zone(cloud: Cloud, admin: Connection) -> None:
    zone = cloud.availability_zone
    aggregate = next((a for a in admin.compute.aggregates() if a.name == zone), None)
    if aggregate is None:
        aggregate = admin.compute.create_aggregate(name=zone, availability_zone=zone)
    host = cloud.host.name
    if host not in (aggregate.hosts or []):
        admin.compute.add_host_to_aggregate(aggregate, host)


def _flavor(admin: Connection, name: str) -> dict[str, Any]:
    memory_mib, cpus, disk_gib = FLAVORS[name]
    flavor = admin.compute.find_flavor(name) or admin.compute.create_flavor(
        name=name, ram=memory_mib, vcpus=cpus, disk=disk_gib
    )
    return {"id": flavor.id, "memory_mib": memory_mib, "cpus": cpus, "disk_gib": disk_gib}


def application_credential(lab: Lab, cloud: Cloud) -> dict[str, str]:
    """`id` and `secret` of the operator's credential. The secret is told once, so it is kept in a file."""
    path = cloud.home / "application-credential.json"
    with connected(lab, cloud, OPERATOR) as operator:
        identity, user = operator.identity, operator.current_user_id
        known = identity.find_application_credential(user, CREDENTIAL)
        if known and path.exists():
            kept: dict[str, str] = json.loads(path.read_text())
            if kept["id"] == known.id:
                return kept
        if known:
            identity.delete_application_credential(user, known)
        fresh = identity.create_application_credential(user, CREDENTIAL)
        kept = {"id": fresh.id, "secret": fresh.secret}
    write(path, json.dumps(kept) + "\n", 0o600)
    return kept
