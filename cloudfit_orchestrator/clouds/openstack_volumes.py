"""State disks as Cinder volumes, and their snapshots.

A machine's volume is its own until the machine is destroyed. A volume of which a snapshot is kept as evidence cannot be
deleted in Cinder: it stays behind its machine and goes with its last snapshot.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cloudfit_orchestrator.clouds.base import DiskSnapshot, Ownership
from cloudfit_orchestrator.clouds.openstack_api import Api, BusyError, RejectedError, UnclearError
from cloudfit_orchestrator.clouds.openstack_tags import KIND, PREFIX, metadata, owner_of
from cloudfit_orchestrator.model.errors import PermanentError, RefusedError, TemporaryError

VOLUME_TIMEOUT_S = 300.0  # a volume from an image of a few MB, or a copy of a few GiB
SNAPSHOT_TIMEOUT_S = 300.0
DELETE_TIMEOUT_S = 300.0  # a back end may wipe the volume first
SETTLE_S = 3.0  # after an unclear creation an API may still be at work: how long its object may take to show
STATE, OVERLAY = "state", "overlay"  # of a machine's own state; over a snapshot, thrown away with its machine
FORMAT = "cinder"
_OF_SNAPSHOT = PREFIX + "snapshot"
_PAGE = "500"


def gib(size_mib: int) -> int:
    """Cinder's sizes are whole GiB."""
    return max(1, math.ceil(size_mib / 1024))


