"""What a cloud driver offers: machines, networks and disk snapshots that carry their owner's tags.

Rules, the same for all drivers:
1. Every call blocks and may be repeated: what is done already is found and returned, what is gone already is no error.
2. Every call may come from any thread.
3. Identity is the ownership tags on the object, never its name. A stranger's object that wears a name of ours raises
   RefusedError and is never touched; nothing is deleted that does not carry the complete tag set.
4. Errors: TemporaryError (try again), PermanentError (somebody must change something), RefusedError (a rule forbids
   it). Each says what was tried, on which object, what was seen last, and the next command.
"""

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar, Self

from cloudfit_orchestrator.model.errors import BadInputError
from cloudfit_orchestrator.model.image import Manifest, Role

MAX_NAME = (
    40  # of a deployment, group or replica: names of five parts stay under libvirt's and the file system's limits
)
_NAME = re.compile(r"[a-z0-9]([a-z0-9._-]*[a-z0-9])?")
MIN_MEMORY_MIB, MAX_MEMORY_MIB = 64, 1 << 20
MAX_CPUS = 64
MIN_DISK_MIB, MAX_DISK_MIB = 16, 1 << 20


def check_name(what: str, name: str) -> str:
    """`name`, if it is lower case letters, digits, dot, dash, underscore, at most MAX_NAME. Raises BadInputError."""
    if len(name) > MAX_NAME or not _NAME.fullmatch(name):
        raise BadInputError(
            f"{what} {name!r}: lower case letters, digits, '.', '-', '_', at most {MAX_NAME} characters"
        )
    return name


@dataclass(frozen=True, slots=True)
class Ownership:
    """The complete tag set of a machine and of its disks. Raises BadInputError on a bad name."""

    deployment: str  # one CLOUDFIT_HOME, one operator: who cleans up
    group: str
    replica: str
    incarnation: int
    role: Role
    operation: str  # the journal operation that asked for it: information, not identity

    def __post_init__(self) -> None:
        for what in ("deployment", "group", "replica"):
            check_name(what, getattr(self, what))
        if self.incarnation < 1:
            raise BadInputError(f"incarnation {self.incarnation} of {self.group}/{self.replica}: must be at least 1")

    @property
    def identity(self) -> tuple[str, str, str, int, str]:
        """What makes it the same machine: all but the operation."""
        return (self.deployment, self.group, self.replica, self.incarnation, self.role.value)

    @property
    def name(self) -> str:
        """A name for people, unique by its last part (names may hold dashes). Never used to identify."""
        return f"{self.deployment}-{self.group}-{self.replica}-{self.incarnation}-{self.role.value}-{self.key[:8]}"

    @property
    def key(self) -> str:
        """16 hex digits, a collision-free name for files and MAC addresses: a hash of the identity."""
        return hashlib.sha256(json.dumps(self.identity).encode()).hexdigest()[:16]

    def tags(self) -> dict[str, str]:
        """As text values, for metadata of any kind."""
        return {name: str(value) for name, value in asdict(self).items()}

    @classmethod
    def from_tags(cls, tags: Mapping[str, str]) -> Self:
        """The inverse of `tags`. Raises BadInputError unless the set is complete and valid."""
        try:
            return cls(
                deployment=tags["deployment"],
                group=tags["group"],
                replica=tags["replica"],
                incarnation=int(tags["incarnation"]),
                role=Role(tags["role"]),
                operation=tags["operation"],
            )
        except (KeyError, ValueError, TypeError) as error:
            raise BadInputError(f"ownership tags are incomplete: {type(error).__name__}: {error}") from error


@dataclass(frozen=True, slots=True)
class NetworkSpec:
    """A machine's place in a cloud's network. `ensure_network` reads all but `address`."""

    name: str  # of the network; one a cloud and deployment
    address: str  # of the machine, IPv4; configured by the guest itself after WELCOME
    prefix: int  # bits
    gateway: str  # the host's address on the network; the host routes between its networks


@dataclass(frozen=True, slots=True)
class StateDisk:
    """A fresh, empty ext4 disk, read-write; `/dev/vdb` in the guest."""

    size_mib: int


@dataclass(frozen=True, slots=True)
class DiskSnapshot:
    """A machine's state disk as it was. Never written again; outlives its machine until `delete_snapshot`."""

    id: str  # driver's; the same for the same machine and operation
    owner: Ownership  # of the machine it was taken from
    operation: str  # the journal operation that took it
    path: Path  # on the cloud's host; under the process driver a directory
    format: str  # raw | qcow2 | directory
    taken_at: str  # RFC 3339, information only


