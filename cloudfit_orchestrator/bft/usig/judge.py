"""The judge of a stream (protocol §3, R1-R4): one pure function of a stream's state and its next message.

What is trusted: nothing but that each message has a valid UI, so a stream has one message per counter. What the judge
may ask of the world (`Evidence`) is itself a function of streams: certificates, whether a NEW-VIEW recomputes, whether
it stands. It never sees the receiver's view, window, or order of arrival. The first message that breaks form or R1-R3
ends its stream: for every judge, for good. Not knowing is not ending: a missing citation *holds* the stream.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from msgspec.structs import replace

from cloudfit_orchestrator.bft.messages import NOOP, Signed, Value
from cloudfit_orchestrator.bft.usig.messages import (
    Commit,
    CommitNewView,
    Header,
    NewView,
    Prepare,
    Req,
    Skip,
    Stable,
    StreamMessage,
    ViewChange,
    Wedge,
)
from cloudfit_orchestrator.model.envelope import MAX_ENVELOPE_BYTES
from cloudfit_orchestrator.model.record import Algorithm, ConfigRecord

MAX_ENTRY_BYTES = 512  # one vote with the proposal that it carries, or one slot of S
MAX_PER_MEMBER_BYTES = 2048  # a signature, a vector's entry, a name, a RETIRE order
WEDGED_VIEW = (1 << 63) - 1  # the v of a wedged stream: above all views of its configuration


class StreamState(Value, frozen=True):
    """All that the rules read of a stream's past (protocol §3). A STABLE states it, so a judge may start there."""

    h: int  # slot of the last STABLE
    v: int  # highest VIEW-CHANGE target; WEDGED_VIEW after a wedge
    e: int  # view entered last
    p: int  # last slot proposed in e, or s_max(e)
    blacklist: tuple[str, ...]  # of e, oldest first, at most f
    retired: tuple[str, ...]  # of e, sorted
    since: int = 0  # messages since the last STABLE, NEW-VIEW, COMMIT(NEW-VIEW) or VIEW-CHANGE
    cited: int = 0  # entries of COMMITs since then

    @property
    def wedged(self) -> bool:
        """The stream is closed for ordering."""
        return self.v == WEDGED_VIEW


@dataclass(frozen=True, slots=True)
class Broken:
    """The message breaks form or R1-R3: the stream ends before it."""

    rule: str


@dataclass(frozen=True, slots=True)
class Held:
    """Cannot tell yet: `why` is missing."""

    why: str


class Evidence(Protocol):
    """What a judge may ask. Each answer is a function of streams and signed statements alone; None: not known yet."""

    def stable_certificate(self, h: int, digest: bytes, certificate: Sequence[Signed]) -> bool:
        """f+1 members signed CHECKPOINT(c, h, digest)."""
        ...

    def view_certificate(self, g: int, certificate: Sequence[Req]) -> bool:
        """f+1 members signed REQ with targets >= g."""
        ...

    def successor(self, prepared: bytes) -> bool:
        """The envelope is a controller's PREPARED(c'), c' > c, on base c."""
        ...

    def new_view_recomputes(self, leader: str, cv: int, header: NewView, payload: bytes) -> bool | None:
        """The NEW-VIEW's content follows from its VIEW-CHANGEs."""
        ...

    def new_view_cited(self, leader: str, message: CommitNewView) -> NewView | None:
        """The carried NEW-VIEW header if its UI is leader's and it decodes."""
        ...

    def new_view_stands(self, leader: str, message: CommitNewView) -> bool | None:
        """The carried NEW-VIEW stands in its leader's stream."""
        ...


def leader(record: ConfigRecord, g: int) -> str:
    """Who leads view g, members(c)[g mod n], always: never skips the blacklist, or one view would have two leaders."""
    return record.members[g % record.n].replica


def proposers(record: ConfigRecord, g: int, blacklist: Sequence[str], retired: Sequence[str]) -> tuple[str, ...]:
    """Ag: who proposes in view g, in slot order (proposer of s is Ag[s mod |Ag|])."""
    if record.algorithm == Algorithm.MINBFT:
        return (leader(record, g),)
    names = [m.replica for m in record.members]
    working = [r for r in names if r not in retired]
    allowed = [r for r in working if r not in blacklist]
    return tuple(allowed or working or names)


def initial(record: ConfigRecord) -> StreamState:
    """The state of every stream at the start of its epoch."""
    return StreamState(h=record.h, v=0, e=0, p=record.h, blacklist=(), retired=())


def stated(stable: Stable) -> StreamState:
    """The state that a STABLE states, and that a judge who starts behind it takes over."""
    return StreamState(stable.h, stable.v, stable.e, stable.p, stable.blacklist, stable.retired)


def judge(
    record: ConfigRecord,
    state: StreamState,
    replica: str,
    cv: int,
    header: Header,
    message: StreamMessage,
    known: Evidence,
) -> StreamState | Broken | Held:
    """The state of `replica`'s stream after message `cv`, or why the stream ends or waits there."""
    if header.c != record.c:
        return Broken("form: message of another configuration")
    if message.payload and not isinstance(header, NewView):
        return Broken("form: only a NEW-VIEW has a payload")  # a COMMIT that carries a PREPARE carries it whole
    if _size(header, message) > _largest(record, header):
        return Broken("form: larger than any correct message")
    if state.wedged:
        return Broken("R1: nothing follows a wedge")
    match header:
        case Prepare() | Skip() | Commit():
            return _ordering(record, state, replica, header)
        case Stable():
            return _stable(state, header, known)
        case ViewChange():
            if header.g <= state.v or header.g >= WEDGED_VIEW:
                return Broken("R1: VIEW-CHANGE target is not above v")
            if not known.view_certificate(header.g, header.certificate):
                return Broken("form: VIEW-CHANGE without f+1 REQs for its target")
            return replace(state, v=header.g, since=0, cited=0)
        case Wedge():
            if not known.successor(header.prepared):
                return Broken("form: wedge without PREPARED(c') on this base")
            return replace(state, v=WEDGED_VIEW, since=0, cited=0)
        case NewView() | CommitNewView():
            return _new_view(record, state, replica, cv, header, message.payload, known)


