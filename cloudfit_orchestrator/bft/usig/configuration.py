"""All that the streams of one configuration say (protocol §3-§5): a receiver's view, the same for members and learners.

Messages go in by `offer…`, `advance` processes what can be processed, in FIFO order a stream, and `slots.decisions()`
are what follows. Nothing here speaks: a member's own voice is in `voice.py`.
"""

from collections.abc import Sequence

from cloudfit_orchestrator.bft.batch import BundleChecker, batch_digest
from cloudfit_orchestrator.bft.batches import Batches
from cloudfit_orchestrator.bft.checkpoints import Certificate
from cloudfit_orchestrator.bft.messages import NOOP, Signed
from cloudfit_orchestrator.bft.usig.citations import Citations
from cloudfit_orchestrator.bft.usig.evidence import Attestations, Statements
from cloudfit_orchestrator.bft.usig.judge import Broken, Held, initial, judge, leader, stated
from cloudfit_orchestrator.bft.usig.logvotes import LogVotes
from cloudfit_orchestrator.bft.usig.merge import Merged, Missing, Proposal, Vote, merge, quorums, slots_of
from cloudfit_orchestrator.bft.usig.messages import (
    Choice,
    Commit,
    CommitNewView,
    Discarded,
    Header,
    NewView,
    Prepare,
    Req,
    Skip,
    Stable,
    StreamMessage,
    ViewChange,
    Wedge,
    decode_header,
    decode_merge,
)
from cloudfit_orchestrator.bft.usig.proofs import Found, LogReader
from cloudfit_orchestrator.bft.usig.slots import Slots
from cloudfit_orchestrator.bft.usig.stream import Kept, NewViewKept, Offered, Stream, Waiting, Weighed, bare, waiting
from cloudfit_orchestrator.bft.usig.wanted import Wanted
from cloudfit_orchestrator.model.errors import BadError
from cloudfit_orchestrator.model.record import ConfigRecord, Status, open_record
from cloudfit_orchestrator.model.signing import DIGEST_BYTES, SIGNATURE_BYTES, Verifier, sha256
from cloudfit_orchestrator.model.ui import EpochEnd, epoch_end_bytes, ui_bytes