@dataclass(frozen=True, slots=True)
class MachineSpec:
    """What to create. Either `state_disk` or `attach` may take the second disk, not both."""

    owner: Ownership
    image_dir: Path  # holds the manifest's files
    manifest: Manifest
    memory_mib: int
    cpus: int
    network: NetworkSpec | None  # None: no network card
    state_disk: StateDisk | None = None
    attach: DiskSnapshot | None = None  # through a throw-away overlay: the guest may write, the snapshot never changes
    drive: bytes | None = field(default=None, repr=False)  # user data of a config drive; with it no wormhole outside

    def __post_init__(self) -> None:
        if self.state_disk is not None and self.attach is not None:
            raise BadInputError(f"machine {self.owner.name}: a state disk and a snapshot both want the second disk")
        if not (MIN_MEMORY_MIB <= self.memory_mib <= MAX_MEMORY_MIB and 1 <= self.cpus <= MAX_CPUS):
            raise BadInputError(f"machine {self.owner.name}: {self.memory_mib} MiB, {self.cpus} CPUs: out of bounds")
        if self.state_disk is not None and not MIN_DISK_MIB <= self.state_disk.size_mib <= MAX_DISK_MIB:
            raise BadInputError(
                f"machine {self.owner.name}: state disk of {self.state_disk.size_mib} MiB: out of bounds"
            )

    @property
    def fingerprint(self) -> str:
        """SHA-256 in hex over all but owner.operation: a machine that exists with another one is not this machine."""
        doc = asdict(self)
        doc["owner"].pop("operation")
        if doc.pop("drive") is not None:  # not its content, which is secret; who has another one cannot be reached
            doc["drive"] = True
        if self.attach is not None:
            doc["attach"] = self.attach.id
        return hashlib.sha256(json.dumps(doc, sort_keys=True, default=str).encode()).hexdigest()


class MachineState(StrEnum):
    """What the cloud says of the machine. Says nothing of what the guest does."""

    RUNNING = "running"
    PAUSED = "paused"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine as last seen."""

    id: str  # driver's: libvirt UUID; pid and start time of a process
    owner: Ownership
    state: MachineState
    channel: Path  # unix socket of the wormhole port on the cloud's host, bound by the machine's side
    console: Path  # log file on the cloud's host
    state_disk: Path | None  # what holds the state now, on the cloud's host
    reference: Mapping[str, Any] = field(default_factory=dict)  # for the agent's `admit`, as seen on the cloud's host


class OrphanKind(StrEnum):
    """In the order in which they can be deleted."""

    MACHINE = "machine"
    SNAPSHOT = "snapshot"
    DISK = "disk"  # files or volumes of a machine that is gone
    NETWORK = "network"


@dataclass(frozen=True, slots=True)
class Orphan:
    """An object that carries our complete tag set and that nobody knows."""

    kind: OrphanKind
    id: str
    name: str
    owner: Ownership | None  # None for a network


@dataclass(frozen=True, slots=True)
class CloudFacts:
    """For `doctor`: what was found, in words."""

    driver: str
    uri: str
    version: str
    accelerator: str  # kvm | tcg | none
    reason: str  # why that accelerator
    isolated: bool
    warning: str = ""


@dataclass(frozen=True, slots=True)
class Demand:
    """What a group is going to ask of one cloud."""

    machines: int
    memory_mib: int  # of each
    cpus: int
    state_mib: int
    root_bytes: int = 0  # of the largest root image, with its hash tree; 0 if not known yet
    command_line: str = ""
    recovery_command_line: str = ""  # of the recovery image; empty if not known yet
    no_disk: tuple[str, ...] = ()  # names of images that UEFI cannot boot


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at before anything is made. `verdict`: ok | warn | fail."""

    name: str
    verdict: str
    finding: str
    fix: str = ""


