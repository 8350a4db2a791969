"""Getting what is known to exist and is not here: messages, batches, NEW-VIEWs, whole states (protocol §3, §4)."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from cloudfit_orchestrator.bft.configuration import Configuration
from cloudfit_orchestrator.bft.messages import (
    MAX_FETCH,
    Chunk,
    ChunkQuery,
    Discarded,
    Fetch,
    FetchBatches,
    FetchNewView,
    Frozen,
    PeerMessage,
    StateIndex,
    StateQuery,
)
from cloudfit_orchestrator.bft.outbox import Outbox
from cloudfit_orchestrator.bft.serving import answer_batches, answer_fetch, answer_state, answer_view
from cloudfit_orchestrator.bft.situation import Situation, replica_of
from cloudfit_orchestrator.bft.store import Snapshot
from cloudfit_orchestrator.bft.transfer import Transfer

FETCH_S = 0.1  # a gap is usually filled by messages under way
PATIENCE_S = 1.0  # what was asked for is not asked for again while it comes in, nor sooner than this
STUCK_S = 0.5  # without progress for so long, a certified state ahead is fetched whole
MAX_BLAMES_REPORTED = 1024


class CatchUp:
    """Asks peers, and answers them."""

    def __init__(self, situation: Situation, outbox: Outbox) -> None:
        self._at = situation
        self._out = outbox
        self._questions: Counter[str] = Counter()  # asked so far, by kind
        self._asked: dict[str, tuple[int, int, float]] = {}  # replica -> (first, last, when) of the FETCH under way
        self._batches_asked: tuple[bytes, ...] = ()
        self._stuck: dict[str, tuple[int, float]] = {}  # replica -> (cursor, since when it stands still)
        self.wait_source = False  # a recovery's exporter is announced: do not fetch from peers what it may have
        self.transfer: Transfer | None = None

    # ------------------------------------------------------------------------------------------------------ messages
    def fetch(self) -> None:
        """Ask for gaps, batches and views."""
        configuration, others = self._at.configuration, self._at.others
        if configuration is None or not others or not self._out.every("fetch", FETCH_S):
            return
        c = configuration.record.c
        ahead = {replica_of(peer): beacon.cv for peer, beacon in self._at.beacons.items()}
        for replica, stream in configuration.streams.items():
            needed = max(ahead.get(replica, 0), configuration.wanted.streams.get(replica, 0), *stream.waiting, 0)
            first = stream.cursor + 1
            if stream.ended is not None or needed < first or (replica == self._at.me and self._at.live):
                continue
            while first in stream.waiting:
                first += 1
            if first <= needed and self._patience_ends(replica, first):
                last = min(needed, first + MAX_FETCH - 1)
                self._asked[replica] = (first, last, self._out.now_s)
                self._out.send(self._source(others, replica), Fetch(c, replica, first, last))
        wanted = sorted(configuration.wanted.batches)
        if len(wanted) > MAX_FETCH:  # turn by turn: who withholds many must not hide the one that matters
            at = self._questions["batches"] * MAX_FETCH % len(wanted)
            wanted = (wanted[at:] + wanted[:at])[:MAX_FETCH]
        batches = tuple(wanted)
        if batches and (batches != self._batches_asked or self._out.due("batches")):
            self._batches_asked = batches
            self._out.later("batches", PATIENCE_S)
            self._out.send(self._next(others, "batches"), FetchBatches(batches))
        if configuration.wanted.views and self._out.every("views", PATIENCE_S / 2):
            asked = self._next(others, "views")
            for g in sorted(configuration.wanted.views)[:4]:
                self._out.send(asked, FetchNewView(c, g))

    def _patience_ends(self, replica: str, first: int) -> bool:
        """Whether the gap that begins at `first` is to be asked for: what was asked for has come, or nothing comes."""
        asked = self._asked.get(replica)
        if asked is None or not asked[0] <= first <= asked[1]:
            return True
        if first > asked[0]:  # it is coming in
            self._asked[replica] = (first, asked[1], self._out.now_s)
            return False
        return self._out.now_s - asked[2] >= PATIENCE_S

    def take_discarded(self, peer: str, configuration: Configuration, message: Discarded) -> None:
        """A peer no longer has what was asked for. Its owner's word is taken at once; another's only when the stream
        has stood still for a while, as a faulty peer might make us jump over what correct ones still have.
        """
        replica = message.stable.replica
        stream = configuration.streams.get(replica)
        if stream is None:
            return
        cursor, since_s = self._stuck.get(replica, (-1, 0.0))
        if cursor != stream.cursor:
            self._stuck[replica] = (stream.cursor, self._out.now_s)
        if replica_of(peer) == replica or (cursor == stream.cursor and self._out.now_s - since_s >= STUCK_S):
            configuration.offer_jump(message)

    def _source(self, others: list[str], replica: str) -> str:
        """Every other time the stream's owner, else the next peer: the owner may be faulty, or down."""
        owner = next((peer for peer in others if replica_of(peer) == replica), None)
        self._questions[replica] += 1
        if owner is not None and self._questions[replica] % 2:
            return owner
        return self._next(others, f"streams like {replica}")

    def _next(self, others: list[str], question: str) -> str:
        """Each peer in turn. Counted by question: a common count that time drives could fall into step with the
        retries, and then one and the same peer, perhaps a silent one, would be asked for ever.
        """
        self._questions[question] += 1
        return others[self._questions[question] % len(others)]

    def answer(self, peer: str, message: PeerMessage) -> bool:
        """Answer a question. False if it was none."""
        now, old = self._at.configuration, self._at.old
        answers: Iterable[Frozen] = ()
        match message:
            case Fetch():
                asked = next((x for x in (now, old) if x is not None and x.record.c == message.c), None)
                answers = answer_fetch(asked, message) if asked is not None else ()
            case FetchBatches():
                answers = [a for x in (now, old) if x is not None for a in answer_batches(x, message)]
            case FetchNewView():
                answers = answer_view(now, message) if now is not None else ()
            case StateQuery() | ChunkQuery():
                answers = answer_state(self._at.execution, message, self._out.now_s, self._newest_certified())
            case _:
                return False
        for answer in answers:
            self._out.send(peer, answer)
        return True

    # -------------------------------------------------------------------------------------------------------- states
    def advance(self, needs_state: int | None) -> None:
        """Start, continue or give up a state transfer. `needs_state`: a slot that reconfiguration must reach."""
        configuration = self._at.configuration
        if configuration is None or self.wait_source:
            return
        target = self._target(configuration, needs_state)
        if target is None:
            if self.transfer is not None and self.transfer.slot <= self._at.execution.slot and self._at.installed:
                self.transfer = None
        elif self.transfer is None or (self.transfer.slot < target[0] and self.transfer.stalled(self._out.now_s)):
            local = self._at.execution.store.snapshot()
            self.transfer = Transfer(*target, local, self._out.send, self.transfer)
        self._tick()

    def _tick(self) -> None:
        if self.transfer is not None:
            self.transfer.tick(self._out.now_s, self._at.others, list(self._at.exporters))

    def _target(self, configuration: Configuration, needs_state: int | None) -> tuple[int, bytes] | None:
        """The certified state to fetch, if the own one cannot get there by itself."""
        record, statements = configuration.record, configuration.statements
        newest, slot = statements.newest, self._at.execution.slot
        if not self._at.installed:
            return (newest.slot, newest.digest) if newest is not None else (record.h, record.digest)
        if needs_state is not None and needs_state > slot and needs_state in statements.certificates:
            return needs_state, statements.certificates[needs_state].digest
        if newest is None:
            return None
        own = self._at.execution.digests.get(newest.slot)
        if own is not None and own != newest.digest:
            self._out.report("diverged", {"slot": newest.slot})
            self._at.installed = False  # the own state is wrong: nothing more is executed on it
            return newest.slot, newest.digest
        # Far behind, the streams that lead there are longer than the state: a learner has none of it yet.
        far = record.parameters.checkpoint_period if self._at.voice is None else record.parameters.window
        stuck = self._out.now_s - self._at.progress_s > STUCK_S
        if newest.slot > slot + far or (newest.slot > slot and stuck):
            return newest.slot, newest.digest
        return None

    def _newest_certified(self) -> bytes:
        """The root of a certified state to offer in place of one that is gone: one that others are fetching already,
        so that those who join together are served together, else the newest; empty if there is none.
        """
        configuration, snapshots = self._at.configuration, self._at.execution.snapshots
        certificates = configuration.statements.certificates if configuration is not None else {}
        kept = [slot for c, slot in snapshots if c == self._at.c and slot in certificates]
        shared = [slot for c, slot in self._at.execution.pinned(self._out.now_s) if c == self._at.c and slot in kept]
        return snapshots[(self._at.c, max(shared or kept))].root if kept else b""

    def take_index(self, peer: str, message: StateIndex) -> None:
        """A state's chunk hashes arrived: those asked for, or those of a later certified state that the peer has."""
        configuration, transfer = self._at.configuration, self.transfer
        if transfer is None or configuration is None:
            return
        if message.root != transfer.root and peer not in self._at.exporters:
            later = configuration.statements.certificates.get(message.slot)
            if transfer.indexed or later is None or later.digest != message.root:
                return
            if self._at.installed and message.slot <= self._at.execution.slot:
                return
            local = self._at.execution.store.snapshot()
            transfer = self.transfer = Transfer(later.slot, later.digest, local, self._out.send, transfer)
        if not transfer.index(peer, message, list(self._at.exporters)):
            self._out.blame(replica_of(peer), "state index")

    def take_chunk(self, peer: str, message: Chunk) -> tuple[int, Snapshot] | None:
        """A chunk arrived. Returns (slot, state) when it was the last one."""
        transfer = self.transfer
        if transfer is None:
            return None
        if transfer.chunk(peer, message, self._out.now_s) is not None:
            self._out.count("corrupt_chunks")
            if peer not in self._at.exporters:
                self._out.blame(replica_of(peer), "chunk")
        if not transfer.done:
            self._tick()
            return None
        self.transfer = None
        self._out.report("transfer", _figures(transfer))
        return transfer.slot, transfer.result()


def _figures(transfer: Transfer) -> dict[str, Any]:
    figures = transfer.figures
    return {
        "slot": transfer.slot,
        "kept": figures.kept,
        "fetched": dict(figures.fetched),
        "from": dict(figures.bytes),
        "stale": dict(figures.stale),
        "absent": dict(figures.absent),
        "corrupt": [{"chunk": b.index, "source": b.source} for b in figures.corrupt[:MAX_BLAMES_REPORTED]],
    }
