"""A replica, sans-IO: calls in, effects out (docs/contracts.md). It joins the parts of this room.

Order of things in every step, and why: what came in is taken into the log before anything that follows from it is
signed (`effects.py`); accepted messages first, then execution, then the own voice, so a body is made from all that is
known; effects leave in the order in which they arose.
"""

import base64
from collections.abc import Iterable, Mapping
from typing import Any

from cloudfit_orchestrator.bft.batch import batch_digest
from cloudfit_orchestrator.bft.catchup import CatchUp
from cloudfit_orchestrator.bft.clientdesk import ClientDesk
from cloudfit_orchestrator.bft.configuration import Configuration
from cloudfit_orchestrator.bft.effects import Certify, Effect, SaveSnapshot
from cloudfit_orchestrator.bft.interfaces import Service
from cloudfit_orchestrator.bft.journal import (
    Entry,
    LogAnchor,
    LogBatch,
    LogBody,
    LogDecision,
    LogEnd,
    LogMessage,
    LogRecord,
    LogState,
    LogUI,
    LogView,
    LogWedges,
    decode_entry,
)
from cloudfit_orchestrator.bft.messages import (
    NOOP,
    BatchMessage,
    Beacon,
    Chunk,
    Discarded,
    EpochEndMessage,
    Forward,
    LogProof,
    PeerMessage,
    Prepare,
    StateIndex,
    StatementMessage,
    StreamMessage,
    WedgeSet,
    decode_header,
    decode_peer,
)
from cloudfit_orchestrator.bft.outbox import Outbox
from cloudfit_orchestrator.bft.recall import collect, end_message, epoch_end
from cloudfit_orchestrator.bft.reconfigure import Outcome
from cloudfit_orchestrator.bft.situation import Peer, Situation, peer_id, replica_of
from cloudfit_orchestrator.bft.store import Snapshot, StateStore
from cloudfit_orchestrator.bft.stream import Kept, Offered, bare
from cloudfit_orchestrator.bft.succession import Succession
from cloudfit_orchestrator.bft.suspicion import Suspicion
from cloudfit_orchestrator.bft.voice import Voice
from cloudfit_orchestrator.model.channel import ErrorCode
from cloudfit_orchestrator.model.errors import BadError
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
from cloudfit_orchestrator.model.ui import EpochEnd, message_digest

__all__ = ["Peer", "Replica", "peer_id"]

