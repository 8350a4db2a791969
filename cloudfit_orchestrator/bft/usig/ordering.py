"""The USIG engine as a replica sees it (`bft.ordering`): streams that are judged, and the own one that is spoken."""

from collections.abc import Callable, Sequence

from cloudfit_orchestrator.bft.effects import Certify
from cloudfit_orchestrator.bft.journal import LogBatch
from cloudfit_orchestrator.bft.messages import Frozen, Named
from cloudfit_orchestrator.bft.ordering import Final, Host, Ordering, TakeBatch
from cloudfit_orchestrator.bft.outbox import Outbox
from cloudfit_orchestrator.bft.situation import member_of
from cloudfit_orchestrator.bft.usig import recall
from cloudfit_orchestrator.bft.usig.configuration import Configuration
from cloudfit_orchestrator.bft.usig.fetching import Fetching
from cloudfit_orchestrator.bft.usig.journal import (
    ENTRIES,
    LogAnchor,
    LogBody,
    LogBreach,
    LogCited,
    LogEnd,
    LogMessage,
    LogUI,
    LogView,
)
from cloudfit_orchestrator.bft.usig.judge import initial, leader, proposers
from cloudfit_orchestrator.bft.usig.logvotes import WEDGE
from cloudfit_orchestrator.bft.usig.messages import (
    MESSAGES,
    Commit,
    Discarded,
    EpochEndMessage,
    Header,
    LogProof,
    NewView,
    Prepare,
    StreamMessage,
    decode_header,
)
from cloudfit_orchestrator.bft.usig.proofs import Found
from cloudfit_orchestrator.bft.usig.stream import Kept, Offered, Weighed, bare, waiting
from cloudfit_orchestrator.bft.usig.voice import Voice
from cloudfit_orchestrator.model.channel import ErrorCode
from cloudfit_orchestrator.model.errors import BadError
from cloudfit_orchestrator.model.orders import open_retire
from cloudfit_orchestrator.model.record import ConfigRecord
from cloudfit_orchestrator.model.statement import LAYOUT, Kind
from cloudfit_orchestrator.model.ui import EpochEnd, message_digest

RETRY_S = 0.2  # refused certifications are asked for again
AMNESIA_REPORT_S = 10.0
KEPT_WINDOWS = 16  # of logs, behind an own NEW-VIEW that the wormhole has not answered: it is back by then, or broken
COMMIT_PIPELINE = 8  # own bodies in flight: while they are, votes gather into the next COMMIT