class Volumes:
    """The volumes and volume snapshots of our deployments in one project."""

    def __init__(self, api: Api, zone: str = "", volume_type: str = "") -> None:
        """`zone`: availability zone of fresh volumes, empty for Cinder's default."""
        self._api = api
        self._zone = zone
        self._type = volume_type

    # Volumes

    def of(self, owner: Ownership) -> list[dict[str, Any]]:
        """All volumes of that machine, oldest first."""
        return [v for v in self.of_deployment(owner.deployment) if _identity(v) == owner.identity]

    def of_deployment(self, deployment: str) -> list[dict[str, Any]]:
        """All volumes with a complete tag set of the deployment, oldest first."""
        return self._mine("volumes", deployment)

    def _mine(self, kind: str, deployment: str) -> list[dict[str, Any]]:
        found = self._api.list("volume", f"/{kind}/detail", kind, f"list the {kind} of {deployment}", limit=_PAGE)
        ours = [v for v in found if (o := owner_of(v.get("metadata"))) is not None and o.deployment == deployment]
        return sorted(ours, key=lambda v: (str(v.get("created_at")), str(v["id"])))

    def ensure_state(self, owner: Ownership, size_mib: int, image: str) -> dict[str, Any]:
        """The free state volume of the machine, made from the image `image` if there is none."""
        body = {"size": gib(size_mib), "imageRef": image} | ({"volume_type": self._type} if self._type else {})
        return self._ensure(owner, STATE, body, {})

    def ensure_overlay(self, owner: Ownership, snapshot: DiskSnapshot, *, attached: bool = False) -> dict[str, Any]:
        """A throw-away volume over the snapshot, free unless it may be `attached` already."""
        found = self._get("snapshots", snapshot.id)
        if found is None:
            raise PermanentError(f"snapshot {snapshot.id} is gone", next_command="openstack volume snapshot list")
        body = {"size": found["size"], "snapshot_id": snapshot.id}
        return self._ensure(owner, OVERLAY, body, {"snapshot": snapshot.id}, attached=attached)

    def _ensure(
        self, owner: Ownership, kind: str, how: Mapping[str, Any], more: Mapping[str, str], *, attached: bool = False
    ) -> dict[str, Any]:
        tried = f"make the {kind} volume of {owner.name}"
        place = self._place() if kind == STATE else {}
        body = {
            "volume": {**how, **place, "name": owner.name, "metadata": metadata(owner, kind=kind, **more)},
        }

        def there() -> list[dict[str, Any]]:
            return [v for v in self.of(owner) if (v.get("metadata") or {}).get(KIND) == kind]

        def step() -> dict[str, Any] | None:
            found = there()
            if not found:
                make_once(self._api, lambda: self._api.make("volume", "/volumes", body, tried), there, tried)
                return None
            for extra in found[1:]:  # of a creation whose answer was lost
                if extra["status"] == "available":
                    self._api.delete("volume", f"/volumes/{extra['id']}", tried)
            volume = found[0]
            if str(volume["status"]).startswith("error"):
                said = self._messages(str(volume["id"]))
                self.remove(volume)
                raise PermanentError(
                    f"{tried}: Cinder of {self._api.name} made an {volume['status']} volume: {said}",
                    next_command=f"openstack --os-cloud {self._api.cloud} volume message list; volume type list",
                )
            if len(found) > 1 or volume["status"] not in ("available", *(["in-use"] * attached)):
                raise TemporaryError(f"it is {volume['status']}")
            return volume

        return self._api.until(tried, step, VOLUME_TIMEOUT_S)

    def _place(self) -> dict[str, str]:
        """The server's zone, if Cinder has one of that name: its zones need not be Nova's."""
        if not self._zone:
            return {}
        tried = "list Cinder's availability zones"
        zones = self._api.list("volume", "/os-availability-zone", "availabilityZoneInfo", tried)
        return {"availability_zone": self._zone} if self._zone in {z.get("zoneName") for z in zones} else {}

    def _messages(self, volume: str) -> str:
        """What Cinder tells its users of a failure."""
        try:
            found = self._api.list("volume", "/messages", "messages", "read Cinder's messages", resource_uuid=volume)
        except (PermanentError, TemporaryError):
            return "it does not say why"
        return "; ".join(str(m.get("user_message")) for m in found[:3]) or "it does not say why"

    def wait_free(self, volume: Mapping[str, Any]) -> None:
        """Until no server holds the volume any more."""
        tried = f"wait for the volume {volume['name']} to be free"

        def free() -> bool | None:
            now = self._get("volumes", str(volume["id"]))
            return True if now is None or now["status"] not in ("in-use", "detaching", "attaching") else None

        self._api.until(tried, free, DELETE_TIMEOUT_S)

    def remove(self, volume: Mapping[str, Any]) -> None:
        """Delete a volume of ours; one that is gone is no error. PermanentError if Cinder cannot."""
        self._remove("volumes", volume)

    def keep_or_remove(self, volume: Mapping[str, Any]) -> None:
        """Delete a volume of ours unless a snapshot of it stands: then it goes with that."""
        if not any(s.get("volume_id") == volume["id"] for s in self._snapshots_here()):
            self.remove(volume)

    def _remove(self, kind: str, found: Mapping[str, Any]) -> None:
        identity, noun = str(found["id"]), "volume" if kind == "volumes" else "volume snapshot"
        tried = f"delete the {noun} {found.get('name')} ({identity})"
        failures = 0

        def step() -> bool | None:
            nonlocal failures
            now = self._get(kind, identity)
            if now is None:
                return True
            if owner_of(now.get("metadata")) is None:
                raise RefusedError(f"{tried}: it does not carry our tags any more: not touched")
            if now["status"] == "error_deleting":
                raise PermanentError(
                    f"{tried}: Cinder of {self._api.name} could not delete it (error_deleting)",
                    next_command=f"an administrator: openstack {noun} set --state error {identity}; then repeat",
                )
            if now["status"] != "deleting":
                try:
                    self._api.delete("volume", f"/{kind}/{identity}", tried)
                except RejectedError as error:
                    failures += 1
                    if error.status != 400 or failures > MAX_REFUSED:  # Cinder says 400 to what is busy
                        raise
            return None

        self._api.until(tried, step, DELETE_TIMEOUT_S)

    def _get(self, kind: str, identity: str) -> dict[str, Any] | None:
        key = kind.removesuffix("s")
        document = self._api.get("volume", f"/{kind}/{identity}", f"look at the {key} {identity}")
        if document is None:
            return None
        found = document.get(key)
        if not isinstance(found, dict) or "status" not in found:
            raise UnclearError(f"look at the {key} {identity}: {self._api.name} answers with no {key}")
        return found

    # Snapshots

    def _snapshots_here(self) -> list[dict[str, Any]]:
        return self._api.list("volume", "/snapshots/detail", "snapshots", "list volume snapshots", limit=_PAGE)

    def snapshots(self, deployment: str) -> list[DiskSnapshot]:
        """Snapshots that are whole, ordered by their owners' names."""
        found = [_snapshot(s) for s in self._mine("snapshots", deployment) if s["status"] == "available"]
        return sorted(found, key=lambda s: (s.owner.name, s.taken_at))

    def all_snapshots(self, deployment: str) -> list[tuple[str, Ownership]]:
        """(id, owner) of every snapshot of the deployment in whatever state."""
        found = ((str(s["id"]), owner_of(s.get("metadata"))) for s in self._mine("snapshots", deployment))
        return [(identity, owner) for identity, owner in found if owner is not None]

    def snapshot(self, owner: Ownership, volume: Mapping[str, Any], operation: str) -> DiskSnapshot:
        """Take it, or finish one that was begun."""
        tried = f"snapshot the state volume of {owner.name}"
        tags = metadata(owner, kind="snapshot", taken_by=operation)
        body = {"snapshot": {"volume_id": volume["id"], "name": owner.name, "force": True, "metadata": tags}}
        failed = 0

        def there() -> list[dict[str, Any]]:
            found = [s for s in self._mine("snapshots", owner.deployment) if _identity(s) == owner.identity]
            return [s for s in found if s["metadata"].get(PREFIX + "taken_by") == operation]

        def step() -> DiskSnapshot | None:
            nonlocal failed
            found = there()
            if not found:
                if failed:
                    raise PermanentError(
                        f"{tried}: Cinder of {self._api.name} failed", next_command="see the log of cinder-volume"
                    )
                make_once(self._api, lambda: self._api.make("volume", "/snapshots", body, tried), there, tried)
                return None
            for extra in found[1:]:
                self._remove("snapshots", extra)
            if str(found[0]["status"]).startswith("error"):
                failed += 1
                self._remove("snapshots", found[0])
                return None
            return _snapshot(found[0]) if found[0]["status"] == "available" else None

        return self._api.until(tried, step, SNAPSHOT_TIMEOUT_S)

    def delete_snapshot(self, snapshot: DiskSnapshot, *, alive: Callable[[Ownership], bool]) -> None:
        """Delete it, and its volume if that outlived its machine (`alive`) for this alone."""
        found = self._get("snapshots", snapshot.id)
        deployment = snapshot.owner.deployment
        if found is not None:
            owner = owner_of(found.get("metadata"))
            if owner is None or owner.identity != snapshot.owner.identity:
                raise RefusedError(
                    f"volume snapshot {snapshot.id} in {self._api.name} does not carry our tags: not touched",
                    next_command=f"openstack --os-cloud {self._api.cloud} volume snapshot show {snapshot.id}",
                )
            for volume in self.of_deployment(deployment):
                if (volume["metadata"] or {}).get(_OF_SNAPSHOT) == snapshot.id and volume["status"] != "deleting":
                    raise RefusedError(
                        f"volume {volume['name']} stands on the snapshot {snapshot.id}",
                        next_command="destroy its machine first",
                    )
            self._remove("snapshots", found)
        if not alive(snapshot.owner):
            for volume in self.of(snapshot.owner):
                self.keep_or_remove(volume)


MAX_REFUSED = 20  # refusals in a row of what is busy: some 60 s


def make_once(
    api: Api, make: Callable[[], dict[str, Any]], there: Callable[[], object], tried: str
) -> dict[str, Any] | None:
    """Ask for a creation once. If its end is unclear, give the object SETTLE_S to show before anybody asks again.

    The answer; None if it was lost and the object shows.
    """
    try:
        return make()
    except (UnclearError, BusyError) as error:
        try:
            api.until(tried, lambda: there() or None, SETTLE_S)
        except TemporaryError:
            raise error from None
        return None


def _identity(found: Mapping[str, Any]) -> tuple[str, str, str, int, str] | None:
    owner = owner_of(found.get("metadata"))
    return None if owner is None else owner.identity


def _snapshot(found: Mapping[str, Any]) -> DiskSnapshot:
    owner = owner_of(found.get("metadata"))
    assert owner is not None
    operation = str(found["metadata"].get(PREFIX + "taken_by", owner.operation))
    identity = str(found["id"])
    return DiskSnapshot(identity, owner, operation, Path(FORMAT) / identity, FORMAT, str(found.get("created_at")))