BEACON_S = 0.25  # hints are cheap; they bound how long a lost tail stays unnoticed
COLLECT_S = 1.0
RETRY_S = 0.2  # refused certifications are asked for again
AMNESIA_REPORT_S = 10.0
MAX_LEARNERS = 8
COMMIT_PIPELINE = 8  # own bodies in flight: while they are, votes gather into the next COMMIT


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
        self.needs_session: int | None = None
        self.clients: list[Client] = []
        self._out = Outbox()
        self._at = Situation(
            group, replica, incarnation, service=service, controllers=controller_keys, verifier=verifier
        )
        self._desk = ClientDesk(self._at, self._out)
        self._suspicion = Suspicion(self._at, self._out, self._desk)
        self._catchup = CatchUp(self._at, self._out)
        self._succession = Succession(self._at, self._out)
        self._session_cv: int | None = None  # a session is open there, the own stream is not rebuilt yet
        self._ready_c = 0
        self._at.execution.snapshots.update(snapshots or {})
        self._at.saved = set(self._at.execution.snapshots)
        self._restore(log)

    @property
    def peers(self) -> dict[str, Peer]:
        """Whom to dial and accept now, by peer id."""
        return self._at.peers

    def effects(self) -> list[Effect]:
        """Drain; the caller carries them out in order."""
        return self._out.drain()

    # ------------------------------------------------------------------------------------------------------- restore
    def _restore(self, log: Iterable[bytes]) -> None:
        """Read the write-ahead log again through the same code; nothing is said meanwhile."""
        for data in log:
            self._out.log_size += 1
            self._replay(decode_entry(data))
        self._advance()
        self._out.replaying = False
        if self._at.configuration is not None:
            self._at.configuration.replaying = False
        for c, slot in sorted(self._at.execution.snapshots.keys() - self._at.saved):
            self._save(c, slot)

    def _replay(self, entry: Entry) -> None:
        if isinstance(entry, LogRecord):
            self._take_record(entry.envelope)
            return
        configuration = self._at.configuration
        if configuration is None:
            return
        match entry:
            case LogMessage() if entry.message.c == configuration.record.c:
                stream = configuration.streams.get(entry.message.replica)
                if stream is not None and stream.wants(entry.message.cv):
                    stream.wait(entry.message)  # its UI was verified before it was logged
            case LogAnchor() if entry.message.c == configuration.record.c:
                configuration.restore_anchor(entry.message)
            case LogView() if entry.message.c == configuration.record.c:
                configuration.restore_view(entry.message)
            case LogBatch() if entry.c == configuration.record.c:
                configuration.batches.add(batch_digest(entry.batch), entry.batch)
            case LogBody() if self._at.voice is not None and entry.c == configuration.record.c:
                self._at.voice.pending[entry.cv] = (entry.header, entry.payload)
            case LogUI() if entry.c == configuration.record.c:
                self._own_certified(entry.cv, entry.certificate)
            case LogState():
                self._replay_state(configuration, entry)
            case LogDecision() if entry.c == configuration.record.c:
                configuration.want_batch(entry.batch)
                configuration.slots.decide(entry.s, entry.batch)
            case LogWedges():
                self._succession.successors.add_set(entry.wedges, "")
            case LogEnd():
                configuration.offer_end(epoch_end(entry.end))
            case _:
                pass  # of a configuration that is over
        self._advance()

    def _replay_state(self, configuration: Configuration, entry: LogState) -> None:
        snapshot = self._at.execution.snapshots.get((entry.c, entry.slot))
        if snapshot is None or snapshot.root != entry.root:
            return  # it was not on the disk yet when we died: the state is fetched again
        if entry.slot >= self._at.execution.slot:
            self._at.execution.adopt(entry.slot, StateStore.from_snapshot(snapshot), entry.c)
            configuration.slots.settle(entry.slot)
            self._check_installed(configuration.record)

    # ------------------------------------------------------------------------------------------ records and sessions
    def record(self, envelope: bytes) -> None:
        """RECORD push from the wormhole."""
        try:
            self._take_record(envelope)
        except BadError as error:
            self._out.count("bad_record")
            self._out.report("bad_record", {"error": str(error)})
        self._pump()

    def _take_record(self, envelope: bytes) -> None:
        record = open_record(envelope, self._at.controllers)
        if record.group != self._at.group:
            raise BadError(f"record of group {record.group}, this is a replica of {self._at.group}")
        if record.c <= self._at.c:
            return
        if record.status is Status.PREPARED:
            self._succession.prepared(record, envelope)
            return
        check_confirmations(record, self._at.verifier)
        self._out.journal(LogRecord(envelope))
        self._activate(record, envelope)

    def _activate(self, record: ConfigRecord, envelope: bytes) -> None:
        at = self._at
        outcomes = self._succession.outcomes()
        configuration = Configuration(record, record_hash(envelope), at.verifier, at.controllers)
        configuration.replaying = self._out.replaying
        at.old, at.configuration, at.envelope = at.configuration, configuration, envelope
        at.ended = False
        at.beacons.clear()
        at.voice = Voice(configuration, at.me, say=self._say) if at.is_me(record) else None
        self.needs_session = record.c if at.voice is not None else None
        self.clients = list(record.clients)
        self._session_cv = None
        self._catchup.transfer = None
        self._out.forget_signs()
        self._suspicion.begin(configuration)
        early = self._succession.begin()
        self._install_state(record, outcomes)
        self._desk.recheck(configuration)
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
        snapshot = self._at.execution.snapshots.get((c, slot))
        if snapshot is not None and (c, slot) not in self._at.saved:
            self._out.put(SaveSnapshot(c, slot, snapshot))
            self._out.journal(LogState(c, slot, snapshot.root))

    def session(self, c: int, next_cv: int, recent: list[tuple[int, bytes, bytes]]) -> None:
        """A session of epoch c is open (protocol §2, restart within an epoch)."""
        voice = self._at.voice
        if voice is None or c != self._at.c:
            return
        self.needs_session = None
        voice.live = False
        certificates = {cv: (digest, certificate) for cv, digest, certificate in recent}
        for cv in sorted(voice.pending):
            known = certificates.get(cv)
            if cv < next_cv and known is not None and known[0] == message_digest(*voice.pending[cv]):
                self._own_certified(cv, known[1])
        voice.pending.clear()  # what is past the counter was never certified, and is made anew
        self._session_cv = next_cv
        self._pump()

    def _try_go_live(self) -> None:
        voice, configuration = self._at.voice, self._at.configuration
        if voice is None or configuration is None or voice.live or self._session_cv is None:
            return
        if configuration.streams[self._at.me].cursor < self._session_cv - 1:
            configuration.wanted.streams[self._at.me] = self._session_cv - 1  # the own stream, from others
            if self._out.every("amnesia", AMNESIA_REPORT_S):
                self._out.report("amnesia", {"c": self._at.c, "cv": self._session_cv - 1})
            return
        voice.go_live(self._session_cv)
        self._session_cv = None
        self._at.pool.release()
        newest = max((slot for slot in self._at.execution.digests if slot > voice.tail.h), default=None)
        if newest is not None:
            self._sign_checkpoint(newest)

    # ---------------------------------------------------------------------------------------------------- own stream
    def _say(self, cv: int, header: bytes, payload: bytes) -> None:
        self._out.journal(LogBody(self._at.c, cv, header, payload))
        self._out.put(Certify(self._at.c, cv, message_digest(header, payload)))

    def certified(self, c: int, cv: int, certificate: bytes) -> None:
        """A UI arrived."""
        if c == self._at.c:
            self._own_certified(cv, certificate)
            self._pump()

    def _own_certified(self, cv: int, certificate: bytes) -> None:
        voice, configuration = self._at.voice, self._at.configuration
        body = voice.certified(cv) if voice is not None else None
        if body is None or configuration is None:
            return
        c = configuration.record.c
        message = StreamMessage(c, self._at.me, cv, *body, certificate)
        if not self._out.replaying:
            self._out.journal(LogUI(c, cv, certificate))
            header = decode_header(body[0])
            data = configuration.batches.data(header.batch) if isinstance(header, Prepare) else None
            self._out.broadcast(self._at.others, StreamMessage(c, self._at.me, cv, *body, certificate, data or b""))
        stream = configuration.streams[self._at.me]
        if stream.wants(cv):
            stream.wait(message)

    def refused(self, c: int, code: ErrorCode) -> None:
        """The wormhole refused a UI, a session or an end of epoch c."""
        voice = self._at.voice
        if voice is None or c != self._at.c:
            return
        self._out.count(f"refused_{code.name.lower()}")
        if code in (ErrorCode.ENDED, ErrorCode.LEASE_OVER):
            voice.live = False
            self._at.ended = True
            self._out.report("silenced", {"c": c, "code": code.name})
        elif code in (ErrorCode.STALE_SESSION, ErrorCode.NOT_ACTIVE, ErrorCode.NO_EPOCH):
            voice.live = False
            self._session_cv = None
            self.needs_session = None
            self._out.later("session", RETRY_S)
        else:
            self._out.later("certify", RETRY_S)

    def _retry(self, configuration: Configuration) -> None:
        """Ask again, in order, for what the wormhole refused for a time."""
        if self._at.voice is None:
            return
        c = configuration.record.c
        if self._out.due("session"):
            self.needs_session = c
        if self._out.due("certify"):
            for cv, (header, payload) in sorted(self._at.voice.pending.items()):
                self._out.put(Certify(c, cv, message_digest(header, payload)))

    def epoch_ended(self, end: EpochEnd) -> None:
        """The wormhole closed the epoch after our wedge."""
        voice, configuration = self._at.voice, self._at.configuration
        if voice is not None and configuration is not None and end.c == self._at.c:
            voice.live = False
            self._at.ended = True
            if configuration.offer_end(end):
                self._out.journal(LogEnd(end_message(end)))
            self._out.report("wedged", {"c": end.c, "base": end.c})
        self._pump()

    # ---------------------------------------------------------------------------------------------------------- pump
    def _pump(self) -> None:
        """Process, execute, speak."""
        if self._at.configuration is None:
            self._succession.confirm_first()
            return
        self._advance()
        self._try_go_live()
        self._speak(self._at.configuration)
        self._succession.advance(self._at.configuration)
        if self._at.live and self._at.installed and self._ready_c != self._at.c:
            self._ready_c = self._at.c
            self._out.report("ready", {"c": self._at.c, "slot": self._at.execution.slot})

    def _advance(self) -> None:
        configuration = self._at.configuration
        if configuration is None:
            return
        for kept in configuration.advance():
            self._accepted(kept)
        for message in configuration.jumps:
            self._out.journal(LogAnchor(message))
        configuration.jumps.clear()
        for replica, rule in configuration.liars.items():
            self._out.blame(replica, rule)
        if self._at.installed:
            self._execute(configuration)

    def _accepted(self, kept: Kept) -> None:
        voice, own = self._at.voice, kept.message.replica == self._at.me
        if voice is None or not own:  # own ones are in the log as body and UI
            self._out.journal(LogMessage(kept.message))
        if voice is not None and not own:
            voice.heard(kept)

    def _execute(self, configuration: Configuration) -> None:
        """Execute decided slots strictly in order."""
        execution, limits = self._at.execution, configuration.record.parameters
        while (digest := configuration.slots.decision(execution.slot + 1)) is not None:
            slot = execution.slot + 1
            checked = configuration.batches.checked(digest) if digest != NOOP else None
            if checked is None and digest != NOOP:
                configuration.want_batch(digest)
                return
            executed = execution.execute(slot, digest, checked, limits.client_window)
            configuration.slots.settle(slot)
            self._suspicion.progressed(configuration)
            if executed:
                self._desk.reply(slot, executed)
            data = configuration.batches.data(digest)
            if data is not None:
                self._desk.executed(data)
            if slot % limits.checkpoint_period == 0:
                execution.checkpoint(configuration.record.c)
                self._save(configuration.record.c, slot)
                self._sign_checkpoint(slot)

    def _speak(self, configuration: Configuration) -> None:
        voice = self._at.voice
        if voice is None or not voice.live or voice.wedge() or voice.tail.wedged:
            return
        view = (voice.tail.v, voice.tail.e)
        voice.stable(self._holds)
        voice.view_change()
        voice.new_view()
        voice.commit_new_view()
        if (voice.tail.v, voice.tail.e) != view:
            self._at.pool.release()
            self._at.progress_s = self._out.now_s
        if len(voice.pending) < COMMIT_PIPELINE:
            voice.commit()
        self._desk.propose(voice, configuration)
        voice.skip()

    def _holds(self, slot: int, digest: bytes) -> bool:
        """The own state after `slot` is the certified one, and on the disk."""
        return self._at.execution.digests.get(slot) == digest and (self._at.c, slot) in self._at.saved

    def saved(self, c: int, slot: int) -> None:
        """A snapshot is durable."""
        self._at.saved.add((c, slot))
        self._pump()
        collect(self._at, self._succession.successors, self._out)

    def _sign_checkpoint(self, slot: int) -> None:
        if self._at.voice is not None:
            c, body = self._at.c, LAYOUT[Kind.CHECKPOINT].pack(slot, self._at.execution.digests[slot])
            self._out.sign(
                c, Kind.CHECKPOINT, body, lambda signature: self._suspicion.state(c, Kind.CHECKPOINT, body, signature)
            )

    def _sign_checkpoint_again(self) -> None:
        """The wormhole may have refused it, for a time."""
        newest = max((slot for slot in self._at.execution.digests if slot > self._at.stable_slot()), default=0)
        said = self._suspicion.statements.get(Kind.CHECKPOINT)
        if newest and (said is None or LAYOUT[Kind.CHECKPOINT].unpack(said.body)[0] < newest):
            self._sign_checkpoint(newest)

    # ---------------------------------------------------------------------------------------------------- from peers
    def receive(self, peer: str, body: bytes) -> None:
        """A frame from an authenticated peer."""
        try:
            message = decode_peer(body)
        except BadError:
            self._out.count("malformed_peer")
            return
        configuration = self._at.configuration
        if configuration is not None and not self._catchup.answer(peer, message):
            self._take(peer, configuration, message)
            self._pump()

    def _take(self, peer: str, configuration: Configuration, message: PeerMessage) -> None:
        c = configuration.record.c
        match message:
            case StreamMessage() if message.c == c:
                self._take_stream(peer, configuration, message)
            case StatementMessage() if message.c == c:
                self._take_statement(configuration, message)
            case Discarded():
                if message.stable.replica != self._at.me or not self._at.live:
                    self._catchup.take_discarded(peer, configuration, message)
            case BatchMessage():
                if configuration.offer_batch(message.batch) is not None:
                    self._out.journal(LogBatch(c, message.batch))
            case LogProof():
                configuration.offer_log(message.messages)
            case Forward():
                self._desk.take(message.bundle)
            case StateIndex():
                self._catchup.take_index(peer, message)
            case Chunk():
                state = self._catchup.take_chunk(peer, message)
                if state is not None:
                    self._adopt(configuration, *state)
            case WedgeSet():
                self._succession.take_set(peer, message)
            case Beacon() if message.c == c:
                self._at.beacons[peer] = message
            case EpochEndMessage():
                self._take_end(configuration, epoch_end(message))
            case _:
                pass

    def _take_stream(self, peer: str, configuration: Configuration, message: StreamMessage) -> None:
        offered = configuration.offer(message)
        if offered is Offered.BAD:
            self._out.count("bad_ui")
            self._out.blame(replica_of(peer), "ui")
            return
        named_by = message.header if offered is Offered.TAKEN else b""
        if message.batch and configuration.offer_batch(message.batch, named_by) is not None:
            self._out.journal(LogBatch(message.c, message.batch))
        if offered is Offered.TAKEN and message.replica == self._at.me and self._at.voice is not None:
            self._out.journal(LogMessage(bare(message)))  # the own stream, lost and found again
        if message.cv <= configuration.streams[message.replica].cursor or configuration.wanted.views:
            configuration.offer_view(message)

    def _take_statement(self, configuration: Configuration, message: StatementMessage) -> None:
        statements = configuration.statements
        if not statements.add(message, self._at.stable_slot()):
            self._out.count("bad_statement")
        elif message.kind == Kind.CHECKPOINT:
            slot, digest = LAYOUT[Kind.CHECKPOINT].unpack(message.body)
            certificate = statements.certificates.get(slot)
            if certificate is not None and certificate.digest != digest:
                # Who signs another digest than f+1 others is wrong about its state, or lies.
                if statements.verify(Kind.CHECKPOINT, message.replica, message.body, message.signature):
                    self._out.blame(message.replica, "checkpoint", slot)

    def _adopt(self, configuration: Configuration, slot: int, snapshot: Snapshot) -> None:
        """A transferred state: its chunks were checked against a certified root."""
        at = self._at
        if slot < at.execution.slot and at.installed:
            return
        at.execution.adopt(slot, StateStore.from_snapshot(snapshot), configuration.record.c)
        configuration.slots.settle(slot)
        at.progress_s = self._out.now_s
        at.installed = True
        self._save(configuration.record.c, slot)
        self._succession.refresh_peers()

    def _take_end(self, configuration: Configuration, end: EpochEnd) -> None:
        known = end.c != configuration.record.c or end.replica in configuration.votes.epoch_ends
        if not known and configuration.offer_end(end):
            self._out.journal(LogEnd(end_message(end)))

    # --------------------------------------------------------------------------------------- clients, wormhole, time
    def from_client(self, client: bytes, body: bytes) -> None:
        """A frame from an authenticated client."""
        self._desk.take(body, client)
        self._pump()

    def signed(self, token: int, signature: bytes) -> None:
        """The KSS signed a statement."""
        self._out.signed(token, signature)
        self._pump()

    def tick(self, now_s: float) -> None:
        """Time passes. Safety never depends on it."""
        self._out.now_s = max(self._out.now_s, now_s)
        configuration = self._at.configuration
        if configuration is None:
            self._pump()
            return
        self._retry(configuration)
        self._desk.answer_again()
        self._catchup.advance(self._succession.successors.needs_state)
        self._pump()
        self._suspicion.tick(transferring=self._catchup.transfer is not None)
        self._catchup.fetch()
        if self._out.every("beacon", BEACON_S):
            self._beacon(configuration)
        if self._out.every("collect", COLLECT_S):
            collect(self._at, self._succession.successors, self._out)

    def _beacon(self, configuration: Configuration) -> None:
        """Repeat what must not be lost: where the own stream ends, own newest statements, EPOCH-ENDs, the wedge set."""
        at = self._at
        if at.voice is not None:
            own = configuration.streams[at.me]
            self._out.broadcast(at.others, Beacon(configuration.record.c, own.cursor, at.execution.slot))
            self._sign_checkpoint_again()
            for statement in self._suspicion.statements.values():
                self._out.broadcast(at.others, statement)
            for end in configuration.votes.epoch_ends.values():
                self._out.broadcast(at.others, end_message(end))
        elif at.installed:
            self._out.report("learner", self._learning(configuration))
        self._succession.hand_round(configuration)

    def _learning(self, configuration: Configuration) -> dict[str, int]:
        """How far a machine that is no member has followed: `behind` is 0 when f+1 members are not ahead of it."""
        record = configuration.record
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
        self._pump()

    def _obey(self, body: dict[str, Any]) -> None:
        match body.get("op"):
            case "learn":
                peer = _peer(body["peer"])
                if peer.peer_id in self._at.learners or len(self._at.learners) < MAX_LEARNERS:
                    self._at.learners[peer.peer_id] = peer
            case "forget":
                self._at.learners.pop(str(body["peer_id"]), None)
            case "base":
                self._catchup.wait_source = bool(body.get("wait_source", False))
            case "source":
                if body.get("peer"):
                    peer = _peer(body["peer"])
                    self._at.exporters = {peer.peer_id: peer}
                self._catchup.wait_source = False
            case "retire":
                self._suspicion.retire(base64.b64decode(body["order"], validate=True))
            case "ended":
                if self._at.configuration is not None:
                    self._take_end(self._at.configuration, _end(body["end"]))
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
            "view": at.voice.tail.e if at.voice is not None else 0,
            "stable": at.stable_slot(),
            "live": at.live,
            "installed": at.installed,
            "pool": len(at.pool),
            "log_records": self._out.log_size,
            "counters": dict(self._out.counters),
        }


def _peer(doc: dict[str, Any]) -> Peer:
    return Peer(str(doc["peer_id"]), str(doc["address"]), base64.b64decode(doc["channel_ca"], validate=True))


def _end(doc: dict[str, Any]) -> EpochEnd:
    """EPOCH-END as a controller hands it on."""
    fields = (base64.b64decode(doc[k], validate=True) for k in ("last_digest", "last_certificate", "signature"))
    return EpochEnd(str(doc["replica"]), int(doc["c"]), int(doc["cv_end"]), *fields)
