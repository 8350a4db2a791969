"""A member's own stream: what a correct replica says, and when (protocol §3-§6).

A body is journalled before its UI is asked for, and sent when the UI is back; until then nothing counts it, not even
its own sender. `tail` is the state after all bodies made, certified or not; each new body is judged against it first:
a correct replica cannot end its own stream.
"""

from collections.abc import Callable

from cloudfit_orchestrator.bft.messages import NOOP, encode
from cloudfit_orchestrator.bft.ordering import ProtocolError
from cloudfit_orchestrator.bft.usig.configuration import Configuration
from cloudfit_orchestrator.bft.usig.judge import StreamState, judge, leader, proposers
from cloudfit_orchestrator.bft.usig.logvotes import WEDGE
from cloudfit_orchestrator.bft.usig.merge import Merged, Vote, slots_of
from cloudfit_orchestrator.bft.usig.messages import (
    Choice,
    Commit,
    CommitNewView,
    Entry,
    Header,
    Merge,
    NewView,
    Prepare,
    Skip,
    Stable,
    StreamMessage,
    ViewChange,
    Wedge,
)
from cloudfit_orchestrator.bft.usig.stream import Kept
from cloudfit_orchestrator.model.signing import sha256
from cloudfit_orchestrator.model.ui import RECENT_UIS

PIPELINE = 4  # own batches in flight: while they are, requests gather into the next one (adaptive batching)