class Cloud(ABC):
    """One cloud of one operator. All methods: see the rules at the top of this module."""

    driver: ClassVar[str]
    isolated: ClassVar[bool]  # False: a machine shares kernel and user with us, so nothing contains an intruder

    @abstractmethod
    def facts(self) -> CloudFacts:
        """Probe the cloud. TemporaryError or PermanentError with the next command if it cannot be reached."""

    def preflight(self, demand: Demand, *, probe: bool = False) -> Sequence[Finding]:
        """Everything that would make `demand` fail, at once. `probe`: also make and remove small objects for a trial.

        Raises nothing that is a finding. None where nothing needs a look before.
        """
        del demand, probe
        return ()

    @abstractmethod
    def ensure_network(self, deployment: str, network: NetworkSpec) -> None:
        """Make and start the network, unless it is there.

        RefusedError: a stranger's network of that name, or ours with another subnet; PermanentError: subnet in use.
        """

    @abstractmethod
    def delete_network(self, deployment: str, name: str) -> None:
        """Remove our network of that name; none is no error. RefusedError: a stranger's, or machines still use it."""

    def given_network(self, name: str) -> NetworkSpec | None:
        """Where machines get their addresses if the network is the operator's, under our `name` for it; else None.

        Its `address` is the subnet's own.
        """
        del name
        return None

    def reserve_address(self, deployment: str, group: str, replica: str, role: Role, operation: str) -> str | None:
        """The address of that machine-to-be, the same on repetition; None where the caller chooses it."""
        del deployment, group, replica, role, operation
        return None

    def admit(
        self, deployment: str, group: str, addresses: Collection[str], port: int, control: int | None = None
    ) -> None:
        """Let these hosts reach the group's machines by TCP on `port`, and clients, and nobody else; on the port
        `control` only this host.

        Nothing is done where the network does not filter.
        """
        del deployment, group, addresses, port, control

    @abstractmethod
    def create(self, spec: MachineSpec) -> Machine:
        """Create and start the machine, unless one with this identity exists: that one is returned, paused or running.

        What a death in the middle of an earlier attempt left (files, a defined machine that never ran) is completed or
        made anew; one that is stopped is started. RefusedError: exists with another fingerprint, or a stranger wears
        its name; PermanentError: image files are missing or unreadable to the hypervisor, no network of that name.
        """

    @abstractmethod
    def find(self, owner: Ownership) -> Machine | None:
        """The machine with that identity, in its present state, or None."""

    @abstractmethod
    def machines(self, deployment: str) -> Sequence[Machine]:
        """All machines of the deployment on this host, ordered by name; none with an incomplete tag set.

        Clouds that share a host see each other's machines.
        """

    @abstractmethod
    def start(self, machine: Machine) -> Machine:
        """Boot a stopped machine again, on its own disks. A running one is returned. TemporaryError if it is gone."""

    @abstractmethod
    def pause(self, machine: Machine) -> Machine:
        """Halt its processors at once; memory and disks stay. PermanentError if it is gone or stopped."""

    @abstractmethod
    def resume(self, machine: Machine) -> Machine:
        """Undo `pause`. A running machine is returned. PermanentError if it is gone or stopped."""

    @abstractmethod
    def stop(self, machine: Machine) -> Machine:
        """Cut its power, without asking the guest. Disks stay. PermanentError if it is gone."""

    @abstractmethod
    def destroy(self, machine: Machine) -> None:
        """Remove it with its disks, channel socket and log; its snapshots stay. One that is gone is no error.

        Also clears what a half-made machine of that identity left.
        """

    def must_pause(self, machine: Machine) -> bool:
        """Whether `snapshot` refuses the machine while it runs."""
        del machine
        return True

    @abstractmethod
    def snapshot(self, machine: Machine, operation: str) -> DiskSnapshot:
        """Freeze the state disk of a paused or stopped machine as a snapshot; the machine may go on on top of it.

        Of a running one too, where `must_pause` says no. One a machine and operation: repeated, the first is returned.
        PermanentError: running, gone, no state disk.
        """

    @abstractmethod
    def snapshots(self, deployment: str) -> Sequence[DiskSnapshot]:
        """All snapshots of the deployment, ordered by their owners' names."""

    @abstractmethod
    def delete_snapshot(self, snapshot: DiskSnapshot) -> None:
        """Remove it; one that is gone is no error. RefusedError: not ours, or a machine still stands on it."""

    @abstractmethod
    def attach(self, machine: Machine, snapshot: DiskSnapshot) -> Machine:
        """Give a running machine the snapshot as its second disk, through a throw-away overlay. Repetition is no error.

        PermanentError: not running, gone, or the snapshot is gone; RefusedError: it has another second disk.
        """

    @abstractmethod
    def orphans(
        self,
        deployment: str,
        known: Collection[Ownership],
        *,
        evidence: Collection[Ownership] = (),
        networks: Collection[str] = (),
    ) -> Sequence[Orphan]:
        """What the deployment has here beyond machines (with disks) of `known`, snapshots of `evidence`, `networks`.

        Compared by identity. In an order in which it can be deleted. The arguments are of the whole deployment, not
        of one cloud: clouds may share a host.
        """

    @abstractmethod
    def sweep(self, deployment: str, orphans: Sequence[Orphan]) -> None:
        """Delete those; each is looked up again and its tags are checked. RefusedError names what is not ours."""

    @abstractmethod
    def close(self) -> None:
        """Let go of connections. Machines go on. The object cannot be used again."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
