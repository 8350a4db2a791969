"""The controller and CONFIG STORAGE of a simulated group: genesis, and reconfigurations that replace a machine.

It fails by crashing only, and here it does not crash; its words arrive late and in any order.
"""

import base64
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloudfit_orchestrator.model.orders import Retire, seal_retire
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
from cloudfit_orchestrator.model.ui import EpochEnd
from cloudfit_orchestrator.testing.machine import Machine
from cloudfit_orchestrator.testing.network import Schedule

MAX_WAY_S = 0.05  # controller to agent or back
ATTEMPT_S = 15.0  # a PREPARED record that is not confirmed by then is followed by another on the same base


class Site(Protocol):
    """What the controller needs of the simulation around it."""

    schedule: Schedule

    def machine(self, peer_id: str) -> Machine:
        """The machine of that name, which was launched before."""
        ...

    def trace(self, who: str, what: str) -> None:
        """One line of the run's trace."""
        ...

    def activated(self, record: ConfigRecord, envelope: bytes) -> None:
        """The record is ACTIVE in CONFIG STORAGE; nobody has it yet."""
        ...

    def happened(self, what: str) -> None:
        """Something worth counting."""
        ...


@dataclass(slots=True)
class Attempt:
    """A PREPARED record under way."""

    record: ConfigRecord
    envelope: bytes
    machines: list[Machine]
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
        self.unready: set[str] = set()  # members of the ACTIVE record that have not said yet that they serve in it
        self._c = 0
        self._after: Callable[[], None] = lambda: None
        self._words_s: dict[str, float] = {}  # agent -> when the last word to it arrives
        self.slow_s: dict[str, float] = {}  # machines to whose agents words take so much longer

    @property
    def busy(self) -> bool:
        """A reconfiguration is under way."""
        return self._attempt is not None

    def reconfigure(self, machines: list[Machine], after: Callable[[], None] = lambda: None) -> None:
        """Make `machines` the members; `after` is called when the record is ACTIVE and installed."""
        assert self._attempt is None
        self._after = after
        self._prepare(machines)

    def reshape(self, parameters: Parameters, algorithm: Algorithm, after: Callable[[], None]) -> None:
        """Other parameters and another algorithm for the present members."""
        assert self.active is not None
        self._parameters, self._algorithm = parameters, algorithm
        self.reconfigure(self._members(self.active), after)

    def supersede(self) -> None:
        """Give the attempt under way up at once, and write another record on the same base."""
        if self._attempt is not None and self.active is not None:
            self._try_again(self._attempt)

    def introduce(self, learner: Machine, *, wait_source: bool = False) -> None:
        """Show the present configuration to a new machine, and the machine to the members, so that it can pre-copy.

        With `wait_source` it takes no state before `source`.
        """
        assert self.active is not None
        envelope = self._active_envelope
        self._tell(learner, lambda: self._install_and_push(learner, envelope))
        base = {"op": "base", "envelope": base64.b64encode(envelope).decode(), "wait_source": wait_source}
        self.command([learner], base)
        self.command(self._members(self.active), {"op": "learn", "peer": as_peer(learner.name)})

    def source(self, learner: Machine, exporter: str | None) -> None:
        """Name the exporter of the old disk to a learner, or say that there is none."""
        self.command([learner], {"op": "source", "peer": as_peer(exporter) if exporter else None})

    def forget(self, learner: Machine) -> None:
        """A recovery was put off: its machine learns no more."""
        if self.active is not None:
            self.command(self._members(self.active), {"op": "forget", "peer_id": learner.name})

    def retire(self, replica: str) -> None:
        """RETIRE(c, r) to all members."""
        if self.active is not None:
            order = seal_retire(Retire(self._group, self.active.c, replica), self._key)
            self.command(self._members(self.active), {"op": "retire", "order": base64.b64encode(order).decode()})

    def ended(self, end: EpochEnd) -> None:
        """Hand the EPOCH-END of a stopped member round: with its log it is its vote."""
        if self.active is not None:
            fields = ("last_digest", "last_certificate", "signature")
            doc = {name: base64.b64encode(getattr(end, name)).decode() for name in fields}
            doc |= {"replica": end.replica, "c": end.c, "cv_end": end.cv_end}  # type: ignore[dict-item]
            self.command(self._members(self.active), {"op": "ended", "end": doc})

    def command(self, machines: list[Machine], body: dict[str, Any]) -> None:
        """A command to some machines' guests."""
        for machine in machines:
            self._tell(machine, partial(machine.push_command, body))

    def report(self, machine: Machine, topic: str, body: dict[str, Any]) -> None:
        """A report arrives."""
        if topic == "confirm" and self._attempt is not None:
            self._confirm(self._attempt, machine, body)
        elif topic == "ready" and self.active is not None and body["c"] == self.active.c:
            member = self.active.member(machine.identity.replica)
            if member is not None and member.incarnation == machine.identity.incarnation:
                self.unready.discard(member.replica)

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
                    address=address(machine.name),
                    usig_key=usig_key,
                    kss_key=kss_key,
                    channel_ca=channel_ca(machine.name),
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
        attempt = Attempt(record, seal_record(record, self._key), machines)
        self._attempt = attempt
        self.chain.append(attempt.envelope)
        self._site.trace("controller", f"PREPARED c={c} on base {record.base}: {[m.name for m in machines]}")
        self._install_everywhere(attempt.envelope, record)
        self._site.schedule.after(ATTEMPT_S, lambda: self._try_again(attempt))

    def _try_again(self, attempt: Attempt) -> None:
        if self._attempt is attempt:
            self._site.trace("controller", f"c={attempt.record.c} is given up")
            self._site.happened("rule:two PREPARED on one base")
            self._prepare(attempt.machines)

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
        if len(attempt.confirmed) > 1:
            self._site.happened("rule:S differs")
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
        self.unready = {member.replica for member in record.members}
        self._site.activated(record, envelope)
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
        """Words to one agent keep their order, however late they are."""
        now_s = self._site.schedule.now_s()
        at_s = now_s + self._way_s(machine) + self.slow_s.get(machine.name, 0.0)
        at_s = self._words_s[machine.name] = max(at_s, self._words_s.get(machine.name, 0.0))
        self._site.schedule.after(at_s - now_s, action)

    def _way_s(self, machine: Machine) -> float:
        return (sum(machine.name.encode()) * 7919 % 97) / 97 * MAX_WAY_S

    def _members(self, record: ConfigRecord) -> list[Machine]:
        return [self._site.machine(f"{m.replica}#{m.incarnation}") for m in record.members]


def address(peer_id: str) -> str:
    """Where peers would dial it."""
    return f"{peer_id.replace('#', '-')}:7000"


def channel_ca(peer_id: str) -> bytes:
    """Stands for the certificate of its channel CA."""
    return b"ca of " + peer_id.encode()


def as_peer(peer_id: str) -> dict[str, str]:
    """A peer as commands name it."""
    return {
        "peer_id": peer_id,
        "address": address(peer_id),
        "channel_ca": base64.b64encode(channel_ca(peer_id)).decode(),
    }
