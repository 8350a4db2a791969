"""What a member of a PBFT configuration says, and when (§4.2-§4.5 of the paper).

Nothing is signed before it is in the log, and nothing is said twice differently: `said` holds every own vote of the
present view, from the log after a restart. A view that is left is never voted in again; a wedge is the last word.
"""

from functools import partial
from typing import TYPE_CHECKING

from cloudfit_orchestrator.bft.checkpoints import Certificate
from cloudfit_orchestrator.bft.effects import Certify
from cloudfit_orchestrator.bft.messages import NOOP, Frozen, encode
from cloudfit_orchestrator.bft.ordering import Host, TakeBatch
from cloudfit_orchestrator.bft.outbox import Outbox
from cloudfit_orchestrator.bft.pbft.book import leader
from cloudfit_orchestrator.bft.pbft.journal import (
    LogJoined,
    LogOwn,
    LogPrepared,
    LogSaid,
    LogSigned,
    LogStable,
    LogVote,
)
from cloudfit_orchestrator.bft.pbft.messages import (
    WEDGE,
    Change,
    NewView,
    Phase,
    Prepared,
    ViewChange,
    Vote,
    change_statement,
    decode_body,
    vote_statement,
)
from cloudfit_orchestrator.bft.pbft.signer import Signer
from cloudfit_orchestrator.model.signing import sha256

if TYPE_CHECKING:
    from cloudfit_orchestrator.bft.pbft.ordering import PbftOrdering

PIPELINE = 4  # own proposals that are not executed: while they are, requests gather into the next batch
JOINED = sha256(b"cloudfit/pbft-joined/v1")  # what the counter's first value is spent on
SESSION_RETRY_S = 0.2