class Voice:
    """See the module. `say(cv, header, payload)` journals a body and asks for its UI."""

    def __init__(self, configuration: Configuration, me: str, *, say: Callable[[int, bytes, bytes], None]) -> None:
        self._configuration = configuration
        self._record = configuration.record
        self.me = me
        self._say = say
        stream = configuration.streams[me]
        self.tail: StreamState = stream.state
        self.next_cv = 1
        self.pending: dict[int, tuple[bytes, bytes]] = {}  # bodies without a UI: counter -> (header, payload)
        self.live = False  # a session is open and the own stream is rebuilt
        self.successor = b""  # PREPARED envelope of a configuration on this base: wedge
        self.retires: dict[str, bytes] = {}  # RETIRE orders known
        self._queue: dict[tuple[str, int], Prepare | Skip] = {}  # proposals not voted for yet
        self._voted: set[int] = set()  # slots voted for (or proposed) in view tail.e
        self._own: list[int] = []  # own batches' slots that may be undecided

    # ------------------------------------------------------------------------------------------------------- session
    def go_live(self, next_cv: int) -> None:
        """The own stream is read to next_cv-1 and no body waits: speak on from there."""
        stream = self._configuration.streams[self.me]
        if stream.cursor != next_cv - 1 or self.pending:
            raise ProtocolError(f"own stream is at {stream.cursor}, the counter at {next_cv - 1}")
        self.tail = stream.state
        self.next_cv = next_cv
        self._enter()
        for kept in stream.kept.values():
            self._recall(kept)
        self.live = True

    def _recall(self, kept: Kept) -> None:
        header = kept.header
        if isinstance(header, Prepare | Skip) and header.g == self.tail.e:
            self._voted.update(slots_of(header, self._record, self.tail, self.me))
        elif isinstance(header, Commit) and header.g == self.tail.e:
            for citation in kept.entries:
                self._voted.update(slots_of(citation.header, self._record, self.tail, citation.proposer))
                self._queue.pop((citation.proposer, citation.cv), None)

    @property
    def room(self) -> bool:
        """Whether a body may be made now: at most 64 wait for their UI."""
        return self.live and len(self.pending) < RECENT_UIS

    @property
    def active(self) -> bool:
        """In a view, not between two."""
        return self.live and self.tail.v <= self.tail.e

    def _emit(self, header: Header, payload: bytes = b"") -> None:
        cv = self.next_cv
        data = encode(header)
        said = StreamMessage(self._record.c, self.me, cv, data, payload, b"")
        outcome = judge(self._record, self.tail, self.me, cv, header, said, self._configuration)
        if not isinstance(outcome, StreamState):
            raise ProtocolError(f"{self.me} would say {header} after {self.tail}: {outcome}")
        entered = outcome.e > self.tail.e
        self.tail = outcome
        self.next_cv = cv + 1
        self.pending[cv] = (data, payload)
        self._say(cv, data, payload)
        if entered:
            self._enter()

    def certified(self, cv: int) -> tuple[bytes, bytes] | None:
        """The UI of body `cv` is there: the body, to be sent."""
        return self.pending.pop(cv, None)

    # ----------------------------------------------------------------------------------------------- what others say
    def heard(self, kept: Kept) -> None:
        """A message of another's stream was accepted."""
        header = kept.header
        if isinstance(header, Prepare | Skip) and header.g == self.tail.e and kept.message.replica != self.me:
            self._queue[(kept.message.replica, kept.message.cv)] = header

    def _enter(self) -> None:
        """A new view: votes begin anew; proposals of the view may have been heard before."""
        self._queue.clear()
        self._voted.clear()
        self._own.clear()
        for replica, stream in self._configuration.streams.items():
            if replica == self.me:
                continue
            for kept in stream.kept.values():
                self.heard(kept)

    # ------------------------------------------------------------------------------------------------------ speaking
    def wedge(self) -> bool:
        """Close the own stream for the successor, if there is one. True if it was said now."""
        if not self.successor or self.tail.wedged or not self.room:
            return False
        self._emit(Wedge(self._record.c, self.successor))
        return True

    def stable(self, holds: Callable[[int, bytes], bool]) -> None:
        """STABLE at the newest certificate above the own window, if the own state agrees (`holds(slot, digest)`)."""
        statements = self._configuration.statements
        if statements.newest is None or statements.newest.slot <= self.tail.h:
            return
        for slot in sorted(statements.certificates, reverse=True):
            if slot <= self.tail.h or not self.room or self.tail.wedged:
                return
            certificate = statements.certificates[slot]
            if holds(slot, certificate.digest):
                streams = self._configuration.streams.values()
                vector = tuple(s.last_stable for s in streams if s.replica != self.me)
                state = self.tail
                self._emit(
                    Stable(
                        self._record.c,
                        slot,
                        certificate.digest,
                        certificate.signatures,
                        state.v,
                        state.e,
                        state.p,
                        state.blacklist,
                        state.retired,
                        vector,
                    )
                )
                return

    def view_change(self) -> None:
        """Join the highest view that f+1 members ask for."""
        if not self._configuration.statements.requests:
            return
        target, certificate = self._configuration.statements.view_wanted()
        if self.room and not self.tail.wedged and target > max(self.tail.v, self.tail.e):
            self._emit(ViewChange(self._record.c, target, certificate, tuple(self.retires.values())))

    def new_view(self) -> None:
        """As leader of the view that is being changed to: NEW-VIEW, as soon as Qv votes give one."""
        g = self.tail.v
        if not self.room or self.tail.wedged or g <= self.tail.e or leader(self._record, g) != self.me:
            return
        for chosen in self._configuration.quorums(g):
            merged = self._configuration.try_merge(chosen)
            if merged is not None and self._can_enter(merged.h, merged.s_max, merged.choices):
                self._say_new_view(g, merged, chosen)
                return

    def _say_new_view(self, g: int, merged: Merged, chosen: tuple[Vote, ...]) -> None:
        content = Merge(tuple(vote.name for vote in chosen), merged.choices)
        header = NewView(self._record.c, g, merged.h, merged.s_max, merged.blacklist, merged.retired)
        self._emit(header, encode(content))

    def commit_new_view(self) -> None:
        """Enter the highest view that has a NEW-VIEW, once its batches are held."""
        views = self._configuration.new_views
        if not views or not self.room or self.tail.wedged:
            return
        for g in sorted((g for g in views if g > self.tail.e and g >= self.tail.v), reverse=True):
            view = views[g]
            message = view.message
            if message.replica == self.me or not self._configuration.stands(message.replica, message.cv):
                continue
            if self._can_enter(view.header.h, view.header.s_max, view.choices):
                payload_hash = sha256(message.payload)
                self._emit(
                    CommitNewView(self._record.c, g, message.cv, message.header, payload_hash, message.certificate)
                )
                return

    def _can_enter(self, h: int, s_max: int, choices: tuple[Choice, ...]) -> bool:
        """Window open to h* (STABLE first), and all batches of S above the own h' held."""
        if h > self.tail.h or s_max > self.tail.h + self._record.parameters.window:
            return False
        batches = self._configuration.batches
        needed = {choice.batch for choice in choices if choice.s > self.tail.h and choice.batch != NOOP}
        lacking = {digest for digest in needed if not batches.valid(digest)}
        self._configuration.wanted.batches |= lacking
        return not lacking

    def commit(self) -> None:
        """COMMIT to the proposals of the current view that are ready."""
        if not self._queue or not self.room or not self.active:
            return
        last = self.tail.h + self._record.parameters.window
        entries: list[Entry] = []
        for key in list(self._queue):
            header = self._queue[key]
            ends = (header.s, header.s) if isinstance(header, Prepare) else (header.s1, header.s2)
            if ends[1] > last:
                continue
            kept = self._configuration.streams[key[0]].kept.get(key[1])
            if ends[1] <= self.tail.h or kept is None:
                del self._queue[key]
                continue
            if isinstance(header, Prepare):
                valid = self._configuration.batches.valid(header.batch)
                if valid is None:
                    continue
                if not valid:
                    del self._queue[key]
                    continue
            del self._queue[key]
            slots = set(slots_of(header, self._record, self.tail, key[0]))
            if slots & self._voted:
                continue
            self._voted |= slots
            message = kept.message
            entries.append(Entry(*ends, message.replica, message.cv, message.header, message.certificate))
            if len(entries) == self._record.parameters.window:
                break
        if entries:
            self._emit(Commit(self._record.c, self.tail.e, tuple(entries)))

    def propose_slot(self, executed: int) -> int | None:
        """The own slot that a batch may be proposed for now, or None."""
        if not self.room or not self.active:
            return None
        self._own = [s for s in self._own if s > executed]
        s = self._next_own()
        if s is None or len(self._own) >= PIPELINE or s > self.tail.h + self._record.parameters.window:
            return None
        return s

    @property
    def window_full(self) -> bool:
        """We propose, but the next own slot is beyond the window."""
        s = self._next_own()
        return self.active and s is not None and s > self.tail.h + self._record.parameters.window

    def _next_own(self) -> int | None:
        turn = proposers(self._record, self.tail.e, self.tail.blacklist, self.tail.retired)
        if self.me not in turn:
            return None
        s = max(self.tail.p, self.tail.h) + 1
        return s + (turn.index(self.me) - s) % len(turn)

    def propose(self, s: int, batch: bytes) -> None:
        """PREPARE the batch with that digest for `s`, from `propose_slot`."""
        self._own.append(s)
        self._voted.add(s)
        self._emit(Prepare(self._record.c, self.tail.e, s, batch))

    def skip(self) -> None:
        """Propose no-ops for own slots below the highest proposal of the view, so that nobody waits for them."""
        if self._configuration.slots.top(self.tail.e) <= self.tail.p or not self.room or not self.active:
            return
        top = min(self._configuration.slots.top(self.tail.e), self.tail.h + self._record.parameters.window)
        first = self._next_own()
        if first is None or first >= top:
            return
        turn = proposers(self._record, self.tail.e, self.tail.blacklist, self.tail.retired)
        last = top - 1
        last -= (last - turn.index(self.me)) % len(turn)
        self._voted.update(s for s in range(first, last + 1, len(turn)))
        self._emit(Skip(self._record.c, self.tail.e, first, last))

    @property
    def wedge_vote_ready(self) -> bool:
        """The own wedge is certified."""
        return self._configuration.votes.has(self.me, WEDGE)
