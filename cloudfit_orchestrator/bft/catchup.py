"""Getting what is known to exist and is not here: batches and whole states (protocol §3, §4). An engine's own messages
are fetched by the engine.
"""

from collections.abc import Iterable
from typing import Any

from cloudfit_orchestrator.bft.messages import (
    MAX_FETCH,
    Chunk,
    ChunkQuery,
    FetchBatches,
    Frozen,
    StateIndex,
    StateQuery,
)
from cloudfit_orchestrator.bft.ordering import Ordering
from cloudfit_orchestrator.bft.outbox import Outbox
from cloudfit_orchestrator.bft.serving import answer_batches, answer_state
from cloudfit_orchestrator.bft.situation import Situation, member_of
from cloudfit_orchestrator.bft.store import Snapshot
from cloudfit_orchestrator.bft.transfer import Transfer
from cloudfit_orchestrator.bft.turns import Rota, Turns

FETCH_S = 0.1  # a gap is usually filled by messages under way
PATIENCE_S = 1.0  # what was asked for is not asked for again while it comes in, nor sooner than this
STUCK_S = 0.5  # without progress for so long, a certified state ahead is fetched whole
MAX_BLAMES_REPORTED = 1024


class CatchUp:
    """Asks peers, and answers them."""

    def __init__(self, situation: Situation, outbox: Outbox) -> None:
        self._at = situation
        self._out = outbox
        self._turns = Turns()
        self._rota: Rota[bytes] = Rota()
        self._batches_asked: tuple[bytes, ...] = ()
        self.wait_source = False  # a recovery's exporter is announced: do not fetch from peers what it may have
        self.transfer: Transfer | None = None

    # ------------------------------------------------------------------------------------------------------ messages
    def fetch(self) -> None:
        """Ask for the engine's messages, and for batches."""
        ordering, others = self._at.ordering, self._at.others
        if ordering is None or not others or not self._out.every("fetch", FETCH_S):
            return
        ordering.fetch()
        wanted = tuple(sorted(ordering.wanted))
        if wanted and (len(wanted) > MAX_FETCH or wanted != self._batches_asked or self._out.due("batches")):
            self._batches_asked = wanted
            self._out.later("batches", PATIENCE_S)
            # Turn by turn, at every peer: who withholds many must not hide the one that matters.
            peer = self._turns.next(others, "batches")
            self._out.send(peer, FetchBatches(self._rota.next(peer, wanted, MAX_FETCH)))

    def answer(self, peer: str, message: Frozen) -> bool:
        """Answer a question. False if it was none."""
        known = [ordering for ordering in (self._at.ordering, self._at.old) if ordering is not None]
        answers: Iterable[Frozen] = ()
        match message:
            case FetchBatches():
                answers = (a for ordering in known for a in answer_batches(ordering.batches, message))
            case StateQuery() | ChunkQuery():
                answers = answer_state(self._at.execution, message, self._out.now_s, self._newest_certified())
            case _:
                return any(ordering.answer(peer, message) for ordering in known)
        self._out.answer(peer, answers)
        return True

    # -------------------------------------------------------------------------------------------------------- states
    def advance(self, needs_state: int | None) -> None:
        """Start, continue or give up a state transfer. `needs_state`: a slot that reconfiguration must reach."""
        ordering = self._at.ordering
        if ordering is None or self.wait_source:
            return
        target = self._target(ordering, needs_state)
        if target is None:
            if self.transfer is not None and self.transfer.slot <= self._at.execution.slot and self._at.installed:
                self.transfer = None
        elif self.transfer is None or (self.transfer.slot < target[0] and self.transfer.stalled(self._out.now_s)):
            local = self._at.execution.store.snapshot()
            self.transfer = Transfer(*target, local, self._out.send, self.transfer)
        self._tick()

    def _tick(self) -> None:
        if self.transfer is not None:
            self.transfer.tick(self._out.now_s, self._at.others, list(self._at.exporters), member=self._at.member)

    def _target(self, ordering: Ordering, needs_state: int | None) -> tuple[int, bytes] | None:
        """The certified state to fetch, if the own one cannot get there by itself."""
        record, statements = ordering.record, ordering.statements
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
        far = record.parameters.checkpoint_period if not self._at.member else record.parameters.window
        stuck = self._out.now_s - self._at.progress_s > STUCK_S
        if newest.slot > slot + far or (newest.slot > slot and stuck):
            return newest.slot, newest.digest
        return None

    def _newest_certified(self) -> bytes:
        """The root of a certified state to offer in place of one that is gone: one that others are fetching already,
        so that those who join together are served together, else the newest; empty if there is none.
        """
        ordering, snapshots = self._at.ordering, self._at.execution.snapshots
        certificates = ordering.statements.certificates if ordering is not None else {}
        kept = [slot for c, slot in snapshots if c == self._at.c and slot in certificates]
        shared = [slot for c, slot in self._at.execution.pinned(self._out.now_s) if c == self._at.c and slot in kept]
        return snapshots[(self._at.c, max(shared or kept))].root if kept else b""

    def take(self, peer: str, message: StateIndex | Chunk) -> tuple[int, Snapshot] | None:
        """A part of a state arrived. Returns (slot, state) when nothing of it is missing: perhaps with its index, if
        the own state, or what came for another, has all of its chunks.
        """
        if isinstance(message, StateIndex):
            self._take_index(peer, message)
        else:
            self._take_chunk(peer, message)
        transfer = self.transfer
        if transfer is None or not transfer.done:
            return None
        self.transfer = None
        self._out.report("transfer", _figures(transfer))
        return transfer.slot, transfer.result()

    def _take_index(self, peer: str, message: StateIndex) -> None:
        """A state's chunk hashes arrived: those asked for, or those of a later certified state that the peer has."""
        ordering, transfer = self._at.ordering, self.transfer
        if transfer is None or ordering is None:
            return
        if message.root != transfer.root and peer not in self._at.exporters:
            later = ordering.statements.certificates.get(message.slot)
            if transfer.indexed or message.slot <= transfer.slot or later is None or later.digest != message.root:
                return
            if self._at.installed and message.slot <= self._at.execution.slot:
                return
            local = self._at.execution.store.snapshot()
            transfer = self.transfer = Transfer(later.slot, later.digest, local, self._out.send, transfer)
        if not transfer.index(peer, message, list(self._at.exporters)):
            self._out.blame(member_of(ordering.record, peer), "state index")

    def _take_chunk(self, peer: str, message: Chunk) -> None:
        transfer, ordering = self.transfer, self._at.ordering
        if transfer is None or ordering is None:
            return
        if transfer.chunk(peer, message, self._out.now_s) is not None:
            self._out.count("corrupt_chunks")
            if peer not in self._at.exporters:
                self._out.blame(member_of(ordering.record, peer), "chunk")
        if not transfer.done:
            self._tick()


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
