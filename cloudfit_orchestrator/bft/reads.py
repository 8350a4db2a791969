"""Linearizable reads that are not ordered (protocol §7): what a replica answers, and when it may.

A client believes a read if R replicas answer equally: each other quorum that showed something newer, be it of a write,
of a read or of a wedge, shares a correct member with these R, which answers from a state at least as new, or not at
all. To be *equal* answers must also agree on when what they read was written last: a value that went away and came back
is not the same. So that replicas that took over a checkpoint agree with those that executed all of it, what is older
than the last multiple of K counts as written there.
"""

from collections.abc import Callable

from cloudfit_orchestrator.bft.effects import Answer
from cloudfit_orchestrator.bft.interfaces import Readable
from cloudfit_orchestrator.bft.journal import LogShown
from cloudfit_orchestrator.bft.messages import Read, ReadReply, Seen, encode, seen_digest
from cloudfit_orchestrator.bft.outbox import Outbox
from cloudfit_orchestrator.bft.situation import Situation
from cloudfit_orchestrator.bft.written import ReadView
from cloudfit_orchestrator.model.record import ConfigRecord
from cloudfit_orchestrator.model.statement import LAYOUT, Kind

MAX_OPERATIONS = 256  # in one message: they are answered at once
MAX_SEEN_BYTES = 1 << 20  # of results in one answer
MAX_LOOKED = 4096  # entries that the listings of one message go through; what needs more is ordered
SHOWN_AHEAD = 256  # slots: one log record for so many


def read_quorum(record: ConfigRecord) -> int:
    """R: with W = f+1 replies that a writer waits for, `W+R`, `2R` and `R+Qv` are each at least n+f+1 (§7)."""
    enough = record.n + record.f + 1
    return max(enough - (record.f + 1), (enough + 1) // 2, enough - record.quorums.view_change)


class ReadDesk:
    """Answers `Read`s; keeps account of what clients may have been shown."""

    def __init__(self, situation: Situation, outbox: Outbox) -> None:
        self._at = situation
        self._out = outbox
        self._shown = 0  # slots up to here may be shown, says the log, or will
        self._durable = 0  # the same of what is on the disk for sure
        self._before_restart = 0  # the same, of an earlier process: until they are executed again, nothing is read

    @property
    def shown(self) -> int:
        """For the log, when it is written anew."""
        return self._shown

    def restore(self, slot: int) -> None:
        """The log says that slots up to `slot` may have been shown."""
        self._shown = self._durable = self._before_restart = max(self._shown, slot)

    def sign(self, c: int, kind: Kind, body: bytes, then: Callable[[bytes], None], size: int) -> None:
        """Have a statement signed that shows the state after the slot executed last; `size` bytes of results wait for
        it. It need not wait for the own log but where the mark ahead of that slot may not be on the disk yet: a
        signature that has waited for it proves it.
        """
        slot = self._at.execution.slot
        if slot <= self._durable:
            self._out.sign(c, kind, body, then, waits=False, size=size)
            return
        if slot > self._shown:
            self._shown = slot + SHOWN_AHEAD
            self._out.journal(LogShown(self._shown))
        mark = self._shown

        def signed(signature: bytes) -> None:
            self._durable = max(self._durable, mark)
            then(signature)

        self._out.sign(c, kind, body, signed, size=size)

    def take(self, client: bytes, message: Read, *, wedging: bool) -> None:
        """Answer, or say at once that it cannot be answered here now. `wedging`: a successor is PREPARED."""
        at, ordering = self._at, self._at.ordering
        may = ordering is not None and at.installed and at.member and not wedging and not ordering.ended
        seen = self._look(message) if may and at.execution.slot >= self._before_restart else None
        if seen is None or ordering is None or not 0 <= message.number < 1 << 63:
            self._out.put(Answer(client, encode(ReadReply(at.me, at.c, message.number, 0, (), b""))))
            return
        c, slot, number = ordering.record.c, at.execution.slot, message.number
        body = LAYOUT[Kind.READ].pack(client, number, slot, seen_digest(message.operations, seen))
        reply = ReadReply(at.me, c, number, slot, seen, b"")
        size = sum(len(part.result) for part in seen)
        self.sign(c, Kind.READ, body, lambda signature: self._answer(client, reply, signature), size)

    def _answer(self, client: bytes, reply: ReadReply, signature: bytes) -> None:
        signed = ReadReply(reply.replica, reply.c, reply.number, reply.slot, reply.seen, signature)
        self._out.put(Answer(client, encode(signed)))

    def _look(self, message: Read) -> tuple[Seen, ...] | None:
        service, execution, ordering = self._at.execution.service, self._at.execution, self._at.ordering
        if not isinstance(service, Readable) or ordering is None or not 0 < len(message.operations) <= MAX_OPERATIONS:
            return None
        period = ordering.record.parameters.checkpoint_period
        rounded = execution.slot // period * period
        found: list[Seen] = []
        size = looked = 0
        for operation in message.operations:
            view = ReadView(execution.store)
            result = service.read(view, operation)
            size += len(result or b"")
            looked += view.looked
            if result is None or size > MAX_SEEN_BYTES or looked > MAX_LOOKED:
                return None
            written = execution.written.last_of_all() if view.all else execution.written.last(view.keys)
            found.append(Seen(max(written, rounded), result))
        return tuple(found)
