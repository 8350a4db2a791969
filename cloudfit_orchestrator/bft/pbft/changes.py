"""VIEW-CHANGEs and NEW-VIEWs (§4.4 of the paper): what makes one valid, and what follows from a quorum of them."""

from collections.abc import Sequence

from cloudfit_orchestrator.bft.checkpoints import Checkpoints
from cloudfit_orchestrator.bft.messages import NOOP, Named, Signed
from cloudfit_orchestrator.bft.ordering import Final
from cloudfit_orchestrator.bft.pbft.book import leader
from cloudfit_orchestrator.bft.pbft.messages import (
    WEDGE,
    Change,
    NewView,
    Phase,
    Prepared,
    ViewChange,
    change_statement,
    decode_body,
    vote_statement,
)
from cloudfit_orchestrator.model.errors import BadError
from cloudfit_orchestrator.model.record import ConfigRecord
from cloudfit_orchestrator.model.statement import Kind

MAX_OF_LEADER = 4  # NEW-VIEWs kept of one leader, above the present view: the highest ones matter, and none of another
MAX_OF_VIEW = 2  # of one view: a faulty leader may sign one that nobody can complete, and another
MAX_SIGNATURE_BYTES = 160  # a signature with its signer's name, or a slot's fields


class Changes:
    """Verified Changes of one configuration. Of a member are kept its newest VIEW-CHANGE, its first wedge, and those
    that somebody's NEW-VIEW or set of wedges names: a faulty member may sign several, and each may be in a set.
    """

    def __init__(self, record: ConfigRecord, statements: Checkpoints) -> None:
        self._record = record
        self._statements = statements
        self._quorum = record.quorums.view_change
        self._bodies: dict[bytes, tuple[Change, ViewChange]] = {}  # by digest: those kept for one of the reasons below
        self._newest: dict[str, bytes] = {}  # replica -> digest of its VIEW-CHANGE with the highest target
        self._wedges: dict[str, bytes] = {}  # replica -> digest of its first wedge
        self._named: set[bytes] = set()  # digests that a NEW-VIEW or a set of wedges names
        self._used: set[bytes] = set()  # digests of wedges that an S was computed from
        self._new_views: dict[bytes, tuple[Change, NewView]] = {}  # by digest; signed by the leader of their view
        self._floor = 0  # the view that was entered: what asks for none above it is of no use
        self.wanted: set[bytes] = set()  # digests that are named and not here
        self.logged: list[Change] = []  # votes of the own log, until the NEW-VIEW that names them is read

    # ----------------------------------------------------------------------------------------------------- taking in
    def add(self, change: Change, *, trusted: bool = False) -> str:
        """Take a Change in; `trusted`: it is from the own log. Returns the rule that its signer broke, or nothing.
        Raises BadError if it is not that member's.
        """
        name = change_statement(change.body)
        if name in self._bodies or name in self._new_views:
            return ""
        if len(change.body) > self._largest():
            raise BadError("larger than any correct message")
        if not trusted and not self._statements.verify(Kind.PBFT, change.replica, name, change.signature):
            raise BadError("not signed by its member")
        try:
            body = decode_body(change.body)
        except BadError:
            return "form: it does not decode"
        if body.replica != change.replica:
            return "form: in the name of another"
        if isinstance(body, NewView):
            return self._add_new_view(change, name, body)
        if not trusted and not self._of_use(change.replica, name, body):
            return ""
        broken = "" if trusted else check_view_change(self._record, self._statements, body)
        if not broken:
            self._keep(change, name, body, trusted=trusted)
        return broken

    def restore_named(self, body: ViewChange | NewView) -> None:
        """Take in what a NEW-VIEW of the own log names. Other votes there are of one that was not written any more: of
        a later view, they would take the place of what is named.
        """
        names = {named.digest for named in body.view_changes} if isinstance(body, NewView) else set()
        votes, self.logged = self.logged, []
        for vote in votes:
            if change_statement(vote.body) in names:
                self.add(vote, trusted=True)

    def _largest(self) -> int:
        slots, n = self._record.parameters.window, self._record.n
        return (slots + 1) * (n + 2) * MAX_SIGNATURE_BYTES

    def _of_use(self, replica: str, name: bytes, body: ViewChange) -> bool:
        if name in self.wanted or name in self._named:
            return True
        return (
            replica not in self._wedges
            if body.target == WEDGE
            else body.target > max(self._floor, self.target(replica))
        )

    def _keep(self, change: Change, name: bytes, body: ViewChange, *, trusted: bool) -> None:
        self._bodies[name] = (change, body)
        self.wanted.discard(name)
        if body.target == WEDGE:
            self._wedges.setdefault(change.replica, name)
            if trusted:
                self._used.add(name)
        elif body.target > self.target(change.replica):
            old = self._newest.get(change.replica)
            self._newest[change.replica] = name
            if old is not None and old not in self._named:
                del self._bodies[old]

    def _add_new_view(self, change: Change, name: bytes, body: NewView) -> str:
        if not 0 < body.g < WEDGE or leader(self._record, body.g) != change.replica:
            return "NEW-VIEW of a view that it does not lead"
        names = body.view_changes
        if len(names) != self._quorum or len({named.replica for named in names}) != len(names):
            return "NEW-VIEW without a quorum of VIEW-CHANGEs"
        same = [of for of, (_, other) in self._new_views.items() if other.g == body.g]
        if body.g > self._floor and len(same) < MAX_OF_VIEW:
            self._new_views[name] = (change, body)
            of_leader = [of for of, (other, _) in self._new_views.items() if other.replica == change.replica]
            if len(of_leader) > MAX_OF_LEADER:
                del self._new_views[min(of_leader, key=lambda of: self._new_views[of][1].g)]
        return ""

    # ----------------------------------------------------------------------------------------------------- telling
    def target(self, replica: str) -> int:
        """The highest view that the member has asked for; 0 if none."""
        name = self._newest.get(replica)
        return self._bodies[name][1].target if name is not None else 0

    def targets(self) -> dict[str, int]:
        """That of all who have asked."""
        return {replica: self.target(replica) for replica in self._newest}

    def votes(self, g: int) -> list[Named]:
        """Members' newest VIEW-CHANGEs for exactly view g, in order of names."""
        return [Named(r, 0, name) for r, name in sorted(self._newest.items()) if self.target(r) == g]

    def wedges(self) -> list[Named]:
        """Members' wedges, one a member, in order of names."""
        return [Named(replica, 0, name) for replica, name in sorted(self._wedges.items())]

    def named(self, names: Sequence[Named], target: int) -> tuple[tuple[Change, ...], Final] | bool | None:
        """The VIEW-CHANGEs for `target` that are named, with what follows from them; False if one is none, None if not
        all are here: they are wanted then.
        """
        if len(names) != self._quorum or len({named.replica for named in names}) != len(names):
            return False
        found: list[tuple[Change, ViewChange]] = []
        for named in names:
            self._named.add(named.digest)
            held = self._bodies.get(named.digest)
            if held is None:
                self.wanted.add(named.digest)
            elif held[0].replica != named.replica or held[1].target != target or named.cv:
                return False
            else:
                found.append(held)
        if len(found) < len(names):
            return None
        if target == WEDGE:
            self._used.update(named.digest for named in names)
        final = new_view([body for _, body in found])
        return tuple(change for change, _ in found), final

    def stable(self, names: Sequence[Named]) -> ViewChange:
        """The VIEW-CHANGE with the highest checkpoint of those named, which are here."""
        return max((self._bodies[named.digest][1] for named in names), key=lambda body: body.h)

    def by_name(self, name: bytes) -> Change | None:
        """The VIEW-CHANGE with that digest, for who asks."""
        held = self._bodies.get(name)
        return held[0] if held is not None else None

    def new_views(self) -> list[tuple[Change, NewView]]:
        """NEW-VIEWs above the view entered last, the highest view first."""
        return sorted(self._new_views.values(), key=lambda found: -found[1].g)

    def drop(self, change: Change) -> None:
        """A NEW-VIEW turned out to be wrong."""
        self._new_views.pop(change_statement(change.body), None)

    def begin(self) -> None:
        """What is named is about to be named again: let go of what nobody names any more. A member may sign any number
        of wedges, and have a false NEW-VIEW name them.
        """
        keep = self._named | self._used | {*self._newest.values(), *self._wedges.values()}
        self._bodies = {name: held for name, held in self._bodies.items() if name in keep}
        self._named.clear()
        self.wanted.clear()

    def entered(self, g: int) -> None:
        """View g was entered: what asks for none above it goes."""
        self._floor = g
        self._new_views = {name: found for name, found in self._new_views.items() if found[1].g > g}
        self._newest = {r: name for r, name in self._newest.items() if self._bodies[name][1].target > g}


