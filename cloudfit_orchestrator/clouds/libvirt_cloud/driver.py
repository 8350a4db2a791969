"""The libvirt driver: machines, networks and snapshots of one libvirt daemon. See `clouds.base` for the rules."""

import hashlib
import threading
import xml.etree.ElementTree as ET
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import libvirt

from cloudfit_orchestrator.clouds.base import (
    Cloud,
    CloudFacts,
    DiskSnapshot,
    Machine,
    MachineSpec,
    MachineState,
    NetworkSpec,
    Orphan,
    OrphanKind,
    Ownership,
    check_name,
)
from cloudfit_orchestrator.clouds.libvirt_cloud.acceleration import Verdict, probe
from cloudfit_orchestrator.clouds.libvirt_cloud.connection import NOT_FOUND, Connection, ensure_daemons, trying
from cloudfit_orchestrator.clouds.libvirt_cloud.domain import (
    Disk,
    Files,
    Host,
    Seen,
    disk_xml,
    domain_xml,
    machine_uuid,
    read_domain,
    snapshot_xml,
)
from cloudfit_orchestrator.clouds.libvirt_cloud.files import MachineFiles
from cloudfit_orchestrator.clouds.libvirt_cloud.network import Networks
from cloudfit_orchestrator.clouds.libvirt_cloud.storage import LocalStorage, PoolStorage, Storage
from cloudfit_orchestrator.model.errors import PermanentError, RefusedError

LOCKS = 64  # machines are spread over so many locks: two calls for one machine wait for each other
REMOTE_HOME = Path("/var/lib/cloudfit")
_PAUSED = frozenset({libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PMSUSPENDED})
_OFF = frozenset({libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_CRASHED, libvirt.VIR_DOMAIN_NOSTATE})
_UNDEFINE = libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
_SNAPSHOT = (
    libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY
    | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC
    | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
    | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REUSE_EXT
)


