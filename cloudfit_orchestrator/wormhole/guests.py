"""The table of admitted guests, which is the whole of what each may do, and the controller's orders on it. Pure."""

import json
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from cloudfit_orchestrator.model.errors import BadError, BadInputError, RefusedError
from cloudfit_orchestrator.model.image import Role
from cloudfit_orchestrator.model.record import ConfigRecord, Member, Status, check_confirmations, open_record
from cloudfit_orchestrator.model.signing import Ed25519Verifier
from cloudfit_orchestrator.model.ui import EpochEnd
from cloudfit_orchestrator.wormhole.epoch import Epoch, KeyMaker, State, fresh_key
from cloudfit_orchestrator.wormhole.identity import Identity
from cloudfit_orchestrator.wormhole.kss import ChannelCA, Lease
from cloudfit_orchestrator.wormhole.records import GroupRecords, Held

MAX_GUESTS = 256  # of one host
MAX_GROUPS = 256
MAX_EPOCHS = 64  # of one incarnation; the ended ones beyond it are forgotten, oldest first
MAX_COMMANDS = 64  # that are kept for a guest, which gets them all when it greets; the oldest are forgotten
MAX_COMMAND_BYTES = 1 << 20  # an order in it is an envelope
MAX_C = (1 << 63) - 1


class NotAdmittedError(RefusedError):
    """No such guest here."""


class NoEpochError(RefusedError):
    """The guest has no keys of that configuration here: they were never made, or went with a restart of the agent."""


@dataclass
class Guest:
    """An admitted incarnation: what was measured, and its keys."""

    identity: Identity
    role: Role
    machine: str  # the driver's id
    image: str
    launch: bytes  # envelope
    lease: Lease
    ca: ChannelCA
    welcome: dict[str, Any]
    make: KeyMaker = fresh_key
    epochs: dict[int, Epoch] = field(default_factory=dict)
    commands: deque[bytes] = field(default_factory=lambda: deque(maxlen=MAX_COMMANDS))  # JSON
    was_member: bool = False
    lost: str = ""  # why the machine is none of this host any more: nothing is signed for it again
    retired: bool = False  # was a member and is none of the ACTIVE configuration: no certificates any more

    def epoch(self, c: int) -> Epoch:
        """The epoch of c. Raises NoEpochError."""
        epoch = self.epochs.get(c)
        if epoch is None:
            raise NoEpochError(f"{self.identity} has no epoch {c} here")
        return epoch

    def prepare(self, c: int) -> Epoch:
        """The epoch of c, made if there is none."""
        if self.role is not Role.REPLICA:
            raise RefusedError(f"{self.identity} is a {self.role} machine: it gets no keys")
        if self.lost:
            raise RefusedError(
                f"{self.identity} is lost to this host: {self.lost}", next_command="evict it and recover the replica"
            )
        if c not in self.epochs:
            ended = sorted(x for x, epoch in self.epochs.items() if epoch.state is State.ENDED)
            if len(self.epochs) >= MAX_EPOCHS:
                if not ended:
                    raise RefusedError(f"{self.identity} has {len(self.epochs)} epochs that have not ended")
                del self.epochs[ended[0]]
            self.epochs[c] = Epoch(self.identity.group, self.identity.replica, c, self.make)
        return self.epochs[c]

    def greeted(self) -> None:
        """A process of the guest said HELLO: the sessions of the one before it end."""
        for epoch in self.epochs.values():
            epoch.forget_session()

    def lose(self, why: str) -> None:
        """End every epoch for good, keeping what they ended with."""
        self.lost = why
        for epoch in self.epochs.values():
            epoch.end()

    def destroy(self) -> None:
        """End every epoch and drop all keys."""
        for epoch in self.epochs.values():
            epoch.end()
        self.epochs.clear()
        self.commands.clear()


