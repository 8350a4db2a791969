"""The controller and CONFIG STORAGE of a simulated group: genesis, and reconfigurations that replace a machine.

It fails by crashing only, and here it does not crash; its words arrive late and in any order.
"""

import base64
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloudfit_orchestrator.model.record import (
    NO_DIGEST,
    Algorithm,
    Client,
    ConfigRecord,
    Confirmation,
    Member,
    Parameters,
    Status,
    check_confirmations,
    confirm_body,
    record_hash,
    seal_record,
)
from cloudfit_orchestrator.model.signing import KEY_BYTES, Verifier, public_bytes
from cloudfit_orchestrator.model.statement import Kind, statement_bytes
from cloudfit_orchestrator.testing.machine import Machine
from cloudfit_orchestrator.testing.network import Schedule

MAX_WAY_S = 0.05  # controller to agent or back
ATTEMPT_S = 15.0  # a PREPARED record that is not confirmed by then is followed by another on the same base
PRECOPY_S = 3.0  # a learner gets so long before its record is written


class Site(Protocol):
    """What the controller needs of the simulation around it."""

    schedule: Schedule

    def machine(self, peer_id: str) -> Machine:
        """The machine of that name, which was launched before."""
        ...

    def trace(self, who: str, what: str) -> None:
        """One line of the run's trace."""
        ...


@dataclass(slots=True)
class Attempt:
    """A PREPARED record under way."""

    record: ConfigRecord
    envelope: bytes
    confirmed: dict[tuple[int, bytes], dict[str, bytes]] = field(default_factory=dict)


