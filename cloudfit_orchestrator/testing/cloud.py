"""A cloud, its agent and its guests in memory: first-class fakes for tests of the controller.

They keep the contracts of `clouds/base.py` and of the agent's socket, and refuse what cannot happen: admitting a
machine that does not run, confirming without keys, learning from nobody, deleting a snapshot that is in use. Keys and
signatures are real. A `World` holds everything that survives the controller's death, and kills it on demand: from the
n-th call on, every call into the world raises `Killed` until `revive`, as if the process had died at that instruction.
"""

import base64
import hashlib
import json
import sqlite3
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Condition, RLock
from typing import Any, ClassVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

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
)
from cloudfit_orchestrator.controller.agents import GuestRef, NoEpochError, NotAdmittedError, Report
from cloudfit_orchestrator.controller.journal import Journal
from cloudfit_orchestrator.controller.ports import Image
from cloudfit_orchestrator.model.envelope import key_id
from cloudfit_orchestrator.model.errors import BadInputError, PermanentError, RefusedError, UnknownError
from cloudfit_orchestrator.model.image import (
    LaunchCertificate,
    Manifest,
    Role,
    manifest_digest,
    seal_launch,
    seal_manifest,
)
from cloudfit_orchestrator.model.record import (
    ConfigRecord,
    Status,
    check_confirmations,
    confirm_body,
    open_record,
    record_hash,
)
from cloudfit_orchestrator.model.signing import Ed25519Verifier, public_bytes
from cloudfit_orchestrator.model.spec import CloudSpec
from cloudfit_orchestrator.model.statement import Kind, statement_bytes
from cloudfit_orchestrator.model.ui import EpochEnd

_IDLE_WAIT_S = 0.01  # how long `reports` waits for news that only another thread's call can make


class Killed(BaseException):
    """The controller died here."""


class World:
    """Clouds and agents by name, and the count of calls into them."""

    def __init__(self, controller_key: bytes) -> None:
        """`controller_key`: whose records agents believe."""
        self.lock = RLock()
        self.news = Condition(self.lock)
        self.controller_key = controller_key
        self.clouds: dict[str, FakeCloud] = {}
        self.agents: dict[str, FakeAgent] = {}
        self.calls = 0
        self.log: list[str] = []
        self._kill_at: int | None = None
        self._faults: dict[int, Exception] = {}

    def point(self, name: str) -> None:
        """One call; raises what is due."""
        with self.lock:
            self.calls += 1
            if self._kill_at is not None and self.calls >= self._kill_at:
                raise Killed(f"call {self.calls}: {name}")
            self.log.append(name)
            fault = self._faults.pop(self.calls, None)
        if fault is not None:
            raise fault

    def check_alive(self) -> None:
        """Raises Killed once the process is dead, without counting as a call."""
        if self._kill_at is not None and self.calls >= self._kill_at:
            raise Killed(f"dead since call {self._kill_at}")

    def kill_at(self, call: int) -> None:
        """Die at that call, counted from now."""
        self._kill_at = self.calls + call

    def fail_at(self, call: int, error: Exception) -> None:
        """Raise `error` at that call, counted from now; the controller lives."""
        self._faults[self.calls + call] = error

    def revive(self) -> None:
        """A new process."""
        self._kill_at = None

    def guest(self, group: str, replica: str) -> list["Guest"]:
        """All guests of that replica, on whatever agent."""
        found = (g for a in self.agents.values() for g in a.guests.values())
        return [g for g in found if (g.ref.group, g.ref.replica) == (group, replica)]

    def machines(self) -> list[Machine]:
        """All machines of all clouds."""
        return [m for c in self.clouds.values() for m in c.all.values()]

    def snapshots_left(self) -> list[DiskSnapshot]:
        """All snapshots of all clouds."""
        return [s for c in self.clouds.values() for s in c.taken.values()]

    def networks(self) -> list[str]:
        """Networks of all clouds."""
        return [n for c in self.clouds.values() for n in c.nets]


class KillableJournal(Journal):
    """A journal in which the process can die before and after every commit."""

    def __init__(self, path: Path, world: World) -> None:
        """See `Journal`."""
        self._world = world
        super().__init__(path)

    @contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        self._world.point("journal before commit")
        with super()._write() as db:
            yield db
        self._world.point("journal after commit")


