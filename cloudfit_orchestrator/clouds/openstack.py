"""The OpenStack driver: servers, volumes and addresses of one project in one region. See `clouds.base` for the rules.

A machine is a server with a port of its own, whose second disk is a Cinder volume; where a cloud has no Cinder, or the
spec wants it so, its one disk holds root and state (model/one_disk.py), and snapshots are server images. Its network is
the operator's: what is called the deployment's network elsewhere is here its security groups, server groups and images,
which go when its last machine has gone.
"""

import socket
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from cloudfit_orchestrator.clouds.base import (
    Cloud,
    CloudFacts,
    Demand,
    DiskSnapshot,
    Finding,
    Machine,
    MachineSpec,
    MachineState,
    NetworkSpec,
    Orphan,
    OrphanKind,
    Ownership,
    check_name,
)
from cloudfit_orchestrator.clouds.openstack_api import Api
from cloudfit_orchestrator.clouds.openstack_images import Images, boot_properties, check_bootable
from cloudfit_orchestrator.clouds.openstack_instance import FORMAT as SERVER_IMAGE
from cloudfit_orchestrator.clouds.openstack_instance import ServerImages
from cloudfit_orchestrator.clouds.openstack_network import Network
from cloudfit_orchestrator.clouds.openstack_preflight import Preflight, find_flavor, flavor_faults
from cloudfit_orchestrator.clouds.openstack_servers import Boot, Servers, state_of
from cloudfit_orchestrator.clouds.openstack_tags import (
    INSTANCE,
    KIND,
    STATE_ON,
    VOLUME,
    Reservation,
    group_of_label,
    owner_of,
)
from cloudfit_orchestrator.clouds.openstack_volumes import FORMAT as VOLUME_SNAPSHOT
from cloudfit_orchestrator.clouds.openstack_volumes import OVERLAY, STATE, Volumes, gib
from cloudfit_orchestrator.model.errors import CloudfitError, LockedOutError, PermanentError, RefusedError
from cloudfit_orchestrator.model.image import Role
from cloudfit_orchestrator.model.one_disk import single_disk_mib
from cloudfit_orchestrator.model.spec import OpenStackPlace

OWN_DISK = Path("nova")  # above a server's id: its state is on its own disk
LOCKS = 64  # machines are spread over so many locks: two calls for one machine wait for each other


