"""Addresses, ports and security groups in networks that the operator made; no network of ours is made or deleted.

An address is reserved before its machine is planned: Neutron chooses it, because only a network's owner may. That is
done by making the machine's port, which says for which operation, replica and role it is. A security group a replica
group lets in its members and clients only.
"""

import ipaddress
from collections.abc import Collection, Mapping
from typing import Any

from cloudfit_orchestrator.clouds.base import Ownership
from cloudfit_orchestrator.clouds.openstack_api import Api, BusyError, RejectedError, UnclearError
from cloudfit_orchestrator.clouds.openstack_tags import (
    Reservation,
    group_label,
    group_of_label,
)
from cloudfit_orchestrator.clouds.openstack_volumes import make_once
from cloudfit_orchestrator.model.errors import PermanentError, RefusedError

NETWORK_TIMEOUT_S = 120.0
_PAGE = "500"


class Network:
    """The operator's network `name` (or id), and what is ours in it."""

    def __init__(self, api: Api, name: str) -> None:
        self._api = api
        self.name = name

    def require(self) -> dict[str, Any]:
        """The network. PermanentError if there is none, or more than one."""
        return self._api.remembered(("network", self.name), self._network)

    def _network(self) -> dict[str, Any]:
        tried = f"look up the network {self.name}"
        found = self._api.list("network", "/networks", "networks", tried, name=self.name)
        found = found or self._api.list("network", "/networks", "networks", tried, id=self.name)
        if len(found) != 1:
            raise PermanentError(
                f"{self._api.name} has {len(found)} networks {self.name!r}" + " that we see" * (not found),
                next_command=f"openstack --os-cloud {self._api.cloud} network list",
            )
        return found[0]

    def subnet(self) -> dict[str, Any]:
        """Its IPv4 subnet with a gateway. PermanentError unless there is exactly one."""
        return self._api.remembered(("subnet", self.name), self._subnet)

    def _subnet(self) -> dict[str, Any]:
        network = self.require()
        tried = f"look up the subnet of the network {self.name}"
        found = self._api.list("network", "/subnets", "subnets", tried, network_id=str(network["id"]), ip_version="4")
        good = [s for s in found if s.get("gateway_ip")]
        if len(good) != 1:
            raise PermanentError(
                f"network {self.name} of {self._api.name} has {len(good)} IPv4 subnets with a gateway, one is needed",
                next_command=f"openstack --os-cloud {self._api.cloud} subnet list --network {self.name}",
            )
        return good[0]

    # Ports

    def ports(self, **only: str) -> list[dict[str, Any]]:
        """All ports of the project on the network, or `only` some: a list costs Neutron what it shows."""
        return self._api.list(
            "network", "/ports", "ports", f"list the ports on {self.name}",
            network_id=str(self.require()["id"]), project_id=self._api.project(), limit=_PAGE, **only,
        )  # fmt: skip

    def reserve(self, wanted: Reservation) -> str:
        """The address for that machine-to-be: the one it got before, or a fresh one."""
        tried = f"reserve an address for {wanted.name}"

        def step() -> str | None:
            found = self._of(wanted)
            if not found:
                body = self._body(wanted)
                make = lambda: self._api.make("network", "/ports", body, tried)  # noqa: E731
                made = _told(make_once(self._api, make, lambda: self._of(wanted), tried), wanted.label())
                return _address(made) if made else None  # what was made twice is seen when the port is taken
            used = [p for p in found if p.get("device_id")]
            first = (used or found)[0]
            for extra in found:
                if extra is not first and not extra.get("device_id"):
                    self._api.delete("network", f"/ports/{extra['id']}", tried)
            return _address(first)

        return self._api.until(tried, step, NETWORK_TIMEOUT_S)

    def _of(self, wanted: Reservation) -> list[dict[str, Any]]:
        """The ports for it, oldest first: more than one only if the answer was lost, or the call carried out twice."""
        found = [p for p in self.ports(name=wanted.name) if Reservation.from_label(p.get("description")) == wanted]
        return sorted(found, key=lambda p: (str(p.get("created_at")), str(p["id"])))

    def _body(self, wanted: Reservation, **fixed: str) -> dict[str, Any]:
        """To make its port, with a `fixed` address or any."""
        port = {
            "network_id": self.require()["id"],
            "name": wanted.name,
            "description": wanted.label(),
            "fixed_ips": [{"subnet_id": self.subnet()["id"], **fixed}],
            "security_groups": [self.ensure_group(wanted.deployment, wanted.group)],
            "admin_state_up": True,
        }
        return {"port": port}

    def take(self, owner: Ownership, address: str) -> dict[str, Any]:
        """The machine's port with that address: the one that was reserved, or, if that is gone, one like it."""
        tried = f"give {owner.name} the address {address}"
        mine = Reservation.of(owner)

        def step() -> dict[str, Any] | None:
            here = self._of(mine)
            at_it = [p for p in here if _address(p) == address] or self.ports(fixed_ips=f"ip_address={address}")
            port = next((p for p in at_it if _address(p) == address), None)
            if port is None:
                try:
                    self._api.make("network", "/ports", self._body(mine, ip_address=address), tried)
                except RejectedError as error:
                    raise PermanentError(
                        f"{tried}: its port is gone, and another one cannot be made: {error.fact}",
                        next_command=f"cloudfit group destroy {owner.group}, then apply again",
                    ) from error
                return None
            if Reservation.from_label(port.get("description")) != mine:
                raise RefusedError(
                    f"{tried}: the port {port['id']} with that address does not carry its tags: not touched",
                    next_command=f"openstack --os-cloud {self._api.cloud} port show {port['id']}",
                )
            for extra in here:
                if extra is not port:
                    self.remove_port(extra)
            return port

        return self._api.until(tried, step, NETWORK_TIMEOUT_S)

    def remove_ports(self, owner: Ownership) -> None:
        """Delete the ports of that machine."""
        for port, reserved in self.of_deployment(owner.deployment):
            if reserved == Reservation.of(owner):
                self.remove_port(port)

    def remove_port(self, port: Mapping[str, Any]) -> None:
        """Delete a port of ours."""
        tried = f"delete the port {port.get('name')} ({port['id']})"

        def gone() -> bool | None:
            return True if not self._api.delete("network", f"/ports/{port['id']}", tried) else None

        self._api.until(tried, gone, NETWORK_TIMEOUT_S)

    def of_deployment(self, deployment: str) -> list[tuple[dict[str, Any], Reservation]]:
        """All ports of the deployment, and what each is for."""
        found = [(p, Reservation.from_label(p.get("description"))) for p in self.ports()]
        return [(p, r) for p, r in found if r is not None and r.deployment == deployment]

    # Security groups

    def groups(self, deployment: str, **only: str) -> list[dict[str, Any]]:
        """Our security groups, or `only` some of them, oldest first."""
        found = self._api.list(
            "network", "/security-groups", "security_groups", f"list the security groups of {deployment}",
            project_id=self._api.project(), limit=_PAGE, **only,
        )  # fmt: skip
        ours = [g for g in found if (group_of_label(g.get("description")) or ("",))[0] == deployment]
        return sorted(ours, key=lambda g: (str(g.get("created_at")), str(g["id"])))

    def ensure_group(self, deployment: str, group: str) -> str:
        """Id of the security group of that replica group."""
        return self._known_group(deployment, group)[0]

    def made_group(self, deployment: str, group: str) -> bool:
        """Whether its security group is new: of this operation, which began with it."""
        return self._known_group(deployment, group)[1]

    def _known_group(self, deployment: str, group: str) -> tuple[str, bool]:
        return self._api.remembered(("security group", deployment, group), lambda: self._group(deployment, group))

    def _group(self, deployment: str, group: str) -> tuple[str, bool]:
        text = group_label(deployment, group)
        tried = f"make the security group of {group}"
        body = {"security_group": {"name": f"{deployment}-{group}", "description": text}}
        new = False

        def there() -> list[dict[str, Any]]:
            return [g for g in self.groups(deployment, description=text) if g["description"] == text]

        def step() -> tuple[str, bool] | None:
            nonlocal new
            found = there()
            if not found:
                new = True
                make_once(self._api, lambda: self._api.make("network", "/security-groups", body, tried), there, tried)
                return None
            for extra in found[1:]:
                try:
                    self._api.delete("network", f"/security-groups/{extra['id']}", tried)
                except BusyError:
                    continue  # a machine of ours has it
            return str(found[0]["id"]), new

        return self._api.until(tried, step, NETWORK_TIMEOUT_S)

    def admit(self, deployment: str, group: str, doors: Collection[tuple[str, int]]) -> None:
        """Let exactly these (CIDR, TCP port) in."""
        tried = f"open {len(doors)} doors of the group {group}"
        wanted = {(str(ipaddress.IPv4Network(n)), port) for n, port in doors}

        def step() -> bool | None:
            identity = self.ensure_group(deployment, group)
            rules = self._api.list(
                "network", "/security-group-rules", "security_group_rules", tried,
                security_group_id=identity, direction="ingress", limit=_PAGE,
            )  # fmt: skip
            here: dict[tuple[str, int], str] = {}
            for rule in rules:
                port = rule.get("port_range_min")
                door = (str(rule.get("remote_ip_prefix")), port if isinstance(port, int) else 0)
                fits = (rule.get("protocol"), rule.get("port_range_max")) == ("tcp", port)
                if fits and door in wanted and door not in here:
                    here[door] = str(rule["id"])
                else:
                    self._api.delete("network", f"/security-group-rules/{rule['id']}", tried)
            missing = sorted(wanted - here.keys())
            return True if not missing or self._allow(identity, missing, tried) else None

        self._api.until(tried, step, NETWORK_TIMEOUT_S)

    def _allow(self, group: str, doors: Collection[tuple[str, int]], tried: str) -> bool:
        """Ask for all these rules in one call; True if the answer shows them."""
        rules = [
            {
                "security_group_id": group,
                "direction": "ingress",
                "ethertype": "IPv4",
                "protocol": "tcp",
                "port_range_min": port,
                "port_range_max": port,
                "remote_ip_prefix": source,
            }
            for source, port in doors
        ]
        try:
            answer = self._api.make("network", "/security-group-rules", {"security_group_rules": rules}, tried)
        except (BusyError, UnclearError):
            return False  # they exist, or nobody knows: the next look tells
        made = [r for r in answer.get("security_group_rules") or () if isinstance(r, dict)]
        return {(r.get("remote_ip_prefix"), r.get("port_range_min")) for r in made} == set(doors)

    def remove_group(self, group: Mapping[str, Any]) -> None:
        """Delete a security group of ours."""
        self._api.forget()
        tried = f"delete the security group {group.get('name')} ({group['id']})"

        def gone() -> bool | None:  # 409 while a port has it
            return True if not self._api.delete("network", f"/security-groups/{group['id']}", tried) else None

        self._api.until(tried, gone, NETWORK_TIMEOUT_S)


def _told(answer: Mapping[str, Any] | None, description: str) -> dict[str, Any] | None:
    """The port in an answer, if it is the one so described; None: look again."""
    port = (answer or {}).get("port")
    return port if isinstance(port, dict) and port.get("description") == description and _address(port) else None


def _address(port: Mapping[str, Any]) -> str:
    fixed = port.get("fixed_ips") or [{}]
    return str(fixed[0].get("ip_address", ""))
