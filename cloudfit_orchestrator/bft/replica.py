"""A replica, sans-IO: calls in, effects out (docs/contracts.md). It joins the parts of this room.

Order of things in every step, and why: what came in is taken into the log before anything that follows from it is
signed (`effects.py`); accepted messages first, then execution, then the own voice, so a body is made from all that is
known; effects leave in the order in which they arose.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from cloudfit_orchestrator.bft.batch import batch_digest
from cloudfit_orchestrator.bft.catchup import CatchUp
from cloudfit_orchestrator.bft.clientdesk import ClientDesk
from cloudfit_orchestrator.bft.commands import parse_bytes, parse_end, parse_peer
from cloudfit_orchestrator.bft.effects import Effect, SaveSnapshot
from cloudfit_orchestrator.bft.engines import engine
from cloudfit_orchestrator.bft.interfaces import Service
from cloudfit_orchestrator.bft.journal import (
    LogBatch,
    LogDecision,
    LogRecord,
    LogShown,
    LogState,
    LogWedges,
    entry_decoder,
)
from cloudfit_orchestrator.bft.messages import (
    NOOP,
    BatchMessage,
    Beacon,
    Chunk,
    Forward,
    Frozen,
    StateIndex,
    StatementMessage,
    WedgeSet,
    as_read,
)
from cloudfit_orchestrator.bft.ordering import Ordering
from cloudfit_orchestrator.bft.outbox import Outbox
from cloudfit_orchestrator.bft.reads import ReadDesk
from cloudfit_orchestrator.bft.recall import collect
from cloudfit_orchestrator.bft.reconfigure import Outcome
from cloudfit_orchestrator.bft.situation import Peer, Situation, peer_id
from cloudfit_orchestrator.bft.store import Snapshot, StateStore
from cloudfit_orchestrator.bft.succession import Succession
from cloudfit_orchestrator.bft.suspicion import Suspicion
from cloudfit_orchestrator.model.channel import ErrorCode
from cloudfit_orchestrator.model.errors import BadError, BadInputError
from cloudfit_orchestrator.model.record import (
    Client,
    ConfigRecord,
    Status,
    check_confirmations,
    open_record,
    record_hash,
)
from cloudfit_orchestrator.model.signing import Verifier
from cloudfit_orchestrator.model.statement import LAYOUT, Kind
from cloudfit_orchestrator.model.ui import EpochEnd

__all__ = ["Peer", "Replica", "peer_id"]

BEACON_S = 0.25  # hints are cheap; they bound how long a lost tail stays unnoticed
COLLECT_S = 1.0
MAX_LEARNERS = 8


class Replica:
    """See the module and docs/contracts.md, which describes every method."""

    def __init__(
        self,
        *,
        group: str,
        replica: str,
        incarnation: int,
        service: Service,
        controller_keys: list[bytes],
        verifier: Verifier,
        log: Iterable[bytes] = (),
        snapshots: Mapping[tuple[int, int], Snapshot] | None = None,
    ) -> None:
        """`log` and `snapshots` are what the state disk holds; both empty for a new machine."""
        self.clients: list[Client] = []
        self._out = Outbox()
        self._at = Situation(
            group, replica, incarnation, service=service, controllers=controller_keys, verifier=verifier, out=self._out
        )
        self._reads = ReadDesk(self._at, self._out)
        self._desk = ClientDesk(self._at, self._out, self._reads)
        self._suspicion = Suspicion(self._at, self._out, self._desk)
        self._catchup = CatchUp(self._at, self._out)
        self._succession = Succession(self._at, self._out)
        self._ready_c = 0
        self._news = False  # something came in that is not processed yet
        self._in_log: set[tuple[int, int]] = set()  # (c, slot) of states that the log names
        self._at.execution.snapshots.update(snapshots or {})
        self._at.saved = set(self._at.execution.snapshots)
        self._restore(log)

    @property
    def peers(self) -> dict[str, Peer]:
        """Whom to dial and accept now, by peer id."""
        return self._at.peers

    @property
    def needs_session(self) -> int | None:
        """The epoch that a session is to be opened of, if any."""
        ordering = self._at.ordering
        return ordering.record.c if ordering is not None and ordering.needs_session else None

    def effects(self) -> list[Effect]:
        """Drain; the caller carries them out in order. What came in since the last time is processed together."""
        if self._news:
            self._pump()
        return self._out.drain()

    # ------------------------------------------------------------------------------------------------------- restore
    def _restore(self, log: Iterable[bytes]) -> None:
        """Read the write-ahead log again through the same code; nothing is said meanwhile."""
        for data in log:
            self._out.logged(data)
            ordering = self._at.ordering
            self._replay(entry_decoder(ordering.ENTRIES if ordering is not None else ())(data))
        self._advance()
        self._out.replaying = False
        if (ordering := self._at.ordering) is not None:
            ordering.batches.restored(self._at.execution.slot + 2 * ordering.record.parameters.window)
            ordering.restored()
        for c, slot in sorted(self._at.execution.snapshots.keys() - (self._in_log & self._at.saved)):
            if c == self._at.c and slot <= self._at.execution.slot:
                self._save(c, slot)

    def _replay(self, entry: Frozen) -> None:
        if isinstance(entry, LogRecord):
            self._take_record(entry.envelope)
            return
        ordering = self._at.ordering
        if ordering is None:
            return
        match entry:
            case LogBatch():
                if entry.c == ordering.record.c:
                    ordering.batches.restore(batch_digest(entry.batch), entry.batch)
            case LogState():
                self._replay_state(ordering, entry)
            case LogDecision():
                if entry.c == ordering.record.c:
                    ordering.want_batch(entry.batch)
                    ordering.decided(entry.s, entry.batch)
            case LogShown():
                self._reads.restore(entry.slot)
            case LogWedges():
                self._succession.successors.add_set(entry.wedges, "")
            case _:
                ordering.restore(entry)
        self._advance()

    def _replay_state(self, ordering: Ordering, entry: LogState) -> None:
        self._in_log.add((entry.c, entry.slot))
        snapshot = self._at.execution.snapshots.get((entry.c, entry.slot))
        if snapshot is None or snapshot.root != entry.root:
            return  # it was not on the disk yet when we died: the state is fetched again
        if entry.slot >= self._at.execution.slot:
            self._at.execution.adopt(entry.slot, StateStore.from_snapshot(snapshot), entry.c)
            ordering.settle(entry.slot)
            self._check_installed(ordering.record)

    # ------------------------------------------------------------------------------------------ records and sessions
    def record(self, envelope: bytes) -> None:
        """RECORD push from the wormhole."""
        try:
            self._take_record(envelope)
        except BadError as error:
            self._out.count("bad_record")
            self._out.report("bad_record", {"error": str(error)})
        self._news = True

    def _take_record(self, envelope: bytes) -> None:
        record = open_record(envelope, self._at.controllers)
        if record.group != self._at.group:
            raise BadError(f"record of group {record.group}, this is a replica of {self._at.group}")
        if record.c <= self._at.c:
            return
        try:
            engine(record.algorithm)  # before anything is wedged for it
        except BadInputError as error:
            raise BadError(f"record c={record.c} cannot be followed here: {error}") from error
        if record.status is Status.PREPARED:
            self._succession.prepared(record, envelope)
            return
        check_confirmations(record, self._at.verifier)
        self._out.journal(LogRecord(envelope))
        self._activate(record, envelope)

    def _activate(self, record: ConfigRecord, envelope: bytes) -> None:
        at = self._at
        outcomes = self._succession.outcomes()
        ordering = engine(record.algorithm)(at, self._out, record, record_hash(envelope))
        at.activate(ordering, envelope)
        self.clients = list(record.clients)
        self._catchup.transfer = None
        self._out.forget_signs()
        self._suspicion.begin(ordering)
        early = self._succession.begin()
        self._install_state(record, outcomes)
        self._desk.recheck(ordering)
        self._succession.refresh_peers()
        for prepared in early:
            self._take_record(prepared)

    def _install_state(self, record: ConfigRecord, outcomes: list[Outcome]) -> None:
        """The pinned state, if it is here: a tentative one, a persisted one, or the present one."""
        execution = self._at.execution
        execution.digests.clear()
        self._at.installed = False
        tentative = next((o for o in outcomes if (o.h, o.digest) == (record.h, record.digest)), None)
        kept = execution.snapshots.get((record.c, record.h))
        if tentative is not None:
            execution.adopt(record.h, tentative.store, record.c)
        elif kept is not None and kept.root == record.digest:
            execution.adopt(record.h, StateStore.from_snapshot(kept), record.c)
        elif execution.slot == record.h and execution.store.root() == record.digest:
            execution.adopt(record.h, execution.store, record.c)
        self._check_installed(record)

    def _check_installed(self, record: ConfigRecord) -> None:
        """Installed means ACTIVE(c') and the state at its h, or a later certified one."""
        execution = self._at.execution
        if self._at.installed:
            return
        at_start = execution.snapshots.get((record.c, record.h))
        beyond = execution.slot > record.h and any(c == record.c for c, _ in execution.snapshots)
        if (at_start is not None and at_start.root == record.digest) or beyond:
            self._at.installed = True
            self._save(record.c, execution.slot)
            self._succession.refresh_peers()

    def _save(self, c: int, slot: int) -> None:
        """Have a snapshot persisted, and named in the log: a machine that stopped may have left it on the disk only."""
        name, snapshots = (c, slot), self._at.execution.snapshots
        if name in snapshots and name not in self._at.saved:
            self._out.put(SaveSnapshot(c, slot, snapshots[name]))
        if name in snapshots and name not in self._in_log and not self._out.replaying:
            self._in_log = self._in_log & snapshots.keys() | {name}
            self._out.journal(LogState(c, slot, snapshots[name].root))

    # ------------------------------------------------------------------------------------------------------ wormhole
    def session(self, c: int, next_cv: int, recent: list[tuple[int, bytes, bytes]]) -> None:
        """A session of epoch c is open (protocol §2, restart within an epoch)."""
        ordering = self._at.ordering
        if ordering is not None and self._at.member and c == self._at.c:
            ordering.session(next_cv, recent)
            self._news = True

    def certified(self, c: int, cv: int, certificate: bytes) -> None:
        """A UI arrived."""
        if self._at.ordering is not None and c == self._at.c:
            self._at.ordering.certified(cv, certificate)
            self._news = True

    def refused(self, c: int, code: ErrorCode) -> None:
        """The wormhole refused a UI, a session or an end of epoch c."""
        if self._at.ordering is not None and c == self._at.c:
            self._at.ordering.refused(code)

    def epoch_ended(self, end: EpochEnd) -> None:
        """The wormhole closed the epoch after our wedge."""
        ordering = self._at.ordering
        if ordering is not None and self._at.member and end.c == self._at.c:
            ordering.close(end)
            self._out.report("wedged", {"c": end.c, "base": end.c})
        self._news = True

    # ---------------------------------------------------------------------------------------------------------- pump
    def _pump(self) -> None:
        """Process, execute, speak."""
        self._news = False
        ordering = self._at.ordering
        if ordering is None:
            self._succession.confirm_first()
            return
        self._advance()
        ordering.speak(self._desk.take_batch)
        self._desk.hand_on(ordering)
        self._succession.advance(ordering)
        if ordering.live and self._at.installed and self._ready_c != self._at.c:
            self._ready_c = self._at.c
            self._out.report("ready", {"c": self._at.c, "slot": self._at.execution.slot})

    def _advance(self) -> None:
        ordering = self._at.ordering
        if ordering is not None:
            ordering.advance()
            if self._at.installed:
                self._execute(ordering)

    def _execute(self, ordering: Ordering) -> None:
        """Execute decided slots strictly in order."""
        execution, limits = self._at.execution, ordering.record.parameters
        while (digest := ordering.decision(execution.slot + 1)) is not None:
            slot = execution.slot + 1
            checked = ordering.batches.checked(digest) if digest != NOOP else None
            if checked is None and digest != NOOP:
                ordering.want_batch(digest)
                return
            executed = execution.execute(slot, digest, checked, limits.client_window)
            ordering.settle(slot)
            self._suspicion.progressed(ordering)
            if executed:
                self._desk.reply(slot, executed)
            if checked is not None:
                self._desk.executed(checked)
            if slot % limits.checkpoint_period == 0:
                execution.checkpoint(ordering.record.c)
                self._save(ordering.record.c, slot)
                self._sign_checkpoint(slot)

    def saved(self, c: int, slot: int) -> None:
        """A snapshot is durable."""
        self._at.saved.add((c, slot))
        self._news = True
        collect(self._at, self._succession.successors, self._out, self._reads.shown)

    def _sign_checkpoint(self, slot: int) -> None:
        if self._at.member:
            body = LAYOUT[Kind.CHECKPOINT].pack(slot, self._at.execution.digests[slot])
            self._at.announce(Kind.CHECKPOINT, body)

    def _sign_checkpoint_again(self) -> None:
        """The wormhole may have refused it, for a time."""
        newest = max((slot for slot in self._at.execution.digests if slot > self._at.stable_slot()), default=0)
        said = self._at.statements.get(Kind.CHECKPOINT)
        if newest and (said is None or LAYOUT[Kind.CHECKPOINT].unpack(said.body)[0] < newest):
            self._sign_checkpoint(newest)

    # ---------------------------------------------------------------------------------------------------- from peers
    def receive(self, peer: str, body: bytes) -> None:
        """A frame from an authenticated peer."""
        try:
            message = self._at.decode(body)
        except BadError:
            self._out.count("malformed_peer")
            return
        ordering = self._at.ordering
        if ordering is not None and not self._catchup.answer(peer, message):
            self._take(peer, ordering, message)
            self._news = True

    def _take(self, peer: str, ordering: Ordering, message: Frozen) -> None:
        c = ordering.record.c
        match message:
            case StatementMessage():
                if message.c == c:
                    self._take_statement(ordering, message)
            case BatchMessage():
                if ordering.offer_batch(message.batch) is not None:
                    self._out.journal(LogBatch(c, message.batch))
            case Forward():
                self._desk.take(message.bundle)
            case StateIndex() | Chunk():
                state = self._catchup.take(peer, message)
                if state is not None:
                    self._adopt(ordering, *state)
            case WedgeSet():
                self._succession.take_set(peer, message)
            case Beacon():
                if message.c == c:
                    self._at.beacons[peer] = message
            case _:
                ordering.receive(peer, message)

    def _take_statement(self, ordering: Ordering, message: StatementMessage) -> None:
        statements = ordering.statements
        if not statements.add(message, self._at.stable_slot()):
            self._out.count("bad_statement")
        elif message.kind == Kind.CHECKPOINT:
            slot, digest = LAYOUT[Kind.CHECKPOINT].unpack(message.body)
            certificate = statements.certificates.get(slot)
            if certificate is not None and certificate.digest != digest:
                # Who signs another digest than a certificate holds is wrong about its state, or lies.
                if statements.verify(Kind.CHECKPOINT, message.replica, message.body, message.signature):
                    self._out.blame(message.replica, "checkpoint", slot)

    def _adopt(self, ordering: Ordering, slot: int, snapshot: Snapshot) -> None:
        """A transferred state: its chunks were checked against a certified root."""
        at = self._at
        if slot < at.execution.slot and at.installed:
            return
        at.execution.adopt(slot, StateStore.from_snapshot(snapshot), ordering.record.c)
        ordering.settle(slot)
        at.progress_s = self._out.now_s
        at.installed = True
        self._save(ordering.record.c, slot)
        self._succession.refresh_peers()

    # --------------------------------------------------------------------------------------- clients, signatures, time
    def from_client(self, client: bytes, body: bytes) -> None:
        """A frame from an authenticated client."""
        read = as_read(body)
        if read is not None:
            self._reads.take(client, read, wedging=self._succession.successors.newest() is not None)
        else:
            self._desk.take(body, client)
            self._news = True

    def signed(self, token: int, signature: bytes) -> None:
        """The KSS signed a statement."""
        if self._out.signed(token, signature) is not Kind.REPLY:  # a reply is on its way, and nothing follows from it
            self._news = True

    def tick(self, now_s: float) -> None:
        """Time passes. Safety never depends on it."""
        self._out.now_s = max(self._out.now_s, now_s)
        ordering = self._at.ordering
        if ordering is None:
            self._pump()
            return
        ordering.tick()
        self._desk.answer_again()
        self._catchup.advance(self._succession.successors.needs_state)
        self._pump()
        self._suspicion.tick(transferring=self._catchup.transfer is not None)
        self._catchup.fetch()
        if self._out.every("beacon", BEACON_S):
            self._beacon(ordering)
        if self._out.every("collect", COLLECT_S):
            collect(self._at, self._succession.successors, self._out, self._reads.shown)

    def _beacon(self, ordering: Ordering) -> None:
        """Repeat what must not be lost: where the own messages end, own newest statements, the wedge set."""
        at = self._at
        if at.member:
            self._out.broadcast(at.others, Beacon(ordering.record.c, ordering.position, at.execution.slot))
            self._sign_checkpoint_again()
            for statement in at.statements.values():
                self._out.broadcast(at.others, statement)
            ordering.repeat()
        elif at.installed:
            self._out.report("learner", self._learning(ordering.record))
        self._succession.hand_round(ordering)

    def _learning(self, record: ConfigRecord) -> dict[str, int]:
        """How far a machine that is no member has followed: `behind` is 0 when f+1 members are not ahead of it."""
        slots = sorted((beacon.slot for beacon in self._at.beacons.values()), reverse=True)
        behind = max(0, slots[record.f] - self._at.execution.slot) if len(slots) > record.f else 1 << 30
        return {"c": record.c, "h": record.h, "slot": self._at.execution.slot, "behind": behind}

    # ------------------------------------------------------------------------------------------------------ commands
    def command(self, body: dict[str, Any]) -> None:
        """COMMAND push from the controller."""
        try:
            self._obey(body)
        except (BadError, KeyError, TypeError, ValueError) as error:
            self._out.count("bad_command")
            self._out.report("bad_command", {"error": f"{type(error).__name__}: {error}"})
        self._news = True

    def _obey(self, body: dict[str, Any]) -> None:
        match body.get("op"):
            case "learn":
                peer = parse_peer(body["peer"])
                if peer.peer_id in self._at.learners or len(self._at.learners) < MAX_LEARNERS:
                    self._at.learners[peer.peer_id] = peer
            case "forget":
                self._at.learners.pop(str(body["peer_id"]), None)
            case "base":
                self._catchup.wait_source = bool(body.get("wait_source", False))
            case "source":
                if body.get("peer"):
                    peer = parse_peer(body["peer"])
                    self._at.exporters = {peer.peer_id: peer}
                self._catchup.wait_source = False
            case "retire":
                if self._at.ordering is not None:
                    self._at.ordering.retire(parse_bytes(body["order"]))
            case "ended":
                if self._at.ordering is not None:
                    self._at.ordering.take_end(parse_end(body["end"]))
            case _:
                self._out.count("unknown_command")
        self._succession.refresh_peers()

    @property
    def status(self) -> dict[str, Any]:
        """Figures for reports and metrics."""
        at = self._at
        return {
            "c": at.c,
            "slot": at.execution.slot,
            "view": at.ordering.view if at.ordering is not None else 0,
            "stable": at.stable_slot(),
            "live": at.live,
            "installed": at.installed,
            "pool": len(at.pool),
            "log_records": self._out.log_size,
            **(at.ordering.figures if at.ordering is not None else {}),
            "counters": dict(self._out.counters),
        }
