"""The PBFT engine as a replica sees it (`bft.ordering`): Castro and Liskov, OSDI 1999, §4, with signatures.

A slot is decided when Q = 2f+1 of 3f+1 members have committed to one digest in one view. What was prepared before a
COMMIT is shown by every later VIEW-CHANGE of a correct member, so a quorum of them never loses what is decided. The own
log is all that keeps this replica from contradicting itself: see `journal.py`.
"""

from collections import deque
from collections.abc import Sequence

from cloudfit_orchestrator.bft.batch import BundleChecker, batch_digest
from cloudfit_orchestrator.bft.batches import Batches
from cloudfit_orchestrator.bft.checkpoints import Certificate, Checkpoints
from cloudfit_orchestrator.bft.journal import LogBatch, LogDecision
from cloudfit_orchestrator.bft.messages import NOOP, Frozen, Named
from cloudfit_orchestrator.bft.ordering import AgreementError, Final, Host, Ordering, ProtocolError, TakeBatch
from cloudfit_orchestrator.bft.outbox import Outbox
from cloudfit_orchestrator.bft.pbft.book import Added, Book, bare, leader, with_own_batch
from cloudfit_orchestrator.bft.pbft.changes import Changes
from cloudfit_orchestrator.bft.pbft.fetching import Fetching
from cloudfit_orchestrator.bft.pbft.journal import ENTRIES, LogView, LogVote, LogWedge
from cloudfit_orchestrator.bft.pbft.messages import (
    MESSAGES,
    WEDGE,
    Change,
    Decided,
    Phase,
    Stable,
    Vote,
    change_statement,
    decode_body,
    vote_statement,
)
from cloudfit_orchestrator.bft.pbft.voice import Voice
from cloudfit_orchestrator.bft.situation import member_of
from cloudfit_orchestrator.model.channel import ErrorCode
from cloudfit_orchestrator.model.errors import BadError
from cloudfit_orchestrator.model.orders import open_retire
from cloudfit_orchestrator.model.record import ConfigRecord
from cloudfit_orchestrator.model.statement import Kind

MAX_EARLY = 64  # votes of one member for views or windows to come: enough to begin one, the rest is fetched
MAX_ASKED_FOR = 1024  # batches that the core wants: those of a set of wedges, L at most
REPEATED_SLOTS = 4  # the own votes of so many undecided slots are repeated: who lacks the first lacks all
REPEAT_CHANGE_S = 1.0  # a VIEW-CHANGE with a full window is some 100 KiB