class FakeCloud(Cloud):
    """Machines, networks and snapshots as values."""

    driver: ClassVar[str] = "fake"
    isolated: ClassVar[bool] = False

    def __init__(self, world: World, name: str) -> None:
        self._w = world
        self._name = name
        self.reachable = True
        self.all: dict[str, Machine] = {}
        self.specs: dict[str, MachineSpec] = {}
        self.nets: dict[str, NetworkSpec] = {}
        self.taken: dict[str, DiskSnapshot] = {}
        self._made = 0

    def _call(self, name: str) -> None:
        if not self.reachable:
            raise UnknownError(f"cloud {self._name} does not answer", next_command="bring it back")
        self._w.point(f"{self._name} {name}")

    def vanish(self) -> None:
        """The whole cloud burns down and is rebuilt empty; its agent's memory goes with it."""
        with self._w.lock:
            self.all, self.specs, self.nets, self.taken = {}, {}, {}, {}
            self._w.agents.pop(self._name, None)

    def facts(self) -> CloudFacts:
        """See `Cloud`."""
        self._call("facts")
        return CloudFacts("fake", "fake://", "1", "none", "there is none", isolated=False)

    def ensure_network(self, deployment: str, network: NetworkSpec) -> None:
        """See `Cloud`."""
        self._call("ensure_network")
        if not network.name.startswith(deployment):
            raise RefusedError(f"network {network.name} is not of {deployment}")
        old = self.nets.setdefault(network.name, network)
        if (old.prefix, old.gateway) != (network.prefix, network.gateway):
            raise RefusedError(f"network {network.name} has another subnet")
        self._w.point(f"{self._name} ensured network")

    def delete_network(self, deployment: str, name: str) -> None:
        """See `Cloud`."""
        self._call("delete_network")
        if any(s.network and s.network.name == name for s in self.specs.values()):
            raise RefusedError(f"machines still use network {name} of {deployment}")
        self.nets.pop(name, None)

    def create(self, spec: MachineSpec) -> Machine:
        """See `Cloud`."""
        self._call("create")
        found = self._find(spec.owner)
        if found is not None:
            if self.specs[found.id].fingerprint != spec.fingerprint:
                raise RefusedError(f"{spec.owner.name} exists with another fingerprint")
            return found
        if spec.network is not None and spec.network.name not in self.nets:
            raise PermanentError(f"no network {spec.network.name}")
        if spec.attach is not None and spec.attach.id not in self.taken:
            raise PermanentError(f"no snapshot {spec.attach.id}")
        used = {s.network.address for s in self.specs.values() if s.network} if spec.network else set()
        if spec.network is not None and spec.network.address in used and spec.network.address != "127.0.0.1":
            raise PermanentError(f"address {spec.network.address} is used twice")
        with self._w.lock:
            self._made += 1
            identity = f"{self._name}-{self._made}"
            reference = {"driver": "process", "pid": 1000 + self._made, "socket": f"/run/{identity}"}
            machine = Machine(
                identity, spec.owner, MachineState.RUNNING, Path(f"/run/{identity}"), Path("/dev/null"), None, reference
            )
            self.all[machine.id], self.specs[machine.id] = machine, spec
        self._w.point(f"{self._name} created")
        return machine

    def _find(self, owner: Ownership) -> Machine | None:
        return next((m for m in self.all.values() if m.owner.identity == owner.identity), None)

    def find(self, owner: Ownership) -> Machine | None:
        """See `Cloud`."""
        self._call("find")
        return self._find(owner)

    def machines(self, deployment: str) -> Sequence[Machine]:
        """See `Cloud`."""
        self._call("machines")
        return sorted((m for m in self.all.values() if m.owner.deployment == deployment), key=lambda m: m.owner.name)

    def _change(self, machine: Machine, what: str, state: MachineState, allowed: Collection[MachineState]) -> Machine:
        self._call(what)
        now = self.all.get(machine.id)
        if now is None or now.state not in allowed:
            raise PermanentError(f"cannot {what} {machine.owner.name}: it is {now.state if now else 'gone'}")
        self.all[machine.id] = replace(now, state=state)
        self._w.point(f"{self._name} {what} done")
        return self.all[machine.id]

    def start(self, machine: Machine) -> Machine:
        """See `Cloud`."""
        return self._change(machine, "start", MachineState.RUNNING, {MachineState.STOPPED, MachineState.RUNNING})

    def pause(self, machine: Machine) -> Machine:
        """See `Cloud`."""
        return self._change(machine, "pause", MachineState.PAUSED, {MachineState.RUNNING, MachineState.PAUSED})

    def resume(self, machine: Machine) -> Machine:
        """See `Cloud`."""
        return self._change(machine, "resume", MachineState.RUNNING, {MachineState.RUNNING, MachineState.PAUSED})

    def stop(self, machine: Machine) -> Machine:
        """See `Cloud`."""
        return self._change(machine, "stop", MachineState.STOPPED, set(MachineState))

    def destroy(self, machine: Machine) -> None:
        """See `Cloud`."""
        self._call("destroy")
        self.all.pop(machine.id, None)
        self.specs.pop(machine.id, None)
        self._w.point(f"{self._name} destroyed")

    def snapshot(self, machine: Machine, operation: str) -> DiskSnapshot:
        """See `Cloud`."""
        self._call("snapshot")
        now = self.all.get(machine.id)
        if now is None or now.state is MachineState.RUNNING or self.specs[machine.id].state_disk is None:
            raise PermanentError(f"cannot snapshot {machine.owner.name}: running, gone or without a state disk")
        name = f"snap-{machine.id}"
        fresh = DiskSnapshot(
            id=name, owner=now.owner, operation=operation, path=Path("/snap"), format="raw",
            taken_at="2026-01-01T00:00:00Z",
        )  # fmt: skip
        self.taken.setdefault(name, fresh)
        self._w.point(f"{self._name} snapshot done")
        return self.taken[name]

    def snapshots(self, deployment: str) -> Sequence[DiskSnapshot]:
        """See `Cloud`."""
        self._call("snapshots")
        found = (s for s in self.taken.values() if s.owner.deployment == deployment)
        return sorted(found, key=lambda s: s.owner.name)

    def delete_snapshot(self, snapshot: DiskSnapshot) -> None:
        """See `Cloud`."""
        self._call("delete_snapshot")
        if any(s.attach and s.attach.id == snapshot.id for s in self.specs.values()):
            raise RefusedError(f"a machine stands on snapshot {snapshot.id}")
        self.taken.pop(snapshot.id, None)

    def attach(self, machine: Machine, snapshot: DiskSnapshot) -> Machine:
        """See `Cloud`."""
        self._call("attach")
        spec = self.specs.get(machine.id)
        if spec is None or snapshot.id not in self.taken:
            raise PermanentError(f"cannot attach {snapshot.id} to {machine.owner.name}: one of them is gone")
        if spec.state_disk is not None:
            raise RefusedError(f"{machine.owner.name} has another second disk")
        self.specs[machine.id] = replace(spec, attach=snapshot)
        return machine

    def orphans(
        self,
        deployment: str,
        known: Collection[Ownership],
        *,
        evidence: Collection[Ownership] = (),
        networks: Collection[str] = (),
    ) -> Sequence[Orphan]:
        """See `Cloud`."""
        self._call("orphans")
        alive, kept = {o.identity for o in known}, {o.identity for o in evidence}
        return [
            *(Orphan(OrphanKind.MACHINE, m.id, m.owner.name, m.owner)
              for m in self.all.values() if m.owner.deployment == deployment and m.owner.identity not in alive),
            *(Orphan(OrphanKind.SNAPSHOT, s.id, s.owner.name, s.owner)
              for s in self.taken.values() if s.owner.deployment == deployment and s.owner.identity not in kept),
            *(Orphan(OrphanKind.NETWORK, n, n, None)
              for n in self.nets if n.startswith(deployment) and n not in networks),
        ]  # fmt: skip

    def sweep(self, deployment: str, orphans: Sequence[Orphan]) -> None:
        """See `Cloud`."""
        self._call("sweep")
        for orphan in orphans:
            if orphan.owner is not None and orphan.owner.deployment != deployment:
                raise RefusedError(f"{orphan.name} is not of {deployment}")
            for table in (self.all, self.specs, self.taken, self.nets):
                table.pop(orphan.id, None)

    def close(self) -> None:
        """See `Cloud`."""