class Table:
    """All guests and what is held of their groups' configuration chains."""

    def __init__(self, controller_keys: list[bytes]) -> None:
        """`controller_keys`: whose records are believed, raw Ed25519."""
        self._controllers = controller_keys
        self._verifier = Ed25519Verifier()
        self._guests: dict[Identity, Guest] = {}
        self._records: dict[str, GroupRecords] = {}

    def __iter__(self) -> Iterator[Guest]:
        return iter(list(self._guests.values()))

    def of_group(self, group: str) -> list[Guest]:
        """The guests of one group."""
        return [g for g in self._guests.values() if g.identity.group == group]

    def find(self, identity: Identity) -> Guest | None:
        """The guest, or None."""
        return self._guests.get(identity)

    def get(self, identity: Identity) -> Guest:
        """The guest. Raises NotAdmittedError."""
        guest = self._guests.get(identity)
        if guest is None:
            raise NotAdmittedError(f"{identity} is not admitted here")
        return guest

    def records(self, group: str) -> GroupRecords:
        """What is held of a group's chain; empty if nothing is."""
        return self._records.get(group) or GroupRecords()

    def groups(self) -> dict[str, GroupRecords]:
        """All groups of which records are held."""
        return dict(self._records)

    def check_admission(self, identity: Identity, machine: str, image: str) -> Guest | None:
        """The guest if this very machine is admitted already. Raises RefusedError if identity or machine is taken."""
        found = self._guests.get(identity)
        if found is not None:
            if (found.machine, found.image) != (machine, image):
                raise RefusedError(
                    f"{identity} is admitted as machine {found.machine} with image {found.image}, "
                    f"not as {machine} with {image}",
                    next_command="admit the new machine under a new incarnation",
                )
            return found
        for other in self._guests.values():
            if other.machine == machine:
                raise RefusedError(f"machine {machine} is admitted as {other.identity}: it cannot be {identity} too")
        if len(self._guests) >= MAX_GUESTS:
            raise RefusedError(f"{len(self._guests)} guests are admitted here, which is the limit")
        return None

    def admit(self, guest: Guest) -> None:
        """Add a measured guest that `check_admission` found to be new."""
        self._guests[guest.identity] = guest

    def evict(self, identity: Identity) -> Guest | None:
        """Destroy a guest's keys and forget it; with the group's last guest its records go too."""
        guest = self._guests.pop(identity, None)
        if guest is not None:
            guest.destroy()
        if not self.of_group(identity.group):
            self._records.pop(identity.group, None)
        return guest

    def prepare(self, identity: Identity, c: int) -> Epoch:
        """Keys of configuration c, made once. Raises RefusedError for what ACTIVE has left behind."""
        if not 1 <= c <= MAX_C:
            raise BadInputError(f"configuration {c} is out of range")
        guest = self.get(identity)
        active = self.records(identity.group).active
        if c not in guest.epochs and active is not None and c <= active.record.c:
            raise RefusedError(f"configuration {c} of {identity.group} is not later than the ACTIVE {active.record.c}")
        return guest.prepare(c)

    def close(self, identity: Identity, c: int) -> EpochEnd:
        """EPOCH-END by the controller's order."""
        return self.get(identity).epoch(c).end()

    def command(self, identity: Identity, body: dict[str, Any]) -> bytes:
        """Keep a command for a guest; its JSON, as it is to be pushed."""
        guest = self.get(identity)
        command = json.dumps(body).encode()
        if len(command) > MAX_COMMAND_BYTES:
            raise BadInputError(f"a command of {len(command)} bytes for {identity}, the limit is {MAX_COMMAND_BYTES}")
        guest.commands.append(command)
        return command

    def install(self, group: str, envelope: bytes) -> Status | None:
        """Take a record; None if it was held already. Raises BadError and RefusedError; then nothing has changed."""
        record = open_record(envelope, self._controllers)
        if record.group != group:
            raise BadError(f"the record is of group {record.group}, not {group}")
        if record.status is Status.ACTIVE:
            check_confirmations(record, self._verifier)
        if group not in self._records and len(self._records) >= MAX_GROUPS:
            raise RefusedError(f"records of {len(self._records)} groups are held here, which is the limit")
        guests = self.of_group(group)
        records = self.records(group)
        held = Held(envelope, record)
        try:
            changed = records.check(held)
        except RefusedError:
            if guests:
                raise
            # With no guest here there is no epoch to protect: a group that was destroyed may begin anew.
            records, changed = GroupRecords(), True
        if changed and record.status is Status.ACTIVE:
            members = [(guest, member) for guest in guests if (member := _member(record, guest)) is not None]
            for guest, member in members:
                _check_keys(guest, member, record.c)
            _activate(guests, members, record.c)
        if changed:
            records.hold(held)
            self._records[group] = records
        return record.status if changed else None

    def concerned(self, guest: Guest, held: Held) -> bool:
        """Whether a record is this guest's business: ACTIVE is every replica's, PREPARED the members' of c' or base."""
        if guest.role is not Role.REPLICA:
            return False
        if held.record.status is Status.ACTIVE or _member(held.record, guest) is not None:
            return True
        active = self.records(guest.identity.group).active
        return active is not None and held.record.base == active.record.c and _member(active.record, guest) is not None


def _member(record: ConfigRecord, guest: Guest) -> Member | None:
    member = record.member(guest.identity.replica)
    return member if member is not None and member.incarnation == guest.identity.incarnation else None


def _check_keys(guest: Guest, member: Member, c: int) -> None:
    epoch = guest.epochs.get(c)
    if epoch is None:
        raise RefusedError(f"ACTIVE record c={c} names {guest.identity}, of which this agent made no keys for c={c}")
    if (member.usig_key, member.kss_key, member.channel_ca) != (epoch.usig_key, epoch.kss_key, guest.ca.certificate):
        raise RefusedError(f"ACTIVE record c={c} names other keys of {guest.identity} than this agent made")


def _activate(guests: list[Guest], members: list[tuple[Guest, Member]], c: int) -> None:
    for guest in guests:
        for epoch in guest.epochs.values():
            if epoch.c < c:
                epoch.end()
        guest.retired = guest.was_member or guest.retired
    for guest, _ in members:
        guest.epochs[c].activate()
        guest.was_member = True
        guest.retired = False
