"""Which files on a host belong to which machine, and which stands on which: kept in small records beside them.

Of a machine with key K (`Ownership.key`) and a snapshot operation hashed to O:
    K.owner.json         the claim: tags and fingerprint; first to come, last to go
    K.state.<format>     the fresh state disk
    K.drive.iso          the config drive
    K.O.snapshot.json    the record of a snapshot: tags, operation, file
    K.O.top.qcow2        what the machine writes to since that snapshot
    K.attach.json        which snapshot the machine reads as its second disk
    K.attach.qcow2       the throw-away overlay over it
    K.sock  K.log*       channel and console
A snapshot *is* the file that the machine wrote to until then; from then on nobody writes to it.
"""

import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cloudfit_orchestrator.clouds.base import DiskSnapshot, MachineSpec, Ownership
from cloudfit_orchestrator.clouds.config_drive import iso_image
from cloudfit_orchestrator.clouds.libvirt_cloud.domain import Disk
from cloudfit_orchestrator.clouds.libvirt_cloud.storage import Storage
from cloudfit_orchestrator.model.errors import BadInputError, PermanentError, RefusedError

MAX_SOCKET_PATH = 107  # sun_path holds 108 bytes with its end
MAX_SNAPSHOTS = 16  # of one machine: each lengthens the chain that every read may walk
_CLAIM, _SNAPSHOT = ".owner.json", ".snapshot.json"


