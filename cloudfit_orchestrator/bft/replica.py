"""A replica, sans-IO: calls in, effects out (docs/contracts.md). It joins the parts of this room.

Order of things in every step, and why: what came in is taken into the log before anything that follows from it is
signed (`effects.py`); accepted messages first, then execution, then the own voice, so a body is made from all that is
known; effects leave in the order in which they arose.
"""

import base64
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cloudfit_orchestrator.bft.batch import batch_digest, make_batch, split_batch
from cloudfit_orchestrator.bft.clients import Executed, acceptable, cached, reply_tree
from cloudfit_orchestrator.bft.configuration import Configuration
from cloudfit_orchestrator.bft.effects import (
    Answer,
    Append,
    Certify,
    DropSnapshots,
    Effect,
    EndEpoch,
    Report,
    Rewrite,
    SaveSnapshot,
    Send,
    Sign,
)
from cloudfit_orchestrator.bft.execution import Execution
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
    encode_entry,
)
from cloudfit_orchestrator.bft.judge import leader, proposers
from cloudfit_orchestrator.bft.messages import (
    MAX_FETCH,
    NOOP,
    BatchMessage,
    Beacon,
    Chunk,
    ChunkQuery,
    Discarded,
    EpochEndMessage,
    Fetch,
    FetchBatches,
    FetchNewView,
    Forward,
    NewView,
    Overloaded,
    PeerMessage,
    Prepare,
    Replies,
    Result,
    StateIndex,
    StateQuery,
    StatementMessage,
    StreamMessage,
    WedgeSet,
    decode_header,
    decode_peer,
    encode,
)
from cloudfit_orchestrator.bft.pool import Pool
from cloudfit_orchestrator.bft.reconfigure import Outcome, Successors
from cloudfit_orchestrator.bft.serving import answer_batches, answer_fetch, answer_state, with_batch
from cloudfit_orchestrator.bft.store import Snapshot, StateStore
from cloudfit_orchestrator.bft.stream import Kept
from cloudfit_orchestrator.bft.transfer import Transfer
from cloudfit_orchestrator.bft.voice import Voice
from cloudfit_orchestrator.model.channel import ErrorCode
from cloudfit_orchestrator.model.errors import BadError
from cloudfit_orchestrator.model.orders import open_retire
from cloudfit_orchestrator.model.record import (
    Client,
    ConfigRecord,
    Status,
    check_confirmations,
    confirm_body,
    open_record,
    record_hash,
)
from cloudfit_orchestrator.model.signing import Verifier
from cloudfit_orchestrator.model.statement import LAYOUT, Kind
from cloudfit_orchestrator.model.ui import EpochEnd, message_digest

BEACON_S = 0.25  # hints are cheap; they bound how long a lost tail stays unnoticed
FETCH_S = 0.1  # a gap is usually filled by messages under way
STUCK_S = 0.5  # without progress for so long, a certified state ahead is fetched whole
RETRY_S = 0.2  # refused certifications are asked for again
MAX_TIMEOUT_S = 60.0
MAX_SIGNS = 4096  # statements waiting for their signature
MAX_EPOCHS_PREPARED = 8  # PREPARED records kept for one base
MAX_LEARNERS = 8
REWRITE_FACTOR = 2  # the log is rewritten when it has grown to so many times what must be kept
REWRITE_SLACK = 512  # records
COMMIT_PIPELINE = 8  # own bodies in flight: while they are, votes gather into the next COMMIT


@dataclass(frozen=True, slots=True)
class Peer:
    """Whom to dial and accept."""

    peer_id: str
    address: str
    channel_ca: bytes