class Configuration:
    """See the module. Implements `judge.Evidence` and `merge.Lookup`."""

    def __init__(
        self, record: ConfigRecord, envelope_hash: bytes, verifier: Verifier, controller_keys: list[bytes]
    ) -> None:
        """`record` is ACTIVE; `envelope_hash` is its H."""
        self.record = record
        self.hash = envelope_hash
        self._verifier = verifier
        self._controllers = controller_keys
        self.replaying = False  # the own log is read again: what is in it was judged before it was logged
        self._stands = False  # the message under judgement precedes an attested STABLE, so it stands (R4)
        self._window = record.parameters.window
        self._usig_keys = {member.replica: member.usig_key for member in record.members}
        self.checker = BundleChecker(record, verifier)
        self.statements = Statements(record, verifier)
        self.attestations = Attestations(record)
        self.batches = Batches(self.checker, 4 * self._window)
        self.slots = Slots(record.h, record.quorums.commit)
        start = initial(record)
        self.streams = {m.replica: Stream(m.replica, start, envelope_hash) for m in record.members}
        self.new_views: dict[int, NewViewKept] = {}
        self.commits: dict[int, dict[str, StreamMessage]] = {}  # COMMIT(NEW-VIEW)s that stand, by view and sender
        self.standing: dict[int, tuple[int, bytes]] = {}  # (counter, digest) of the NEW-VIEW that stands, by view
        self.entered: set[int] = {0}  # views that some stream, known to stand, has entered
        self.named: dict[bytes, int] = {}  # batches that standing proposals name -> highest slot
        self._lacking: set[bytes] = set()  # those of them that were not held when they were named
        self.wanted = Wanted()
        self.votes = LogVotes(record, self.streams, self.wanted, controller_keys)
        self.citations = Citations(
            record,
            streams=self.streams,
            slots=self.slots,
            wanted=self.wanted,
            genuine=self.genuine,
            name=self._name,
        )
        self.liars: dict[str, str] = {}  # replica -> the rule its stream broke
        self.cited: dict[int, tuple[tuple[StreamMessage, ...], ...]] = {}  # logs behind NEW-VIEWs under way
        self._weighed: dict[int, Weighed] = {}  # what they name
        self.found = Found()
        self._reader = LogReader(record, self.streams, citations=self.citations, votes=self.votes, known=self)
        self._merge_wants: set[bytes] = set()

    # ---------------------------------------------------------------------------------------------- messages come in
    def genuine(self, message: StreamMessage) -> bool:
        """The UI is that member's, for this content."""
        return self.certified(message.replica, message.cv, message.digest, message.certificate)

    def certified(self, replica: str, cv: int, digest: bytes, certificate: bytes) -> bool:
        """Whether the USIG of that member certified (cv, digest) in this configuration."""
        key = self._usig_keys.get(replica)
        if key is None or not 0 < cv < 1 << 63:
            return False
        return self._verifier.verify(key, ui_bytes(self.record.group, replica, self.record.c, cv, digest), certificate)

    def offer(self, message: StreamMessage) -> Offered:
        """Buffer a stream message."""
        stream = self.streams.get(message.replica)
        if stream is None or message.c != self.record.c:
            return Offered.BAD
        if not stream.wants(message.cv):
            return Offered.NOT_WANTED
        digest = message.digest
        if not self.certified(message.replica, message.cv, digest, message.certificate):
            return Offered.BAD
        item = waiting(message, digest)
        stream.wait(item)
        self._peek(item.message, item.header)
        return Offered.TAKEN

    def offer_batch(self, data: bytes, named_by: bytes = b"") -> bytes | None:
        """Hold a batch that a proposal names, or may: one that came with the genuine PREPARE `named_by`. Its digest if
        it is new.
        """
        digest = batch_digest(data)
        asked_for = digest in self.named or digest in self._merge_wants
        if not asked_for and digest not in named_by:
            return None
        if not self.batches.add(digest, data):
            return None
        if asked_for:  # what comes unasked must not push it out
            self.batches.name(digest, self.named.get(digest, self.slots.floor + 2 * self._window))
        return digest

    def offer_view(self, message: StreamMessage) -> None:
        """Answer to FETCH-NEW-VIEW: a NEW-VIEW that precedes what is held of its stream, or a COMMIT of one that
        stands: then the NEW-VIEW does, too (R4).
        """
        stream = self.streams.get(message.replica)
        if stream is None or message.c != self.record.c or not self.genuine(message):
            return
        try:
            header = decode_header(message.header)
        except BadError:
            return
        if isinstance(header, NewView) and leader(self.record, header.g) == message.replica:
            if stream.stands(message.cv) and header.g not in self.new_views:
                self._keep_view(message, header)
                self.found.views.append(bare(message))
        elif isinstance(header, CommitNewView) and message.cv < self.attestations.attested(message.replica):
            if stream.ended is None:
                self.entered.add(header.g)
                self.standing[header.g] = (header.cv, sha256(header.header, header.payload_hash))

    def offer_log(self, messages: Sequence[StreamMessage]) -> None:
        """Answer to FETCH-NEW-VIEW: the log of a VIEW-CHANGE or closed epoch whose stream was jumped over. It precedes
        an attested STABLE, or is processed: all of it stands.
        """
        self._stands = True
        if self._reader.read(messages):
            self.found.logs.append(tuple(messages))
        self._stands = False

    def offer_end(self, end: EpochEnd) -> bool:
        """An EPOCH-END: the stream has no message beyond cv_end. False if it is not the wormhole's."""
        member = self.record.member(end.replica)
        if member is None or end.c != self.record.c or not 0 <= end.cv_end < 1 << 63:
            return False
        if len(end.last_digest) != DIGEST_BYTES or len(end.last_certificate) != SIGNATURE_BYTES:
            return False
        if not self._verifier.verify(member.usig_key, epoch_end_bytes(self.record.group, end), end.signature):
            return False
        self.votes.epoch_ends[end.replica] = end
        return True

    def offer_jump(self, message: Discarded) -> bool:
        """Answer to a FETCH of a discarded counter. True if a cursor jumped."""
        stable = message.stable
        stream = self.streams.get(stable.replica)
        if stream is None or stable.c != self.record.c or stable.cv <= stream.cursor or stream.ended is not None:
            return False
        if len(message.attestation) > self.record.n or not self.genuine(stable):
            return False
        for proof in message.attestation:
            if proof.c == self.record.c and self.genuine(proof):
                item = waiting(proof)
                self._peek(item.message, item.header)
        return self._jump(stream, stable)

    def _peek(self, message: StreamMessage, header: Header | None) -> None:
        """A STABLE is a signed statement already: its attestations and its certificate hold before it is processed,
        which may have to wait for just that.
        """
        if isinstance(header, Stable) and header.c == self.record.c:
            self.attestations.add(message, header)
            newest = self.statements.newest
            if newest is None or header.h > newest.slot:
                if self.stable_certificate(header.h, header.digest, header.certificate):
                    self.statements.certify(Certificate(header.h, header.digest, header.certificate))

    def restore_anchor(self, message: StreamMessage) -> None:
        """Start a stream at a STABLE of the own log."""
        header = decode_header(message.header)
        stream = self.streams[message.replica]
        if isinstance(header, Stable) and stream.cursor < message.cv:  # else it was read: a cut log may have it twice
            kept = Kept(message, header, message.digest, stated(header))
            stream.jump(kept)
            self.entered.add(header.e)
            self._count(kept)

    def restore_breach(self, message: StreamMessage) -> None:
        """What ended a stream, of the own log."""
        item = waiting(message)
        self._peek(item.message, item.header)
        self.streams[message.replica].end(item, "form, or R1 to R3, says the own log")

    def restore_view(self, message: StreamMessage, weighed: Weighed) -> None:
        """A NEW-VIEW of the own log, and what is kept for it."""
        header = decode_header(message.header)
        if isinstance(header, NewView):
            self._weighed[header.g] = weighed
            self._keep_view(message, header)

    # ---------------------------------------------------------------------------------------------------- processing
    def advance(self) -> list[Kept]:
        """Process all that can be, and return the messages that were accepted, in the order of processing."""
        self.wanted.clear()
        self._merge_wants = set()
        done: list[Kept] = []
        moved = True
        while moved:
            moved = False
            for stream in self.streams.values():
                while stream.cursor + 1 in stream.waiting and self._step(stream, done):
                    moved = True
        self.citations.settle()
        self.votes.want_logs()
        unread = {stream.state.e for stream in self.streams.values()} - self.new_views.keys() - {0}
        self.wanted.views.update(g for g in unread if g >= self._current)  # who jumped over it must enter it, too
        if self._lacking:
            self._lacking = {d for d in self._lacking if d in self.named and self.batches.valid(d) is None}
            self.wanted.batches |= self._lacking
        self._merge_wants |= self.wanted.batches
        return done

    def _step(self, stream: Stream, done: list[Kept]) -> bool:
        """Process the next message of a stream, which is there, if it can be judged."""
        cv = stream.cursor + 1
        item = stream.waiting[cv]
        message, header = item.message, item.header
        if stream.ended is not None:
            return False
        if header is None:
            self._end(stream, item, "form: header does not decode")
            return False
        self._stands = self.replaying or cv < self.attestations.attested(stream.replica)
        outcome = judge(self.record, stream.state, stream.replica, cv, header, message, self)
        self._stands = False
        match outcome:
            case Held():
                stream.held = outcome.why
                return False
            case Broken():
                if isinstance(header, Stable):  # also of an ended stream it is a signed statement
                    self.attestations.add(message, header)
                self._end(stream, item, outcome.rule)
                return False
        stream.unwait(cv)
        entries = self.citations.read(header) if isinstance(header, Commit) else ()
        kept = Kept(message, header, item.digest, outcome, entries)
        if isinstance(header, ViewChange | Wedge):
            self.votes.keep(stream, kept)
        stream.accept(kept)
        self._count(kept)
        done.append(kept)
        return True

    def _end(self, stream: Stream, item: Waiting, rule: str) -> None:
        stream.end(item, rule)
        self.liars[stream.replica] = rule
        self.found.breaches.append(item.message)

    def _jump(self, stream: Stream, message: StreamMessage) -> bool:
        try:
            header = decode_header(message.header)
        except BadError:
            return False
        if not isinstance(header, Stable) or header.c != self.record.c:
            return False
        if message.cv > self.attestations.attested(stream.replica):
            return False
        if not self.stable_certificate(header.h, header.digest, header.certificate):
            return False  # cannot be: an attested STABLE stands
        kept = Kept(bare(message), header, message.digest, stated(header))
        stream.jump(kept)
        self.found.jumps.append(kept.message)
        self.entered.add(header.e)
        self._count(kept)
        return True

    def _count(self, kept: Kept) -> None:
        """What an accepted message adds: proposals, votes, certificates, views."""
        header, replica, state = kept.header, kept.message.replica, kept.state
        match header:
            case Prepare() | Skip():
                batch = header.batch if isinstance(header, Prepare) else NOOP
                for s in slots_of(header, self.record, state, replica):
                    self.slots.propose(Proposal(header.g, s, replica, kept.message.cv, batch))
                    self._name(batch, s)
            case Commit():
                for citation in kept.entries:
                    self.citations.cite(replica, citation, state)
            case Stable():
                self.attestations.add(kept.message, header)
                self.statements.certify(Certificate(header.h, header.digest, header.certificate))
            case NewView():
                self._keep_view(kept.message, header)
            case CommitNewView():
                self.entered.add(header.g)
                self.commits.setdefault(header.g, {})[replica] = kept.message
                found = self.new_views.get(header.g)
                if found is not None:
                    self.slots.vote_view(header.g, replica, found.choices)
                else:
                    self.wanted.views.add(header.g)
            case ViewChange():
                self.statements.take_requests(header.certificate)
            case _:
                pass
        if kept.message.cv:
            self.citations.resolve(replica, kept.message.cv)

    def _name(self, digest: bytes, s: int) -> None:
        if digest != NOOP and s > self.slots.floor:
            self.named[digest] = max(s, self.named.get(digest, 0))
            if not self.batches.name(digest, s):
                self._lacking.add(digest)

    def _keep_view(self, message: StreamMessage, header: NewView) -> None:
        choices = decode_merge(message.payload).choices
        known = self.new_views.get(header.g)
        logs = self.cited.pop(header.g, known.logs if known is not None else ())
        weighed = self._weighed.pop(header.g, known.weighed if known is not None else Weighed())
        weighed = Weighed(weighed.batches | {choice.batch for choice in choices}, weighed.views)
        self.new_views[header.g] = NewViewKept(bare(message), header, choices, logs, weighed)
        self.entered.add(header.g)
        self.standing[header.g] = (message.cv, message.digest)
        for choice in choices:
            self._name(choice.batch, choice.s)
        for voter in (message.replica, *self.commits.get(header.g, ())):  # its COMMITs may have come before it
            self.slots.vote_view(header.g, voter, choices)

    # ------------------------------------------------------------------------------------------------ judge.Evidence
    def stable_certificate(self, h: int, digest: bytes, certificate: Sequence[Signed]) -> bool:
        """See `judge.Evidence`."""
        return self.statements.valid_certificate(h, digest, certificate)

    def view_certificate(self, g: int, certificate: Sequence[Req]) -> bool:
        """See `judge.Evidence`."""
        return self.statements.valid_requests(g, certificate)

    def successor(self, prepared: bytes) -> bool:
        """See `judge.Evidence`."""
        try:
            record = open_record(prepared, self._controllers)
        except BadError:
            return False
        named = (record.group, record.status, record.base)
        return named == (self.record.group, Status.PREPARED, self.record.c) and record.c > self.record.c

    def new_view_recomputes(self, leader: str, cv: int, header: NewView, payload: bytes) -> bool | None:
        """See `judge.Evidence`. A view that a standing stream has entered has a NEW-VIEW that stands, and it is this
        one: the leader's stream stands to here, and had it another before or were this one false, none could follow.
        """
        del cv
        try:
            content = decode_merge(payload)
        except BadError:
            return False
        if self._stands or header.g in self.entered:
            return True
        votes = self.votes.named(header.g, content.view_changes, leader)
        if votes is None:
            self.wanted.views.add(header.g)  # or a COMMIT of it that stands
        if votes is None or isinstance(votes, bool):
            return votes
        outcome = merge(self.record, votes, self)
        if isinstance(outcome, Missing):
            self.wanted.add(outcome, leader)
            return None
        told = Merged(header.h, header.s_max, content.choices, header.blacklist, header.retired)
        if told == outcome:
            self.cited[header.g] = tuple(vote.log for vote in votes)
            self._weighed[header.g] = Weighed(
                frozenset(p.batch for vote in votes for p in vote.proposals if p.s > header.h),
                frozenset(g for vote in votes for g, s_max in vote.views if s_max > header.h),
            )
        return told == outcome

    def new_view_stands(self, leader: str, message: CommitNewView) -> bool | None:
        """See `judge.Evidence`."""
        this = (message.cv, sha256(message.header, message.payload_hash))
        if self._stands:
            self.entered.add(message.g)
            self.standing[message.g] = this
            return True
        if message.g in self.standing:
            return self.standing[message.g] == this
        return self.stands(leader, message.cv)

    def new_view_cited(self, leader: str, message: CommitNewView) -> NewView | None:
        """See `judge.Evidence`."""
        digest = sha256(message.header, message.payload_hash)
        if not self.certified(leader, message.cv, digest, message.certificate):
            return None
        try:
            header = decode_header(message.header)
        except BadError:
            return None
        return header if isinstance(header, NewView) else None

    def stands(self, replica: str, cv: int) -> bool | None:
        """See `judge.Evidence`."""
        stream = self.streams.get(replica)
        stands = stream.stands(cv) if stream is not None else False
        if stands is None:
            self.wanted.stream(replica, cv)
        return stands

    # -------------------------------------------------------------------------------------------------- merge.Lookup
    def batch_valid(self, digest: bytes) -> bool | None:
        """See `merge.Lookup`."""
        return self.batches.valid(digest)

    def new_view(self, g: int) -> tuple[NewView, Sequence[Choice]] | None:
        """See `merge.Lookup`."""
        found = self.new_views.get(g)
        return (found.header, found.choices) if found else None

    # --------------------------------------------------------------------------------------------------- view change
    def quorums(self, target: int) -> list[tuple[Vote, ...]]:
        """See `merge.quorums`; of the votes for `target`. What they miss is wanted."""
        found, missing = quorums(self.record, self.votes.of(target), self)
        self.wanted.add(missing)
        self._merge_wants |= self.wanted.batches
        return found

    def try_merge(self, votes: Sequence[Vote]) -> Merged | None:
        """The merge of `votes`; None if something is missing, which is then wanted."""
        outcome = merge(self.record, votes, self)
        if isinstance(outcome, Missing):
            self.wanted.add(outcome)
            self._merge_wants |= self.wanted.batches
            return None
        return outcome

    def want_batch(self, digest: bytes) -> None:
        """Accept this batch from whoever sends it."""
        self.wanted.batches.add(digest)
        self._merge_wants.add(digest)

    # ------------------------------------------------------------------------------------------------------- garbage
    @property
    def _current(self) -> int:
        """The lowest view whose NEW-VIEW is kept in any case: all but f streams have entered it, or a later one."""
        return sorted(stream.state.e for stream in self.streams.values())[self.record.f]

    def truncate(self, floor: int) -> None:
        """Forget what no log, view or slot above `floor` (own stable slot - L) needs (protocol §4)."""
        window = self._window
        for stream in self.streams.values():
            stream.truncate(self.attestations.attested(stream.replica), window)
        # NEW-VIEW(e) is kept while e is current (until all but f streams have gone beyond it), and while a kept log
        # holds or commits to it: who reads that log must be able to judge it, by the views and batches that it follows
        # from. Nobody else may have these any more.
        current = self._current
        cited = {
            kept.header.g
            for stream in self.streams.values()
            for kept in stream.kept.values()
            if isinstance(kept.header, NewView | CommitNewView)
        }
        for g in sorted(self.new_views, reverse=True):
            view = self.new_views[g]
            if g < current and view.header.s_max <= floor and g not in cited:
                del self.new_views[g]
            else:
                cited |= view.weighed.views
        for g in [g for g in self.commits if g not in cited and g not in self.new_views]:
            del self.commits[g]
        for digest in [d for d, s in self.named.items() if s <= floor]:
            del self.named[digest]
        self.citations.forget(floor)
        for g in [g for g in self.standing if g < current and g not in cited and g not in self.new_views]:
            del self.standing[g]
            self.entered.discard(g)
        self.batches.drop(floor, frozenset[bytes]().union(*(v.weighed.batches for v in self.new_views.values())))
