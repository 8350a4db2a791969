"""What the parts of a replica share: who it is, the present configuration, its state, whom it knows."""

from dataclasses import dataclass

from cloudfit_orchestrator.bft.configuration import Configuration
from cloudfit_orchestrator.bft.execution import Execution
from cloudfit_orchestrator.bft.interfaces import Service
from cloudfit_orchestrator.bft.messages import Beacon
from cloudfit_orchestrator.bft.pool import Pool
from cloudfit_orchestrator.bft.voice import Voice
from cloudfit_orchestrator.model.record import ConfigRecord
from cloudfit_orchestrator.model.signing import Verifier


@dataclass(frozen=True, slots=True)
class Peer:
    """Whom to dial and accept."""

    peer_id: str
    address: str
    channel_ca: bytes


def peer_id(replica: str, incarnation: int) -> str:
    """`replica#incarnation`."""
    return f"{replica}#{incarnation}"


def replica_of(peer: str) -> str:
    """The replica's name in a peer id."""
    return peer.partition("#")[0]


class Situation:
    """See the module. `configuration` is the present one, that of `envelope`; `voice` is None if we are no member."""

    def __init__(
        self,
        group: str,
        me: str,
        incarnation: int,
        *,
        service: Service,
        controllers: list[bytes],
        verifier: Verifier,
    ) -> None:
        self.group = group
        self.me = me
        self.incarnation = incarnation
        self.controllers = controllers
        self.verifier = verifier
        self.configuration: Configuration | None = None
        self.envelope = b""
        self.old: Configuration | None = None
        self.voice: Voice | None = None
        self.execution = Execution(service)
        self.pool = Pool()
        self.installed = False  # ACTIVE(c) and the state at its h, or a later certified one, are here
        self.ended = False  # the wormhole has closed the own epoch
        self.saved: set[tuple[int, int]] = set()  # (c, slot) of durable snapshots
        self.beacons: dict[str, Beacon] = {}
        self.learners: dict[str, Peer] = {}
        self.exporters: dict[str, Peer] = {}
        self.peers: dict[str, Peer] = {}
        self.progress_s = 0.0  # when something was executed or a view entered last

    @property
    def c(self) -> int:
        """Number of the present configuration; 0 before the first."""
        return self.configuration.record.c if self.configuration is not None else 0

    @property
    def live(self) -> bool:
        """We speak."""
        return self.voice is not None and self.voice.live

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
        """The slot of the own last STABLE; of the newest certificate within the own state if we are no member."""
        if self.voice is not None:
            return self.voice.tail.h
        newest = self.configuration.statements.newest if self.configuration is not None else None
        return newest.slot if newest is not None and newest.slot <= self.execution.slot else 0

    def refresh_peers(self, prepared: list[ConfigRecord]) -> None:
        """Whom we talk to: members of the present and of coming configurations, learners, exporters."""
        records = [*prepared]
        if self.configuration is not None:
            records.append(self.configuration.record)
        if self.old is not None and not self.installed:  # a leaving member can still hand round what it has
            records.append(self.old.record)
        peers = {}
        for record in records:
            for member in record.members:
                name = peer_id(member.replica, member.incarnation)
                if name != self.own_id:
                    peers[name] = Peer(name, member.address, member.channel_ca)
        self.peers = {**peers, **self.learners, **self.exporters}
