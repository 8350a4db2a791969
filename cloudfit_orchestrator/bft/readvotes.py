"""Which reads that are not ordered are believed: R equal answers under one configuration (protocol §7). Sans-IO.

An answer counts only if it proves itself: the replica's KSS signature covers question and answer.
"""

from dataclasses import dataclass, field

from cloudfit_orchestrator.bft.messages import Read, ReadReply, seen_digest
from cloudfit_orchestrator.bft.reads import read_quorum
from cloudfit_orchestrator.model.errors import BadError
from cloudfit_orchestrator.model.record import ConfigRecord
from cloudfit_orchestrator.model.signing import Verifier
from cloudfit_orchestrator.model.statement import LAYOUT, Kind, statement_bytes


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a read. `results`: one for each operation, None for one that must be ordered."""

    results: tuple[bytes | None, ...]
    refused: bool = False  # a replica cannot answer now


@dataclass(slots=True)
class _Asked:
    read: Read
    record: ConfigRecord  # answers count under this one only: R of another meets neither its writes nor its wedges
    replies: dict[str, ReadReply] = field(default_factory=dict)


class ReadVotes:
    """Counts answers to one client's reads."""

    def __init__(self, client: bytes, verifier: Verifier) -> None:
        """`client`: raw key."""
        self._client = client
        self._verifier = verifier
        self._asked: dict[int, _Asked] = {}

    def __len__(self) -> int:
        """Reads under way."""
        return len(self._asked)

    def expect(self, read: Read, record: ConfigRecord) -> None:
        """It is sent to all members of `record`."""
        self._asked[read.number] = _Asked(read, record)

    def give_up(self, number: int) -> bool:
        """Nobody waits for it any more; False if nobody did."""
        return self._asked.pop(number, None) is not None

    def take(self, reply: ReadReply) -> Outcome | None:
        """Count one answer; what became of its read, if that is clear now. Raises BadError if it proves nothing."""
        asked = self._asked.get(reply.number)
        if asked is None:
            return None
        operations = asked.read.operations
        if not reply.seen or reply.c != asked.record.c:
            del self._asked[reply.number]
            return Outcome((None,) * len(operations), refused=True)
        if len(reply.seen) != len(operations) or not self._proved(asked, reply):
            raise BadError(f"an answer of {reply.replica} to a read proves nothing")
        asked.replies[reply.replica] = reply
        if len(asked.replies) < read_quorum(asked.record):
            return None
        del self._asked[reply.number]
        first, *others = asked.replies.values()
        return Outcome(
            tuple(
                seen.result if all(other.seen[i] == seen for other in others) else None
                for i, seen in enumerate(first.seen)
            )
        )

    def _proved(self, asked: _Asked, reply: ReadReply) -> bool:
        record = asked.record
        member = record.member(reply.replica)
        if member is None or not 0 <= reply.slot < 1 << 63:
            return False
        digest = seen_digest(asked.read.operations, reply.seen)
        body = LAYOUT[Kind.READ].pack(self._client, reply.number, reply.slot, digest)
        message = statement_bytes(Kind.READ, record.group, reply.replica, record.c, body)
        return self._verifier.verify(member.kss_key, message, reply.signature)