class UsigOrdering(Ordering):
    """See the module. `voice` is None if we are no member."""

    MESSAGES = MESSAGES
    ENTRIES = ENTRIES

    def __init__(self, host: Host, out: Outbox, record: ConfigRecord, envelope_hash: bytes) -> None:
        """See `Ordering`."""
        self._at = host
        self._out = out
        self.record = record
        self.configuration = Configuration(record, envelope_hash, host.verifier, host.controllers)
        self.configuration.replaying = out.replaying
        self.batches = self.configuration.batches
        self.statements = self.configuration.statements
        self.wanted = self.configuration.wanted.batches
        self.voice = Voice(self.configuration, host.me, say=self._say) if host.is_me(record) else None
        self._fetching = Fetching(host, out, self.configuration)
        self._wants_session = self.voice is not None
        self._session_cv: int | None = None  # a session is open there, the own stream is not rebuilt yet
        self._asked = 0  # the highest view that we asked for

    # ------------------------------------------------------------------------------------------------- what it is now
    @property
    def live(self) -> bool:
        """See `Ordering`."""
        return self.voice is not None and self.voice.live

    @property
    def stable(self) -> int:
        """See `Ordering`."""
        return self.voice.tail.h if self.voice is not None else 0

    @property
    def view(self) -> int:
        """See `Ordering`."""
        return self.voice.tail.e if self.voice is not None else 0

    @property
    def position(self) -> int:
        """See `Ordering`."""
        return self.configuration.streams[self._at.me].cursor if self.voice is not None else 0

    @property
    def needs_session(self) -> bool:
        """See `Ordering`."""
        return self._wants_session

    # ------------------------------------------------------------------------------------------------- what comes in
    def receive(self, peer: str, message: Frozen) -> None:
        """See `Ordering`."""
        match message:
            case StreamMessage() if message.c == self.record.c:
                self._take_stream(peer, message)
            case Discarded():
                if message.stable.replica != self._at.me or not self.live:
                    self._fetching.take_discarded(peer, message)
            case LogProof() if self.configuration.wanted.views:  # else nobody has asked for it
                self.configuration.offer_log(message.messages)
            case EpochEndMessage():
                self.take_end(recall.epoch_end(message))
            case _:
                pass

    def answer(self, peer: str, message: Frozen) -> bool:
        """See `Ordering`."""
        return self._fetching.answer(peer, message)

    def offer_batch(self, data: bytes) -> bytes | None:
        """See `Ordering`."""
        return self.configuration.offer_batch(data)

    def _take_stream(self, peer: str, message: StreamMessage) -> None:
        configuration = self.configuration
        offered = configuration.offer(message)
        if offered is Offered.BAD:
            self._out.count("bad_ui")
            self._out.blame(member_of(self.record, peer), "ui")
            return
        named_by = message.header if offered is Offered.TAKEN else b""
        if message.batch and configuration.offer_batch(message.batch, named_by) is not None:
            self._out.journal(LogBatch(message.c, message.batch))
        if offered is Offered.TAKEN and message.replica == self._at.me and self.voice is not None:
            self._out.journal(LogMessage(bare(message)))  # the own stream, lost and found again
        if message.cv <= configuration.streams[message.replica].cursor or configuration.wanted.views:
            configuration.offer_view(message)

    def session(self, next_cv: int, recent: list[tuple[int, bytes, bytes]]) -> None:
        """See `Ordering` (protocol §2, restart within an epoch)."""
        voice = self.voice
        if voice is None:
            return
        self._wants_session = False
        voice.live = False
        certificates = {cv: (digest, certificate) for cv, digest, certificate in recent}
        for cv in sorted(voice.pending):
            known = certificates.get(cv)
            if cv < next_cv and known is not None and known[0] == message_digest(*voice.pending[cv]):
                self.certified(cv, known[1])
        voice.pending.clear()  # what is past the counter was never certified, and is made anew
        self._session_cv = next_cv

    def _try_go_live(self, voice: Voice) -> None:
        configuration = self.configuration
        if voice.live or self._session_cv is None:
            return
        if configuration.streams[self._at.me].cursor < self._session_cv - 1:
            configuration.wanted.streams[self._at.me] = self._session_cv - 1  # the own stream, from others
            if self._out.every("amnesia", AMNESIA_REPORT_S):
                self._out.report("amnesia", {"c": self.record.c, "cv": self._session_cv - 1})
            return
        voice.go_live(self._session_cv)
        configuration.cited.clear()  # no NEW-VIEW of ours is under way
        self._session_cv = None
        self._at.pool.release()
        digests = self._at.execution.digests
        newest = max((slot for slot in digests if slot > voice.tail.h), default=None)
        if newest is not None:
            self._at.announce(Kind.CHECKPOINT, LAYOUT[Kind.CHECKPOINT].pack(newest, digests[newest]))

    def _say(self, cv: int, header: bytes, payload: bytes) -> None:
        if payload:  # a NEW-VIEW: we may be the only one who can prove it, also after a restart
            for g, logs in self.configuration.cited.items():
                for entry in recall.cited(self.record.c, g, logs):
                    self._out.journal(entry)
        self._out.journal(LogBody(self.record.c, cv, header, payload))
        self._out.put(Certify(self.record.c, cv, message_digest(header, payload)))

    def certified(self, cv: int, certificate: bytes) -> None:
        """See `Ordering`."""
        body = self.voice.certified(cv) if self.voice is not None else None
        if body is None:
            return
        c, me = self.record.c, self._at.me
        message = StreamMessage(c, me, cv, *body, certificate)
        if not self._out.replaying:
            self._out.journal(LogUI(c, cv, certificate))
            header = decode_header(body[0])
            data = self.batches.data(header.batch) if isinstance(header, Prepare) else None
            said = StreamMessage(c, me, cv, *body, certificate, data or b"")
            self._out.broadcast(self._at.others, said, self._awaited(header))
        stream = self.configuration.streams[me]
        if stream.wants(cv):
            stream.wait(waiting(message))

    def _awaited(self, header: Header) -> Callable[[str], bool]:
        """Who waits for such a message of ours: where two votes decide, a COMMIT's proposer; everyone else has the
        proposal and the own vote.
        """
        if not isinstance(header, Commit) or self.record.quorums.commit > 2:
            return lambda _: True
        waiting_for_it = {entry.proposer for entry in header.entries}
        return lambda peer: member_of(self.record, peer) in waiting_for_it

    def refused(self, code: ErrorCode) -> None:
        """See `Ordering`."""
        voice = self.voice
        if voice is None:
            return
        self._out.count(f"refused_{code.name.lower()}")
        if code in (ErrorCode.ENDED, ErrorCode.LEASE_OVER):
            voice.live = False
            self.ended = True
            self._out.report("silenced", {"c": self.record.c, "code": code.name})
        elif code in (ErrorCode.STALE_SESSION, ErrorCode.NOT_ACTIVE, ErrorCode.NO_EPOCH):
            voice.live = False
            self._session_cv = None
            self._wants_session = False
            self._out.later("session", RETRY_S)
        else:
            self._out.later("certify", RETRY_S)

    def tick(self) -> None:
        """Ask again, in order, for what the wormhole refused for a time."""
        if self.voice is None:
            return
        if self._out.due("session"):
            self._wants_session = True
        if self._out.due("certify"):
            for cv, (header, payload) in sorted(self.voice.pending.items()):
                self._out.put(Certify(self.record.c, cv, message_digest(header, payload)))

    def close(self, end: EpochEnd) -> None:
        """See `Ordering`."""
        if self.voice is not None:
            self.voice.live = False
            self.ended = True
            if self.configuration.offer_end(end):
                self._out.journal(LogEnd(recall.end_message(end)))

    def take_end(self, end: EpochEnd) -> None:
        """See `Ordering`."""
        known = end.c != self.record.c or end.replica in self.configuration.votes.epoch_ends
        if not known and self.configuration.offer_end(end):
            self._out.journal(LogEnd(recall.end_message(end)))
        elif not known:
            self._out.count("bad_end")

    def restore(self, entry: Frozen) -> None:
        """See `Ordering`."""
        configuration, c = self.configuration, self.record.c
        match entry:
            case LogMessage() if entry.message.c == c:
                stream = configuration.streams.get(entry.message.replica)
                if stream is not None and stream.wants(entry.message.cv):
                    stream.wait(waiting(entry.message))  # its UI was verified before it was logged
            case LogAnchor() if entry.message.c == c:
                configuration.restore_anchor(entry.message)
            case LogView() if entry.message.c == c:
                configuration.restore_view(entry.message, Weighed(frozenset(entry.batches), frozenset(entry.views)))
            case LogBreach() if entry.message.c == c:
                configuration.restore_breach(entry.message)
            case LogCited() if entry.c == c and entry.g == WEDGE:
                configuration.offer_log(entry.logs[0])
            case LogCited() if entry.c == c:
                known = {log[-1].replica: log for log in (*configuration.cited.get(entry.g, ()), *entry.logs) if log}
                configuration.cited[entry.g] = tuple(known.values())
            case LogBody() if self.voice is not None and entry.c == c:
                self.voice.pending[entry.cv] = (entry.header, entry.payload)
            case LogUI() if entry.c == c:
                self.certified(entry.cv, entry.certificate)
            case LogEnd():
                configuration.offer_end(recall.epoch_end(entry.end))
            case _:
                pass  # of a configuration that is over

    def restored(self) -> None:
        """See `Ordering`. A NEW-VIEW of ours may have been certified unheard: what it was computed from is at hand."""
        self.configuration.replaying = False
        for logs in list(self.configuration.cited.values()):
            for log in logs:
                self.configuration.offer_log(log)

    # ------------------------------------------------------------------------------------------------------ deciding
    def advance(self) -> None:
        """See `Ordering`."""
        configuration = self.configuration
        for kept in configuration.advance():
            self._accepted(kept)
        found, configuration.found = configuration.found, Found()
        for entry in recall.news(self.record.c, found):
            self._out.journal(entry)
        for replica, rule in configuration.liars.items():
            self._out.blame(replica, rule)

    def _accepted(self, kept: Kept) -> None:
        own = kept.message.replica == self._at.me
        if self.voice is None or not own:  # own ones are in the log as body and UI
            self._out.journal(LogMessage(kept.message))
        if self.voice is not None and not own:
            self.voice.heard(kept)

    def decision(self, s: int) -> bytes | None:
        """See `Ordering`."""
        return self.configuration.slots.decision(s)

    def decided(self, s: int, digest: bytes) -> None:
        """See `Ordering`."""
        self.configuration.slots.decide(s, digest)

    def settle(self, s: int) -> None:
        """See `Ordering`."""
        self.configuration.slots.settle(s)

    def want_batch(self, digest: bytes) -> None:
        """See `Ordering`."""
        self.configuration.want_batch(digest)

    def speak(self, take_batch: TakeBatch) -> None:
        """See `Ordering`."""
        voice = self.voice
        if voice is None:
            return
        self._try_go_live(voice)
        if not voice.live or voice.wedge() or voice.tail.wedged:
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
        while self._at.pool.unproposed and (slot := voice.propose_slot(self._at.execution.slot)) is not None:
            digest = take_batch(slot)
            if digest is None:
                break
            voice.propose(slot, digest)
        voice.skip()

    def _holds(self, slot: int, digest: bytes) -> bool:
        """The own state after `slot` is the certified one, and on the disk."""
        return self._at.execution.digests.get(slot) == digest and (self.record.c, slot) in self._at.saved

    def fetch(self) -> None:
        """See `Ordering`."""
        self._fetching.fetch(live=self.live)

    def repeat(self) -> None:
        """EPOCH-ENDs. The end of the own stream is in the beacon."""
        if self.voice is not None:
            for end in self.configuration.votes.epoch_ends.values():
                self._out.broadcast(self._at.others, recall.end_message(end))

    # ------------------------------------------------------------------------------------------------------ liveness
    @property
    def waiting(self) -> bool:
        """See `Ordering`."""
        changing = self.voice is not None and self.voice.tail.v > self.voice.tail.e
        return changing or self.configuration.slots.highest > self._at.execution.slot

    @property
    def may_suspect(self) -> bool:
        """See `Ordering`."""
        return self.voice is not None and self.voice.live and not self.voice.tail.wedged

    def suspect(self) -> None:
        """See `Ordering`."""
        if self.voice is not None:
            self._ask(max(self.voice.tail.v, self.voice.tail.e) + 1)

    def _ask(self, target: int) -> None:
        """REQ(c, target)."""
        self._asked = max(self._asked, target)
        self._at.announce(Kind.REQ, LAYOUT[Kind.REQ].pack(self._asked))

    @property
    def proposes(self) -> bool:
        """See `Ordering`."""
        return self._at.me in self._turn()

    def forward_to(self, *, behind: bool) -> str | None:
        """See `Ordering`."""
        if self.voice is None:
            return None
        turn = self._turn()
        others = [replica for replica in turn if replica != self._at.me]
        if self._at.me in turn and not behind:
            return self._next_proposer(turn) if self.voice.window_full else None
        return others[self.voice.tail.e % len(others)] if others else None

    def _turn(self) -> Sequence[str]:
        """Who proposes in the view that we are in."""
        tail = self.voice.tail if self.voice is not None else initial(self.record)
        return proposers(self.record, tail.e, tail.blacklist, tail.retired)

    def _next_proposer(self, turn: Sequence[str]) -> str | None:
        """Who is to propose the lowest slot without a proposal, if that is not us: it may be idle, and not know."""
        tail = self.voice.tail if self.voice is not None else initial(self.record)
        s = self.configuration.slots.first_open(tail.e)
        if s > tail.h + self.record.parameters.window or turn[s % len(turn)] == self._at.me:
            return None
        return turn[s % len(turn)]

    def retire(self, envelope: bytes) -> None:
        """Ask, once, for the next view that r neither leads nor proposes in."""
        order = open_retire(envelope, self._at.controllers)
        voice, record = self.voice, self.record
        if voice is None:
            return
        tail = voice.tail
        if (order.group, order.c) != (record.group, record.c) or record.member(order.replica) is None:
            raise BadError(f"RETIRE names {order.replica} of c={order.c}, here is c={record.c}")
        if order.replica in voice.retires:
            return
        voice.retires[order.replica] = envelope
        if order.replica in proposers(record, tail.e, tail.blacklist, tail.retired):
            target = max(tail.v, tail.e) + 1
            while leader(record, target) == order.replica and record.n > 1:
                target += 1
            self._ask(target)

    # ------------------------------------------------------------------------------------------------------ succession
    def wedge(self, prepared: bytes) -> None:
        """See `Ordering`."""
        if self.voice is not None:
            self.voice.successor = prepared

    @property
    def wedged(self) -> bool:
        """See `Ordering`."""
        return self.voice is not None and self.voice.wedge_vote_ready

    def wedges(self) -> list[Named]:
        """See `Ordering`."""
        return [vote.name for vote in self.configuration.votes.of(WEDGE)]

    def wedge_sets(self) -> list[tuple[Named, ...]]:
        """See `Ordering`."""
        return [tuple(vote.name for vote in chosen) for chosen in self.configuration.quorums(WEDGE)]

    def final(self, names: Sequence[Named]) -> Final | None:
        """See `Ordering`."""
        votes = self.configuration.votes.named(WEDGE, names)
        merged = self.configuration.try_merge(votes) if isinstance(votes, list) else None
        if merged is None:
            return None
        return Final(merged.h, merged.s_max, tuple((choice.s, choice.batch) for choice in merged.choices))

    # ------------------------------------------------------------------------------------------------------------ log
    def decisions(self) -> list[tuple[int, bytes]]:
        """See `Ordering`."""
        return self.configuration.slots.decisions()

    def entries(self) -> list[Frozen]:
        """See `Ordering`."""
        return recall.entries(self.configuration, self.voice)

    @property
    def kept(self) -> int:
        """See `Ordering`."""
        return sum(len(stream.kept) for stream in self.configuration.streams.values())

    def truncate(self, floor: int) -> None:
        """See `Ordering`."""
        if not self._unheard(floor):
            self.configuration.truncate(floor)

    def _unheard(self, floor: int) -> bool:
        """A NEW-VIEW of ours has no UI yet, as far as we know. If it has one nobody but us can prove it: however far
        the others have gone on, we keep what it was computed from, for a while.
        """
        pending = self.voice.pending.values() if self.voice is not None else ()
        views = [decode_header(header) for header, payload in pending if payload]
        kept = KEPT_WINDOWS * self.record.parameters.window
        return any(isinstance(view, NewView) and floor < view.s_max + kept for view in views)