class SimController:
    """Signs records, one reconfiguration at a time."""

    def __init__(
        self,
        site: Site,
        *,
        group: str,
        f: int,
        k: int,
        algorithm: Algorithm,
        parameters: Parameters,
        clients: tuple[Client, ...],
        verifier: Verifier,
        rng: random.Random,
    ) -> None:
        """Everything but the members is the same in each configuration."""
        self._site = site
        self._key = Ed25519PrivateKey.from_private_bytes(rng.randbytes(KEY_BYTES))
        self.public = public_bytes(self._key)
        self._group = group
        self._f, self._k = f, k
        self._algorithm = algorithm
        self._parameters = parameters
        self._clients = clients
        self._verifier = verifier
        self._rng = rng
        self.chain: list[bytes] = []  # CONFIG STORAGE: envelopes
        self.active: ConfigRecord | None = None
        self._active_envelope = b""
        self._attempt: Attempt | None = None
        self._c = 0
        self._after: Callable[[], None] = lambda: None
        self.reports: dict[str, list[tuple[str, dict[str, Any]]]] = {}

    @property
    def busy(self) -> bool:
        """A reconfiguration is under way."""
        return self._attempt is not None

    def reconfigure(self, machines: list[Machine], after: Callable[[], None] = lambda: None) -> None:
        """Make `machines` the members; `after` is called when the record is ACTIVE and installed."""
        assert self._attempt is None
        self._after = after
        self._prepare(machines)

    def introduce(self, learner: Machine) -> None:
        """Show the present configuration to a new machine, and the machine to the members, so that it can pre-copy."""
        assert self.active is not None
        envelope = self._active_envelope
        peer = {
            "peer_id": learner.name,
            "address": address(learner),
            "channel_ca": base64.b64encode(channel_ca(learner)).decode(),
        }
        self._tell(learner, lambda: self._install_and_push(learner, envelope))
        self._tell(
            learner, lambda: learner.push_command({"op": "base", "envelope": base64.b64encode(envelope).decode()})
        )
        for member in self._members(self.active):
            self._tell(member, lambda member=member: member.push_command({"op": "learn", "peer": peer}))  # type: ignore[misc]

    def report(self, machine: Machine, topic: str, body: dict[str, Any]) -> None:
        """A report arrives."""
        self.reports.setdefault(topic, []).append((machine.name, body))
        if topic == "confirm" and self._attempt is not None:
            self._confirm(self._attempt, machine, body)

    # --------------------------------------------------------------------------------------------------- one attempt
    def _prepare(self, machines: list[Machine]) -> None:
        self._c += 1
        c = self._c
        members = []
        for machine in machines:
            usig_key, kss_key = machine.wormhole.prepare(c)
            members.append(
                Member(
                    replica=machine.identity.replica,
                    incarnation=machine.identity.incarnation,
                    cloud="simulation",
                    address=address(machine),
                    usig_key=usig_key,
                    kss_key=kss_key,
                    channel_ca=channel_ca(machine),
                    image="sha256:" + "0" * 64,
                    launch="sha256:" + "0" * 64,
                )
            )
        record = ConfigRecord(
            group=self._group,
            c=c,
            base=self.active.c if self.active is not None else None,
            members=tuple(members),
            clients=self._clients,
            service="kv",
            f=self._f,
            k=self._k,
            algorithm=self._algorithm,
            parameters=self._parameters,
            previous=record_hash(self.chain[-1]) if self.chain else NO_DIGEST,
        )
        attempt = Attempt(record, seal_record(record, self._key))
        self._attempt = attempt
        self.chain.append(attempt.envelope)
        self._site.trace("controller", f"PREPARED c={c} on base {record.base}: {[m.name for m in machines]}")
        self._install_everywhere(attempt.envelope, record)
        self._site.schedule.after(ATTEMPT_S, lambda: self._try_again(attempt, machines))

    def _try_again(self, attempt: Attempt, machines: list[Machine]) -> None:
        if self._attempt is attempt:
            self._site.trace("controller", f"c={attempt.record.c} is given up")
            self._prepare(machines)

    def _confirm(self, attempt: Attempt, machine: Machine, body: dict[str, Any]) -> None:
        record = attempt.record
        prepared, digest, signature = (base64.b64decode(body[name]) for name in ("prepared", "digest", "signature"))
        member = record.member(machine.identity.replica)
        if body["c"] != record.c or prepared != record_hash(attempt.envelope) or member is None:
            return
        if member.incarnation != machine.identity.incarnation:
            return
        said = statement_bytes(
            Kind.CONFIRM, record.group, member.replica, record.c, confirm_body(prepared, body["h"], digest)
        )
        if not self._verifier.verify(member.kss_key, said, signature):
            return
        votes = attempt.confirmed.setdefault((body["h"], digest), {})
        votes[member.replica] = signature
        if len(votes) >= record.confirmations_needed:
            self._activate(attempt, body["h"], digest, votes)

    def _activate(self, attempt: Attempt, h: int, digest: bytes, votes: dict[str, bytes]) -> None:
        old = self.active
        if old is not None:
            for machine in self._members(old):
                machine.wormhole.close(old.c)
        record = attempt.record.activated(
            prepared=record_hash(attempt.envelope),
            previous=record_hash(self.chain[-1]),
            h=h,
            digest=digest,
            confirmations=[Confirmation(replica, signature) for replica, signature in sorted(votes.items())],
        )
        check_confirmations(record, self._verifier)
        envelope = seal_record(record, self._key)
        self.chain.append(envelope)
        self.active, self._active_envelope, self._attempt = record, envelope, None
        self._site.trace("controller", f"ACTIVE c={record.c} at h={h}, digest {digest.hex()[:8]}, by {sorted(votes)}")
        self._install_everywhere(envelope, record, old)
        self._site.schedule.after(2 * MAX_WAY_S, self._after)

    # ------------------------------------------------------------------------------------------------------ messages
    def _install_everywhere(self, envelope: bytes, record: ConfigRecord, old: ConfigRecord | None = None) -> None:
        named = [*self._members(record), *(self._members(old) if old is not None else [])]
        if record.status is Status.PREPARED and self.active is not None:
            named += self._members(self.active)
        for machine in dict.fromkeys(named):
            self._tell(machine, lambda machine=machine: self._install_and_push(machine, envelope))  # type: ignore[misc]

    def _install_and_push(self, machine: Machine, envelope: bytes) -> None:
        if machine.wormhole.install(envelope):
            machine.push_record(envelope)

    def _tell(self, machine: Machine, action: Callable[[], None]) -> None:
        """Words to one agent keep their order; they are late by the same for one agent."""
        self._site.schedule.after(self._way_s(machine), action)

    def _way_s(self, machine: Machine) -> float:
        return (sum(machine.name.encode()) * 7919 % 97) / 97 * MAX_WAY_S

    def _members(self, record: ConfigRecord) -> list[Machine]:
        return [self._site.machine(f"{m.replica}#{m.incarnation}") for m in record.members]


def address(machine: Machine) -> str:
    """Where peers would dial it."""
    return f"{machine.identity.replica}-{machine.identity.incarnation}:7000"


def channel_ca(machine: Machine) -> bytes:
    """Stands for the certificate of its channel CA."""
    return b"ca of " + machine.name.encode()