@dataclass
class Guest:
    """A machine as its agent and its peers know it."""

    ref: GuestRef
    role: Role
    machine: str
    launch: bytes
    keys: dict[int, tuple[Ed25519PrivateKey, Ed25519PrivateKey]] = field(default_factory=dict)
    frozen: set[int] = field(default_factory=set)
    closed: set[int] = field(default_factory=set)
    serves: int | None = None  # the configuration it is ready in
    learners: set[str] = field(default_factory=set)  # peers it was told to serve
    learning: bool = False
    observes: bool = False  # it was told its base
    told_ended: set[tuple[str, int]] = field(default_factory=set)
    retired: set[str] = field(default_factory=set)


class FakeAgent:
    """The agent of one cloud with its guests: `controller.ports.Agent`."""

    def __init__(self, world: World, cloud: FakeCloud, name: str) -> None:
        self._w = world
        self._cloud = cloud
        self.name = name
        self.reachable = True
        self.mute: set[str] = set()  # replicas that never confirm
        self.extract_fails = False
        self._identity = Ed25519PrivateKey.generate()
        self.guests: dict[GuestRef, Guest] = {}
        self._reports: list[Report] = []
        self._records: dict[str, ConfigRecord] = {}
        self.inside = False

    def key_of(self, guest: GuestRef) -> bytes:
        """See `Agent`."""
        del guest
        return public_bytes(self._identity)

    def _call(self, op: str) -> None:
        if not self.reachable or not self._cloud.reachable:
            raise UnknownError(f"agent of {self.name} does not answer")
        self._w.point(f"agent {self.name} {op}")

    def _guest(self, ref: GuestRef) -> Guest:
        if ref not in self.guests:
            raise NotAdmittedError(f"agent {self.name} knows no {ref}", next_command="admit it again")
        return self.guests[ref]

    def _say(self, guest: Guest, topic: str, **body: Any) -> None:
        report = Report(len(self._reports) + 1, guest.ref, topic, json.loads(json.dumps(body)))
        if not any((r.guest, r.topic, r.body) == (report.guest, report.topic, report.body) for r in self._reports):
            with self._w.news:
                self._reports.append(report)
                self._w.news.notify_all()

    def status(self) -> dict[str, Any]:
        """See `Agent`."""
        self._call("status")
        guests = [
            {
                "group": g.ref.group, "replica": g.ref.replica, "incarnation": g.ref.incarnation, "role": g.role.value,
                "machine": g.machine, "connected": self._runs(g), "greeted": True, "counters": {"frames": 1},
                "epochs": [{"c": c, "state": "ended" if c in g.closed else "open", "cv": 0} for c in g.keys],
            }
            for g in self.guests.values()
        ]  # fmt: skip
        key = _text(public_bytes(self._identity))
        return {"agent": self.name, "key": key, "guests": guests, "counters": {}}

    def _runs(self, guest: Guest) -> bool:
        machine = next((m for m in self._cloud.all.values() if m.id == guest.machine), None)
        return machine is not None and machine.state is MachineState.RUNNING

    def admit(
        self,
        guest: GuestRef,
        *,
        role: Role,
        machine: dict[str, Any],
        manifest: bytes,
        lease_s: float,
        welcome: dict[str, Any],
        image_dir: Path | None = None,
        allow_adversary: bool = False,
    ) -> bytes:
        """See `Agent`."""
        self._call("admit")
        del image_dir, allow_adversary
        if lease_s <= 0 or not welcome["network"]["address"] or not welcome["port"]:
            raise BadInputError("admit without lease, address or port")
        found = [m for m in self._cloud.all.values() if m.reference == machine]
        if not found or found[0].state is not MachineState.RUNNING:
            raise UnknownError(f"machine {machine} does not run")
        owner = found[0].owner
        if (owner.group, owner.replica, owner.incarnation) != (guest.group, guest.replica, guest.incarnation):
            raise BadInputError(f"machine {machine} is {owner.name}, not {guest}")
        with self._w.lock:
            if guest not in self.guests or self.guests[guest].machine != found[0].id:
                certificate = LaunchCertificate(
                    guest.group, guest.replica, guest.incarnation, role, manifest_digest(manifest), "sha256:0",
                    found[0].id, key_id(public_bytes(self._identity)), isolated=False,
                    channel_ca=_text(found[0].id.encode()), measured_at="2026-01-01T00:00:00Z",
                )  # fmt: skip
                self.guests[guest] = Guest(guest, role, found[0].id, seal_launch(certificate, self._identity))
        self._w.point(f"agent {self.name} admitted")
        return self.guests[guest].launch

    def prepare(self, guest: GuestRef, c: int) -> tuple[bytes, bytes]:
        """See `Agent`."""
        self._call("prepare")
        g = self._guest(guest)
        with self._w.lock:
            keys = g.keys.setdefault(c, (Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()))
        return public_bytes(keys[0]), public_bytes(keys[1])

    def install(self, group: str, envelope: bytes) -> None:
        """See `Agent`. Guests answer at once: `confirm` to PREPARED, `ready` to ACTIVE."""
        self._call("install")
        record = open_record(envelope, [self._w.controller_key])
        if record.group != group:
            raise BadInputError(f"record is of {record.group}, not {group}")
        with self._w.lock:
            if record.status is Status.ACTIVE:
                self._activate(record)
            else:
                self._prepare_record(record, envelope)
        self._w.point(f"agent {self.name} installed")

    def _members(self, record: ConfigRecord) -> list[Guest]:
        found = []
        for member in record.members:
            guest = self.guests.get(GuestRef(record.group, member.replica, member.incarnation))
            if guest is None or record.c not in guest.keys:
                continue
            if public_bytes(guest.keys[record.c][1]) != member.kss_key:
                raise NoEpochError(f"{guest.ref} has other keys of c={record.c} than the record says")
            if self._runs(guest):
                found.append(guest)
        return found

    def _prepare_record(self, record: ConfigRecord, envelope: bytes) -> None:
        held = self._records.get(record.group)
        if held is not None and record.c <= held.c:
            return
        for guest in self._members(record):
            knows_base = record.base is None or guest.serves == record.base or guest.learning
            if guest.ref.replica in self.mute or not knows_base:
                continue
            state = (0 if record.base is None else 10 * record.base, hashlib.sha256(str(record.base).encode()).digest())
            body = confirm_body(record_hash(envelope), *state)
            message = statement_bytes(Kind.CONFIRM, record.group, guest.ref.replica, record.c, body)
            self._say(
                guest, "confirm", c=record.c, prepared=_text(record_hash(envelope)), h=state[0], digest=_text(state[1]),
                signature=_text(guest.keys[record.c][1].sign(message)),
            )  # fmt: skip

    def _activate(self, record: ConfigRecord) -> None:
        check_confirmations(record, Ed25519Verifier())
        held = self._records.get(record.group)
        if held is not None and held.c > record.c:
            raise RefusedError(f"ACTIVE c={record.c} goes back behind c={held.c}")
        self._records[record.group] = record
        for guest in self._members(record):
            guest.closed |= {c for c in guest.keys if c < record.c}
            guest.serves, guest.learning = record.c, False
            self._say(guest, "ready", c=record.c)

    def freeze(self, guest: GuestRef, c: int) -> int:
        """See `Agent`."""
        self._call("freeze")
        self._epoch(guest, c).frozen.add(c)
        return 0

    def thaw(self, guest: GuestRef, c: int) -> int:
        """See `Agent`."""
        self._call("thaw")
        self._epoch(guest, c).frozen.discard(c)
        return 0

    def close_epoch(self, guest: GuestRef, c: int) -> EpochEnd:
        """See `Agent`."""
        self._call("close")
        self._epoch(guest, c).closed.add(c)
        return EpochEnd(guest.replica, c, 0, bytes(32), bytes(64), bytes(64))

    def _epoch(self, ref: GuestRef, c: int) -> Guest:
        guest = self._guest(ref)
        if c not in guest.keys:
            raise NoEpochError(f"{ref} has no epoch {c}")
        return guest

    def command(self, guest: GuestRef, body: dict[str, Any]) -> None:
        """See `Agent`."""
        self._call(f"command {body['op']}")
        g = self._guest(guest)
        with self._w.lock:
            if body["op"] == "learn":
                g.learners.add(body["peer"]["peer_id"])
            elif body["op"] == "forget":
                g.learners.discard(body["peer_id"])
            elif body["op"] == "retire":
                g.retired.add(body["order"])
            elif body["op"] == "ended":
                g.told_ended.add((body["end"]["replica"], body["end"]["c"]))
            elif body["op"] == "base":
                g.observes = True
                if not body["wait_source"]:
                    self._learn(g)
            elif body["op"] == "source":
                if not g.observes:
                    raise BadInputError(f"{g.ref} got a source before its base")
                if body["peer"] is None or self._extract(g, body["peer"]):
                    self._learn(g)

    def _learn(self, guest: Guest) -> None:
        me = f"{guest.ref.replica}#{guest.ref.incarnation}"
        servers = [
            g for a in self._w.agents.values() for g in a.guests.values()
            if g.ref.group == guest.ref.group and me in g.learners and g.serves is not None
        ]  # fmt: skip
        if not servers:
            return  # nobody would let it in
        guest.learning = True
        self._say(guest, "learner", h=10, slot=12, behind=3)
        self._say(guest, "learner", h=10, slot=15, behind=0)

    def _extract(self, guest: Guest, peer: dict[str, str]) -> bool:
        name, _, incarnation = peer["peer_id"].partition("#")
        exporter = self.guests.get(GuestRef(guest.ref.group, name, int(incarnation)))
        if exporter is None or exporter.role is not Role.RECOVERY or not self._runs(exporter):
            raise NotAdmittedError(f"no recovery machine {peer['peer_id']} runs here")
        if self._cloud.specs[exporter.machine].attach is None:
            raise BadInputError("a recovery machine without a snapshot")
        if f"{guest.ref.replica}#{guest.ref.incarnation}" not in exporter.learners:
            raise BadInputError(f"{peer['peer_id']} was not told to serve {guest.ref}")
        if self.extract_fails:
            return False
        self._say(
            guest, "transfer", slot=15, chunks=8, kept=5, fetched=3, corrupt=[{"chunk": 2, "source": peer["peer_id"]}],
            **{"from": {peer["peer_id"]: 5000, "peers": 3000}},
        )  # fmt: skip
        return True

    def reports(self, since: int, wait_s: float = 0.0, group: str | None = None) -> tuple[list[Report], int]:
        """See `Agent`."""
        with self._w.news:
            if not self._find_reports(since, group):  # silence is no call: how often one asks depends on threads
                self._w.check_alive()
                self._w.news.wait(min(wait_s, _IDLE_WAIT_S))
            if not self.reachable or not self._cloud.reachable:
                raise UnknownError(f"agent of {self.name} does not answer")
            found, following = self._find_reports(since, group), len(self._reports)
        if found:
            self._call("reports")
        return found, following

    def _find_reports(self, since: int, group: str | None) -> list[Report]:
        return [r for r in self._reports if r.seq > since and group in (None, r.guest.group)]

    def evict(self, guest: GuestRef) -> None:
        """See `Agent`."""
        self._call("evict")
        self.guests.pop(guest, None)

    def restart(self) -> None:
        """All keys, admissions and reports are gone."""
        self.guests, self._reports, self._records = {}, [], {}