class LibvirtCloud(Cloud):
    """One libvirt daemon: `qemu:///system`, `qemu:///session` (no networks), `qemu+ssh://user@host/system`."""

    driver: ClassVar[str] = "libvirt"
    isolated: ClassVar[bool] = True

    def __init__(
        self,
        *,
        home: Path,
        uri: str = "qemu:///system",
        remote_home: Path = REMOTE_HOME,
        accelerator: Verdict | None = None,
    ) -> None:
        """`home`: CLOUDFIT_HOME here; `remote_home`: the same on a remote host. `accelerator`: instead of a probe.

        Starts the daemons of `qemu:///system` where no init system does; connects when first needed.
        """
        self.uri = uri
        self._connection = Connection(uri)
        self._home = home
        self._remote_home = remote_home
        self._verdict = accelerator
        self._verdict_lock = threading.Lock()
        self._networks = Networks(self._connection)
        self._locks = tuple(threading.RLock() for _ in range(LOCKS))
        if uri == "qemu:///system":
            ensure_daemons()

    # The host

    @property
    def _simulated(self) -> bool:
        return self.uri.startswith("test:")

    def _label(self) -> str | None:
        """The `+uid:+gid` that the host's daemon runs QEMU as; None where QEMU runs as we do."""
        if not self._connection.system:
            return None
        with trying(f"read the capabilities of {self.uri}"):
            capabilities = ET.fromstring(self._connection.get().getCapabilities())  # noqa: S314  from the daemon
        for model in capabilities.iterfind("host/secmodel"):
            if model.findtext("model") == "dac":
                return model.findtext("baselabel")
        return None

    def _storage(self, deployment: str) -> Storage:
        check_name("deployment", deployment)
        label = self._label()
        user = None
        if label is not None:
            uid, gid = (int(part) for part in label.replace("+", "").split(":"))
            user = (uid, gid)
        if self._connection.remote:
            root = self._remote_home / "machines" / deployment
            return PoolStorage(self._connection, f"cloudfit-{deployment}", root, user)
        return LocalStorage(self._home / "machines" / deployment, user)

    def _files(self, deployment: str) -> MachineFiles:
        return MachineFiles(self._storage(deployment))

    def acceleration(self) -> Verdict:
        """KVM or TCG, by a boot probe the first time. Cached in CLOUDFIT_HOME a host and QEMU version."""
        with self._verdict_lock:
            if self._verdict is None:
                if self._simulated:
                    self._verdict = Verdict("none", "libvirt's test driver runs nothing")
                else:
                    cache = self._home / "acceleration.json"
                    self._verdict = probe(self._connection, self._storage("probe"), cache, self._label())
            return self._verdict

    def _host(self) -> Host:
        return Host("test" if self._simulated else self.acceleration().domain_type, self._label())

    def facts(self) -> CloudFacts:
        connection = self._connection.get()
        with trying(f"ask {self.uri} for its version"):
            libvirt_version, qemu_version = connection.getLibVersion(), connection.getVersion()
        verdict = self.acceleration()
        return CloudFacts(
            driver=self.driver,
            uri=self.uri,
            version=f"libvirt {_version(libvirt_version)}, QEMU {_version(qemu_version)}",
            accelerator=verdict.accelerator,
            reason=verdict.reason,
            isolated=True,
        )

    @contextmanager
    def _locked(self, owner: Ownership) -> Iterator[None]:
        with self._locks[int(owner.key, 16) % LOCKS]:
            yield

    # Networks

    def ensure_network(self, deployment: str, network: NetworkSpec) -> None:
        check_name("deployment", deployment)
        if not self._simulated and not self._connection.system:
            raise RefusedError(
                f"network {network.name}: {self.uri} may not make bridges", next_command="use qemu:///system, as root"
            )
        self._networks.ensure(deployment, network)

    def delete_network(self, deployment: str, name: str) -> None:
        self._networks.delete(deployment, name)
        if not self.machines(deployment):
            self._storage(deployment).release()

    # Machines

    def _lookup(self, owner: Ownership) -> tuple[Any, Seen] | None:
        """The domain of that identity. RefusedError if a stranger wears its name or UUID."""
        connection = self._connection.get()
        uuid = machine_uuid(owner)
        with trying(f"look up the machine {owner.name} on {self.uri}"):
            for lookup, by in ((connection.lookupByUUIDString, uuid), (connection.lookupByName, owner.name)):
                try:
                    domain = lookup(by)
                    seen = read_domain(domain.XMLDesc(0))
                except libvirt.libvirtError as error:
                    if error.get_error_code() in NOT_FOUND:
                        continue
                    raise
                if seen.owner is None or seen.owner.identity != owner.identity or seen.uuid != uuid:
                    raise RefusedError(
                        f"domain {seen.name} (uuid {seen.uuid}) on {self.uri} wears the name of a machine of ours, but "
                        "not its tags: not touched",
                        next_command=f"virsh -c '{self.uri}' dumpxml {seen.uuid}",
                    )
                return domain, seen
        return None

    def _require(self, owner: Ownership) -> tuple[Any, Seen]:
        found = self._lookup(owner)
        if found is None:
            raise PermanentError(
                f"machine {owner.name} does not exist on {self.uri}", next_command="cloudfit group show"
            )
        return found

    def _state(self, domain: Any) -> MachineState:
        state, _reason = domain.state()
        if state in _PAUSED:
            return MachineState.PAUSED
        return MachineState.STOPPED if state in _OFF else MachineState.RUNNING

    def _machine(self, domain: Any, seen: Seen) -> Machine:
        assert seen.owner is not None
        files = self._files(seen.owner.deployment)
        return Machine(
            id=seen.uuid,
            owner=seen.owner,
            state=self._state(domain),
            channel=seen.channel or files.channel(seen.owner),
            console=seen.console or files.console(seen.owner),
            state_disk=seen.state_disk.path if seen.state_disk is not None else None,
            reference={"driver": self.driver, "uri": self._connection.local_uri, "uuid": seen.uuid},
        )

    def _seen(self, owner: Ownership) -> Machine:
        domain, seen = self._require(owner)
        with trying(f"read the state of {owner.name} on {self.uri}"):
            return self._machine(domain, seen)

    def create(self, spec: MachineSpec) -> Machine:
        owner = spec.owner
        with self._locked(owner):
            found = self._lookup(owner)
            if found is None:
                domain = self._define(spec)
            else:
                domain, seen = found
                if seen.fingerprint != spec.fingerprint:
                    raise RefusedError(
                        f"machine {owner.name} exists on {self.uri} with another specification",
                        next_command="destroy it, or ask for the next incarnation",
                    )
            self._boot(domain, owner)
            return self._seen(owner)

    def _define(self, spec: MachineSpec) -> Any:
        owner = spec.owner
        connection, host, files = self._connection.get(), self._host(), self._files(owner.deployment)
        network = None if spec.network is None else self._networks.require(owner.deployment, spec.network.name)
        parts = {p.name: p for p in spec.manifest.parts}
        missing = {"kernel", "initramfs", "root"} - parts.keys()
        if missing:
            raise PermanentError(f"image {spec.manifest.name} has no {', '.join(sorted(missing))}")
        paths = {n: files.storage.place(spec.image_dir / parts[n].file, _file_digest(spec, n)) for n in parts}
        on_host = Files(paths["kernel"], paths["initramfs"], paths["root"], files.channel(owner), files.console(owner))
        files.claim(spec)
        second: Disk | None = None
        if spec.state_disk is not None:
            second = files.state_disk(owner, spec.state_disk.size_mib)
        elif spec.attach is not None:
            second = files.overlay(owner, spec.attach)
        drive = None if spec.drive is None else files.drive(owner, spec.drive)
        with trying(f"define the machine {owner.name} on {self.uri}"):
            return connection.defineXML(domain_xml(spec, host, on_host, second, network, drive))

    def _boot(self, domain: Any, owner: Ownership) -> None:
        with trying(f"start the machine {owner.name} on {self.uri}"):
            if self._state(domain) is MachineState.STOPPED:
                domain.create()

    def find(self, owner: Ownership) -> Machine | None:
        found = self._lookup(owner)
        if found is None:
            return None
        try:
            with trying(f"read the state of {owner.name} on {self.uri}"):
                return self._machine(*found)
        except PermanentError as error:
            if _gone(error):
                return None
            raise

    def machines(self, deployment: str) -> Sequence[Machine]:
        connection = self._connection.get()
        found = []
        with trying(f"list the machines of {deployment} on {self.uri}"):
            for domain in connection.listAllDomains(0):
                try:
                    seen = read_domain(domain.XMLDesc(0))
                    ours = seen.owner is not None and seen.uuid == machine_uuid(seen.owner)
                    if ours and seen.owner is not None and seen.owner.deployment == deployment:
                        found.append(self._machine(domain, seen))
                except libvirt.libvirtError as error:
                    if error.get_error_code() not in NOT_FOUND:  # one that went while we looked is not there
                        raise
        return sorted(found, key=lambda m: m.owner.name)

    def start(self, machine: Machine) -> Machine:
        with self._locked(machine.owner):
            domain, _ = self._require(machine.owner)
            self._boot(domain, machine.owner)
            return self._seen(machine.owner)

    def pause(self, machine: Machine) -> Machine:
        with self._locked(machine.owner):
            domain, _ = self._require(machine.owner)
            with trying(f"pause the machine {machine.owner.name} on {self.uri}"):
                if self._state(domain) is not MachineState.PAUSED:
                    domain.suspend()
            return self._seen(machine.owner)

    def resume(self, machine: Machine) -> Machine:
        with self._locked(machine.owner):
            domain, _ = self._require(machine.owner)
            with trying(f"resume the machine {machine.owner.name} on {self.uri}"):
                if self._state(domain) is not MachineState.RUNNING:
                    domain.resume()
            return self._seen(machine.owner)

    def stop(self, machine: Machine) -> Machine:
        with self._locked(machine.owner):
            domain, _ = self._require(machine.owner)
            self._power_off(domain, machine.owner)
            return self._seen(machine.owner)

    def _power_off(self, domain: Any, owner: Ownership) -> None:
        with trying(f"stop the machine {owner.name} on {self.uri}"):
            try:
                if self._state(domain) is not MachineState.STOPPED:
                    domain.destroy()
            except libvirt.libvirtError:
                if self._state(domain) is not MachineState.STOPPED:  # it went by itself in between
                    raise

    def destroy(self, machine: Machine) -> None:
        self._destroy(machine.owner)

    def _destroy(self, owner: Ownership) -> None:
        with self._locked(owner):
            found = self._lookup(owner)
            if found is not None:
                domain, _ = found
                try:
                    self._power_off(domain, owner)
                    with trying(f"remove the machine {owner.name} on {self.uri}"):
                        domain.undefineFlags(_UNDEFINE)
                except PermanentError as error:
                    if not _gone(error):
                        raise
            self._files(owner.deployment).clear(owner)

    # Disks

    def snapshot(self, machine: Machine, operation: str) -> DiskSnapshot:
        owner = machine.owner
        with self._locked(owner):
            domain, seen = self._require(owner)
            files = self._files(owner.deployment)
            if seen.state_disk is None or seen.state_disk.path.name == f"{owner.key}.attach.qcow2":
                raise PermanentError(f"machine {owner.name} has no state disk")
            taken = files.snapshot(owner, operation)
            if taken is not None and taken.path != seen.state_disk.path:
                return taken  # the machine writes elsewhere since
            with trying(f"read the state of {owner.name} on {self.uri}"):
                if self._state(domain) is MachineState.RUNNING:
                    raise PermanentError(f"machine {owner.name} is running: its disk changes", next_command="pause it")
            taken, overlay = files.begin_snapshot(owner, operation, seen.state_disk.path)
            with trying(f"snapshot the state disk of {owner.name} on {self.uri}"):
                domain.snapshotCreateXML(snapshot_xml(overlay, drive=seen.drive), _SNAPSHOT)
            return taken

    def snapshots(self, deployment: str) -> Sequence[DiskSnapshot]:
        return self._files(deployment).snapshots()

    def delete_snapshot(self, snapshot: DiskSnapshot) -> None:
        with self._locked(snapshot.owner):
            self._files(snapshot.owner.deployment).drop_snapshot(snapshot)

    def attach(self, machine: Machine, snapshot: DiskSnapshot) -> Machine:
        owner = machine.owner
        with self._locked(owner):
            domain, seen = self._require(owner)
            files = self._files(owner.deployment)
            if seen.state_disk is not None:
                if files.attached(owner) == snapshot.id:
                    return self._seen(owner)
                raise RefusedError(f"machine {owner.name} has the second disk {seen.state_disk.path} already")
            with trying(f"attach the snapshot {snapshot.id} to {owner.name} on {self.uri}"):
                if self._state(domain) is not MachineState.RUNNING:
                    raise PermanentError(f"machine {owner.name} does not run", next_command="start it")
                disk = files.overlay(owner, snapshot)
                domain.attachDeviceFlags(
                    disk_xml(disk), libvirt.VIR_DOMAIN_AFFECT_LIVE | libvirt.VIR_DOMAIN_AFFECT_CONFIG
                )
            return self._seen(owner)

    # Orphans

    def orphans(
        self,
        deployment: str,
        known: Collection[Ownership],
        *,
        evidence: Collection[Ownership] = (),
        networks: Collection[str] = (),
    ) -> Sequence[Orphan]:
        files = self._files(deployment)
        expected, kept = {o.identity for o in known}, {o.identity for o in evidence}
        here = self.machines(deployment)
        present = {m.owner.identity for m in here}
        found = [
            Orphan(OrphanKind.MACHINE, m.id, m.owner.name, m.owner) for m in here if m.owner.identity not in expected
        ]
        found += [
            Orphan(OrphanKind.SNAPSHOT, s.id, s.owner.name, s.owner)
            for s in reversed(files.snapshots())  # the newest stands on the older ones
            if s.owner.identity not in kept
        ]
        found += [
            Orphan(OrphanKind.DISK, o.key, o.name, o) for o in files.claims() if o.identity not in expected | present
        ]
        mine = self._networks.list(deployment)
        found += [Orphan(OrphanKind.NETWORK, uuid, n, None) for n, uuid in sorted(mine.items()) if n not in networks]
        return found

    def sweep(self, deployment: str, orphans: Sequence[Orphan]) -> None:
        for orphan in orphans:
            if orphan.kind is OrphanKind.NETWORK:
                self.delete_network(deployment, orphan.name)
                continue
            if orphan.owner is None or orphan.owner.deployment != deployment:
                raise RefusedError(f"{orphan.kind} {orphan.name} does not carry the tags of {deployment}: not touched")
            if orphan.kind is OrphanKind.SNAPSHOT:
                for snapshot in self._files(deployment).snapshots():
                    if snapshot.id == orphan.id:
                        self.delete_snapshot(snapshot)
            elif orphan.kind is OrphanKind.MACHINE or self.find(orphan.owner) is None:
                self._destroy(orphan.owner)

    def close(self) -> None:
        self._connection.close()


def _gone(error: Exception) -> bool:
    cause = error.__cause__
    return isinstance(cause, libvirt.libvirtError) and cause.get_error_code() in NOT_FOUND


def _file_digest(spec: MachineSpec, name: str) -> str:
    """A name for the file that holds the part: over the digests of all parts in that file."""
    file = spec.manifest.part(name).file
    parts = sorted((p.offset, p.size, p.sha256) for p in spec.manifest.parts if p.file == file)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _version(number: int) -> str:
    return f"{number // 1_000_000}.{number // 1000 % 1000}.{number % 1000}"
