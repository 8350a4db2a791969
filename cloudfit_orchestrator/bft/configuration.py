"""All that the streams of one configuration say (protocol §3-§5): a receiver's view, the same for members and learners.

Messages go in by `offer…`, `advance` processes what can be processed, in FIFO order a stream, and `slots.decisions()`
are what follows. Nothing here speaks: a member's own voice is in `voice.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from cloudfit_orchestrator.bft.batch import BundleChecker, batch_digest
from cloudfit_orchestrator.bft.evidence import Attestations, Batches, Certificate, Statements
from cloudfit_orchestrator.bft.judge import Broken, Held, StreamState, initial, judge, leader, stated
from cloudfit_orchestrator.bft.merge import Merged, Missing, Proposal, Vote, merge, slots_of, vote_of
from cloudfit_orchestrator.bft.messages import (
    NOOP,
    Choice,
    Commit,
    CommitNewView,
    Discarded,
    Header,
    Named,
    NewView,
    Prepare,
    Req,
    Signed,
    Skip,
    Stable,
    StreamMessage,
    ViewChange,
    Wedge,
    decode_header,
    decode_merge,
)
from cloudfit_orchestrator.bft.slots import Slots
from cloudfit_orchestrator.bft.stream import MAX_AHEAD, Citation, Kept, Stream
from cloudfit_orchestrator.model.errors import BadError
from cloudfit_orchestrator.model.orders import open_retire
from cloudfit_orchestrator.model.record import ConfigRecord, Status, open_record
from cloudfit_orchestrator.model.signing import DIGEST_BYTES, SIGNATURE_BYTES, Verifier, sha256
from cloudfit_orchestrator.model.ui import EpochEnd, epoch_end_bytes, ui_bytes

WEDGE = -1  # the target under which wedge votes are kept
MAX_VOTES_KEPT = 8  # view-change votes kept of one stream: the newest matter


@dataclass(frozen=True, slots=True)
class NewViewKept:
    """A NEW-VIEW that stands."""

    message: StreamMessage
    header: NewView
    choices: tuple[Choice, ...]
    logs: tuple[tuple[StreamMessage, ...], ...] = ()  # of the VIEW-CHANGEs that it was computed from, if they were read


class Offered(Enum):
    """What became of a message that was offered."""

    TAKEN = "taken"  # its UI holds, and it waits for its turn
    NOT_WANTED = "not wanted"  # known, or too far ahead: its UI was not looked at
    BAD = "bad"  # its UI is wrong: blame who sent it


@dataclass(slots=True)
class Wanted:
    """What is missing, for the runtime of the core to fetch; rebuilt on every `advance`."""

    batches: set[bytes] = field(default_factory=set)
    views: set[int] = field(default_factory=set)
    streams: dict[str, int] = field(default_factory=dict)  # replica -> counter needed

    def add(self, missing: Missing) -> None:
        """Take a merge's needs in."""
        self.batches.update(missing.batches)
        self.views.update(missing.views)
        for replica, cv in missing.streams:
            self.streams[replica] = max(cv, self.streams.get(replica, 0))


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
        self.votes: dict[str, dict[int, Vote]] = {m.replica: {} for m in record.members}
        self.epoch_ends: dict[str, EpochEnd] = {}
        self.named: dict[bytes, int] = {}  # batches that standing proposals name -> highest slot
        self.wanted = Wanted()
        self.liars: dict[str, str] = {}  # replica -> the rule its stream broke
        self._cited: dict[tuple[str, int], list[tuple[str, Citation]]] = {}
        self._logs: dict[int, tuple[tuple[StreamMessage, ...], ...]] = {}  # of the NEW-VIEW being judged
        self.jumps: list[StreamMessage] = []  # anchors that cursors jumped to, for the journal to take
        self._merge_wants: set[bytes] = set()

    # ---------------------------------------------------------------------------------------------- messages come in
    def genuine(self, message: StreamMessage) -> bool:
        """The UI is that member's, for this content."""
        return self.certified(message.replica, message.cv, message.digest, message.certificate)

    def certified(self, replica: str, cv: int, digest: bytes, certificate: bytes) -> bool:
        """Whether the USIG of that member certified (cv, digest) in this configuration."""
        member = self.record.member(replica)
        if member is None or not 0 < cv < 1 << 63:
            return False
        message = ui_bytes(self.record.group, replica, self.record.c, cv, digest)
        return self._verifier.verify(member.usig_key, message, certificate)

    def offer(self, message: StreamMessage) -> Offered:
        """Buffer a stream message."""
        stream = self.streams.get(message.replica)
        if stream is None or message.c != self.record.c:
            return Offered.BAD
        if not stream.wants(message.cv):
            return Offered.NOT_WANTED
        if not self.genuine(message):
            return Offered.BAD
        stream.wait(bare(message))
        self._peek(message)
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
        if digest in self.named:
            self.batches.name(digest, self.named[digest])
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
        elif isinstance(header, CommitNewView) and message.cv < self.attestations.attested(message.replica):
            if stream.ended is None:
                self.entered.add(header.g)
                self.standing[header.g] = (header.cv, sha256(header.header, header.payload_hash))

    def offer_log(self, messages: Sequence[StreamMessage]) -> None:
        """Answer to FETCH-NEW-VIEW: the log of a VIEW-CHANGE whose stream was jumped over. It precedes an attested
        STABLE, so all of it stands; it counts if it begins where a log may begin (§4).
        """
        if not messages:  # how many there are is bounded by the frame that brings them
            return
        first, last = messages[0], messages[-1]
        stream = self.streams.get(first.replica)
        if stream is None or stream.stands(last.cv) is not True:
            return
        if [m.cv for m in messages] != list(range(first.cv, last.cv + 1)):
            return
        if not all(m.replica == first.replica and m.c == self.record.c and self.genuine(m) for m in messages):
            return
        self._read_log(stream, messages)

    def _read_log(self, stream: Stream, messages: Sequence[StreamMessage]) -> None:
        state = initial(self.record)
        kept: list[Kept] = []
        for message in messages:
            try:
                header = decode_header(message.header)
            except BadError:
                return
            if isinstance(header, Stable) and not kept and message.cv > 1:
                outcome: object = stated(header)
            else:
                self._stands = True
                outcome = judge(self.record, state, stream.replica, message.cv, header, message, self)
                self._stands = False
            if not isinstance(outcome, StreamState):
                return  # cannot be: it stands
            entries = self._citations(header) if isinstance(header, Commit) else ()
            before, state = state, outcome
            kept.append(Kept(message, header, message.digest, state, entries))
        header, first = kept[-1].header, kept[0]
        anchored = first.message.cv == 1 or (
            isinstance(first.header, Stable) and first.header.h <= before.h - self._window
        )
        if isinstance(header, ViewChange) and anchored:
            name = Named(stream.replica, kept[-1].message.cv, kept[-1].digest)
            retires = self._retires(header.retires)
            self.votes[stream.replica][header.g] = vote_of(
                self.record, name, before, kept[:-1], message=kept[-1].message, retires=retires
            )
            self._prune_votes(self.votes[stream.replica], header.g)

    def offer_end(self, end: EpochEnd) -> bool:
        """An EPOCH-END: the stream has no message beyond cv_end. False if it is not the wormhole's."""
        member = self.record.member(end.replica)
        if member is None or end.c != self.record.c or not 0 <= end.cv_end < 1 << 63:
            return False
        if len(end.last_digest) != DIGEST_BYTES or len(end.last_certificate) != SIGNATURE_BYTES:
            return False
        if not self._verifier.verify(member.usig_key, epoch_end_bytes(self.record.group, end), end.signature):
            return False
        self.epoch_ends[end.replica] = end
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
                self._peek(proof)
        return self._jump(stream, stable)

    def _peek(self, message: StreamMessage) -> None:
        """A STABLE is a signed statement already: its attestations and its certificate hold before it is processed,
        which may have to wait for just that.
        """
        try:
            header = decode_header(message.header)
        except BadError:
            return
        if isinstance(header, Stable) and header.c == self.record.c:
            self.attestations.add(message, header)
            newest = self.statements.newest
            if newest is None or header.h > newest.slot:
                if self.stable_certificate(header.h, header.digest, header.certificate):
                    self.statements.certify(Certificate(header.h, header.digest, header.certificate))

    def restore_anchor(self, message: StreamMessage) -> None:
        """Start a stream at a STABLE of the own log."""
        header = decode_header(message.header)
        if isinstance(header, Stable):
            stream = self.streams[message.replica]
            kept = Kept(message, header, message.digest, stated(header))
            stream.jump(kept)
            self.entered.add(header.e)
            self._count(kept)

    def restore_view(self, message: StreamMessage) -> None:
        """A NEW-VIEW of the own log."""
        header = decode_header(message.header)
        if isinstance(header, NewView):
            self._keep_view(message, header)

    # ---------------------------------------------------------------------------------------------------- processing
    def advance(self) -> list[Kept]:
        """Process all that can be, and return the messages that were accepted, in the order of processing."""
        self.wanted = Wanted()
        self._merge_wants = set()
        done: list[Kept] = []
        moved = True
        while moved:
            moved = False
            for stream in self.streams.values():
                while self._step(stream, done):
                    moved = True
        self._resolve_ended()
        for digest in self.named:
            if self.batches.valid(digest) is None:
                self.wanted.batches.add(digest)
        self._merge_wants |= self.wanted.batches
        return done

    def _step(self, stream: Stream, done: list[Kept]) -> bool:
        """Process the next message of a stream, if it is there and can be judged."""
        cv = stream.cursor + 1
        message = stream.waiting.get(cv)
        if message is None or stream.ended is not None:
            return False
        try:
            header = decode_header(message.header)
        except BadError:
            self._end(stream, cv, "form: header does not decode")
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
                self._end(stream, cv, outcome.rule)
                return False
        stream.unwait(cv)
        entries = self._citations(header) if isinstance(header, Commit) else ()
        kept = Kept(message, header, message.digest, outcome, entries)
        if isinstance(header, ViewChange | Wedge):
            self._keep_vote(stream, kept)
        stream.accept(kept)
        self._count(kept)
        done.append(kept)
        return True

    def _end(self, stream: Stream, cv: int, rule: str) -> None:
        stream.end(cv, rule)
        self.liars[stream.replica] = rule

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
        self.jumps.append(kept.message)
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
                    self._cite(replica, citation)
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
            case _:
                pass
        if kept.message.cv:
            self._resolve(replica, kept.message.cv)

    def _name(self, digest: bytes, s: int) -> None:
        if digest != NOOP and s > self.slots.floor:
            self.named[digest] = max(s, self.named.get(digest, 0))
            self.batches.name(digest, s)

    def _keep_view(self, message: StreamMessage, header: NewView) -> None:
        choices = decode_merge(message.payload).choices
        self.new_views[header.g] = NewViewKept(bare(message), header, choices, self._logs.pop(header.g, ()))
        self.entered.add(header.g)
        self.standing[header.g] = (message.cv, message.digest)
        for choice in choices:
            self._name(choice.batch, choice.s)
        for voter in (message.replica, *self.commits.get(header.g, ())):  # its COMMITs may have come before it
            self.slots.vote_view(header.g, voter, choices)

    def _keep_vote(self, stream: Stream, kept: Kept) -> None:
        header = kept.header
        name = Named(stream.replica, kept.message.cv, kept.digest)
        if isinstance(header, ViewChange):
            target, retires = header.g, self._retires(header.retires)
            for req in header.certificate:  # certificates travel: who sees one may join
                if req.target > self.statements.requests.get(req.replica, (0, b""))[0]:
                    self.statements.requests[req.replica] = (req.target, req.signature)
        else:
            target, retires = WEDGE, ()
        if not stream.complete(self._window):
            return  # read from an anchor too near to tell what the log holds: this judge cannot count the vote
        votes = self.votes[stream.replica]
        log = list(stream.kept.values())
        votes[target] = vote_of(self.record, name, stream.state, log, message=kept.message, retires=retires)
        self._prune_votes(votes, target)

    def _prune_votes(self, votes: dict[int, Vote], newest: int) -> None:
        """Keep the newest few, and the one that was just read."""
        for old in sorted(t for t in votes if t not in (WEDGE, newest))[: 1 - MAX_VOTES_KEPT]:
            del votes[old]

    def _retires(self, orders: Sequence[bytes]) -> tuple[str, ...]:
        found = set()
        for envelope in orders[: self.record.n]:
            try:
                order = open_retire(envelope, self._controllers)
            except BadError:
                continue
            if (order.group, order.c) == (self.record.group, self.record.c) and self.record.member(order.replica):
                found.add(order.replica)
        return tuple(sorted(found))

    # ----------------------------------------------------------------------------------------------------- citations
    def _citations(self, header: Commit) -> tuple[Citation, ...]:
        """The entries of a COMMIT that are what they claim; proposals that they carry are offered to their streams."""
        found: dict[tuple[str, int], Citation] = {}
        for entry in header.entries:
            stream = self.streams.get(entry.proposer)
            if stream is None:
                continue
            kept = stream.kept.get(entry.cv)
            message = StreamMessage(self.record.c, entry.proposer, entry.cv, entry.header, b"", entry.certificate)
            if kept is not None and kept.message == message:
                carried: Header = kept.header
            else:  # an entry is judged by itself, not by what is held: its UI must be the proposer's
                if not self.genuine(message):
                    continue
                try:
                    carried = decode_header(entry.header)
                except BadError:
                    continue
                if stream.wants(entry.cv):
                    stream.wait(message)
            if not isinstance(carried, Prepare | Skip) or carried.g != header.g or carried.c != header.c:
                continue
            ends = (carried.s, carried.s) if isinstance(carried, Prepare) else (carried.s1, carried.s2)
            if ends == (entry.s1, entry.s2):
                found[(entry.proposer, entry.cv)] = Citation(entry.proposer, entry.cv, carried)
        return tuple(found.values())

    def _cite(self, voter: str, citation: Citation) -> None:
        stream = self.streams[citation.proposer]
        stands = stream.stands(citation.cv)
        if stands is None:
            if citation.cv > stream.cursor + MAX_AHEAD:
                return  # too far ahead to wait for; a checkpoint will cover it
            self._cited.setdefault((citation.proposer, citation.cv), []).append((voter, citation))
            self.wanted.streams[citation.proposer] = max(citation.cv, self.wanted.streams.get(citation.proposer, 0))
        elif stands:
            self._vote(voter, citation)

    def _vote(self, voter: str, citation: Citation) -> None:
        kept = self.streams[citation.proposer].kept.get(citation.cv)
        if kept is None:
            return  # behind an attested anchor: a checkpoint covers its slots
        header = citation.header
        batch = header.batch if isinstance(header, Prepare) else NOOP
        for s in slots_of(header, self.record, kept.state, citation.proposer):
            self.slots.vote(Proposal(header.g, s, citation.proposer, citation.cv, batch), voter)

    def _resolve(self, replica: str, cv: int) -> None:
        for voter, citation in self._cited.pop((replica, cv), ()):
            self._vote(voter, citation)

    def _resolve_ended(self) -> None:
        for proposer, cv in list(self._cited):
            if self.streams[proposer].stands(cv) is not None:  # jumped over, or after the end
                del self._cited[(proposer, cv)]
            else:
                self.wanted.streams[proposer] = max(cv, self.wanted.streams.get(proposer, 0))

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
        return (
            record.group == self.record.group
            and record.status is Status.PREPARED
            and record.base == self.record.c
            and record.c > self.record.c
        )

    def new_view_recomputes(self, leader: str, cv: int, header: NewView, payload: bytes) -> bool | None:
        """See `judge.Evidence`. A view that a standing stream has entered has a NEW-VIEW that stands, and it is this
        one: the leader's stream stands to here, and had it another before or were this one false, none could follow.
        """
        del leader, cv
        try:
            content = decode_merge(payload)
        except BadError:
            return False
        if self._stands or header.g in self.entered:
            return True
        votes = self._named_votes(header.g, content.view_changes)
        if votes is None:
            self.wanted.views.add(header.g)  # or a COMMIT of it that stands
        if votes is None or isinstance(votes, bool):
            return votes
        outcome = merge(self.record, votes, self)
        if isinstance(outcome, Missing):
            self.wanted.add(outcome)
            return None
        told = Merged(header.h, header.s_max, content.choices, header.blacklist, header.retired)
        self._logs = {header.g: tuple(vote.log for vote in votes)}
        return told == outcome

    def _named_votes(self, target: int, names: Sequence[Named]) -> list[Vote] | bool | None:
        """The VIEW-CHANGEs that a NEW-VIEW or a wedge set names; False if one is none, None if not all are known."""
        if len({n.replica for n in names}) != len(names) or len(names) < self.record.quorums.view_change:
            return False
        votes = []
        unknown = False
        for name in names:
            stream = self.streams.get(name.replica)
            if stream is None:
                return False
            vote = self.votes[name.replica].get(target) or self._vote_again(stream, target, name)
            if vote is not None:
                if vote.name != name:
                    return False
                votes.append(vote)
            elif stream.stands(name.cv) is False or not self._may_be(stream, target, name):
                return False
            else:
                unknown = True
                self.wanted.streams[name.replica] = max(name.cv, self.wanted.streams.get(name.replica, 0))
        return None if unknown else votes

    def _may_be(self, stream: Stream, target: int, name: Named) -> bool:
        """False if the message at that counter is held and is no vote for `target`."""
        kept = stream.kept.get(name.cv)
        if kept is None:
            return True
        if kept.digest != name.digest:
            return False
        if target == WEDGE:
            return isinstance(kept.header, Wedge)
        return isinstance(kept.header, ViewChange) and kept.header.g == target

    def _vote_again(self, stream: Stream, target: int, name: Named) -> Vote | None:
        """A vote that was let go, read off the kept stream once more."""
        kept = stream.kept.get(name.cv)
        if kept is None or not self._may_be(stream, target, name) or not isinstance(kept.header, ViewChange):
            return None
        before = stream.kept.get(name.cv - 1)
        state = before.state if before is not None else stream.base_state
        anchor = stream.anchor()
        if anchor is not None and (name.cv <= anchor.message.cv or anchor.state.h > state.h - self._window):
            return None
        log = [item for cv, item in stream.kept.items() if cv < name.cv]
        retires = self._retires(kept.header.retires)
        return vote_of(self.record, name, state, log, message=kept.message, retires=retires)

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
        if stream is None:
            return False
        stands = stream.stands(cv)
        if stands is None:
            self.wanted.streams[replica] = max(cv, self.wanted.streams.get(replica, 0))
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
    def view_votes(self, target: int) -> list[Vote]:
        """The VIEW-CHANGEs for `target` that stand, one a member; for `WEDGE` also the closed streams that are read to
        their end: EPOCH-END and the whole log are a vote (protocol §6.5).
        """
        found = []
        for replica, votes in self.votes.items():
            vote = votes.get(target)
            if vote is None and target == WEDGE:
                vote = self._closed_vote(replica)
            if vote is not None:
                found.append(vote)
        return found

    def _closed_vote(self, replica: str) -> Vote | None:
        end, stream = self.epoch_ends.get(replica), self.streams[replica]
        if end is None or stream.ended is not None or stream.cursor != end.cv_end:
            return None
        if not stream.complete(self._window):
            return None
        name = Named(replica, end.cv_end + 1, end.last_digest)
        vote = vote_of(self.record, name, stream.state, list(stream.kept.values()))
        self.votes[replica][WEDGE] = vote
        return vote

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

    def wedge_votes(self, names: Sequence[Named]) -> list[Vote] | None:
        """The wedges that a set names; None if not all are known here (or it is no quorum of wedges)."""
        for replica in self.votes:
            if WEDGE not in self.votes[replica]:
                self._closed_vote(replica)
        votes = self._named_votes(WEDGE, names)
        return votes if isinstance(votes, list) else None

    # ------------------------------------------------------------------------------------------------------- garbage
    def truncate(self, floor: int) -> None:
        """Forget what no log, view or slot above `floor` (own stable slot - L) needs (protocol §4)."""
        window = self._window
        for stream in self.streams.values():
            stream.truncate(self.attestations.attested(stream.replica), window)
        # NEW-VIEW(e) is kept while e is current (until all but f streams have gone beyond it), and while a kept log
        # holds or commits to it: who reads that log must be able to judge it.
        current = sorted(stream.state.e for stream in self.streams.values())[self.record.f]
        cited = {
            kept.header.g
            for stream in self.streams.values()
            for kept in stream.kept.values()
            if isinstance(kept.header, NewView | CommitNewView)
        }
        for g in [g for g, view in self.new_views.items() if g < current and view.header.s_max <= floor]:
            if g not in cited:
                del self.new_views[g]
        for g in [g for g in self.commits if g not in cited and g not in self.new_views]:
            del self.commits[g]
        for digest in [d for d, s in self.named.items() if s <= floor]:
            del self.named[digest]
        for place in [p for p, waiting in self._cited.items() if _last_slot(waiting[0][1].header) <= floor]:
            del self._cited[place]
        for g in [g for g in self.standing if g < current and g not in cited and g not in self.new_views]:
            del self.standing[g]
            self.entered.discard(g)
        self.batches.drop(floor)


def _last_slot(header: Prepare | Skip) -> int:
    return header.s if isinstance(header, Prepare) else header.s2


def bare(message: StreamMessage) -> StreamMessage:
    """The message without its batch, as it is kept."""
    if not message.batch:
        return message
    return StreamMessage(message.c, message.replica, message.cv, message.header, message.payload, message.certificate)
