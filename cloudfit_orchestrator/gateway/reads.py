"""Reads that are not ordered (protocol §7), from the client's side: R equal answers, or else an ordered read.

All reads of one event-loop tick go out together, to all replicas. A replica that refuses, lies, is slow or behind costs
an ordered read; where that happens again and again, reads are ordered at once for a while.
"""

import asyncio
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field

from cloudfit_orchestrator.bft.messages import Read, ReadReply, encode, seen_digest
from cloudfit_orchestrator.bft.reads import MAX_OPERATIONS, read_quorum
from cloudfit_orchestrator.model.record import ConfigRecord
from cloudfit_orchestrator.model.signing import Verifier
from cloudfit_orchestrator.model.statement import LAYOUT, Kind, statement_bytes

WAIT_S = 0.25  # for all R answers, then it is ordered
MAX_READS = 1024  # messages that wait for their answers
FIRST_PAUSE_S = 0.5  # after a read that had to be ordered; doubles while that goes on
LAST_PAUSE_S = 8.0
READ_BYTES = 256 << 10  # of operations in one message


@dataclass(slots=True)
class _Waiting:
    record: ConfigRecord  # answers count under this one only: R of another meets neither its writes nor its wedges
    operations: tuple[bytes, ...]
    answers: "list[asyncio.Future[bytes | None]]"
    timer: asyncio.TimerHandle
    replies: dict[str, ReadReply] = field(default_factory=dict)


class Reads:
    """Reads of one client under way. `send(data)` sends to all replicas."""

    def __init__(
        self, client: bytes, verifier: Verifier, record: Callable[[], ConfigRecord], send: Callable[[bytes], None]
    ) -> None:
        """`client`: raw key; `record` gives the present configuration."""
        self._client = client
        self._verifier = verifier
        self._record = record
        self._send = send
        self._number = secrets.randbits(61)  # a read's number is used once by a key, or old answers could come again
        self._waiting: dict[int, _Waiting] = {}
        self._outbox: list[tuple[bytes, asyncio.Future[bytes | None]]] = []
        self._scheduled = False
        self._pause_s = 0.0
        self._not_before_s = 0.0
        self.answered = 0
        self.given_up = 0

    @property
    def worth_trying(self) -> bool:
        """Whether reads have not just failed."""
        return asyncio.get_running_loop().time() >= self._not_before_s and len(self._waiting) < MAX_READS

    def ask(self, operation: bytes) -> "asyncio.Future[bytes | None]":
        """The result of an operation that changes nothing; None if it must be ordered."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[bytes | None] = loop.create_future()
        self._outbox.append((operation, answer))
        if not self._scheduled:
            self._scheduled = True
            loop.call_soon(self._flush)
        return answer

    def _flush(self) -> None:
        self._scheduled = False
        while self._outbox:
            size, count = 0, 0
            for operation, _ in self._outbox[:MAX_OPERATIONS]:
                size += len(operation)
                if count and size > READ_BYTES:
                    break
                count += 1
            part, self._outbox = self._outbox[:count], self._outbox[count:]
            self._number += 1
            number = self._number
            operations = tuple(operation for operation, _ in part)
            timer = asyncio.get_running_loop().call_later(WAIT_S, self._give_up, number)
            self._waiting[number] = _Waiting(self._record(), operations, [answer for _, answer in part], timer)
            self._send(encode(Read(number, operations)))

    def take(self, reply: ReadReply) -> bool:
        """Count an answer. False if it proves nothing."""
        waiting = self._waiting.get(reply.number)
        if waiting is None:
            return True
        if not reply.seen or reply.c != waiting.record.c:
            self._give_up(reply.number)
            return True
        if len(reply.seen) != len(waiting.operations) or not self._proved(waiting, reply):
            return False
        waiting.replies[reply.replica] = reply
        if len(waiting.replies) >= read_quorum(waiting.record):
            self._count(reply.number, waiting)
        return True

    def _proved(self, waiting: _Waiting, reply: ReadReply) -> bool:
        record = waiting.record
        member = record.member(reply.replica)
        if member is None or not 0 <= reply.slot < 1 << 63:
            return False
        digest = seen_digest(waiting.operations, reply.seen)
        body = LAYOUT[Kind.READ].pack(self._client, reply.number, reply.slot, digest)
        message = statement_bytes(Kind.READ, record.group, reply.replica, record.c, body)
        return self._verifier.verify(member.kss_key, message, reply.signature)

    def _count(self, number: int, waiting: _Waiting) -> None:
        waiting.timer.cancel()
        del self._waiting[number]
        replies = list(waiting.replies.values())
        equal = 0
        for i, answer in enumerate(waiting.answers):
            seen = replies[0].seen[i]
            same = all(reply.seen[i] == seen for reply in replies)
            equal += same
            if not answer.done():
                answer.set_result(seen.result if same else None)
        self.answered += equal
        self.given_up += len(replies[0].seen) - equal
        if equal:
            self._pause_s = 0.0

    def _give_up(self, number: int) -> None:
        waiting = self._waiting.pop(number, None)
        if waiting is None:
            return
        waiting.timer.cancel()
        self.given_up += len(waiting.answers)
        self._pause_s = min(max(2 * self._pause_s, FIRST_PAUSE_S), LAST_PAUSE_S)
        self._not_before_s = asyncio.get_running_loop().time() + self._pause_s
        for answer in waiting.answers:
            if not answer.done():
                answer.set_result(None)

    def close(self) -> None:
        """Nobody waits any more."""
        for waiting in self._waiting.values():
            waiting.timer.cancel()
            for answer in waiting.answers:
                answer.cancel()
        self._waiting.clear()
        for _, answer in self._outbox:
            answer.cancel()
        self._outbox.clear()
