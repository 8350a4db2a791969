"""When to ask for another view (protocol §5.1, §5.5). Time-outs give liveness only."""

from cloudfit_orchestrator.bft.clientdesk import ClientDesk
from cloudfit_orchestrator.bft.configuration import Configuration
from cloudfit_orchestrator.bft.judge import leader, proposers
from cloudfit_orchestrator.bft.messages import StatementMessage
from cloudfit_orchestrator.bft.outbox import Outbox
from cloudfit_orchestrator.bft.situation import Situation
from cloudfit_orchestrator.model.errors import BadError
from cloudfit_orchestrator.model.orders import open_retire
from cloudfit_orchestrator.model.statement import LAYOUT, Kind

MAX_TIMEOUT_S = 60.0


class Suspicion:
    """The progress timer: doubles while nothing moves, shrinks back when something does."""

    def __init__(self, situation: Situation, outbox: Outbox, desk: ClientDesk) -> None:
        self._at = situation
        self._out = outbox
        self._desk = desk
        self._timeout_s = 1.0
        self._asked = 0
        self.statements: dict[Kind, StatementMessage] = {}  # own newest ones, repeated until superseded

    def begin(self, configuration: Configuration) -> None:
        """A new configuration."""
        self._timeout_s = configuration.record.parameters.progress_timeout_ms / 1000
        self._asked = 0
        self.statements.clear()
        self._at.progress_s = self._out.now_s

    def progressed(self, configuration: Configuration) -> None:
        """A slot was executed."""
        self._at.progress_s = self._out.now_s
        self._timeout_s = max(configuration.record.parameters.progress_timeout_ms / 1000, self._timeout_s / 2)

    def state(self, c: int, kind: Kind, body: bytes, signature: bytes) -> None:
        """An own statement is signed: send it, and again until it is superseded."""
        configuration = self._at.configuration
        if configuration is None or configuration.record.c != c:
            return
        message = StatementMessage(c, self._at.me, kind, body, signature)
        self.statements[kind] = message
        configuration.statements.add(message, self._at.stable_slot())
        self._out.broadcast(self._at.others, message)

    def ask(self, target: int) -> None:
        """REQ(c, target)."""
        self._asked = max(self._asked, target)
        c, body = self._at.c, LAYOUT[Kind.REQ].pack(self._asked)
        self._out.sign(c, Kind.REQ, body, lambda signature: self.state(c, Kind.REQ, body, signature))

    def tick(self, *, transferring: bool) -> None:
        """Ask for the next view if something waits for too long: first a bundle is forwarded, only then suspected."""
        voice, configuration, at = self._at.voice, self._at.configuration, self._at
        if voice is None or configuration is None or not voice.live or voice.tail.wedged or not at.installed:
            return
        self._desk.forward(voice, configuration, behind=transferring)
        if transferring:
            return
        waiting = voice.tail.v > voice.tail.e or configuration.slots.highest > at.execution.slot
        oldest = at.pool.oldest_s()
        if not waiting and (oldest is None or self._out.now_s - oldest < self._timeout_s):
            newest = configuration.statements.newest
            if oldest is None and (newest is None or newest.slot <= at.execution.slot):
                at.progress_s = self._out.now_s
            return
        if self._out.now_s - at.progress_s < self._timeout_s:
            return
        self._desk.prune(configuration)
        if not waiting and not len(at.pool):
            return
        at.progress_s = self._out.now_s
        self._timeout_s = min(self._timeout_s * 2, MAX_TIMEOUT_S)
        self.ask(max(voice.tail.v, voice.tail.e) + 1)

    def retire(self, envelope: bytes) -> None:
        """RETIRE(c, r): ask, once, for the next view that r neither leads nor proposes in. Raises BadError."""
        order = open_retire(envelope, self._at.controllers)
        voice, configuration = self._at.voice, self._at.configuration
        if voice is None or configuration is None:
            return
        record, tail = configuration.record, voice.tail
        if (order.group, order.c) != (record.group, record.c) or record.member(order.replica) is None:
            raise BadError(f"RETIRE names {order.replica} of c={order.c}, here is c={record.c}")
        if order.replica in voice.retires:
            return
        voice.retires[order.replica] = envelope
        if order.replica in proposers(record, tail.e, tail.blacklist, tail.retired):
            target = max(tail.v, tail.e) + 1
            while leader(record, target) == order.replica and record.n > 1:
                target += 1
            self.ask(target)
