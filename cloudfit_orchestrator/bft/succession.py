"""A member's part in a reconfiguration (protocol §6): wedge, end the epoch, hand round wedge sets, confirm."""

import base64

from cloudfit_orchestrator.bft.effects import EndEpoch
from cloudfit_orchestrator.bft.journal import LogRecord, LogWedges
from cloudfit_orchestrator.bft.messages import WedgeSet
from cloudfit_orchestrator.bft.ordering import Ordering
from cloudfit_orchestrator.bft.outbox import Outbox
from cloudfit_orchestrator.bft.reconfigure import Outcome, Successors
from cloudfit_orchestrator.bft.situation import Situation
from cloudfit_orchestrator.bft.store import StateStore
from cloudfit_orchestrator.model.record import ConfigRecord, confirm_body, record_hash
from cloudfit_orchestrator.model.signing import DIGEST_BYTES
from cloudfit_orchestrator.model.statement import Kind

MAX_PREPARED = 8  # PREPARED records kept for one base; the newest is the only one that may become ACTIVE
END_RETRY_S = 1.0
CONFIRM_RETRY_S = 1.0  # the wormhole may not know the configuration yet, or be busy


class Succession:
    """Works on `successors`, which are those of the present base."""

    def __init__(self, situation: Situation, outbox: Outbox) -> None:
        self._at = situation
        self._out = outbox
        self.successors = Successors()
        self._confirmed: set[tuple[int, int, bytes]] = set()  # (c', h, digest) that the KSS has signed
        self._early: list[bytes] = []  # PREPARED records whose base has not come yet

    def begin(self) -> list[bytes]:
        """A configuration became ACTIVE. Returns PREPARED records that came before their base."""
        self.successors = Successors()
        self._confirmed.clear()
        early, self._early = self._early, []
        return early

    def prepared(self, record: ConfigRecord, envelope: bytes) -> None:
        """A PREPARED record."""
        base = record.base or 0
        if base > self._at.c:
            self._early = [*self._early, envelope][-MAX_PREPARED:]
        if base != self._at.c or record.c in self.successors.prepared:
            return
        if len(self.successors.prepared) >= MAX_PREPARED:
            del self.successors.prepared[min(self.successors.prepared)]
        self._out.journal(LogRecord(envelope))
        self.successors.prepared[record.c] = (record, envelope)
        if self._at.ordering is not None:
            self._at.ordering.wedge(envelope)
        self.refresh_peers()
        self._out.report("prepared", {"c": record.c})

    def refresh_peers(self) -> None:
        """See `Situation.refresh_peers`."""
        self._at.refresh_peers([record for record, _ in self.successors.prepared.values()])

    def outcomes(self) -> list[Outcome]:
        """The states that ACTIVE may pin, computed again if the log has just been read."""
        if self._at.ordering is not None and self._at.installed and self.successors.prepared:
            self.successors.compute(self._at.ordering, self._at.execution)
        return self.successors.outcomes()

    def take_set(self, peer: str, message: WedgeSet) -> None:
        """A peer computed S from these wedges: we shall, too."""
        ordering = self._at.ordering
        if ordering is None or message.c != ordering.record.c or not self.successors.prepared:
            return
        names = message.wedges
        sound = all(ordering.record.member(name.replica) and len(name.digest) == DIGEST_BYTES for name in names)
        if sound and len(names) <= ordering.record.n and self.successors.add_set(names, peer):
            self._out.journal(LogWedges(message.successor, names))

    def confirm_first(self) -> None:
        """The first configuration of a group begins with the empty state."""
        newest = self.successors.newest()
        if newest is not None and newest[0].base is None and self._at.is_me(newest[0]):
            self._confirm(*newest, 0, StateStore().root())

    def advance(self, ordering: Ordering) -> None:
        """Do what the newest PREPARED record allows now."""
        newest = self.successors.newest()
        if newest is None:
            return
        if ordering.wedged and not ordering.ended and self._out.every("end", END_RETRY_S):
            self._out.put(EndEpoch(ordering.record.c))
        record, envelope = newest
        if not self._at.is_me(record) or not self._at.installed:
            return
        chosen = self.successors.choose(ordering)
        if chosen is not None:
            self._out.journal(LogWedges(record.c, chosen))
            self.hand_round(ordering)
        self.successors.compute(ordering, self._at.execution)
        for outcome in self.successors.outcomes() if self._base_is_durable() else ():
            self._confirm(record, envelope, outcome.h, outcome.digest)

    def _base_is_durable(self) -> bool:
        """The state that outcomes are executed on can be built again from the disk: a persisted snapshot, and decided
        slots without a gap from there. Else ACTIVE might pin a state that nobody has after a crash (§6).
        """
        execution, c = self._at.execution, self._at.c
        saved = max((slot for of, slot in self._at.saved if of == c and slot <= execution.slot), default=None)
        return saved is not None and all(slot in execution.history for slot in range(saved + 1, execution.slot + 1))

    def hand_round(self, ordering: Ordering) -> None:
        """Tell the others which wedges the own S comes from; repeated."""
        newest = self.successors.newest()
        if newest is not None and self.successors.own_set is not None:
            message = WedgeSet(ordering.record.c, newest[0].c, self.successors.own_set)
            self._out.broadcast(self._at.others, message)

    def _confirm(self, record: ConfigRecord, envelope: bytes, h: int, digest: bytes) -> None:
        name = (record.c, h, digest)
        if name in self._confirmed or not self._out.every(f"confirm {name}", CONFIRM_RETRY_S):
            return
        prepared = record_hash(envelope)

        def report(signature: bytes) -> None:
            self._confirmed.add(name)
            fields = {"prepared": prepared, "digest": digest, "signature": signature}
            body = {key: base64.b64encode(value).decode() for key, value in fields.items()}
            self._out.report("confirm", {"c": record.c, "h": h, **body})

        self._out.sign(record.c, Kind.CONFIRM, confirm_body(prepared, h, digest), report)