class PbftOrdering(Ordering):
    """See the module. `e`: the view entered last; `v` >= e: the highest asked for; between them nothing is voted."""

    MESSAGES = MESSAGES
    ENTRIES = ENTRIES

    def __init__(self, host: Host, out: Outbox, record: ConfigRecord, envelope_hash: bytes) -> None:
        """See `Ordering`."""
        del envelope_hash
        self._at = host
        self._out = out
        self.record = record
        window = record.parameters.window
        self.statements = Checkpoints(record, host.verifier, record.quorums.commit)
        self.batches = Batches(BundleChecker(record, host.verifier), 4 * window)
        self.wanted = set()
        self.book = Book(record)
        self.changes = Changes(record, self.statements)
        self.e = 0
        self.entered: tuple[Change, tuple[Change, ...]] | None = None  # NEW-VIEW(e) and what it names
        self.choices: dict[int, bytes] = {}  # what NEW-VIEW(e) says of slots up to s_max
        self.s_max = record.h
        self.proofs: dict[int, Decided] = {}  # commit certificates, for those that lag behind
        self._decided: dict[int, bytes] = {}
        self._settled = record.h
        self._used: dict[bytes, Change] = {}  # wedges that an S was computed from, by digest
        self._early: dict[str, deque[Vote]] = {}
        self._named: dict[bytes, int] = {}  # batches that proposals name -> the highest slot
        self._asked_for: dict[bytes, None] = {}  # by the core
        self.voice = Voice(self, host, out) if host.is_me(record) else None
        self._fetching = Fetching(self, host, out)

    # ------------------------------------------------------------------------------------------------- what it is now
    @property
    def live(self) -> bool:
        """See `Ordering`."""
        return self.voice is not None and self.voice.live and not self.ended

    @property
    def stable(self) -> int:
        """See `Ordering`."""
        return self.low

    @property
    def low(self) -> int:
        """The low-water mark h: votes count for slots of h+1..h+L."""
        if self.voice is not None:
            return self.voice.stable.slot
        newest = self.statements.newest
        return newest.slot if newest is not None else self.record.h

    @property
    def view(self) -> int:
        """See `Ordering`."""
        return self.e

    @property
    def position(self) -> int:
        """The view: who is behind asks for its NEW-VIEW."""
        return self.e

    @property
    def needs_session(self) -> bool:
        """See `Ordering`."""
        return self.voice is not None and self.voice.needs_session

    # ------------------------------------------------------------------------------------------------- what comes in
    def receive(self, peer: str, message: Frozen) -> None:
        """See `Ordering`."""
        try:
            match message:
                case Vote() if message.c == self.record.c:
                    self._take_vote(message)
                case Change() if message.c == self.record.c:
                    self._take_change(message)
                case Decided() if message.c == self.record.c:
                    self._take_decided(message)
                case Stable() if message.c == self.record.c:
                    self._take_stable(message)
                case _:
                    pass
        except BadError:
            self._out.count("bad_signature")
            # A correct peer hands nothing on that it has not verified.
            self._out.blame(member_of(self.record, peer), "signature")

    def answer(self, peer: str, message: Frozen) -> bool:
        """See `Ordering`."""
        return self._fetching.answer(peer, message)

    def _genuine(self, replica: str, statement: bytes, signature: bytes) -> bool:
        return self.statements.verify(Kind.PBFT, replica, statement, signature)

    def _take_vote(self, vote: Vote) -> None:
        """Raises BadError if it is not that member's."""
        low, window, first = self.low, self.record.parameters.window, leader(self.record, vote.g)
        if vote.g < self.e or not low < vote.s <= low + 2 * window:
            return
        if vote.g == self.e and vote.phase in tuple(Phase) and self.book.has(vote):
            self._take_batch(vote)
            return
        if not self._genuine(vote.replica, vote_statement(vote.phase, vote.g, vote.s, vote.digest), vote.signature):
            raise BadError("vote is not its sender's")
        if vote.phase not in tuple(Phase) or (
            (vote.phase != Phase.COMMIT) and ((vote.replica == first) != (vote.phase == Phase.PRE_PREPARE))
        ):
            self._out.blame(vote.replica, "phase", vote.s)  # the leader's PREPARE is its PRE-PREPARE, nobody else's
            return
        if vote.g > self.e or vote.s > low + window:  # others may have the certificate that opens it already
            self._take_early(vote)
            return
        self.count(vote)

    def _take_early(self, vote: Vote) -> None:
        """It has come ahead of its view or window."""
        early = self._early.setdefault(vote.replica, deque(maxlen=MAX_EARLY))
        known = bare(vote) in map(bare, early)
        if not known and (vote.g > self.e or len(early) < MAX_EARLY):  # the lowest slots are needed first
            early.append(with_own_batch(vote, self.batches.checker.max_bytes))

    def count(self, vote: Vote) -> None:
        """A genuine vote of this view, ours or another's."""
        if vote.phase == Phase.PRE_PREPARE and vote.s <= self.s_max and self.choices.get(vote.s) != vote.digest:
            self._out.blame(vote.replica, "PRE-PREPARE against its NEW-VIEW", vote.s)
            return
        if self.book.add(bare(vote)) is Added.CONFLICT:
            self._out.blame(vote.replica, "equivocation", vote.s)
            return
        if vote.phase == Phase.PRE_PREPARE:
            self._name(vote.digest, vote.s)
            self._take_batch(vote)
        elif vote.phase == Phase.COMMIT:
            proof = self.book.committed(vote.s, vote.digest)
            if proof is not None:
                self._prove(proof)

    def _take_batch(self, vote: Vote) -> None:
        """The batch that came with a PRE-PREPARE, if it is the one that this names."""
        if vote.batch and vote.digest in self._named and batch_digest(vote.batch) == vote.digest:
            if self.batches.add(vote.digest, vote.batch):
                self._out.journal(LogBatch(self.record.c, vote.batch))
                self.batches.name(vote.digest, self._named[vote.digest])

    def offer_batch(self, data: bytes) -> bytes | None:
        """See `Ordering`."""
        digest = batch_digest(data)
        if digest not in self.wanted or not self.batches.add(digest, data):
            return None
        self.batches.name(digest, self._named.get(digest, self._settled + 2 * self.record.parameters.window))
        return digest

    def _take_change(self, change: Change) -> None:
        broken = self.changes.add(change)
        if broken:
            self._out.blame(change.replica, broken)

    def _take_decided(self, proof: Decided) -> None:
        """A commit certificate is proof by itself: Q-f correct members were prepared."""
        low = self._settled
        if not low < proof.s <= low + 2 * self.record.parameters.window or proof.s in self._decided:
            return
        statement = vote_statement(Phase.COMMIT, proof.g, proof.s, proof.digest)
        names = {signed.replica for signed in proof.commits}
        if len(proof.commits) != self.record.quorums.commit or len(names) != len(proof.commits):
            raise BadError("commit certificate is of another size")
        if not all(self._genuine(signed.replica, statement, signed.signature) for signed in proof.commits):
            raise BadError("commit certificate is forged")
        self._prove(proof)

    def _take_stable(self, message: Stable) -> None:
        newest = self.statements.newest
        if message.slot <= self.record.h or (newest is not None and message.slot <= newest.slot):
            return
        if message.slot >= WEDGE or not self.statements.valid_certificate(
            message.slot, message.digest, message.certificate
        ):
            raise BadError("checkpoint certificate is forged")
        self.statements.certify(Certificate(message.slot, message.digest, message.certificate))

    def _prove(self, proof: Decided) -> None:
        if self._decided.get(proof.s) != proof.digest:
            self.decided(proof.s, proof.digest)
            self._out.journal(LogDecision(self.record.c, proof.s, proof.digest))
        self.proofs.setdefault(proof.s, proof)

    def session(self, next_cv: int, recent: list[tuple[int, bytes, bytes]]) -> None:
        """See `Ordering`."""
        del recent
        if self.voice is not None:
            self.voice.session(next_cv)

    def certified(self, cv: int, certificate: bytes) -> None:
        """See `Ordering`."""
        del cv, certificate
        if self.voice is not None:
            self.voice.joined_for_good()

    def refused(self, code: ErrorCode) -> None:
        """See `Ordering`."""
        if self.voice is None:
            return
        self._out.count(f"refused_{code.name.lower()}")
        if code in (ErrorCode.ENDED, ErrorCode.LEASE_OVER):
            self.ended = True
            self._out.report("silenced", {"c": self.record.c, "code": code.name})
        else:
            self.voice.session_later()

    def restore(self, entry: Frozen) -> None:
        """See `Ordering`."""
        match entry:
            case LogVote() if entry.change.c == self.record.c:
                self.changes.logged.append(entry.change)
            case LogView() if entry.new_view.c == self.record.c:
                self._restore_view(entry)
            case LogWedge(change=wedge) if wedge.c == self.record.c:
                self.changes.add(wedge, trusted=True)
                self._used[change_statement(wedge.body)] = wedge
            case _ if self.voice is not None:
                self.voice.restore(entry)

    def _restore_view(self, entry: LogView) -> None:
        self.changes.restore_named(decode_body(entry.new_view.body))
        self.changes.add(entry.new_view, trusted=True)
        for change, body in self.changes.new_views():
            if change == entry.new_view:
                found = self.changes.named(body.view_changes, body.g)
                if isinstance(found, tuple):
                    self._enter(body.g, change, *found, body.view_changes)
                    return
        raise ProtocolError("the own log holds a view that cannot be entered again")

    def restored(self) -> None:
        """See `Ordering`."""
        if self.voice is not None:
            self.voice.restored()

    # ------------------------------------------------------------------------------------------------------ deciding
    def advance(self) -> None:
        """See `Ordering`."""
        self.changes.begin()
        if self.voice is not None:
            self.voice.name_votes()
        for change, body in self.changes.new_views():
            if body.g <= self.e or (self.voice is not None and body.g < self.voice.v):
                continue
            found = self.changes.named(body.view_changes, body.g)
            if isinstance(found, tuple):
                for vote in found[0]:
                    self._out.journal(LogVote(vote))
                self._out.journal(LogView(change))
                self._enter(body.g, change, *found, body.view_changes)
                break
            if found is False:
                self.changes.drop(change)
                self._out.blame(change.replica, "NEW-VIEW names what is no vote for it")
        self._refresh_wanted()

    def _enter(self, g: int, change: Change, votes: tuple[Change, ...], final: Final, names: Sequence[Named]) -> None:
        newest = self.changes.stable(names)
        if newest.certificate:
            self.statements.certify(Certificate(newest.h, newest.digest, newest.certificate))
        self.e = g
        self.entered = (change, votes)
        self.s_max, self.choices = final.s_max, dict(final.choices)
        self.book.enter(g)
        self.changes.entered(g)
        for s, digest in final.choices:
            self._name(digest, s)
        if self.voice is not None:
            self.voice.entered(g)
        self._at.pool.release()
        self._at.progress_s = self._out.now_s
        self.count_early()

    def count_early(self) -> None:
        """A view is entered, or the window has moved: votes that came too early for it count now."""
        high = self.low + self.record.parameters.window
        for early in self._early.values():
            for vote in [vote for vote in early if vote.g < self.e or (vote.g == self.e and vote.s <= high)]:
                early.remove(vote)
                if vote.g == self.e and vote.s > self.low:
                    self.count(vote)

    def _refresh_wanted(self) -> None:
        for digest in [d for d in self._asked_for if self.batches.valid(d) is not None]:
            del self._asked_for[digest]
        self.wanted.clear()
        self.wanted.update(d for d in (*self._named, *self._asked_for) if self.batches.valid(d) is None)

    def _name(self, digest: bytes, s: int) -> None:
        if digest != NOOP:
            self._named[digest] = max(s, self._named.get(digest, 0))
            self.batches.name(digest, s)

    def decision(self, s: int) -> bytes | None:
        """See `Ordering`."""
        return self._decided.get(s)

    def decided(self, s: int, digest: bytes) -> None:
        """See `Ordering`."""
        known = self._decided.get(s)
        if known is not None and known != digest:
            raise AgreementError(f"slot {s} decided as {known.hex()[:16]} and as {digest.hex()[:16]}")
        self._decided[s] = digest
        self._name(digest, s)

    def settle(self, s: int) -> None:
        """See `Ordering`."""
        self._settled = max(self._settled, s)

    def want_batch(self, digest: bytes) -> None:
        """See `Ordering`."""
        if digest != NOOP and len(self._asked_for) < MAX_ASKED_FOR and self.batches.valid(digest) is None:
            self._asked_for[digest] = None
            self.wanted.add(digest)

    def speak(self, take_batch: TakeBatch) -> None:
        """See `Ordering`."""
        if self.voice is not None and not self.ended:
            self.voice.speak(take_batch)

    def tick(self) -> None:
        """See `Ordering`."""
        if self.voice is not None and not self.ended:
            self.voice.tick()

    def fetch(self) -> None:
        """See `Ordering`."""
        self._fetching.fetch()

    def repeat(self) -> None:
        """Own votes of the first undecided slots; the own VIEW-CHANGE or wedge."""
        if self.voice is None:
            return
        first = self._at.execution.slot + 1
        if not self.voice.wedging:
            for s in range(first, first + REPEATED_SLOTS):
                for vote in self.book.votes(s):
                    if vote.replica == self._at.me:
                        self._out.broadcast(self._at.others, vote)
        if self.voice.change is not None and self._out.every("repeat change", REPEAT_CHANGE_S):
            self._out.broadcast(self._at.others, self.voice.change)

    # ------------------------------------------------------------------------------------------------------ liveness
    @property
    def waiting(self) -> bool:
        """A leader's proposal, what a NEW-VIEW left, or a change of view. Votes of others alone are no reason: one
        faulty member could make all change views.
        """
        slot = self._at.execution.slot
        if self.voice is not None and self.voice.v > self.e:
            return True
        proposals = self.book.proposals()
        return self.s_max > slot or max(self._decided, default=0) > slot or bool(proposals and proposals[-1][0] > slot)

    @property
    def may_suspect(self) -> bool:
        """See `Ordering`."""
        return self.live and self.voice is not None and not self.voice.wedging

    def suspect(self) -> None:
        """See `Ordering`. While a change of view is under way the next is asked for only when a quorum asks for this
        one (§4.5.2 of the paper): else one that lost touch would run ahead of all others.
        """
        if self.voice is None:
            return
        asking = [r for r, target in self.changes.targets().items() if target >= self.voice.v]
        if self.voice.v == self.e or len(asking) >= self.record.quorums.view_change:
            self.voice.ask(self.voice.v + 1)

    @property
    def proposes(self) -> bool:
        """See `Ordering`."""
        return leader(self.record, self.e) == self._at.me

    def forward_to(self, *, behind: bool) -> str | None:
        """See `Ordering`."""
        del behind
        return leader(self.record, self.e) if self.voice is not None and not self.proposes else None

    def retire(self, envelope: bytes) -> None:
        """See `Ordering`: whoever has the order asks for the next view that the member does not lead."""
        order = open_retire(envelope, self._at.controllers)
        record = self.record
        if (order.group, order.c) != (record.group, record.c) or record.member(order.replica) is None:
            raise BadError(f"RETIRE names {order.replica} of c={order.c}, here is c={record.c}")
        if (
            self.voice is not None
            and self.may_suspect
            and leader(record, self.voice.v) == order.replica
            and record.n > 1
        ):
            self.voice.ask(self.voice.v + 1)

    # ------------------------------------------------------------------------------------------------------ succession
    def wedge(self, prepared: bytes) -> None:
        """See `Ordering`."""
        del prepared
        if self.voice is not None:
            self.voice.wedging = True

    @property
    def wedged(self) -> bool:
        """See `Ordering`."""
        return self.voice is not None and self.voice.wedged

    def wedges(self) -> list[Named]:
        """See `Ordering`."""
        return self.changes.wedges()

    def final(self, names: Sequence[Named]) -> Final | None:
        """See `Ordering`."""
        found = self.changes.named(names, WEDGE)
        if not isinstance(found, tuple):
            return None
        newest = self.changes.stable(names)
        for change in found[0]:
            name = change_statement(change.body)
            if name not in self._used:
                self._used[name] = change
                self._out.journal(LogWedge(change))
        if newest.certificate:  # who lags behind it fetches that state
            self.statements.certify(Certificate(newest.h, newest.digest, newest.certificate))
        return found[1]

    # ------------------------------------------------------------------------------------------------------------ log
    def decisions(self) -> list[tuple[int, bytes]]:
        """See `Ordering`."""
        return [(s, digest) for s, digest in sorted(self._decided.items()) if s > self._settled]

    def entries(self) -> list[Frozen]:
        """See `Ordering`."""
        view, votes = self.entered or (None, ())
        found: list[Frozen] = [*map(LogVote, votes), LogView(view)] if view is not None else []
        found += [LogWedge(change) for change in self._used.values()]
        return found + (self.voice.entries() if self.voice is not None else [])

    @property
    def kept(self) -> int:
        """See `Ordering`."""
        return self.voice.kept if self.voice is not None else 0

    def truncate(self, floor: int) -> None:
        """See `Ordering`."""
        floor = min(floor, self._settled)
        self._decided = {s: digest for s, digest in self._decided.items() if s > floor}
        self.proofs = {s: proof for s, proof in self.proofs.items() if s > floor}
        self.book.forget(min(self.low, floor))
        for digest in [d for d, s in self._named.items() if s <= floor]:
            del self._named[digest]
        self.batches.drop(floor)