class FakeSites:
    """`controller.ports.Sites` over a world."""

    def __init__(self, world: World) -> None:
        self._w = world

    def cloud(self, spec: CloudSpec) -> Cloud:
        """See `Sites`."""
        return self._fake(spec)

    def _fake(self, spec: CloudSpec) -> FakeCloud:
        with self._w.lock:
            return self._w.clouds.setdefault(spec.name, FakeCloud(self._w, spec.name))

    def agent(self, spec: CloudSpec, *, start: bool) -> FakeAgent:
        """See `Sites`."""
        with self._w.lock:
            if spec.name not in self._w.agents:
                if not start or not self._fake(spec).reachable:
                    raise UnknownError(f"no agent of {spec.name} runs", next_command="cloudfit agent run")
                self._w.agents[spec.name] = FakeAgent(self._w, self._fake(spec), spec.name)
        self._w.point(f"agent {spec.name} found")
        return self._w.agents[spec.name]

    def stop_agent(self, spec: CloudSpec) -> None:
        """See `Sites`."""
        self._w.point(f"agent {spec.name} stop")
        self._w.agents.pop(spec.name, None)

    def taken_networks(self, spec: CloudSpec) -> list[str]:
        """See `Sites`."""
        del spec
        return ["10.84.0.0/24"]


class FakeImages:
    """`controller.ports.Images`: signed manifests without files."""

    def __init__(self, verify: Callable[[str], None] = lambda _: None) -> None:
        """`verify(reference)` may raise."""
        self._key = Ed25519PrivateKey.generate()
        self._verify = verify
        self._made: dict[str, Image] = {}

    def verified(self, reference: str, driver: str, *, allow_adversary: bool) -> Image:
        """See `Images`."""
        del driver
        self._verify(reference)
        reference = reference.partition("@")[0]
        if reference == "adversary" and not allow_adversary:
            raise RefusedError("image adversary is an adversary", next_command="allow_adversary: true")
        if reference not in self._made:
            role = Role.RECOVERY if reference == "recovery" else Role.REPLICA
            manifest = Manifest(reference, role, reference == "adversary", "", "", (), (), "fake")
            envelope = seal_manifest(manifest, self._key)
            self._made[reference] = Image(manifest_digest(envelope), envelope, manifest, Path("/images") / reference)
        return self._made[reference]


def _text(raw: bytes) -> str:

    return base64.b64encode(raw).decode()
