"""A cloud's network on a libvirt host: a bridge of its own, routed to the others by the host, no DHCP, no DNS."""

import hashlib
import ipaddress
import uuid
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from typing import Any

import libvirt

from cloudfit_orchestrator.clouds.base import NetworkSpec, check_name
from cloudfit_orchestrator.clouds.libvirt_cloud.connection import NOT_FOUND, Connection, trying
from cloudfit_orchestrator.clouds.libvirt_cloud.domain import read_domain
from cloudfit_orchestrator.model.errors import BadInputError, PermanentError, RefusedError

NAMESPACE = "https://cloudfit.dev/xmlns/network/1"
_TAG = f"{{{NAMESPACE}}}network"
_UUIDS = uuid.UUID("b0e0a4f2-2b7e-5a39-8f0a-0a9f6f5c7f10")
ET.register_namespace("cloudfit-network", NAMESPACE)


def network_name(deployment: str, name: str) -> str:
    """Name in libvirt of the network. Identity is the tags."""
    return f"cloudfit-{deployment}-{name}"


def _hash(deployment: str, name: str) -> str:
    return hashlib.sha256(f"{deployment}\0{name}".encode()).hexdigest()


def network_xml(deployment: str, network: NetworkSpec) -> str:
    """The definition. Mode `route`: libvirt turns on forwarding and lets the firewall pass the subnet, no NAT."""
    digest = _hash(deployment, network.name)
    element = ET.Element("network")
    ET.SubElement(element, "name").text = network_name(deployment, network.name)
    ET.SubElement(element, "uuid").text = str(uuid.uuid5(_UUIDS, digest))
    metadata = ET.SubElement(element, "metadata")
    ET.SubElement(metadata, _TAG, deployment=deployment, name=network.name)
    ET.SubElement(element, "forward", mode="route")
    ET.SubElement(element, "bridge", name="cf" + digest[:12], stp="off", delay="0")
    ET.SubElement(element, "dns", enable="no")
    ET.SubElement(element, "ip", address=network.gateway, prefix=str(network.prefix))
    return ET.tostring(element, "unicode")


@dataclass(frozen=True, slots=True)
class SeenNetwork:
    """What a network's XML says. `deployment` and `short` are None if it is not ours."""

    name: str
    uuid: str
    deployment: str | None
    short: str | None
    gateway: str
    prefix: int


def read_network(xml: str) -> SeenNetwork:
    """Read a network definition."""
    element = ET.fromstring(xml)  # noqa: S314  from the daemon that runs our machines
    tag, ip = element.find(f"metadata/{_TAG}"), element.find("ip")
    complete = tag is not None and bool(tag.get("deployment")) and bool(tag.get("name"))
    prefix = 0
    if ip is not None:
        mask = ip.get("prefix") or str(ipaddress.ip_network(f"0.0.0.0/{ip.get('netmask', '0')}").prefixlen)
        prefix = int(mask)
    return SeenNetwork(
        name=element.findtext("name", ""),
        uuid=element.findtext("uuid", ""),
        deployment=tag.get("deployment") if tag is not None and complete else None,
        short=tag.get("name") if tag is not None and complete else None,
        gateway=ip.get("address", "") if ip is not None else "",
        prefix=prefix,
    )


def check_subnet(network: NetworkSpec) -> None:
    """Raises BadInputError unless address and gateway are two IPv4 hosts of one subnet."""
    check_name("network", network.name)
    try:
        subnet = ipaddress.IPv4Network(f"{network.gateway}/{network.prefix}", strict=False)
        hosts = {ipaddress.IPv4Address(network.address), ipaddress.IPv4Address(network.gateway)}
    except ValueError as error:
        raise BadInputError(f"network {network.name}: {error}") from error
    edges = {subnet.network_address, subnet.broadcast_address}
    if len(hosts) != 2 or not all(h in subnet for h in hosts) or hosts & edges:
        raise BadInputError(
            f"network {network.name}: address {network.address} and gateway {network.gateway} "
            f"are not two hosts of {subnet}"
        )