class OpenStackCloud(Cloud):
    """One project in one region, by an entry of clouds.yaml."""

    driver: ClassVar[str] = "openstack"
    isolated: ClassVar[bool] = True

    def __init__(self, *, home: Path, place: OpenStackPlace, api: Api | None = None) -> None:
        """`home`: only its keys are used. `api`: instead of one for `place`. Connects when needed."""
        self.place = place
        self.api = api or Api(place.cloud, place.region)
        self.images = Images(self.api, place, home / "keys")
        self.network = Network(self.api, place.network)
        self.servers = Servers(self.api)
        self.volumes = Volumes(self.api, place.availability_zone, place.volume_type)
        self.server_images = ServerImages(self.api, self.servers)
        self._locks = tuple(threading.RLock() for _ in range(LOCKS))

    @contextmanager
    def _locked(self, owner: Ownership) -> Iterator[None]:
        with self._locks[int(owner.key, 16) % LOCKS]:
            yield

    def facts(self) -> CloudFacts:
        tried = f"ask {self.api.name} for its version"
        version = ((self.api.get("compute", "/", tried) or {}).get("version") or {}).get("version", "unknown")
        return CloudFacts(
            driver=self.driver,
            uri=self.api.name,
            version=f"compute API {version}",
            accelerator="none",
            reason="the cloud does not show it",
            isolated=True,
        )

    def preflight(self, demand: Demand, *, probe: bool = False) -> Sequence[Finding]:
        return Preflight(self.api, self.place, self.network, self.servers, self.images).run(demand, probe=probe)

    def _cinder(self) -> bool:
        """Whether Cinder may be asked at all: never where the spec says so, or the catalogue has none."""
        if self.place.state == INSTANCE:
            return False
        return self.place.state == VOLUME or self.api.endpoint("volume") is not None

    def _server_images(self) -> bool:
        """Whether there may be server images of ours: also where Cinder came later."""
        return self.place.state != VOLUME

    # The network

    def ensure_network(self, deployment: str, network: NetworkSpec) -> None:
        check_name("deployment", deployment)
        self.api.forget()  # an operation begins
        given = self.given_network(network.name)
        assert given is not None
        if (given.prefix, given.gateway) != (network.prefix, network.gateway):
            raise RefusedError(
                f"network {self.place.network} of {self.api.name} has now the gateway {given.gateway}/{given.prefix}, "
                f"this deployment began with {network.gateway}/{network.prefix}",
                next_command="cloudfit group destroy the groups on it, then apply again",
            )

    def given_network(self, name: str) -> NetworkSpec | None:
        subnet = self.network.subnet()
        address, prefix = str(subnet["cidr"]).split("/")
        return NetworkSpec(name, address, int(prefix), str(subnet["gateway_ip"]))

    def reserve_address(self, deployment: str, group: str, replica: str, role: Role, operation: str) -> str | None:
        return self.network.reserve(Reservation(deployment, group, replica, role, operation))

    def admit(
        self, deployment: str, group: str, addresses: Collection[str], port: int, control: int | None = None
    ) -> None:
        own = f"{own_address(str(self.network.subnet()['gateway_ip']))}/32"
        doors = {(n, port) for n in [*(f"{a}/32" for a in addresses), *self.place.clients, own]}
        self.network.admit(deployment, group, doors | ({(own, control)} if control else set()))

    def delete_network(self, deployment: str, name: str) -> None:
        if self.servers.of_deployment(deployment):
            raise RefusedError(f"machines of {deployment} still stand in {self.api.name}: {name} stays")
        for port, _ in self.network.of_deployment(deployment):
            self.network.remove_port(port)
        for what, made, _ in self._of_groups(deployment):
            (self.servers.remove_group if what == "server group" else self.network.remove_group)(made)
        self.images.remove_all(deployment)

    # Machines

    def create(self, spec: MachineSpec) -> Machine:
        owner = spec.owner
        with self._locked(owner):
            check_bootable(spec.manifest, self.place.boot)
            asked = False

            def boot() -> Boot:
                nonlocal asked
                asked = True
                return self._boot(spec)

            try:
                server = self.servers.create(owner, spec.fingerprint, boot)
            except LockedOutError:
                raise  # nothing can be undone; what there is will be found
            except PermanentError:
                if asked:  # else there is one, or a stranger's: not ours to undo
                    self._undo(owner)
                raise
            return self._machine(server, owner)

    def _undo(self, owner: Ownership) -> None:
        """A creation failed for good: nothing of it stays. What cannot be removed now is an orphan, listed as such."""
        try:
            self._clear(owner)
        except CloudfitError:
            return  # the error that is under way says why; this one would hide it

    def _boot(self, spec: MachineSpec) -> Boot:
        owner = spec.owner
        cinder = spec.attach.format == VOLUME_SNAPSHOT if spec.attach else self._cinder()
        flavor = self.flavor(spec, single=spec.state_disk is not None and not cinder)
        image = self.images.ensure_boot(spec) if cinder else self._one_disk(spec)
        port = None if spec.network is None else self.network.take(owner, spec.network.address)
        user = self.servers.get(str(port["device_id"])) if port is not None and port.get("device_id") else None
        if user is not None and owner_of(user["metadata"]) is None:
            raise RefusedError(f"the port of {owner.name} is used by a server that is not ours, {user['id']}")
        volume = self._volume(spec) if cinder else None
        new = port is not None and self.network.made_group(owner.deployment, owner.group)
        group = self.servers.ensure_group(owner.deployment, owner.group, new=new)
        return Boot(
            image=image,
            flavor=str(flavor["id"]),
            port=None if port is None else str(port["id"]),
            volume=volume,
            zone=self.place.availability_zone,
            group=group,
            state=VOLUME if cinder else INSTANCE,
            drive=spec.drive,
        )

    def _volume(self, spec: MachineSpec) -> str | None:
        """The machine's second disk."""
        owner = spec.owner
        if spec.state_disk is not None:
            size_mib = spec.state_disk.size_mib
            empty = self.images.ensure_state(owner.deployment, gib(size_mib))
            return str(self.volumes.ensure_state(owner, size_mib, empty)["id"])
        return None if spec.attach is None else str(self.volumes.ensure_overlay(owner, spec.attach)["id"])

    def _one_disk(self, spec: MachineSpec) -> str:
        """The image of a machine's only disk. PermanentError where that would have to boot by UEFI."""
        if self.place.boot == "uefi":
            raise PermanentError(
                f"{self.api.name}: with state on the machine's own disk it cannot boot by UEFI",
                next_command="boot: kernel in the spec, or state: volume",
            )
        if spec.state_disk is not None:
            return self.images.ensure_single(spec, spec.state_disk.size_mib)
        if spec.attach is None:
            return self.images.ensure_boot(spec)
        kernel, initramfs = self.images.ensure_carrier(spec)
        return self.server_images.boot_by(spec.attach, boot_properties(spec.manifest, kernel, initramfs))

    def flavor(self, spec: MachineSpec, *, single: bool = False) -> dict[str, Any]:
        """The flavor. PermanentError if there is none or it is too small for `spec`; `single`: the disk holds state."""
        found = self.api.remembered(("flavor",), lambda: find_flavor(self.api, self.place.flavor))
        disk_bytes = spec.manifest.disk_bytes
        if single and spec.state_disk is not None:
            disk_bytes = single_disk_mib(spec.state_disk.size_mib) << 20
        wrong = flavor_faults(found, spec.memory_mib, spec.cpus, disk_bytes)
        if wrong:
            raise PermanentError(
                f"flavor {self.place.flavor} of {self.api.name}: {'; '.join(wrong)}",
                next_command=f"openstack --os-cloud {self.place.cloud} flavor list, and name a larger one in the spec",
            )
        return found

    def _machine(self, server: Mapping[str, Any], owner: Ownership) -> Machine:
        identity = str(server["id"])
        volumes = server.get("os-extended-volumes:volumes_attached") or []
        return Machine(
            id=identity,
            owner=owner,
            state=state_of(server),
            channel=Path(identity, "channel"),  # on the compute host, where the agent makes it
            console=Path(identity, "console.log"),
            state_disk=Path("cinder", str(volumes[0]["id"])) if volumes else _own_disk(server),
            reference={"driver": "libvirt", "uri": self.place.hypervisor, "uuid": identity},
        )

    def find(self, owner: Ownership) -> Machine | None:
        server = self.servers.find(owner)
        if server is None:
            return None
        theirs = owner_of(server["metadata"])
        assert theirs is not None
        return self._machine(server, theirs)

    def machines(self, deployment: str) -> Sequence[Machine]:
        found = [(s, owner_of(s["metadata"])) for s in self.servers.of_deployment(deployment)]
        return sorted((self._machine(s, o) for s, o in found if o is not None), key=lambda m: m.owner.name)

    def start(self, machine: Machine) -> Machine:
        with self._locked(machine.owner):
            return self._machine(self.servers.start(machine.id, machine.owner), machine.owner)

    def pause(self, machine: Machine) -> Machine:
        with self._locked(machine.owner):
            return self._machine(self.servers.pause(machine.id, machine.owner), machine.owner)

    def resume(self, machine: Machine) -> Machine:
        with self._locked(machine.owner):
            return self._machine(self.servers.resume(machine.id, machine.owner), machine.owner)

    def stop(self, machine: Machine) -> Machine:
        with self._locked(machine.owner):
            return self._machine(self.servers.stop(machine.id, machine.owner), machine.owner)

    def destroy(self, machine: Machine) -> None:
        with self._locked(machine.owner):
            self._clear(machine.owner)
        deployment = machine.owner.deployment
        servers = self.servers.of_deployment(deployment)  # seconds of Nova's where there are hundreds: once
        self.images.collect(deployment, {str((s.get("image") or {}).get("id")) for s in servers})
        self._leave(deployment, machine.owner.group, servers)

    def _clear(self, owner: Ownership) -> None:
        """All servers, ports and volumes of that identity; a volume with a snapshot stays behind for it."""
        for server in self.servers.all_of(owner):
            self.servers.remove(server)
        self.network.remove_ports(owner)
        for volume in self.volumes.of(owner) if self._cinder() else ():
            self.volumes.wait_free(volume)
            self.volumes.keep_or_remove(volume)

    def _leave(self, deployment: str, group: str, servers: Iterable[Mapping[str, Any]]) -> None:
        """Remove what belongs to a replica group as a whole, once its last machine has gone from the `servers` here."""
        owners = (owner_of(s["metadata"]) for s in servers)
        if any(o is not None and (o.deployment, o.group) == (deployment, group) for o in owners):
            return
        for port, reserved in self.network.of_deployment(deployment):
            if reserved.group == group:
                self.network.remove_port(port)
        for what, made, label in self._of_groups(deployment):
            if label == group:
                (self.servers.remove_group if what == "server group" else self.network.remove_group)(made)

    # Disks

    def must_pause(self, machine: Machine) -> bool:
        return machine.state_disk is None or not machine.state_disk.is_relative_to(OWN_DISK)

    def snapshot(self, machine: Machine, operation: str) -> DiskSnapshot:
        owner = machine.owner
        with self._locked(owner):
            taken = next((s for s in self.snapshots(owner.deployment) if _is_of(s, owner, operation)), None)
            if taken is not None:
                return taken
            server = self.servers.get(machine.id)
            if server is None:
                raise PermanentError(f"machine {owner.name} does not exist in {self.api.name}")
            if server["metadata"].get(STATE_ON) == INSTANCE:
                return self.server_images.snapshot(owner, machine.id, operation)
            volume = next((v for v in self.volumes.of(owner) if v["metadata"].get(KIND) == STATE), None)
            if volume is None:
                raise PermanentError(f"machine {owner.name} has no state disk")
            if state_of(server) is MachineState.RUNNING:
                raise PermanentError(f"machine {owner.name} is running: its disk changes", next_command="pause it")
            return self.volumes.snapshot(owner, volume, operation)

    def snapshots(self, deployment: str) -> Sequence[DiskSnapshot]:
        found = self.volumes.snapshots(deployment) if self._cinder() else []
        found += self.server_images.snapshots(deployment) if self._server_images() else []
        return sorted(found, key=lambda s: (s.owner.name, s.taken_at))

    def delete_snapshot(self, snapshot: DiskSnapshot) -> None:
        with self._locked(snapshot.owner):
            if snapshot.format == SERVER_IMAGE:
                self.server_images.delete_snapshot(snapshot)
            else:
                self.volumes.delete_snapshot(snapshot, alive=lambda owner: bool(self.servers.all_of(owner)))

    def attach(self, machine: Machine, snapshot: DiskSnapshot) -> Machine:
        owner = machine.owner
        if snapshot.format == SERVER_IMAGE:
            raise PermanentError(
                f"machine {owner.name} runs, and {self.api.name} has no Cinder to give it the disk {snapshot.id}",
                next_command="make a machine from the snapshot",
            )
        with self._locked(owner):
            others = [v for v in self.volumes.of(owner) if v["metadata"].get(KIND) != OVERLAY]
            if others:
                raise RefusedError(f"machine {owner.name} has the second disk {others[0]['id']} already")
            server = self.servers.get(machine.id)
            if server is None or state_of(server) is not MachineState.RUNNING:
                raise PermanentError(f"machine {owner.name} does not run", next_command="start it")
            volume = self.volumes.ensure_overlay(owner, snapshot, attached=True)
            self.servers.attach(machine.id, owner, str(volume["id"]))
            server = self.servers.get(machine.id)
            if server is None:
                raise PermanentError(f"machine {owner.name} does not exist in {self.api.name}")
            return self._machine(server, owner)

    # Orphans

    def orphans(
        self,
        deployment: str,
        known: Collection[Ownership],
        *,
        evidence: Collection[Ownership] = (),
        networks: Collection[str] = (),
    ) -> Sequence[Orphan]:
        expected, kept = {o.identity for o in known}, {o.identity for o in evidence}
        here = self.machines(deployment)
        present = {m.owner.identity for m in here}
        found = [
            Orphan(OrphanKind.MACHINE, m.id, m.owner.name, m.owner) for m in here if m.owner.identity not in expected
        ]
        cinder = self._cinder()
        snapshots = self.volumes.all_snapshots(deployment) if cinder else []
        images = self.server_images.all_snapshots(deployment) if self._server_images() else []
        found += [
            Orphan(OrphanKind.SNAPSHOT, identity, owner.name, owner)
            for identity, owner in reversed([*images, *snapshots])
            if owner.identity not in kept
        ]
        standing = {owner.identity for _, owner in snapshots}  # their volumes go with them
        volumes = self.volumes.of_deployment(deployment) if cinder else []
        parts = {o.identity: o for o in (owner_of(v["metadata"]) for v in volumes) if o}
        parts = {identity: o for identity, o in parts.items() if identity not in standing}
        ports = self.network.of_deployment(deployment)
        owners = {Reservation.of(o): o for o in (*parts.values(), *evidence, *known, *(m.owner for m in here))}
        parts |= {o.identity: o for o in (owners.get(reserved) for _, reserved in ports) if o}
        found += [
            Orphan(OrphanKind.DISK, o.key, o.name, o) for i, o in sorted(parts.items()) if i not in expected | present
        ]
        found += [
            Orphan(OrphanKind.NETWORK, str(port["id"]), reserved.name, None)
            for port, reserved in ports
            if reserved not in owners
        ]
        groups = {o.group for o in known}
        found += [
            Orphan(OrphanKind.NETWORK, str(made["id"]), f"{what} {made['name']}", None)
            for what, made, label in self._of_groups(deployment)
            if label not in groups
        ]
        if not known and not networks and self.images.of_deployment(deployment):
            found.append(Orphan(OrphanKind.NETWORK, deployment, f"images of {deployment}", None))
        return found

    def _of_groups(self, deployment: str) -> Iterator[tuple[str, dict[str, Any], str]]:
        """(what, object, replica group) of all that belongs to whole groups."""
        for made in self.network.groups(deployment):
            yield "security group", made, (group_of_label(made["description"]) or ("", ""))[1]
        for made in self.servers.groups(deployment):
            yield "server group", made, (group_of_label(made["name"]) or ("", ""))[1]

    def sweep(self, deployment: str, orphans: Sequence[Orphan]) -> None:
        for orphan in orphans:
            if orphan.kind is OrphanKind.NETWORK:
                self._sweep_network(deployment, orphan)
                continue
            if orphan.owner is None or orphan.owner.deployment != deployment:
                raise RefusedError(f"{orphan.kind} {orphan.name} does not carry the tags of {deployment}: not touched")
            if orphan.kind is OrphanKind.SNAPSHOT:
                images = self.server_images.all_snapshots(deployment) if self._server_images() else []
                form = SERVER_IMAGE if orphan.id in {identity for identity, _ in images} else VOLUME_SNAPSHOT
                if form == SERVER_IMAGE or self._cinder():  # else it is gone
                    taken = DiskSnapshot(orphan.id, orphan.owner, orphan.owner.operation, Path(orphan.id), form, "")
                    self.delete_snapshot(taken)
            elif orphan.kind is OrphanKind.MACHINE or self.find(orphan.owner) is None:
                with self._locked(orphan.owner):
                    self._clear(orphan.owner)
                self._leave(deployment, orphan.owner.group, self.servers.of_deployment(deployment))

    def _sweep_network(self, deployment: str, orphan: Orphan) -> None:
        """What is not found among ours is gone, or not ours: then it is not touched."""
        for port, _ in self.network.of_deployment(deployment):
            if port["id"] == orphan.id:
                self.network.remove_port(port)
        for what, made, _ in self._of_groups(deployment):
            if made["id"] == orphan.id:
                (self.servers.remove_group if what == "server group" else self.network.remove_group)(made)
        if orphan.id == deployment:
            self.images.remove_all(deployment)

    def close(self) -> None:
        self.api.close()


def _own_disk(server: Mapping[str, Any]) -> Path | None:
    """Where a machine has its state without a volume."""
    return OWN_DISK / str(server["id"]) if server["metadata"].get(STATE_ON) == INSTANCE else None


def _is_of(snapshot: DiskSnapshot, owner: Ownership, operation: str) -> bool:
    return (snapshot.owner.identity, snapshot.operation) == (owner.identity, operation)


def own_address(towards: str) -> str:
    """Our own address on the way to another host: what a client here comes from, unless addresses are translated."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((towards, 9))  # sends nothing: a datagram socket only looks up the route
        except OSError as error:
            raise PermanentError(
                f"there is no route to {towards}: {error.strerror}", next_command=f"ip route get {towards}"
            ) from error
        return str(probe.getsockname()[0])
