"""Snapshots where there is no Cinder: server images, which Nova takes of a machine's one disk, root and state in one.

A server that runs goes on meanwhile: libvirt copies its disk as it is at one instant, as after a loss of power. One
that is paused would be written to disk with its memory, and lose the wormhole's channel. A recovery machine boots from
the image itself, so that what it writes goes to Nova's own overlay; for that the image gets the recovery image's
kernel, initramfs and command line, and nothing that lies in it is run.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cloudfit_orchestrator.clouds.base import DiskSnapshot, Ownership
from cloudfit_orchestrator.clouds.openstack_api import Api, UnclearError
from cloudfit_orchestrator.clouds.openstack_images import HARDWARE
from cloudfit_orchestrator.clouds.openstack_servers import Servers
from cloudfit_orchestrator.clouds.openstack_tags import KIND, PREFIX, metadata, owner_of
from cloudfit_orchestrator.clouds.openstack_volumes import make_once
from cloudfit_orchestrator.model.errors import PermanentError, RefusedError

SNAPSHOT_TIMEOUT_S = 900.0  # Nova copies the disk and uploads what is used of it
DELETE_TIMEOUT_S = 300.0
FORMAT = "glance"
SNAPSHOT = "snapshot"  # the kind of these images
MAX_FAILED = 2  # snapshots of one operation that Nova did not bring to an end
_TAKEN_BY = PREFIX + "taken_by"
_TASK = "OS-EXT-STS:task_state"


class ServerImages:
    """The server images of our deployments in one project."""

    def __init__(self, api: Api, servers: Servers) -> None:
        """Asks for nothing yet."""
        self._api = api
        self._servers = servers

    def _mine(self, deployment: str) -> list[dict[str, Any]]:
        """All with a complete tag set of the deployment, whatever their state, oldest first."""
        found = self._api.list(
            "image", "/images", "images", f"list the server images of {deployment}",
            **{KIND: SNAPSHOT, PREFIX + "deployment": deployment}, owner=self._api.project(), limit="100",
        )  # fmt: skip
        ours = [
            i for i in found
            if i.get(KIND) == SNAPSHOT and (o := owner_of(i)) is not None and o.deployment == deployment
        ]  # fmt: skip
        return sorted(ours, key=lambda i: (str(i.get("created_at")), str(i["id"])))

    def snapshots(self, deployment: str) -> list[DiskSnapshot]:
        """Those that are whole, ordered by their owners' names."""
        found = [_snapshot(i) for i in self._mine(deployment) if i.get("status") == "active"]
        return sorted(found, key=lambda s: (s.owner.name, s.taken_at))

    def all_snapshots(self, deployment: str) -> list[tuple[str, Ownership]]:
        """(id, owner) of every one of the deployment in whatever state."""
        found = ((str(i["id"]), owner_of(i)) for i in self._mine(deployment))
        return [(identity, owner) for identity, owner in found if owner is not None]

    def snapshot(self, owner: Ownership, server: str, operation: str) -> DiskSnapshot:
        """Take it, or finish one that was begun."""
        tried = f"take an image of the server {owner.name}"
        body = {"createImage": {"name": owner.name, "metadata": metadata(owner, kind=SNAPSHOT, taken_by=operation)}}
        asked = 0

        def there() -> list[dict[str, Any]]:
            found = [i for i in self._mine(owner.deployment) if i.get(_TAKEN_BY) == operation]
            return [i for i in found if (o := owner_of(i)) is not None and o.identity == owner.identity]

        def step() -> DiskSnapshot | None:
            nonlocal asked
            found = there()
            whole = [i for i in found if i.get("status") == "active"]
            if whole:
                for extra in found:
                    if extra is not whole[0]:
                        self._remove(extra)
                return _snapshot(whole[0])
            now = self._servers.get(server)
            if now is None:
                raise PermanentError(
                    f"{tried}: it does not exist in {self._api.name}", next_command=f"cloudfit group show {owner.group}"
                )
            if now.get(_TASK):
                return None  # it is taken, or something else is going on
            for failed in there():  # no task, so nobody works on it any more; it may be whole since the look above
                if failed.get("status") == "active":
                    return None
                self._remove(failed)
            if asked == MAX_FAILED:
                raise PermanentError(
                    f"{tried}: Nova of {self._api.name} did not bring it to an end, {asked} times",
                    next_command=f"openstack --os-cloud {self._api.cloud} server event list {server}, image list",
                )
            asked += 1
            make_once(
                self._api, lambda: self._api.make("compute", f"/servers/{server}/action", body, tried), there, tried
            )
            return None

        return self._api.until(tried, step, SNAPSHOT_TIMEOUT_S)

    def boot_by(self, snapshot: DiskSnapshot, properties: Mapping[str, str]) -> str:
        """Let what boots from it start by these properties, not by those that its server had; its id."""
        tried = f"set how the image {snapshot.id} boots"
        found = self._present(snapshot)
        if found is None:
            raise PermanentError(f"image {snapshot.id} is gone", next_command="openstack image list")
        wanted = {**properties, **HARDWARE}
        if any(found.get(name) != value for name, value in wanted.items()):
            changes = [{"op": "add", "path": f"/{name}", "value": value} for name, value in wanted.items()]
            self._api.patch(f"/images/{snapshot.id}", changes, tried)
        return snapshot.id

    def _present(self, snapshot: DiskSnapshot) -> dict[str, Any] | None:
        tried = f"look at the image {snapshot.id}"
        found = self._api.get("image", f"/images/{snapshot.id}", tried)
        if found is None:
            return None
        if found.get("id") != snapshot.id or "status" not in found:
            raise UnclearError(f"{tried}: {self._api.name} answers with no image")
        owner = owner_of(found)
        if found.get(KIND) != SNAPSHOT or owner is None or owner.identity != snapshot.owner.identity:
            raise RefusedError(
                f"image {snapshot.id} in {self._api.name} does not carry our tags: not touched",
                next_command=f"openstack --os-cloud {self._api.cloud} image show {snapshot.id}",
            )
        return found

    def delete_snapshot(self, snapshot: DiskSnapshot) -> None:
        """Delete it; RefusedError if a machine of ours stands on it, or it is not ours."""
        found = self._present(snapshot)
        if found is None:
            return
        for server in self._servers.of_deployment(snapshot.owner.deployment):
            if (server.get("image") or {}).get("id") == snapshot.id:
                raise RefusedError(
                    f"server {server['name']} stands on the snapshot {snapshot.id}",
                    next_command="destroy its machine first",
                )
        self._remove(found)

    def _remove(self, image: Mapping[str, Any]) -> None:
        tried = f"delete the server image {image.get('name')} ({image['id']})"

        def gone() -> bool | None:  # 409 while Nova reads it
            return True if not self._api.delete("image", f"/images/{image['id']}", tried) else None

        self._api.until(tried, gone, DELETE_TIMEOUT_S)


def _snapshot(found: Mapping[str, Any]) -> DiskSnapshot:
    owner = owner_of(found)
    assert owner is not None
    identity = str(found["id"])
    operation = str(found.get(_TAKEN_BY, owner.operation))
    return DiskSnapshot(identity, owner, operation, Path(FORMAT) / identity, FORMAT, str(found.get("created_at")))