def _size(header: Header, message: StreamMessage) -> int:
    return len(message.header) + len(message.payload) if not isinstance(header, Wedge) else len(header.prepared)


def _largest(record: ConfigRecord, header: Header) -> int:
    """Bytes that a correct member may need for such a message: what is kept of a stream is bounded (rule 5)."""
    if isinstance(header, Wedge):
        return MAX_ENVELOPE_BYTES
    if isinstance(header, Commit):
        return (len(header.entries) + 1) * MAX_ENTRY_BYTES
    if isinstance(header, Prepare | Skip):
        return MAX_ENTRY_BYTES
    entries = record.parameters.window if isinstance(header, NewView) else 1
    return entries * MAX_ENTRY_BYTES + (record.n + 1) * MAX_PER_MEMBER_BYTES


def _ordering(
    record: ConfigRecord, state: StreamState, replica: str, header: Prepare | Skip | Commit
) -> StreamState | Broken:
    """R1, R2, R3 for PREPARE, SKIP and COMMIT."""
    window = record.parameters.window
    if header.g != state.e or header.g < state.v:
        return Broken("R1: not the view entered last, or a later VIEW-CHANGE stands before it")
    if state.since >= 2 * window:
        return Broken("form: more than 2L messages since the last STABLE or view message")
    since = state.since + 1
    if isinstance(header, Commit):
        if not 1 <= len(header.entries) <= window:
            return Broken("form: COMMIT with no entry, or more than L")
        if any(entry.s2 > state.h + window for entry in header.entries):
            return Broken("R2: vote beyond h'+L")
        if state.cited + len(header.entries) > 2 * window:
            return Broken("form: more than 2L votes since the last STABLE or view message")
        return replace(state, since=since, cited=state.cited + len(header.entries))
    first, last = (header.s, header.s) if isinstance(header, Prepare) else (header.s1, header.s2)
    turn = proposers(record, header.g, state.blacklist, state.retired)
    if first > last or turn[first % len(turn)] != replica or turn[last % len(turn)] != replica:
        return Broken("R3: not the proposer of this slot")
    if first <= state.p:
        return Broken("R3: proposals go upwards")
    if isinstance(header, Prepare) and header.batch == NOOP:  # nobody could vote for it, a merge would: see SKIP
        return Broken("form: PREPARE of no batch")
    if last - first > 2 * window:  # p may lie far behind h': of a view that the others have left
        return Broken("form: SKIP over more than 2L slots")
    if last > state.h + window:
        return Broken("R2: proposal beyond h'+L")
    return replace(state, since=since, p=last)


def _stable(state: StreamState, header: Stable, known: Evidence) -> StreamState | Broken:
    if header.h <= state.h:
        return Broken("R2: STABLE not for a greater slot")
    told = stated(header)
    if (told.v, told.e, told.p, told.blacklist, told.retired) != (
        state.v,
        state.e,
        state.p,
        state.blacklist,
        state.retired,
    ):
        return Broken("form: STABLE states a state that its stream does not have")
    if not known.stable_certificate(header.h, header.digest, header.certificate):
        return Broken("form: STABLE without f+1 matching CHECKPOINTs")
    return told


def _new_view(
    record: ConfigRecord,
    state: StreamState,
    replica: str,
    cv: int,
    header: NewView | CommitNewView,
    payload: bytes,
    known: Evidence,
) -> StreamState | Broken | Held:
    """NEW-VIEW by the leader, COMMIT(NEW-VIEW) by the others: both enter view g."""
    owner = leader(record, header.g)
    if (owner == replica) != isinstance(header, NewView):
        return Broken("R1: NEW-VIEW is the leader's, COMMIT(NEW-VIEW) everyone else's")
    if header.g <= state.e or header.g < state.v:
        return Broken("R1: view is not above the one entered, or below the VIEW-CHANGE sent")
    if isinstance(header, CommitNewView):
        view = known.new_view_cited(owner, header)
        if view is None or view.g != header.g or view.c != header.c:
            return Broken("form: COMMIT(NEW-VIEW) carries no NEW-VIEW of its view's leader")
    else:
        view = header
    if view.s_max > state.h + record.parameters.window:
        return Broken("R2: NEW-VIEW ends beyond h'+L")
    if isinstance(header, CommitNewView):
        sound = known.new_view_stands(owner, header)
    else:
        sound = known.new_view_recomputes(owner, cv, header, payload)
    if sound is None:
        return Held(f"NEW-VIEW({header.g}) of {owner} cannot be judged yet")
    if not sound:
        return Broken("form: NEW-VIEW does not recompute, or does not stand")
    return replace(state, e=view.g, p=view.s_max, blacklist=view.blacklist, retired=view.retired, since=0, cited=0)