class MachineFiles:
    """The files of one deployment on one host."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def channel(self, owner: Ownership) -> Path:
        """Where the machine's channel socket is. PermanentError if the path is too long for a socket."""
        path = self.storage.path(f"{owner.key}.sock")
        if len(str(path).encode()) > MAX_SOCKET_PATH:
            raise PermanentError(
                f"channel socket {path}: longer than the {MAX_SOCKET_PATH} bytes of a unix socket",
                next_command="choose a shorter CLOUDFIT_HOME",
            )
        return path

    def console(self, owner: Ownership) -> Path:
        """Where the machine's console log is."""
        return self.storage.path(f"{owner.key}.log")

    # Claims

    def claim(self, spec: MachineSpec) -> None:
        """Say whose the files to come are. What an earlier, half-made machine with another fingerprint left goes.

        Only to be called while the machine does not exist.
        """
        name = spec.owner.key + _CLAIM
        record = self._record(name)
        if record is not None and record.get("fingerprint") == spec.fingerprint:
            return
        self.clear(spec.owner)
        self._write(name, {"tags": spec.owner.tags(), "fingerprint": spec.fingerprint})

    def claims(self) -> list[Ownership]:
        """Whose files there are, by their claims."""
        found = (self._record(name) for name in sorted(self.storage.names()) if name.endswith(_CLAIM))
        owners = (_owner(record) for record in found if record is not None)
        return [owner for owner in owners if owner is not None]

    def clear(self, owner: Ownership) -> None:
        """Remove all files of the machine but its snapshots. Only to be called while the machine does not exist."""
        prefix = owner.key + "."
        names = self.storage.names(prefix)
        kept = {n for n in names if n.endswith(_SNAPSHOT)}
        kept |= {r["file"] for r in map(self._record, kept) if r is not None}
        claim = owner.key + _CLAIM
        # The channel socket is in no storage pool's listing; libvirt itself removes it there.
        for name in sorted(names - kept - {claim}):
            self.storage.remove(name)
        if claim in names:
            self.storage.remove(claim)

    # Disks

    def state_disk(self, owner: Ownership, size_mib: int) -> Disk:
        """The machine's fresh state disk, made unless it is there."""
        name = f"{owner.key}.state.{self.storage.disk_format}"
        self.storage.make_disk(name, size_mib)
        return Disk(self.storage.path(name), self.storage.disk_format)

    def drive(self, owner: Ownership, user_data: bytes) -> Disk:
        """The machine's config drive."""
        name = f"{owner.key}.drive.iso"
        self.storage.write(name, iso_image(user_data))
        return Disk(self.storage.path(name), "raw")

    def overlay(self, owner: Ownership, snapshot: DiskSnapshot) -> Disk:
        """A fresh throw-away overlay over the snapshot. PermanentError if the snapshot is gone."""
        source = self._require(snapshot)
        self._write(f"{owner.key}.attach.json", {"tags": owner.tags(), "snapshot": snapshot.id, "file": source["file"]})
        return self._overlay(f"{owner.key}.attach.qcow2", source["file"])

    def attached(self, owner: Ownership) -> str | None:
        """The id of the snapshot that the machine reads, or None."""
        record = self._record(f"{owner.key}.attach.json")
        return None if record is None else str(record.get("snapshot"))

    def _overlay(self, name: str, backing: str) -> Disk:
        storage = self.storage
        storage.make_overlay(name, backing, _format(backing), storage.capacity(backing))
        return Disk(storage.path(name), "qcow2", self._chain(backing))

    def _chain(self, name: str) -> tuple[tuple[Path, str], ...]:
        """`name` and the files below it, nearest first."""
        chain: list[tuple[Path, str]] = []
        while len(chain) <= MAX_SNAPSHOTS:
            chain.append((self.storage.path(name), _format(name)))
            if not name.endswith(".top.qcow2"):
                return tuple(chain)
            record = self._record(name.removesuffix(".top.qcow2") + _SNAPSHOT)
            if record is None:
                raise PermanentError(f"disk {self.storage.path(name)}: the record of what is below it is gone")
            name = record["file"]
        raise PermanentError(f"disk {self.storage.path(name)}: more than {MAX_SNAPSHOTS} files below it")

    # Snapshots

    def snapshot(self, owner: Ownership, operation: str) -> DiskSnapshot | None:
        """The machine's snapshot by that operation, or None."""
        return self._snapshot(self._record(f"{owner.key}.{_short(operation)}{_SNAPSHOT}"))

    def begin_snapshot(self, owner: Ownership, operation: str, current: Path) -> tuple[DiskSnapshot, Path]:
        """Record that `current` becomes the snapshot, and prepare the overlay that the machine is to go on with."""
        taken = [n for n in self.storage.names(f"{owner.key}.") if n.endswith(_SNAPSHOT)]
        if len(taken) >= MAX_SNAPSHOTS:
            raise PermanentError(
                f"machine {owner.name} has {len(taken)} snapshots, the limit is {MAX_SNAPSHOTS}",
                next_command="replace the machine by a recovery, then delete its evidence",
            )
        stem = f"{owner.key}.{_short(operation)}"
        record = {
            "tags": owner.tags(),
            "operation": operation,
            "file": current.name,
            "taken_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        self._write(stem + _SNAPSHOT, record)
        overlay = self._overlay(f"{stem}.top.qcow2", current.name)
        snapshot = self._snapshot(record)
        assert snapshot is not None
        return snapshot, overlay.path

    def snapshots(self) -> list[DiskSnapshot]:
        """All snapshots with a complete record."""
        found = (self._snapshot(self._record(n)) for n in self.storage.names() if n.endswith(_SNAPSHOT))
        return sorted((s for s in found if s is not None), key=lambda s: (s.owner.name, s.taken_at, s.id))

    def drop_snapshot(self, snapshot: DiskSnapshot) -> None:
        """Delete it. RefusedError if a disk stands on it."""
        owner, stem = snapshot.owner, f"{snapshot.owner.key}.{_short(snapshot.operation)}"
        record = self._record(stem + _SNAPSHOT)
        if record is None:
            return
        found = _owner(record)
        if found is None or found.identity != owner.identity or record.get("operation") != snapshot.operation:
            raise RefusedError(f"snapshot {snapshot.id}: the record {stem}{_SNAPSHOT} does not carry its tags")
        names = self.storage.names()
        users = [f"{stem}.top.qcow2"] if f"{stem}.top.qcow2" in names else []
        readers = (self._record(n) for n in names if n.endswith(".attach.json"))
        users += [r["tags"]["replica"] for r in readers if r is not None and r.get("file") == record["file"]]
        if users:
            raise RefusedError(
                f"snapshot {snapshot.id} of {owner.name}: {', '.join(users)} still stands on it",
                next_command="destroy the machine that uses it",
            )
        self.storage.remove(record["file"])
        self.storage.remove(stem + _SNAPSHOT)

    def _require(self, snapshot: DiskSnapshot) -> dict[str, Any]:
        record = self._record(f"{snapshot.owner.key}.{_short(snapshot.operation)}{_SNAPSHOT}")
        if record is None or record["file"] not in self.storage.names(snapshot.owner.key):
            raise PermanentError(f"snapshot {snapshot.id} of {snapshot.owner.name} does not exist")
        return record

    def _snapshot(self, record: dict[str, Any] | None) -> DiskSnapshot | None:
        owner = None if record is None else _owner(record)
        if record is None or owner is None:
            return None
        return DiskSnapshot(
            id=f"{owner.key}.{_short(record['operation'])}",
            owner=owner,
            operation=record["operation"],
            path=self.storage.path(record["file"]),
            format=_format(record["file"]),
            taken_at=record["taken_at"],
        )

    # Records

    def _record(self, name: str) -> dict[str, Any] | None:
        data = self.storage.read(name)
        if data is None:
            return None
        try:
            record = json.loads(data)
        except ValueError:
            return None  # not ours, or cut off: an incomplete tag set
        return record if isinstance(record, dict) else None

    def _write(self, name: str, record: dict[str, Any]) -> None:
        self.storage.write(name, json.dumps(record, sort_keys=True).encode())


def _format(name: str) -> str:
    return name.rsplit(".", 1)[1]


def _short(operation: str) -> str:
    return hashlib.sha256(operation.encode()).hexdigest()[:8]


def _owner(record: dict[str, Any]) -> Ownership | None:
    try:
        return Ownership.from_tags(record["tags"])
    except (BadInputError, KeyError, TypeError):
        return None
