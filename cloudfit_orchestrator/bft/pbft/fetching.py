"""Asking for votes, certificates and VIEW-CHANGEs that are not here, and answering: as all are signed, anybody may."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from cloudfit_orchestrator.bft.messages import Frozen
from cloudfit_orchestrator.bft.ordering import Host
from cloudfit_orchestrator.bft.outbox import Outbox
from cloudfit_orchestrator.bft.pbft.messages import FetchChanges, FetchSlots, Stable, change_statement
from cloudfit_orchestrator.bft.turns import Rota, Turns

if TYPE_CHECKING:
    from cloudfit_orchestrator.bft.pbft.ordering import PbftOrdering

MAX_SLOTS = 32  # asked for at once: some votes of each member for each
MAX_CHANGES = 8  # asked for at once: each may have some 100 KiB
PATIENCE_S = 0.3  # what is missing is usually under way


class Fetching:
    """For one configuration."""

    def __init__(self, ordering: "PbftOrdering", host: Host, out: Outbox) -> None:
        self._of = ordering
        self._at = host
        self._out = out
        self._turns = Turns()
        self._rota: Rota[bytes] = Rota()

    def fetch(self) -> None:
        """Ask the next peer for what follows the own state, if anybody seems to know more, and for what is named."""
        of, others, c = self._of, self._at.others, self._of.record.c
        slot = self._at.execution.slot
        ahead = any(beacon.cv > of.e or beacon.slot > slot for beacon in self._at.beacons.values())
        if (ahead or of.waiting) and self._out.every("slots", PATIENCE_S):
            question = FetchSlots(c, of.e, slot + 1, slot + MAX_SLOTS)
            self._out.send(self._turns.next(others, "slots"), question)
        if of.changes.wanted and self._out.every("changes", PATIENCE_S):
            # All that is named has its turn at every peer: a faulty member may name what nobody has.
            peer = self._turns.next(others, "changes")
            self._out.send(peer, FetchChanges(c, self._rota.next(peer, of.changes.wanted, MAX_CHANGES)))

    def answer(self, peer: str, message: Frozen) -> bool:
        """Answer a question about this configuration. False if it was none."""
        c = self._of.record.c
        match message:
            case FetchSlots() if message.c == c:
                answers = self._slots(message)
            case FetchChanges() if message.c == c:
                answers = self._changes(message)
            case _:
                return False  # also a question about the configuration before, of whose engine it is asked next
        self._out.answer(peer, answers)
        return True

    def _slots(self, question: FetchSlots) -> Iterator[Frozen]:
        of = self._of
        if of.entered is not None and question.g < of.e:
            yield of.entered[0]
        newest = of.statements.newest
        if newest is not None and newest.slot >= question.first:
            yield Stable(question.c, newest.slot, newest.digest, newest.signatures)
        first = max(question.first, 0)
        for s in range(first, min(question.last + 1, first + MAX_SLOTS)):
            proof = of.proofs.get(s)
            if proof is not None:
                yield proof
            else:
                yield from of.book.votes(s)

    def _changes(self, question: FetchChanges) -> Iterator[Frozen]:
        entered = {change_statement(change.body): change for change in (self._of.entered or ((), ()))[1]}
        for name in question.digests[:MAX_CHANGES]:
            change = self._of.changes.by_name(name) or entered.get(name)
            if change is not None:
                yield change