class Voice:
    """See the module. Works for `ordering`, whose parts it reads."""

    def __init__(self, ordering: "PbftOrdering", host: Host, out: Outbox) -> None:
        self._of = ordering
        self._at = host
        self._out = out
        self._record = record = ordering.record
        self._c = record.c
        self._signer = Signer(out, record.c)
        self.live = False  # this log is known to be all that was ever said in c
        self.needs_session = True
        self._joined = False
        self.v = 0
        self.stable = Certificate(record.h, record.digest, ())
        self.prepared: dict[int, Prepared] = {}  # of slots above the low-water mark, the highest view's
        self.said: dict[tuple[int, int, Phase], bytes] = {}  # (view, slot, phase) -> digest, of views from e on
        self.wedging = False  # a successor is being prepared
        self._last_word = False  # the wedge is in the log
        self.wedged = False  # the wedge is signed
        self.change: Change | None = None  # the own newest VIEW-CHANGE or wedge, signed
        self._body = b""  # that which is to be signed
        self._new_views: dict[int, bytes] = {}  # own NEW-VIEWs above e
        self._last = record.h  # the last slot proposed in view e

    # ------------------------------------------------------------------------------------------------------- session
    def session(self, next_cv: int) -> None:
        """The wormhole's counter tells one thing, a log that was lost: its first value is spent before the first word.
        Safety does not rest on it: a lost log counts in f anyway.
        """
        self.needs_session = False
        if next_cv == 1:
            if not self._joined:
                self._joined = True
                self._out.journal(LogJoined(self._c))
            self._out.put(Certify(self._c, 1, JOINED))
        elif self._joined:
            self.joined_for_good()
        else:
            self._out.report("amnesia", {"c": self._c, "cv": next_cv - 1})

    def joined_for_good(self) -> None:
        """Whoever starts again without this log will be told."""
        if self._joined and not self.live:
            self.live = True
            self._at.pool.release()

    def session_later(self) -> None:
        """It was refused for a time."""
        self.needs_session = False
        self._out.later("session", SESSION_RETRY_S)

    def tick(self) -> None:
        """Ask again for what was refused for a time."""
        if self._out.due("session"):
            self.needs_session = True
        if self.live:
            self._signer.tick()

    # ------------------------------------------------------------------------------------------------------- restart
    def restore(self, entry: Frozen) -> None:
        """An entry of the own log."""
        match entry:
            case LogJoined() if entry.c == self._c:
                self._joined = True
            case LogSaid() if entry.c == self._c:
                self.said[entry.g, entry.s, Phase(entry.phase)] = entry.digest
                if entry.phase == Phase.PRE_PREPARE:
                    self._last = max(self._last, entry.s)
            case LogPrepared() if entry.c == self._c:
                self.prepared[entry.prepared.s] = entry.prepared
            case LogStable() if entry.c == self._c:
                self._settle(Certificate(entry.slot, entry.digest, entry.certificate))
            case LogOwn() if entry.c == self._c:
                self._restore_own(entry)
            case LogSigned() if entry.change.c == self._c:
                self._take_signed(entry.change)
            case _:
                pass  # of a configuration that is over

    def _restore_own(self, entry: LogOwn) -> None:
        body = decode_body(entry.body)
        if isinstance(body, NewView):
            self._of.changes.restore_named(body)
            self._new_views[body.g] = entry.body
            self.name_votes()
            return
        self._body, self.change = entry.body, None
        if body.target == WEDGE:
            self.wedging = self._last_word = True
        else:
            self.v = max(self.v, body.target)

    def restored(self) -> None:
        """Have signed again what may not have been: it says the same."""
        if self._body and self.change is None:
            self._sign_change(self._body)
        if self.wedging:
            return
        for g, body in self._new_views.items():
            if g >= self.v:
                self._sign_new_view(g, body)
        if self.v == self._of.e:
            for (g, s, phase), digest in sorted(self.said.items()):
                if g == self._of.e and s > self.stable.slot:
                    self._sign_vote(phase, g, s, digest)

    def entries(self) -> list[Frozen]:
        """Entries that make this voice again."""
        c = self._c
        found: list[Frozen] = [LogJoined(c)] if self._joined else []
        if self.stable.signatures:
            found.append(LogStable(c, self.stable.slot, self.stable.digest, self.stable.signatures))
        for _, body in sorted(self._new_views.items()):
            found += [*map(LogVote, self._votes_of(body)), LogOwn(c, body)]
        if self._body:
            found.append(LogOwn(c, self._body))
        if self.change is not None:
            found.append(LogSigned(self.change))
        found += [LogPrepared(c, prepared) for _, prepared in sorted(self.prepared.items())]
        found += [LogSaid(c, phase, g, s, digest) for (g, s, phase), digest in sorted(self.said.items())]
        return found

    def _votes_of(self, body: bytes) -> tuple[Change, ...]:
        view = decode_body(body)
        names = view.view_changes if isinstance(view, NewView) else ()
        return tuple(change for named in names if (change := self._of.changes.by_name(named.digest)) is not None)

    @property
    def kept(self) -> int:
        """About how many entries that would be."""
        return len(self.prepared) + len(self.said) + 4

    # ------------------------------------------------------------------------------------------------------ speaking
    def speak(self, take_batch: TakeBatch) -> None:
        """Say what follows from what is known."""
        if not self.live:
            return
        if self.wedging:
            self._wedge()
            return
        self._advance_stable()
        self._join()
        self._lead()
        if self.v > self._of.e:
            return
        if leader(self._record, self._of.e) == self._at.me:
            self._propose(take_batch)
        self._agree()

    def _advance_stable(self) -> None:
        """Raise the low-water mark to the newest certificate that the own durable state agrees with."""
        digests = self._at.execution.digests
        for slot, certificate in sorted(self._of.statements.certificates.items(), reverse=True):
            if slot <= self.stable.slot:
                return
            if digests.get(slot) == certificate.digest and (self._c, slot) in self._at.saved:
                self._out.journal(LogStable(self._c, slot, certificate.digest, certificate.signatures))
                self._settle(certificate)
                self._of.count_early()
                return

    def _settle(self, certificate: Certificate) -> None:
        self.stable = certificate
        self._of.statements.certify(certificate)
        self.prepared = {s: prepared for s, prepared in self.prepared.items() if s > certificate.slot}
        self.said = {key: digest for key, digest in self.said.items() if key[1] > certificate.slot}
        self._of.book.forget(certificate.slot)

    def _join(self) -> None:
        """f+1 others ask for views above the own: join the lowest of these (§4.5.2)."""
        above = sorted(t for r, t in self._of.changes.targets().items() if r != self._at.me and t > self.v)
        if len(above) > self._record.f:
            self.ask(above[0])

    def ask(self, target: int) -> None:
        """VIEW-CHANGE to `target`: from now on nothing is voted for until a view from there on is entered."""
        if self.live and not self.wedging and target > self.v:
            self.v = target
            self._say_change(target)

    def _wedge(self) -> None:
        if not self._last_word:
            self._last_word = True
            self._signer.clear()
            self._say_change(WEDGE)

    @staticmethod
    def _target(body: bytes) -> int:
        change = decode_body(body)
        return change.target if isinstance(change, ViewChange) else 0

    def _say_change(self, target: int) -> None:
        prepared = tuple(found for _, found in sorted(self.prepared.items()))
        stable = self.stable
        body = encode(ViewChange(self._at.me, target, stable.slot, stable.digest, stable.signatures, prepared))
        self._body, self.change = body, None
        self._out.journal(LogOwn(self._c, body))
        self._sign_change(body)

    def _sign_change(self, body: bytes) -> None:
        self._signer.ask(change_statement(body), partial(self._changed, body))

    def _changed(self, body: bytes, signature: bytes) -> None:
        if body != self._body:
            return  # another has been said since
        change = Change(self._c, self._at.me, body, signature)
        self._out.journal(LogSigned(change))
        self._take_signed(change)
        self._out.broadcast(self._at.others, change)

    def _take_signed(self, change: Change) -> None:
        self._body, self.change = change.body, change
        self._of.changes.add(change, trusted=True)
        self.wedged = self._target(change.body) == WEDGE

    def _lead(self) -> None:
        """NEW-VIEW, as leader of the view that is being changed to, once a quorum asks for it."""
        g = self.v
        if g <= self._of.e or g in self._new_views or leader(self._record, g) != self._at.me:
            return
        names = tuple(self._of.changes.votes(g)[: self._record.quorums.view_change])
        found = self._of.changes.named(names, g)
        if isinstance(found, tuple):
            body = encode(NewView(self._at.me, g, names))
            self._new_views[g] = body
            for vote in found[0]:
                self._out.journal(LogVote(vote))
            self._out.journal(LogOwn(self._c, body))
            self._sign_new_view(g, body)

    def name_votes(self) -> None:
        """Hold what own NEW-VIEWs name, signed or not: nobody else may have it."""
        for g, body in self._new_views.items():
            view = decode_body(body)
            if isinstance(view, NewView):
                self._of.changes.named(view.view_changes, g)

    def _sign_new_view(self, g: int, body: bytes) -> None:
        self._signer.ask(change_statement(body), partial(self._new_view_signed, g, body))

    def _new_view_signed(self, g: int, body: bytes, signature: bytes) -> None:
        if self.wedging or self.v > g:
            return
        change = Change(self._c, self._at.me, body, signature)
        self._of.changes.add(change, trusted=True)
        self._out.broadcast(self._at.others, change)

    def entered(self, g: int) -> None:
        """View g was entered."""
        if self.v <= g:
            self.v = g
            if not self.wedging:
                self._body, self.change = b"", None
        self._new_views = {of: body for of, body in self._new_views.items() if of > g}
        self.said = {key: digest for key, digest in self.said.items() if key[0] >= g}
        self._last = self._of.s_max

    # ------------------------------------------------------------------------------------------------------- voting
    def _propose(self, take_batch: TakeBatch) -> None:
        of, low = self._of, self.stable.slot
        high = low + self._record.parameters.window
        for s, digest in of.choices.items():
            if low < s <= high and (of.e, s, Phase.PRE_PREPARE) not in self.said:
                self._say(Phase.PRE_PREPARE, s, digest)
        while True:
            s = max(self._last, of.s_max, low) + 1
            if s > high or s - self._at.execution.slot > PIPELINE:
                return
            batch = take_batch(s)
            if batch is None:
                return
            self._last = s
            self._say(Phase.PRE_PREPARE, s, batch)

    def _agree(self) -> None:
        """PREPARE what the leader proposes, COMMIT what is prepared; a batch must be here and valid."""
        of = self._of
        first = leader(self._record, of.e)
        for s in list(of.book.open):
            digest = of.book.proposal(s)
            if digest is None or s <= self.stable.slot or (digest != NOOP and not of.batches.valid(digest)):
                continue
            if first != self._at.me and not self._say(Phase.PREPARE, s, digest):
                continue
            prepared = of.book.prepared(s)
            if prepared is not None:
                self.prepared[s] = prepared
                self._out.journal(LogPrepared(self._c, prepared))
                self._say(Phase.COMMIT, s, digest)
                del of.book.open[s]

    def _say(self, phase: Phase, s: int, digest: bytes) -> bool:
        """Vote in view e. False if another vote was said in its place: a leader may have signed two proposals, and the
        first of them be forgotten in a restart, but not what was said to it.
        """
        key = (self._of.e, s, phase)
        if key not in self.said:
            self.said[key] = digest
            self._out.journal(LogSaid(self._c, phase, self._of.e, s, digest))
            self._sign_vote(phase, self._of.e, s, digest)
        return self.said[key] == digest

    def _sign_vote(self, phase: Phase, g: int, s: int, digest: bytes) -> None:
        self._signer.ask(vote_statement(phase, g, s, digest), partial(self._voted, phase, g, s, digest))

    def _voted(self, phase: Phase, g: int, s: int, digest: bytes, signature: bytes) -> None:
        if self.wedging or self.v > g or s <= self.stable.slot:
            return
        vote = Vote(self._c, self._at.me, phase, g, s, digest, signature)
        self._of.count(vote)
        data = self._of.batches.data(digest) if phase is Phase.PRE_PREPARE else None
        with_batch = Vote(self._c, self._at.me, phase, g, s, digest, signature, data) if data else vote
        self._out.broadcast(self._at.others, with_batch)
