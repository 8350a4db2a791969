"""What the parts of a replica share: who it is, the present configuration, its state, whom it knows."""

from dataclasses import dataclass

from cloudfit_orchestrator.bft.execution import Execution
from cloudfit_orchestrator.bft.interfaces import Service
from cloudfit_orchestrator.bft.messages import Beacon, StatementMessage, peer_decoder
from cloudfit_orchestrator.bft.ordering import Ordering
from cloudfit_orchestrator.bft.outbox import Outbox
from cloudfit_orchestrator.bft.pool import Pool
from cloudfit_orchestrator.model.record import ConfigRecord
from cloudfit_orchestrator.model.signing import Verifier
from cloudfit_orchestrator.model.statement import Kind


@dataclass(frozen=True, slots=True)
class Peer:
    """Whom to dial and accept."""

    peer_id: str
    address: str
    channel_ca: bytes


def peer_id(replica: str, incarnation: int) -> str:
    """`replica#incarnation`."""
    return f"{replica}#{incarnation}"


def member_of(record: ConfigRecord, peer: str) -> str:
    """The member that `peer` is. If it is none, its own id: what another incarnation of a member says or breaks, be it
    the one before, is not that member's word or fault.
    """
    member = record.member(peer.partition("#")[0])
    return member.replica if member is not None and peer == peer_id(member.replica, member.incarnation) else peer


class Situation:
    """See the module. `ordering` is that of the present configuration, whose record is in `envelope`. Implements
    `ordering.Host`.
    """

    def __init__(
        self,
        group: str,
        me: str,
        incarnation: int,
        *,
        service: Service,
        controllers: list[bytes],
        verifier: Verifier,
        out: Outbox,
    ) -> None:
        self.group = group
        self.me = me
        self.incarnation = incarnation
        self.controllers = controllers
        self.verifier = verifier
        self._out = out
        self.ordering: Ordering | None = None
        self.envelope = b""
        self.old: Ordering | None = None  # of the configuration before: a leaving member can still hand round its log
        self.member = False  # of the present configuration
        self.decode = peer_decoder(())  # a message of the present or the last configuration's engine; raises BadError
        self.execution = Execution(service)
        self.pool = Pool()
        self.installed = False  # ACTIVE(c) and the state at its h, or a later certified one, are here
        self.saved: set[tuple[int, int]] = set()  # (c, slot) of durable snapshots
        self.beacons: dict[str, Beacon] = {}
        self.learners: dict[str, Peer] = {}
        self.exporters: dict[str, Peer] = {}
        self.peers: dict[str, Peer] = {}
        self.progress_s = 0.0  # when something was executed or a view entered last
        self.statements: dict[Kind, StatementMessage] = {}  # own newest ones, repeated until superseded

    @property
    def c(self) -> int:
        """Number of the present configuration; 0 before the first."""
        return self.ordering.record.c if self.ordering is not None else 0

    @property
    def live(self) -> bool:
        """We speak."""
        return self.ordering is not None and self.ordering.live

    @property
    def own_id(self) -> str:
        """Our peer id."""
        return peer_id(self.me, self.incarnation)

    @property
    def others(self) -> list[str]:
        """Peers that take part or learn; exporters only answer."""
        return [name for name in self.peers if name not in self.exporters]

    def is_me(self, record: ConfigRecord) -> bool:
        """Whether this very incarnation is a member of `record`."""
        member = record.member(self.me)
        return member is not None and member.incarnation == self.incarnation

    def stable_slot(self) -> int:
        """The slot of the own stable checkpoint. If we are no member: of the newest own state on the disk that a
        certificate covers, as what we follow may be what we confirm.
        """
        if self.ordering is None:
            return 0
        if self.member:
            return self.ordering.stable
        newest = self.ordering.statements.newest
        covered = min(newest.slot, self.execution.slot) if newest is not None else 0
        return max((slot for c, slot in self.saved if c == self.c and slot <= covered), default=0)

    def activate(self, ordering: Ordering, envelope: bytes) -> None:
        """A configuration became ACTIVE."""
        self.old, self.ordering, self.envelope = self.ordering, ordering, envelope
        self.member = self.is_me(ordering.record)
        self.beacons.clear()
        self.statements.clear()
        types = ordering.MESSAGES + (self.old.MESSAGES if self.old is not None else ())
        self.decode = peer_decoder(tuple(dict.fromkeys(types)))

    def announce(self, kind: Kind, body: bytes) -> None:
        """See `ordering.Host`."""
        c = self.c
        self._out.sign(c, kind, body, lambda signature: self._announce(c, kind, body, signature))

    def _announce(self, c: int, kind: Kind, body: bytes, signature: bytes) -> None:
        if self.ordering is None or self.c != c:
            return
        message = StatementMessage(c, self.me, kind, body, signature)
        self.statements[kind] = message
        self.ordering.statements.add(message, self.stable_slot())
        self._out.broadcast(self.others, message)

    def refresh_peers(self, prepared: list[ConfigRecord]) -> None:
        """Whom we talk to: members of the present and of coming configurations, learners, exporters."""
        records = [*prepared]
        if self.ordering is not None:
            records.append(self.ordering.record)
        if self.old is not None and not self.installed:  # a leaving member can still hand round what it has
            records.append(self.old.record)
        peers = {}
        for record in records:
            for member in record.members:
                name = peer_id(member.replica, member.incarnation)
                if name != self.own_id:
                    peers[name] = Peer(name, member.address, member.channel_ca)
        self.peers = {**peers, **self.learners, **self.exporters}