class Networks:
    """The networks of a host."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def _lookup(self, name: str) -> Any | None:
        connection = self._connection.get()
        with trying(f"look up the network {name} on {self._connection.uri}"):
            try:
                return connection.networkLookupByName(name)
            except libvirt.libvirtError as error:
                if error.get_error_code() not in NOT_FOUND:
                    raise
            return None

    def _ours(self, deployment: str, name: str) -> tuple[Any, SeenNetwork] | None:
        full = network_name(deployment, name)
        found = self._lookup(full)
        if found is None:
            return None
        with trying(f"read the network {full} on {self._connection.uri}"):
            seen = read_network(found.XMLDesc(0))
        if (seen.deployment, seen.short) != (deployment, name):
            raise RefusedError(
                f"network {full} on {self._connection.uri} (uuid {seen.uuid}) does not carry our tags: not touched",
                next_command=f"virsh -c {self._connection.uri} net-dumpxml {full}",
            )
        return found, seen

    def require(self, deployment: str, name: str) -> str:
        """Name in libvirt of our network. PermanentError if it is not there, RefusedError if a stranger wears it."""
        if self._ours(deployment, name) is None:
            raise PermanentError(
                f"network {name} of {deployment} does not exist on {self._connection.uri}",
                next_command="cloudfit doctor",
            )
        return network_name(deployment, name)

    def ensure(self, deployment: str, network: NetworkSpec) -> None:
        """See `Cloud.ensure_network`."""
        check_subnet(network)
        full = network_name(deployment, network.name)
        ours = self._ours(deployment, network.name)
        if ours is None:
            connection = self._connection.get()
            with trying(f"define the network {full} on {self._connection.uri}"):
                found = connection.networkDefineXML(network_xml(deployment, network))
        else:
            found, seen = ours
            if (seen.gateway, seen.prefix) != (network.gateway, network.prefix):
                raise RefusedError(
                    f"network {full} exists with {seen.gateway}/{seen.prefix}, asked for "
                    f"{network.gateway}/{network.prefix}",
                    next_command="cloudfit group destroy of the groups on it, then apply again",
                )
        with trying(f"start the network {full} ({network.gateway}/{network.prefix}) on {self._connection.uri}"):
            try:
                if not found.isActive():
                    found.create()
            except libvirt.libvirtError as error:
                if not found.isActive():  # another thread or process may have started it in between
                    if ours is None:
                        found.undefine()
                    if "already in use" in str(error):  # libvirt has no code of its own for it
                        raise PermanentError(
                            f"network {full}: {network.gateway}/{network.prefix} is in use on {self._connection.uri}",
                            next_command="cloudfit group destroy, then in the spec, libvirt: {network: 10.9.0.0/24}",
                        ) from error
                    raise

    def delete(self, deployment: str, name: str) -> None:
        """See `Cloud.delete_network`."""
        ours = self._ours(deployment, name)
        if ours is None:
            return
        found, seen = ours
        connection = self._connection.get()
        with trying(f"delete the network {seen.name} on {self._connection.uri}"):
            users = [d.name() for d in connection.listAllDomains(0) if seen.name in read_domain(d.XMLDesc(0)).networks]
            if users:
                raise RefusedError(
                    f"network {seen.name} is still used by {', '.join(sorted(users))}",
                    next_command="destroy them first",
                )
            try:
                if found.isActive():
                    found.destroy()
                found.undefine()
            except libvirt.libvirtError as error:
                if error.get_error_code() not in NOT_FOUND:
                    raise

    def list(self, deployment: str) -> dict[str, str]:
        """Short name -> UUID of each network of the deployment."""
        connection = self._connection.get()
        with trying(f"list networks on {self._connection.uri}"):
            seen = [read_network(n.XMLDesc(0)) for n in connection.listAllNetworks(0)]
        return {s.short: s.uuid for s in seen if s.deployment == deployment and s.short is not None}
