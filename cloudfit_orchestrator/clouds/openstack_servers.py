"""Our servers in Nova: looked up by tags, created once, brought into a state by looking, acting and looking again."""

import base64
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from cloudfit_orchestrator.clouds.base import MachineState, Ownership
from cloudfit_orchestrator.clouds.openstack_api import Api, RejectedError, UnclearError
from cloudfit_orchestrator.clouds.openstack_tags import (
    FINGERPRINT,
    deployment_tag,
    group_label,
    group_of_label,
    group_tag,
    metadata,
    owner_of,
)
from cloudfit_orchestrator.clouds.openstack_volumes import make_once
from cloudfit_orchestrator.model.errors import PermanentError, RefusedError, TemporaryError

SERVER_TIMEOUT_S = 300.0  # a first boot fetches the image to the host; libvirt on a loaded host takes a minute
SERVER_PACE = 4  # a listing each two seconds, however many servers are waited for
ACTION_TIMEOUT_S = 180.0
DELETE_TIMEOUT_S = 300.0
_PAGE = "500"
_STATES = {
    "ACTIVE": MachineState.RUNNING,
    "REBOOT": MachineState.RUNNING,
    "HARD_REBOOT": MachineState.RUNNING,
    "PASSWORD": MachineState.RUNNING,
    "PAUSED": MachineState.PAUSED,
    "SUSPENDED": MachineState.PAUSED,
}
_TASK, _LAUNCHED = "OS-EXT-STS:task_state", "OS-SRV-USG:launched_at"


@dataclass(frozen=True, slots=True)
class Boot:
    """What a server is made of; all ids."""

    image: str
    flavor: str
    port: str | None
    volume: str | None
    zone: str
    group: str
    state: str  # volume | instance: where the machine has its state; kept in the server's metadata
    drive: bytes | None = field(default=None, repr=False)  # user data for a config drive


def state_of(server: Mapping[str, Any]) -> MachineState:
    """What Nova's status means. What is neither running nor paused does nothing."""
    return _STATES.get(str(server.get("status")), MachineState.STOPPED)


def _is(server: Mapping[str, Any], owner: Ownership) -> bool:
    found = owner_of(server.get("metadata"))
    return found is not None and found.identity == owner.identity


def fault_of(server: Mapping[str, Any]) -> str:
    """Nova's own words of why a server failed."""
    fault = server.get("fault") or {}
    return str(fault.get("message") or "it does not say why")