def check_view_change(record: ConfigRecord, statements: Checkpoints, body: ViewChange) -> str:
    """The rule that a VIEW-CHANGE breaks, or nothing. A function of the message and the record alone."""
    window = record.parameters.window
    if not (0 < body.target <= WEDGE and record.h <= body.h < WEDGE):
        return "VIEW-CHANGE: out of range"
    if body.h == record.h:
        if body.certificate or body.digest != record.digest:
            return "VIEW-CHANGE: not the state that the configuration began with"
    elif not statements.valid_certificate(body.h, body.digest, body.certificate):
        return "VIEW-CHANGE: checkpoint without a certificate"
    before = body.h
    for prepared in body.prepared:
        if not before < prepared.s <= body.h + window or not 0 <= prepared.g < body.target:
            return "VIEW-CHANGE: prepared slots out of order, window or view"
        if not _certified(record, statements, prepared):
            return "VIEW-CHANGE: forged prepared certificate"
        before = prepared.s
    return ""


def _certified(record: ConfigRecord, statements: Checkpoints, prepared: Prepared) -> bool:
    first = leader(record, prepared.g)
    names = {signed.replica for signed in prepared.prepares}
    if len(prepared.prepares) != record.quorums.commit - 1 or len(names) != len(prepared.prepares) or first in names:
        return False
    signed = [(Phase.PRE_PREPARE, Signed(first, prepared.proposal))]
    signed += [(Phase.PREPARE, signature) for signature in prepared.prepares]
    try:
        return all(
            statements.verify(
                Kind.PBFT,
                one.replica,
                vote_statement(phase, prepared.g, prepared.s, prepared.digest),
                one.signature,
            )
            for phase, one in signed
        )
    except BadError:
        return False


def new_view(votes: Sequence[ViewChange]) -> Final:
    """What follows from a quorum of valid VIEW-CHANGEs (§4.4): all up to the highest checkpoint is settled; above it
    each slot has the digest of its prepared certificate of the highest view, or a no-op. Pure; the order of the votes
    does not matter.
    """
    h = max(vote.h for vote in votes)
    best: dict[int, Prepared] = {}
    for vote in votes:
        for prepared in vote.prepared:
            known = best.get(prepared.s)
            if prepared.s > h and (known is None or (prepared.g, prepared.digest) > (known.g, known.digest)):
                best[prepared.s] = prepared
    s_max = max(best, default=h)
    choices = tuple((s, best[s].digest if s in best else NOOP) for s in range(h + 1, s_max + 1))
    return Final(h, s_max, choices)