def peer_id(replica: str, incarnation: int) -> str:
    """`replica#incarnation`."""
    return f"{replica}#{incarnation}"


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
        self.group = group
        self.me = replica
        self.incarnation = incarnation
        self.needs_session: int | None = None
        self.clients: list[Client] = []
        self.peers: dict[str, Peer] = {}
        self.counters: dict[str, int] = {}
        self._controllers = controller_keys
        self._verifier = verifier
        self._out: list[Effect] = []
        self._now = 0.0
        self._replaying = True
        self._log_size = 0
        self._active: tuple[ConfigRecord, bytes] | None = None
        self._configuration: Configuration | None = None
        self._old: Configuration | None = None
        self._voice: Voice | None = None
        self._execution = Execution(service)
        self._execution.snapshots.update(snapshots or {})
        self._saved = set(self._execution.snapshots)
        self._successors = Successors()
        self._confirmed: set[tuple[int, int, bytes]] = set()
        self._pool = Pool()
        self._signs: dict[int, Callable[[bytes], None]] = {}
        self._token = 0
        self._learners: dict[str, Peer] = {}
        self._exporters: dict[str, Peer] = {}
        self._wait_source = False
        self._transfer: Transfer | None = None
        self._installed = False
        self._session_cv: int | None = None
        self._ended = False
        self._beacons: dict[str, Beacon] = {}
        self._blame: dict[str, str] = {}
        self._own_statements: dict[Kind, StatementMessage] = {}
        self._due: dict[str, float] = {}
        self._turn = 0
        self._progress_s = 0.0
        self._timeout_s = 1.0
        self._asked_view = 0
        self._reported: set[tuple[str, int]] = set()
        self._early: list[bytes] = []
        self._restore(log)
        self._replaying = False

    # ----------------------------------------------------------------------------------------------------------- effects
    def effects(self) -> list[Effect]:
        """Drain; the caller carries them out in order."""
        out, self._out = self._out, []
        return out

    def _journal(self, entry: Entry) -> None:
        if not self._replaying:
            self._log_size += 1
            self._out.append(Append(encode_entry(entry)))

    def _effect(self, effect: Effect) -> None:
        if not self._replaying:
            self._out.append(effect)

    def _count(self, name: str) -> None:
        self.counters[name] = self.counters.get(name, 0) + 1

    def _broadcast(self, message: PeerMessage) -> None:
        data = encode(message)
        for peer in self.peers:
            if peer not in self._exporters:
                self._effect(Send(peer, data))

    def _send(self, peer: str, message: Any) -> None:
        self._effect(Send(peer, encode(message)))

    def _sign(self, c: int, kind: Kind, body: bytes, then: Callable[[bytes], None]) -> None:
        if self._replaying or len(self._signs) >= MAX_SIGNS:
            return
        self._token += 1
        self._signs[self._token] = then
        self._out.append(Sign(c, kind, body, self._token))

    def _every(self, name: str, seconds: float) -> bool:
        if self._now < self._due.get(name, 0.0):
            return False
        self._due[name] = self._now + seconds
        return True

    # ----------------------------------------------------------------------------------------------------------- restore
    def _restore(self, log: Iterable[bytes]) -> None:
        """Read the write-ahead log again through the same code; nothing is said meanwhile."""
        for data in log:
            self._log_size += 1
            self._replay(decode_entry(data))
        if self._active is not None:
            self._advance()
            self._replaying = False
            for name in sorted(self._execution.snapshots.keys() - self._saved):
                self._effect(SaveSnapshot(*name, self._execution.snapshots[name]))
                self._journal(LogState(*name, self._execution.snapshots[name].root))

    def _replay(self, entry: Entry) -> None:
        if isinstance(entry, LogRecord):
            self._take_record(entry.envelope)
            return
        configuration = self._configuration
        if configuration is None:
            return
        match entry:
            case LogMessage():
                self._replay_message(configuration, entry.message)
            case LogAnchor():
                configuration.restore_anchor(entry.message)
            case LogView():
                configuration.restore_view(entry.message)
            case LogBatch():
                if entry.c == configuration.record.c:
                    configuration.batches.add(batch_digest(entry.batch), entry.batch)
            case LogBody():
                if self._voice is not None and entry.c == configuration.record.c:
                    self._voice.pending[entry.cv] = (entry.header, entry.payload)
            case LogUI():
                if self._voice is not None and entry.c == configuration.record.c:
                    self._own_certified(entry.cv, entry.certificate)
            case LogState():
                self._replay_state(configuration, entry)
            case LogDecision():
                if entry.c == configuration.record.c:
                    configuration.want_batch(entry.batch)
                    configuration.slots.decide(entry.s, entry.batch)
            case LogWedges():
                self._successors.add_set(entry.wedges, "")
            case LogEnd():
                configuration.offer_end(_epoch_end(entry.end))
        self._advance()

    def _replay_message(self, configuration: Configuration, message: StreamMessage) -> None:
        if message.c == configuration.record.c:
            stream = configuration.streams.get(message.replica)
            if stream is not None and stream.wants(message.cv):
                stream.wait(message)  # its UI was verified before it was logged

    def _replay_state(self, configuration: Configuration, entry: LogState) -> None:
        snapshot = self._execution.snapshots.get((entry.c, entry.slot))
        if snapshot is None or snapshot.root != entry.root:
            return  # it was not on the disk yet when we died: the state is fetched again
        if entry.slot >= self._execution.slot:
            self._execution.adopt(entry.slot, StateStore.from_snapshot(snapshot), entry.c)
            configuration.slots.settle(entry.slot)
            self._check_installed()

    # ----------------------------------------------------------------------------------------------- records and sessions
    def record(self, envelope: bytes) -> None:
        """RECORD push from the wormhole."""
        try:
            self._take_record(envelope)
        except BadError as error:
            self._count("bad_record")
            self._effect(Report("bad_record", {"error": str(error)}))
        self._pump()

    def _take_record(self, envelope: bytes) -> None:
        record = open_record(envelope, self._controllers)
        if record.group != self.group:
            raise BadError(f"record of group {record.group}, this is a replica of {self.group}")
        current = self._active[0].c if self._active else 0
        if record.c <= current:
            return
        if record.status is Status.ACTIVE:
            check_confirmations(record, self._verifier)
            self._journal(LogRecord(envelope))
            self._activate(record, envelope)
            return
        if (record.base or 0) > current:
            self._early = [*self._early, envelope][-MAX_EPOCHS_PREPARED:]
        if (record.base or 0) != current or record.c in self._successors.prepared:
            return
        if len(self._successors.prepared) >= MAX_EPOCHS_PREPARED:
            del self._successors.prepared[min(self._successors.prepared)]
        self._journal(LogRecord(envelope))
        self._successors.prepared[record.c] = (record, envelope)
        if self._voice is not None:
            self._voice.successor = envelope
        self._refresh_peers()
        self._effect(Report("prepared", {"c": record.c}))

    def _is_me(self, record: ConfigRecord) -> bool:
        member = record.member(self.me)
        return member is not None and member.incarnation == self.incarnation

    def _activate(self, record: ConfigRecord, envelope: bytes) -> None:
        if self._configuration is not None and self._installed and self._successors.prepared:
            self._successors.compute(self._configuration, self._execution)
        outcomes = self._successors.outcomes()
        self._active = (record, envelope)
        self._old, self._configuration = (
            self._configuration,
            Configuration(record, record_hash(envelope), self._verifier, self._controllers),
        )
        self._successors = Successors()
        self._confirmed.clear()
        self._beacons.clear()
        self._own_statements.clear()
        self._signs.clear()
        self._transfer = None
        self._ended = False
        self._session_cv = None
        self._asked_view = 0
        self._timeout_s = record.parameters.progress_timeout_ms / 1000
        self._progress_s = self._now
        self.clients = list(record.clients)
        self._voice = None
        if self._is_me(record):
            self._voice = Voice(self._configuration, self.me, say=self._say)
            self.needs_session = record.c
        else:
            self.needs_session = None
        self._install_state(record, outcomes)
        for waiting in self._pool.bundles():
            try:
                self._configuration.checker.check(waiting.data)
            except BadError:
                self._pool.remove(waiting.data)
        self._pool.release()
        self._refresh_peers()
        early, self._early = self._early, []
        for prepared in early:
            self._take_record(prepared)

    def _install_state(self, record: ConfigRecord, outcomes: list[Outcome]) -> None:
        """The pinned state, if it is here: a tentative one, the present one, or a persisted one."""
        execution = self._execution
        execution.digests.clear()
        self._installed = False
        for outcome in outcomes:
            if (outcome.h, outcome.digest) == (record.h, record.digest):
                execution.adopt(outcome.h, outcome.store, record.c)
                break
        else:
            kept = execution.snapshots.get((record.c, record.h))
            if kept is not None and kept.root == record.digest:
                execution.adopt(record.h, StateStore.from_snapshot(kept), record.c)
            elif execution.slot == record.h and execution.store.root() == record.digest:
                execution.adopt(record.h, execution.store, record.c)
        self._check_installed()

    def _check_installed(self) -> None:
        """Installed means ACTIVE(c') and the state at its h, or a later certified one."""
        if self._installed or self._active is None:
            return
        record = self._active[0]
        at_start = self._execution.snapshots.get((record.c, record.h))
        beyond = self._execution.slot > record.h and any(c == record.c for c, _ in self._execution.snapshots)
        if (at_start is not None and at_start.root == record.digest) or beyond:
            self._installed = True
            self._save(record.c)
            self._refresh_peers()

    def _save(self, c: int) -> None:
        name = (c, self._execution.slot)
        snapshot = self._execution.snapshots.get(name)
        if snapshot is not None and name not in self._saved:
            self._effect(SaveSnapshot(c, self._execution.slot, snapshot))
            self._journal(LogState(c, self._execution.slot, snapshot.root))

    def session(self, c: int, next_cv: int, recent: list[tuple[int, bytes, bytes]]) -> None:
        """A session of epoch c is open (protocol §2, restart within an epoch)."""
        if self._voice is None or self._configuration is None or c != self._configuration.record.c:
            return
        self.needs_session = None
        voice = self._voice
        voice.live = False
        certificates = {cv: (digest, certificate) for cv, digest, certificate in recent}
        for cv in sorted(voice.pending):
            header, payload = voice.pending[cv]
            known = certificates.get(cv)
            if cv < next_cv and known is not None and known[0] == message_digest(header, payload):
                self._own_certified(cv, known[1])
        voice.pending.clear()  # what is past the counter was never certified, and is made anew
        self._session_cv = next_cv
        self._pump()

    def _try_go_live(self) -> None:
        voice, configuration = self._voice, self._configuration
        if voice is None or configuration is None or voice.live or self._session_cv is None:
            return
        stream = configuration.streams[self.me]
        if stream.cursor < self._session_cv - 1:
            configuration.wanted.streams[self.me] = self._session_cv - 1  # the own stream, from others
            if self._every("amnesia", 10.0):
                self._effect(Report("amnesia", {"c": configuration.record.c, "cv": self._session_cv - 1}))
            return
        voice.go_live(self._session_cv)
        self._session_cv = None
        self._pool.release()
        newest = max((s for s in self._execution.digests if s > voice.tail.h), default=None)
        if newest is not None:
            self._sign_checkpoint(newest)

    # ----------------------------------------------------------------------------------------------------- own stream
    def _say(self, cv: int, header: bytes, payload: bytes) -> None:
        assert self._configuration is not None
        c = self._configuration.record.c
        self._journal(LogBody(c, cv, header, payload))
        self._effect(Certify(c, cv, message_digest(header, payload)))

    def certified(self, c: int, cv: int, certificate: bytes) -> None:
        """A UI arrived."""
        if self._voice is not None and self._configuration is not None and c == self._configuration.record.c:
            self._own_certified(cv, certificate)
            self._pump()

    def _own_certified(self, cv: int, certificate: bytes) -> None:
        assert self._voice is not None
        assert self._configuration is not None
        body = self._voice.certified(cv)
        if body is None:
            return
        c = self._configuration.record.c
        message = StreamMessage(c, self.me, cv, *body, certificate)
        if not self._replaying:
            self._journal(LogUI(c, cv, certificate))
            header = decode_header(body[0])
            data = self._configuration.batches.data(header.batch) if isinstance(header, Prepare) else None
            self._broadcast(StreamMessage(c, self.me, cv, *body, certificate, data or b""))
        stream = self._configuration.streams[self.me]
        if stream.wants(cv):
            stream.wait(message)

    def refused(self, c: int, code: ErrorCode) -> None:
        """The wormhole refused a UI, a session or an end of epoch c."""
        if self._voice is None or self._configuration is None or c != self._configuration.record.c:
            return
        self._count(f"refused_{code.name.lower()}")
        if code in (ErrorCode.ENDED, ErrorCode.LEASE_OVER):
            self._voice.live = False
            self._ended = True
            self._effect(Report("silenced", {"c": c, "code": code.name}))
        elif code in (ErrorCode.STALE_SESSION, ErrorCode.NOT_ACTIVE, ErrorCode.NO_EPOCH):
            self._voice.live = False
            self._due["session"] = self._now + RETRY_S
            self._session_cv = None
            self.needs_session = None
        else:
            self._due.setdefault("certify", self._now + RETRY_S)

    def _retry(self) -> None:
        """Ask again, in order, for what the wormhole refused for a time."""
        assert self._configuration is not None
        voice = self._voice
        if voice is None:
            return
        if "session" in self._due and self._now >= self._due["session"]:
            del self._due["session"]
            self.needs_session = self._configuration.record.c
        if "certify" in self._due and self._now >= self._due["certify"]:
            del self._due["certify"]
            for cv, (header, payload) in sorted(voice.pending.items()):
                self._effect(Certify(self._configuration.record.c, cv, message_digest(header, payload)))

    def epoch_ended(self, end: EpochEnd) -> None:
        """The wormhole closed the epoch after our wedge."""
        if self._voice is not None and self._configuration is not None and end.c == self._configuration.record.c:
            self._voice.live = False
            self._ended = True
            if self._configuration.offer_end(end):
                self._journal(LogEnd(_end_message(end)))
            self._effect(Report("wedged", {"c": end.c, "base": end.c}))
        self._pump()

    # --------------------------------------------------------------------------------------------------------------- pump
    def _pump(self) -> None:
        """Process, execute, speak."""
        if self._configuration is None:
            self._confirm_first()
            return
        self._advance()
        self._try_go_live()
        self._speak()
        self._reconfigure()
        self._report_ready()

    def _advance(self) -> None:
        configuration = self._configuration
        if configuration is None:
            return
        for kept in configuration.advance():
            self._accepted(kept)
        for message in configuration.jumps:
            self._journal(LogAnchor(message))
        configuration.jumps.clear()
        for replica, rule in configuration.liars.items():
            self._liar(replica, rule)
        self._execute()

    def _accepted(self, kept: Kept) -> None:
        message = kept.message
        if message.replica != self.me or self._voice is None:  # own ones are in the log as body and UI
            self._journal(LogMessage(message))
        if self._voice is not None and message.replica != self.me:
            self._voice.heard(kept)

    def _execute(self) -> None:
        configuration, execution = self._configuration, self._execution
        if configuration is None or not self._installed:
            return
        record = configuration.record
        while (digest := configuration.slots.decision(execution.slot + 1)) is not None:
            slot = execution.slot + 1
            checked = None
            if digest != NOOP:
                checked = configuration.batches.checked(digest)
                if checked is None:
                    configuration.want_batch(digest)
                    return
            executed = execution.execute(slot, digest, checked, record.parameters.client_window)
            configuration.slots.settle(slot)
            self._progress_s = self._now
            base = record.parameters.progress_timeout_ms / 1000
            self._timeout_s = max(base, self._timeout_s / 2)
            if executed:
                self._reply(slot, executed)
            data = configuration.batches.data(digest) if checked else None
            for bundle in split_batch(data) if data is not None else ():
                self._pool.remove(bundle)
            if slot % record.parameters.checkpoint_period == 0:
                execution.checkpoint(record.c)
                self._save(record.c)
                self._sign_checkpoint(slot)

    def _speak(self) -> None:
        voice = self._voice
        if voice is None or not voice.live or self._replaying:
            return
        if voice.wedge() or voice.tail.wedged:
            return
        view = (voice.tail.v, voice.tail.e)
        voice.stable(self._holds)
        voice.view_change()
        voice.new_view()
        voice.commit_new_view()
        if (voice.tail.v, voice.tail.e) != view:
            self._pool.release()
            self._progress_s = self._now
        if len(voice.pending) < COMMIT_PIPELINE:
            voice.commit()
        self._propose(voice)
        voice.skip()

    def _propose(self, voice: Voice) -> None:
        assert self._configuration is not None
        limits = self._configuration.record.parameters
        while self._installed and self._pool.unproposed:
            slot = voice.propose_slot(self._execution.slot)
            if slot is None:
                return
            bundles = self._pool.take(limits.max_batch_requests, limits.max_batch_bytes - 16)
            if not bundles:
                return
            batch = make_batch(bundles)
            digest = batch_digest(batch)
            if self._configuration.batches.add(digest, batch):
                self._journal(LogBatch(self._configuration.record.c, batch))
            self._configuration.batches.name(digest, slot)
            voice.propose(slot, digest)

    def _holds(self, slot: int, digest: bytes) -> bool:
        """The own state after `slot` is the certified one, and on the disk."""
        assert self._configuration is not None
        return self._execution.digests.get(slot) == digest and (self._configuration.record.c, slot) in self._saved

    def saved(self, c: int, slot: int) -> None:
        """A snapshot is durable."""
        self._saved.add((c, slot))
        self._pump()
        self._collect()

    def _sign_checkpoint(self, slot: int) -> None:
        if self._voice is None or self._configuration is None:
            return
        c = self._configuration.record.c
        body = LAYOUT[Kind.CHECKPOINT].pack(slot, self._execution.digests[slot])
        self._sign(c, Kind.CHECKPOINT, body, lambda sig: self._state(c, Kind.CHECKPOINT, body, sig))

    def _state(self, c: int, kind: Kind, body: bytes, signature: bytes) -> None:
        """An own statement is signed: send it, and again until it is superseded."""
        if self._configuration is None or self._configuration.record.c != c:
            return
        message = StatementMessage(c, self.me, kind, body, signature)
        self._own_statements[kind] = message
        self._configuration.statements.add(message, self._stable_slot())
        self._broadcast(message)

    def _stable_slot(self) -> int:
        if self._voice is not None:
            return self._voice.tail.h
        newest = self._configuration.statements.newest if self._configuration else None
        return newest.slot if newest and newest.slot <= self._execution.slot else 0

    # ------------------------------------------------------------------------------------------------------------ garbage
    def _collect(self) -> None:
        """Forget what a stable checkpoint made useless; rewrite the log when it pays (protocol §4)."""
        configuration = self._configuration
        if configuration is None or not self._installed:
            return
        record = configuration.record
        stable = self._stable_slot()
        configuration.truncate(stable - record.parameters.window)
        mine = sorted(slot for c, slot in self._execution.snapshots if c == record.c)
        saved = [slot for slot in mine if (record.c, slot) in self._saved]
        keep = {(record.c, slot) for slot in mine if slot >= stable or slot == mine[-1]}
        certified = [slot for slot in saved if slot in configuration.statements.certificates]
        if certified:
            keep.add((record.c, certified[-1]))
        else:
            keep.update(name for name in self._execution.snapshots if name[0] < record.c or name[1] == record.h)
        if not saved:
            return
        if self._execution.snapshots.keys() - keep:
            self._execution.settle(keep)
            self._saved &= keep
            self._effect(DropSnapshots(tuple(sorted(keep))))
        if self._log_size > self._kept_log_size() * REWRITE_FACTOR + REWRITE_SLACK:
            self._rewrite(configuration, max(saved))

    def _kept_log_size(self) -> int:
        assert self._configuration is not None
        return sum(len(s.kept) for s in self._configuration.streams.values()) + len(self._configuration.batches.all())

    def _rewrite(self, configuration: Configuration, saved_slot: int) -> None:
        assert self._active is not None
        record = configuration.record
        entries: list[Entry] = [LogRecord(self._active[1])]
        root = self._execution.snapshots[(record.c, saved_slot)].root
        entries += [LogBatch(record.c, data) for data in configuration.batches.all()]
        entries += [LogView(view.message) for _, view in sorted(configuration.new_views.items())]
        anchors = [anchor.message for s in configuration.streams.values() if (anchor := s.anchor()) is not None]
        entries += [LogAnchor(message) for message in anchors]
        entries.append(LogState(record.c, saved_slot, root))
        decided = {s: d for s, d in self._execution.history.items() if s > saved_slot}
        decided.update(configuration.slots.decisions())
        entries += [LogDecision(record.c, s, d) for s, d in sorted(decided.items())]
        entries += self._kept_messages(configuration)
        if self._voice is not None:
            entries += [LogBody(record.c, cv, *body) for cv, body in sorted(self._voice.pending.items())]
        entries += [LogRecord(envelope) for _, (_, envelope) in sorted(self._successors.prepared.items())]
        entries += [LogEnd(_end_message(end)) for end in configuration.epoch_ends.values()]
        entries += [LogWedges(record.c, names) for names in self._successors.sets]
        self._log_size = len(entries)
        self._effect(Rewrite(tuple(encode_entry(entry) for entry in entries)))

    def _kept_messages(self, configuration: Configuration) -> list[Entry]:
        """Kept stream messages in an order in which each can be judged when it is read: round robin is enough, as a
        message that must wait for another stream's waits in the buffer.
        """
        found: list[Entry] = []
        for stream in configuration.streams.values():
            for cv, kept in stream.kept.items():
                if cv == stream.base + 1 and stream.base:
                    continue  # the anchor itself
                if stream.replica == self.me and self._voice is not None:
                    message = kept.message
                    found.append(LogBody(message.c, cv, message.header, message.payload))
                    found.append(LogUI(message.c, cv, message.certificate))
                else:
                    found.append(LogMessage(kept.message))
        return found

    # ------------------------------------------------------------------------------------------------------ from peers
    def receive(self, peer: str, body: bytes) -> None:
        """A frame from an authenticated peer."""
        try:
            message = decode_peer(body)
        except BadError:
            self._count("malformed_peer")
            return
        configuration = self._configuration
        if configuration is None:
            if isinstance(message, WedgeSet | Chunk | StateIndex):
                self._count("early")
            return
        if not self._serve(peer, message):
            self._take(peer, configuration, message)
            self._pump()

    def _serve(self, peer: str, message: PeerMessage) -> bool:
        """Answer questions. True if it was one."""
        answers: Iterable[PeerMessage] = ()
        match message:
            case Fetch():
                for configuration in (self._configuration, self._old):
                    if configuration is not None and configuration.record.c == message.c:
                        answers = answer_fetch(configuration, message)
            case FetchBatches():
                for configuration in (self._configuration, self._old):
                    if configuration is not None:
                        answers = [*answers, *answer_batches(configuration, message)]
            case FetchNewView():
                view = self._configuration.new_views.get(message.g) if self._configuration else None
                answers = (view.message,) if view is not None else ()
            case StateQuery() | ChunkQuery():
                answers = answer_state(self._execution, message)
            case _:
                return False
        for answer in answers:
            self._send(peer, answer)
        return True

    def _take(self, peer: str, configuration: Configuration, message: PeerMessage) -> None:
        c = configuration.record.c
        match message:
            case StreamMessage():
                self._take_stream(peer, configuration, message)
            case StatementMessage():
                if message.c == c and not configuration.statements.add(message, self._stable_slot()):
                    self._count("bad_statement")
                elif message.c == c and message.kind == Kind.CHECKPOINT:
                    self._watch_checkpoint(message)
            case Discarded():
                if message.stable.replica != self.me or self._voice is None or not self._voice.live:
                    configuration.offer_jump(message)
            case BatchMessage():
                if configuration.offer_batch(message.batch) is not None:
                    self._journal(LogBatch(c, message.batch))
            case Forward():
                self._take_bundle(message.bundle)
            case StateIndex():
                if self._transfer is not None and not self._transfer.index(peer, message, list(self._exporters)):
                    self._liar(_replica_of(peer), "state index")
            case Chunk():
                self._take_chunk(peer, message)
            case WedgeSet():
                if message.c == c and len(message.wedges) <= configuration.record.n:
                    if self._successors.prepared and self._successors.add_set(message.wedges, peer):
                        self._journal(LogWedges(message.successor, message.wedges))
            case Beacon():
                if message.c == c:
                    self._beacons[peer] = message
            case EpochEndMessage():
                end = _epoch_end(message)
                if end.c == c and end.replica not in configuration.epoch_ends and configuration.offer_end(end):
                    self._journal(LogEnd(message))
            case _:
                pass

    def _take_stream(self, peer: str, configuration: Configuration, message: StreamMessage) -> None:
        if message.c != configuration.record.c:
            return
        if not configuration.offer(message):
            self._count("bad_ui")
            self._liar(_replica_of(peer), "ui")
            return
        if message.batch and configuration.offer_batch(message.batch, named_by=message.header) is not None:
            self._journal(LogBatch(message.c, message.batch))
        if message.replica == self.me and self._voice is not None and not self._voice.live:
            self._journal(LogMessage(message))  # the own stream, lost and found again
        stream = configuration.streams[message.replica]
        if message.cv <= stream.cursor and message.payload:
            try:
                header = decode_header(message.header)
            except BadError:
                return
            if isinstance(header, NewView) and header.g not in configuration.new_views:
                configuration.offer_view(message)

    def _watch_checkpoint(self, message: StatementMessage) -> None:
        """A member that signs another digest than f+1 others is wrong about its state, or lies."""
        assert self._configuration is not None
        slot, digest = LAYOUT[Kind.CHECKPOINT].unpack(message.body)
        certificate = self._configuration.statements.certificates.get(slot)
        if certificate is not None and certificate.digest != digest:
            body = message.body
            if self._configuration.statements.verify(Kind.CHECKPOINT, message.replica, body, message.signature):
                self._liar(message.replica, "checkpoint", slot)

    def _liar(self, replica: str, kind: str, slot: int = 0) -> None:
        if self._blame.get(replica) != kind:
            self._blame[replica] = kind
            self._count(f"lies_{replica}")
            self._effect(Report("liar", {"replica": replica, "kind": kind, "slot": slot}))

    # ------------------------------------------------------------------------------------------------------------ clients
    def from_client(self, client: bytes, body: bytes) -> None:
        """A frame from an authenticated client."""
        if self._configuration is None or not self._installed or self._voice is None:
            return
        self._take_bundle(body, client)
        self._pump()

    def _take_bundle(self, data: bytes, client: bytes | None = None) -> None:
        configuration = self._configuration
        if configuration is None or not self._installed:
            return
        limits = configuration.record.parameters
        try:
            body = configuration.checker.check(data)
        except BadError:
            self._count("bad_bundle")
            return
        if client is not None and body.client != client:
            self._count("bad_bundle")
            return
        if len(body.requests) > limits.max_batch_requests or len(data) + 16 > limits.max_batch_bytes:
            self._count("bad_bundle")
            return
        store = self._execution.store
        known = [Result(r.number, got) for r in body.requests if (got := cached(store, body.client, r.number)) is not None]
        if known and client is not None:
            self._reply(self._execution.slot, [Executed(body.client, tuple(known))])
        fresh = [r.number for r in body.requests if cached(store, body.client, r.number) is None]
        wanted = [n for n in fresh if acceptable(store, body.client, n, limits.client_window)]
        if wanted and not self._pool.add(data, body, self._now) and client is not None:
            self._count("overloaded")
            self._effect(Answer(client, encode(Overloaded(tuple(wanted)))))

    def _reply(self, slot: int, executed: list[Executed]) -> None:
        """One signature for all replies of a slot."""
        if self._voice is None or self._configuration is None or self._replaying:
            return
        c = self._configuration.record.c
        root, paths = reply_tree(executed)

        def send(signature: bytes) -> None:
            for item, path in zip(executed, paths, strict=True):
                answer = Replies(self.me, c, slot, item.results, path, signature)
                self._effect(Answer(item.client, encode(answer)))

        self._sign(c, Kind.REPLY, LAYOUT[Kind.REPLY].pack(slot, root), send)

    def signed(self, token: int, signature: bytes) -> None:
        """The KSS signed a statement."""
        then = self._signs.pop(token, None)
        if then is not None:
            then(signature)
            self._pump()

    # -------------------------------------------------------------------------------------------------------------- time
    def tick(self, now_s: float) -> None:
        """Time passes. Safety never depends on it."""
        self._now = max(self._now, now_s)
        if self._configuration is None:
            self._pump()
            return
        self._retry()
        self._transfer_state()
        self._pump()
        self._suspect()
        self._fetch_missing()
        if self._every("beacon", BEACON_S):
            self._send_beacons()
        if self._every("collect", 1.0):
            self._collect()

    def _send_beacons(self) -> None:
        assert self._configuration is not None
        own = self._configuration.streams.get(self.me) if self._voice is not None else None
        if own is not None:
            self._broadcast(Beacon(self._configuration.record.c, own.cursor, self._execution.slot))
            for statement in self._own_statements.values():
                self._broadcast(statement)
            for end in self._configuration.epoch_ends.values():
                self._broadcast(_end_message(end))
        if self._successors.own_set is not None:
            newest = self._successors.newest()
            if newest is not None:
                self._broadcast(WedgeSet(self._configuration.record.c, newest[0].c, self._successors.own_set))
        if self._voice is None and self._installed:
            self._effect(Report("learner", self._learning()))

    def _learning(self) -> dict[str, int]:
        """How far a machine that is no member has followed the members: `behind` is 0 when f+1 of them are not ahead."""
        assert self._configuration is not None
        record = self._configuration.record
        slots = sorted((b.slot for b in self._beacons.values()), reverse=True)
        behind = max(0, slots[record.f] - self._execution.slot) if len(slots) > record.f else 1 << 30
        return {"c": record.c, "h": record.h, "slot": self._execution.slot, "behind": behind}

    def _suspect(self) -> None:
        """Ask for another view when nothing moves (protocol §5.1)."""
        voice, configuration = self._voice, self._configuration
        if voice is None or configuration is None or not voice.live or not self._installed:
            return
        if voice.tail.wedged or self._transfer is not None:
            return
        self._forward(voice)
        waiting = voice.tail.v > voice.tail.e or configuration.slots.highest > self._execution.slot
        oldest = self._pool.oldest_s()
        if not waiting and (oldest is None or self._now - oldest < self._timeout_s):
            newest = configuration.statements.newest
            if oldest is None and (newest is None or newest.slot <= self._execution.slot):
                self._progress_s = self._now
            return
        if self._now - self._progress_s < self._timeout_s:
            return
        self._prune_pool()
        if not waiting and not len(self._pool):
            return
        self._progress_s = self._now
        self._timeout_s = min(self._timeout_s * 2, MAX_TIMEOUT_S)
        self._ask_view(max(voice.tail.v, voice.tail.e) + 1)

    def _ask_view(self, target: int) -> None:
        assert self._configuration is not None
        c = self._configuration.record.c
        self._asked_view = max(self._asked_view, target)
        body = LAYOUT[Kind.REQ].pack(self._asked_view)
        self._sign(c, Kind.REQ, body, lambda sig: self._state(c, Kind.REQ, body, sig))

    def _prune_pool(self) -> None:
        """Bundles that were executed under another wrapping, or left their client's window, are no reason to suspect."""
        assert self._configuration is not None
        width = self._configuration.record.parameters.client_window
        store = self._execution.store
        for waiting in self._pool.bundles():
            client = waiting.body.client
            numbers = [r.number for r in waiting.body.requests]
            if all(cached(store, client, n) is not None or not acceptable(store, client, n, width) for n in numbers):
                self._pool.remove(waiting.data)

    def _forward(self, voice: Voice) -> None:
        """Who may not propose hands bundles on to one who may."""
        assert self._configuration is not None
        record, tail = self._configuration.record, voice.tail
        turn = proposers(record, tail.e, tail.blacklist, tail.retired)
        if self.me in turn:
            return
        chosen = record.member(turn[tail.e % len(turn)])
        if chosen is not None:
            for waiting in self._pool.to_forward():
                self._send(peer_id(chosen.replica, chosen.incarnation), Forward(waiting.data))

    def _fetch_missing(self) -> None:
        """Ask for what is known to exist and is not here."""
        configuration = self._configuration
        if configuration is None or not self._every("fetch", FETCH_S):
            return
        others = [p for p in self.peers if p not in self._exporters]
        if not others:
            return
        self._turn += 1
        c = configuration.record.c
        ahead = {_replica_of(p): b.cv for p, b in self._beacons.items()}
        for replica, stream in configuration.streams.items():
            needed = max(ahead.get(replica, 0), configuration.wanted.streams.get(replica, 0), *stream.waiting, 0)
            first = stream.cursor + 1
            if stream.ended is not None or needed < first or (replica == self.me and self._live):
                continue
            while first in stream.waiting:
                first += 1
            if first <= needed:
                last = min(needed, first + MAX_FETCH - 1)
                self._send(self._source(others, replica), Fetch(c, replica, first, last))
        batches = tuple(sorted(configuration.wanted.batches))[:MAX_FETCH]
        if batches:
            self._send(others[self._turn % len(others)], FetchBatches(batches))
        for g in sorted(configuration.wanted.views)[:4]:
            self._send(others[self._turn % len(others)], FetchNewView(c, g))

    @property
    def _live(self) -> bool:
        return self._voice is not None and self._voice.live

    def _source(self, others: list[str], replica: str) -> str:
        """Every other time the stream's owner, else the next peer: the owner may be faulty, or down."""
        owner = next((p for p in others if _replica_of(p) == replica), None)
        if owner is not None and self._turn % 2:
            return owner
        return others[(self._turn // 2) % len(others)]

    # ----------------------------------------------------------------------------------------------------- state transfer
    def _transfer_state(self) -> None:
        configuration = self._configuration
        if configuration is None or self._wait_source:
            return
        target = self._target(configuration)
        if target is None:
            if self._transfer is not None and self._transfer.slot <= self._execution.slot and self._installed:
                self._transfer = None
        elif self._transfer is None or (self._transfer.slot < target[0] and self._transfer.stalled(self._now)):
            local = self._execution.store.snapshot()
            self._transfer = Transfer(*target, local, self._send, self._transfer)
        if self._transfer is not None:
            exporters = list(self._exporters)
            self._transfer.tick(self._now, [p for p in self.peers if p not in self._exporters], exporters)

    def _target(self, configuration: Configuration) -> tuple[int, bytes] | None:
        """The certified state to fetch, if the own one cannot get there by itself."""
        record, newest = configuration.record, configuration.statements.newest
        if not self._installed:
            if newest is not None:
                return newest.slot, newest.digest
            return record.h, record.digest
        needed = self._successors.needs_state
        if needed is not None and needed > self._execution.slot and needed in configuration.statements.certificates:
            return needed, configuration.statements.certificates[needed].digest
        if newest is None:
            return None
        own = self._execution.digests.get(newest.slot)
        if own is not None and own != newest.digest:
            self._effect(Report("diverged", {"slot": newest.slot}))
            self._installed = False  # the own state is wrong: nothing more is executed on it
            return newest.slot, newest.digest
        if newest.slot > self._execution.slot and self._now - self._progress_s > STUCK_S:
            return newest.slot, newest.digest
        return None

    def _take_chunk(self, peer: str, message: Chunk) -> None:
        transfer = self._transfer
        if transfer is None:
            return
        blame = transfer.chunk(peer, message, self._now)
        if blame is not None:
            self._count("corrupt_chunks")
            if peer not in self._exporters:
                self._liar(_replica_of(peer), "chunk")
        if transfer.done:
            self._finish_transfer(transfer)
        else:
            peers = [p for p in self.peers if p not in self._exporters]
            transfer.tick(self._now, peers, list(self._exporters))

    def _finish_transfer(self, transfer: Transfer) -> None:
        assert self._configuration is not None
        self._transfer = None
        if transfer.slot < self._execution.slot and self._installed:
            return
        c = self._configuration.record.c
        snapshot = transfer.result()
        self._execution.adopt(transfer.slot, StateStore.from_snapshot(snapshot), c)
        self._configuration.slots.settle(transfer.slot)
        self._progress_s = self._now
        self._installed = True
        self._save(c)
        self._refresh_peers()
        figures = transfer.figures
        self._effect(
            Report(
                "transfer",
                {
                    "slot": transfer.slot,
                    "kept": figures.kept,
                    "fetched": dict(figures.fetched),
                    "from": dict(figures.bytes),
                    "stale": dict(figures.stale),
                    "absent": dict(figures.absent),
                    "corrupt": [{"chunk": blame.index, "source": blame.source} for blame in figures.corrupt[:1024]],
                },
            )
        )

    # ------------------------------------------------------------------------------------------------- reconfiguration
    def _confirm_first(self) -> None:
        """The first configuration of a group begins with the empty state."""
        newest = self._successors.newest()
        if newest is not None and newest[0].base is None and self._is_me(newest[0]):
            self._confirm(*newest, 0, StateStore().root())

    def _reconfigure(self) -> None:
        configuration, newest = self._configuration, self._successors.newest()
        if configuration is None or newest is None:
            return
        self._end_epoch(configuration)
        record, envelope = newest
        if not self._is_me(record) or not self._installed:
            return
        chosen = self._successors.choose(configuration)
        if chosen is not None:
            self._journal(LogWedges(record.c, chosen))
            self._broadcast(WedgeSet(configuration.record.c, record.c, chosen))
        self._successors.compute(configuration, self._execution)
        for outcome in self._successors.outcomes():
            self._confirm(record, envelope, outcome.h, outcome.digest)

    def _end_epoch(self, configuration: Configuration) -> None:
        """After the own wedge is out, the wormhole closes the epoch."""
        if self._voice is not None and not self._ended and self._voice.wedge_vote_ready and self._every("end", 1.0):
            self._effect(EndEpoch(configuration.record.c))

    def _confirm(self, record: ConfigRecord, envelope: bytes, h: int, digest: bytes) -> None:
        name = (record.c, h, digest)
        if name in self._confirmed or self._replaying:
            return
        self._confirmed.add(name)
        prepared = record_hash(envelope)

        def report(signature: bytes) -> None:
            body = {
                "c": record.c,
                "prepared": base64.b64encode(prepared).decode(),
                "h": h,
                "digest": base64.b64encode(digest).decode(),
                "signature": base64.b64encode(signature).decode(),
            }
            self._effect(Report("confirm", body))

        self._sign(record.c, Kind.CONFIRM, confirm_body(prepared, h, digest), report)

    def _report_ready(self) -> None:
        if self._active is None or not self._installed or self._replaying:
            return
        c = self._active[0].c
        if self._live and ("ready", c) not in self._reported:
            self._reported.add(("ready", c))
            self._effect(Report("ready", {"c": c, "slot": self._execution.slot}))

    # ------------------------------------------------------------------------------------------------------------ commands
    def command(self, body: dict[str, Any]) -> None:
        """COMMAND push from the controller."""
        try:
            self._obey(body)
        except (BadError, KeyError, TypeError, ValueError) as error:
            self._count("bad_command")
            self._effect(Report("bad_command", {"error": f"{type(error).__name__}: {error}"}))
        self._pump()

    def _obey(self, body: dict[str, Any]) -> None:
        match body.get("op"):
            case "learn":
                if len(self._learners) < MAX_LEARNERS:
                    peer = _peer(body["peer"])
                    self._learners[peer.peer_id] = peer
            case "forget":
                self._learners.pop(str(body["peer_id"]), None)
            case "base":
                self._wait_source = bool(body.get("wait_source", False))
            case "source":
                if body.get("peer"):
                    peer = _peer(body["peer"])
                    self._exporters = {peer.peer_id: peer}
                self._wait_source = False
            case "retire":
                self._retire(base64.b64decode(body["order"], validate=True))
            case "ended":
                self._take_end(body["end"])
            case _:
                self._count("unknown_command")
        self._refresh_peers()

    def _retire(self, envelope: bytes) -> None:
        order = open_retire(envelope, self._controllers)
        voice, configuration = self._voice, self._configuration
        if voice is None or configuration is None or order.c != configuration.record.c or order.group != self.group:
            return
        if order.replica in voice.retires or configuration.record.member(order.replica) is None:
            return
        voice.retires[order.replica] = envelope
        record, tail = configuration.record, voice.tail
        if order.replica not in proposers(record, tail.e, tail.blacklist, tail.retired):
            return
        target = max(tail.v, tail.e) + 1
        while leader(record, target) == order.replica and record.n > 1:
            target += 1
        self._ask_view(target)

    def _take_end(self, doc: dict[str, Any]) -> None:
        """The EPOCH-END of a member that the controller closed."""
        end = EpochEnd(
            str(doc["replica"]),
            int(doc["c"]),
            int(doc["cv_end"]),
            *(base64.b64decode(doc[k], validate=True) for k in ("last_digest", "last_certificate", "signature")),
        )
        if self._configuration is not None and self._configuration.offer_end(end):
            self._journal(LogEnd(_end_message(end)))

    def _refresh_peers(self) -> None:
        peers: dict[str, Peer] = {}
        records = [self._active[0]] if self._active else []
        records += [record for record, _ in self._successors.prepared.values()]
        if self._old is not None and not self._installed:  # a leaving member can still hand round what it has
            records.append(self._old.record)
        for record in records:
            for member in record.members:
                name = peer_id(member.replica, member.incarnation)
                if name != peer_id(self.me, self.incarnation):
                    peers[name] = Peer(name, member.address, member.channel_ca)
        peers.update(self._learners)
        peers.update(self._exporters)
        self.peers = peers

    @property
    def status(self) -> dict[str, Any]:
        """Figures for reports and metrics."""
        voice = self._voice
        return {
            "c": self._active[0].c if self._active else 0,
            "slot": self._execution.slot,
            "view": voice.tail.e if voice else 0,
            "stable": self._stable_slot(),
            "live": self._live,
            "installed": self._installed,
            "pool": len(self._pool),
            "log_records": self._log_size,
            "counters": dict(self.counters),
        }


def _replica_of(peer: str) -> str:
    return peer.partition("#")[0]


def _peer(doc: dict[str, Any]) -> Peer:
    return Peer(str(doc["peer_id"]), str(doc["address"]), base64.b64decode(doc["channel_ca"], validate=True))


def _epoch_end(message: EpochEndMessage) -> EpochEnd:
    return EpochEnd(
        message.replica, message.c, message.cv_end, message.last_digest, message.last_certificate, message.signature
    )


def _end_message(end: EpochEnd) -> EpochEndMessage:
    return EpochEndMessage(
        end.c, end.replica, end.cv_end, end.last_digest, end.last_certificate, end.signature
    )