class Servers:
    """The servers of our deployments in one project."""

    def __init__(self, api: Api) -> None:
        self._api = api

    def of_deployment(self, deployment: str) -> list[dict[str, Any]]:
        """All servers with a complete tag set of the deployment, oldest first; none that is being deleted."""
        found = self._list(f"list the servers of {deployment}", tags=deployment_tag(deployment))
        return [s for s in found if (o := owner_of(s.get("metadata"))) is not None and o.deployment == deployment]

    def _list(self, tried: str, **only: str) -> list[dict[str, Any]]:
        found = self._api.list("compute", "/servers/detail", "servers", tried, **only, limit=_PAGE)
        alive = [s for s in found if s.get("status") not in ("DELETED", "SOFT_DELETED")]
        return sorted(alive, key=lambda s: (str(s.get("created")), str(s["id"])))

    def _brief(self, tried: str, **only: str) -> list[dict[str, Any]]:
        """Id and name: for details Nova asks Neutron about every server in the list."""
        return self._api.list("compute", "/servers", "servers", tried, **only, limit=_PAGE)

    def all_of(self, owner: Ownership, *, alone: bool = False, known: bool = False) -> list[dict[str, Any]]:
        """Every server of that identity, oldest first: more than one only after a creation whose answer was lost.

        `alone`: RefusedError if there is none and a stranger wears its name. `known`: there has been one just now.
        """
        # The lists are of the whole group: threads that make its machines at the same time share them.
        tried, of_group = f"look up the machines of {owner.group}", group_tag(owner)
        if known or self._brief(tried, tags=of_group):
            found = [s for s in self._list(tried, tags=of_group) if _is(s, owner)]
            if found:
                return found
        pattern = f"^{owner.deployment}-{owner.group}-".replace(".", r"\.")
        homonyms = [str(s["id"]) for s in self._brief(tried, name=pattern) if s.get("name") == owner.name]
        named = [s for s in map(self.get, homonyms) if s is not None]
        found = [s for s in named if _is(s, owner)]  # somebody took the tag away, which identifies nothing
        if alone and named and not found:
            raise RefusedError(
                f"server {owner.name} ({named[0]['id']}) in {self._api.name} wears the name of a machine of ours, "
                "but not its tags: not touched",
                next_command=f"openstack --os-cloud {self._api.cloud} server show {named[0]['id']}; rename it",
            )
        return found

    def _ours(self, identity: str, owner: Ownership) -> list[dict[str, Any]]:
        """The server with that id, if it is that machine: lists may be late to show what was just made."""
        server = self.get(identity) if identity else None
        return [server] if server is not None and _is(server, owner) else []

    def _still_built(self, identity: str, owner: Ownership) -> bool:
        """Whether Nova is building that server: a list of those that are, which all threads that wait share."""
        tried = f"list the servers of {owner.deployment} that are being built"
        found = self._brief(tried, tags=deployment_tag(owner.deployment), status="BUILD")
        return any(s["id"] == identity for s in found)

    def find(self, owner: Ownership) -> dict[str, Any] | None:
        """The server of that identity. RefusedError if there is none and a stranger wears its name."""
        return next(iter(self.all_of(owner, alone=True)), None)

    def get(self, identity: str) -> dict[str, Any] | None:
        """The server with that id, or None."""
        document = self._api.get("compute", f"/servers/{identity}", f"look at the server {identity}")
        if document is None:
            return None
        server = document.get("server")
        if not isinstance(server, dict) or server.get("id") != identity or "status" not in server:
            raise UnclearError(f"look at the server {identity}: {self._api.name} answers with no such server")
        return None if server["status"] in ("DELETED", "SOFT_DELETED") else server

    def create(self, owner: Ownership, fingerprint: str, boot: Callable[[], Boot]) -> dict[str, Any]:
        """The running or paused server of that identity; `boot` is asked for only if it must be made.

        One that never ran is made anew, once; one that is stopped is started. PermanentError with Nova's fault text.
        """
        tried = f"create the server {owner.name}"
        failed, asked, made = "", False, ""

        def step() -> dict[str, Any] | None:
            nonlocal failed, asked, made
            if made and self._still_built(made, owner):
                raise TemporaryError("it is BUILD")
            found = self.all_of(owner, alone=True, known=bool(made)) or self._ours(made, owner)
            for extra in found[1:]:
                self.remove(extra)
            if not found:
                if failed and asked:
                    raise PermanentError(
                        f"{tried}: Nova of {self._api.name} ended in ERROR: {failed}",
                        next_command=f"openstack --os-cloud {self._api.cloud} hypervisor list, flavor show, quota show",
                    )
                body = self._body(owner, fingerprint, boot())
                asked = True
                there = lambda: self.all_of(owner)  # noqa: E731
                answer = make_once(self._api, lambda: self._api.make("compute", "/servers", body, tried), there, tried)
                server = (answer or {}).get("server")
                made = str(server.get("id", "")) if isinstance(server, dict) else ""
                return None
            server = found[0]
            if server["metadata"].get(FINGERPRINT) != fingerprint:
                raise RefusedError(
                    f"machine {owner.name} exists in {self._api.name} with another specification",
                    next_command="destroy it, or ask for the next incarnation",
                )
            status = server["status"]
            if status == "ERROR" and not server.get(_LAUNCHED):
                failed = fault_of(server)
                self.remove(server)
                return None
            if status == "BUILD" or server.get(_TASK):
                raise TemporaryError(f"it is {status}, {server.get(_TASK) or 'no task'}")
            return server

        server = self._api.until(tried, step, SERVER_TIMEOUT_S, SERVER_PACE)
        return server if state_of(server) is not MachineState.STOPPED else self.start(str(server["id"]), owner)

    def _body(self, owner: Ownership, fingerprint: str, boot: Boot) -> dict[str, Any]:
        disks: list[dict[str, Any]] = [
            {
                "uuid": boot.image, "source_type": "image", "destination_type": "local", "boot_index": 0,
                "delete_on_termination": True,
            }
        ]  # fmt: skip
        if boot.volume is not None:
            disks.append(
                {
                    "uuid": boot.volume, "source_type": "volume", "destination_type": "volume", "boot_index": -1,
                    "delete_on_termination": False,
                }
            )  # fmt: skip
        server: dict[str, Any] = {
            "name": owner.name,
            "imageRef": boot.image,
            "flavorRef": boot.flavor,
            "networks": [{"port": boot.port}] if boot.port else "none",
            "block_device_mapping_v2": disks,
            "metadata": metadata(owner, fingerprint=fingerprint, state=boot.state),
            "tags": [deployment_tag(owner.deployment), group_tag(owner)],
            "config_drive": boot.drive is not None,
        }
        if boot.drive is not None:
            server["user_data"] = base64.b64encode(boot.drive).decode()
        if boot.zone:
            server["availability_zone"] = boot.zone
        return {"server": server, "os:scheduler_hints": {"group": boot.group}}

    # States

    def reach(
        self, identity: str, owner: Ownership, action: str, wanted: Collection[str], allowed: Collection[str]
    ) -> dict[str, Any]:
        """Do `action` unless the status is in `wanted`. PermanentError if it is gone or not in `allowed`."""
        tried = f"{action} the server {owner.name}"

        def step() -> dict[str, Any] | None:
            server = self._present(identity, owner, tried)
            if server.get(_TASK):
                raise TemporaryError(f"it is {server['status']}, {server[_TASK]}")
            if server["status"] in wanted:
                return server
            if server["status"] not in allowed:
                fault = f": {fault_of(server)}" * (server["status"] == "ERROR")
                raise PermanentError(
                    f"{tried}: it is {server['status']}{fault}", next_command=f"cloudfit group show {owner.group}"
                )
            self._act(identity, {action: None}, tried)
            return None

        return self._api.until(tried, step, ACTION_TIMEOUT_S)

    def _present(self, identity: str, owner: Ownership, tried: str) -> dict[str, Any]:
        server = self.get(identity)
        if server is None:
            raise PermanentError(
                f"{tried}: it does not exist in {self._api.name}", next_command=f"cloudfit group show {owner.group}"
            )
        if not _is(server, owner):
            raise RefusedError(f"{tried}: it does not carry our tags any more: not touched")
        return server

    def _act(self, identity: str, body: Mapping[str, Any], tried: str) -> None:
        try:
            self._api.make("compute", f"/servers/{identity}/action", body, tried)
        except RejectedError as error:
            if error.status != 404:  # gone in between: the next look says it
                raise

    def start(self, identity: str, owner: Ownership) -> dict[str, Any]:
        """Boot it. See `reach`."""
        return self.reach(identity, owner, "os-start", ("ACTIVE", "PAUSED"), ("SHUTOFF", "STOPPED"))

    def pause(self, identity: str, owner: Ownership) -> dict[str, Any]:
        """Halt its processors. See `reach`."""
        return self.reach(identity, owner, "pause", ("PAUSED", "SUSPENDED"), ("ACTIVE",))

    def resume(self, identity: str, owner: Ownership) -> dict[str, Any]:
        """Undo `pause`. See `reach`."""
        return self.reach(identity, owner, "unpause", ("ACTIVE",), ("PAUSED",))

    def stop(self, identity: str, owner: Ownership) -> dict[str, Any]:
        """Cut its power; a paused one goes on for an instant first, as Nova stops no paused server."""
        server = self._present(identity, owner, f"stop the server {owner.name}")
        if server["status"] == "PAUSED":
            self.resume(identity, owner)
        return self.reach(identity, owner, "os-stop", ("SHUTOFF", "STOPPED"), ("ACTIVE", "ERROR"))

    def attach(self, identity: str, owner: Ownership, volume: str) -> None:
        """Give a running server the volume as its next disk."""
        tried = f"attach the volume {volume} to {owner.name}"
        body = {"volumeAttachment": {"volumeId": volume}}

        def step() -> bool | None:
            server = self._present(identity, owner, tried)
            if any(v.get("id") == volume for v in server.get("os-extended-volumes:volumes_attached") or []):
                attached = self._api.get("volume", f"/volumes/{volume}", tried)
                return True if ((attached or {}).get("volume") or {}).get("status") == "in-use" else None
            if server["status"] != "ACTIVE":
                raise PermanentError(f"{tried}: it is {server['status']}", next_command="start it")
            self._api.make("compute", f"/servers/{identity}/os-volume_attachments", body, tried)
            return None

        self._api.until(tried, step, ACTION_TIMEOUT_S)

    def remove(self, server: Mapping[str, Any]) -> None:
        """Delete a server of ours and wait until it is gone; one that is gone is no error."""
        identity = str(server["id"])
        tried = f"delete the server {server['name']} ({identity})"

        def step() -> bool | None:
            now = self.get(identity)
            if now is None:
                return True
            if owner_of(now.get("metadata")) is None:
                raise RefusedError(f"{tried}: it does not carry our tags any more: not touched")
            if now.get(_TASK) != "deleting" or now["status"] == "ERROR":
                self._api.delete("compute", f"/servers/{identity}", tried)
            return None

        try:
            self._api.until(tried, step, DELETE_TIMEOUT_S)
        except TemporaryError as error:
            raise TemporaryError(
                error.fact, next_command=f"openstack --os-cloud {self._api.cloud} server show {identity}"
            ) from error

    # Server groups

    def groups(self, deployment: str) -> list[dict[str, Any]]:
        """Our server groups."""
        found = self._api.list(
            "compute", "/os-server-groups", "server_groups", f"list the server groups of {deployment}", limit=_PAGE
        )
        ours = [g for g in found if (group_of_label(g.get("name")) or ("",))[0] == deployment]
        return sorted(ours, key=lambda g: str(g["id"]))

    def ensure_group(self, deployment: str, group: str, *, new: bool = False) -> str:
        """Id of the server group of that replica group: its machines stand on different hosts where there are enough.

        Soft, because a recovery has two machines of one replica for a while, and must not fail for want of a host.
        `new`: probably there is none, and to list hundreds takes Nova seconds, so it is made before anybody looks; of
        two the one without members goes.
        """
        what = ("server group", deployment, group)
        return self._api.remembered(what, lambda: self._group(deployment, group, new=new))

    def _group(self, deployment: str, group: str, *, new: bool) -> str:
        name = group_label(deployment, group)
        tried = f"make the server group of {group}"
        body = {"server_group": {"name": name, "policy": "soft-anti-affinity"}}

        def there() -> list[dict[str, Any]]:
            return [g for g in self.groups(deployment) if g["name"] == name]

        def step() -> str | None:
            nonlocal new
            found = [] if new else sorted(there(), key=lambda g: not g.get("members"))
            if not found:
                new = False
                make_once(self._api, lambda: self._api.make("compute", "/os-server-groups", body, tried), there, tried)
                return None
            for extra in found[1:]:
                if not extra.get("members"):
                    self.remove_group(extra)
            return str(found[0]["id"])

        return self._api.until(tried, step, ACTION_TIMEOUT_S)

    def remove_group(self, group: Mapping[str, Any]) -> None:
        """Delete a server group of ours; one that is gone is no error."""
        self._api.forget()
        tried = f"delete the server group {group['name']}"
        self._api.until(
            tried,
            lambda: True if not self._api.delete("compute", f"/os-server-groups/{group['id']}", tried) else None,
            ACTION_TIMEOUT_S,
        )
