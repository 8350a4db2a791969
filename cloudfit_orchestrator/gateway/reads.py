"""Reads that are not ordered (protocol §7), from the client's side: R equal answers, or else an ordered read.

All reads of one event-loop tick go out together, to all replicas. A replica that refuses, lies, is slow or behind costs
an ordered read; where that happens again and again, reads are ordered at once for a while.
"""

import asyncio
import secrets
from collections.abc import Callable
from dataclasses import dataclass

from cloudfit_orchestrator.bft.messages import Read, ReadReply, encode
from cloudfit_orchestrator.bft.reads import MAX_OPERATIONS
from cloudfit_orchestrator.bft.readvotes import Outcome, ReadVotes
from cloudfit_orchestrator.model.errors import BadError
from cloudfit_orchestrator.model.record import ConfigRecord
from cloudfit_orchestrator.model.signing import Verifier

WAIT_S = 0.25  # for all R answers, then it is ordered
MAX_READS = 1024  # messages that wait for their answers
FIRST_PAUSE_S = 0.5  # after a read that had to be ordered; doubles while that goes on
LAST_PAUSE_S = 8.0
READ_BYTES = 256 << 10  # of operations in one message


@dataclass(frozen=True, slots=True)
class _Waiting:
    answers: "list[asyncio.Future[bytes | None]]"
    timer: asyncio.TimerHandle


class Reads:
    """Reads of one client under way. `send(data)` sends to all replicas."""

    def __init__(
        self, client: bytes, verifier: Verifier, record: Callable[[], ConfigRecord], send: Callable[[bytes], None]
    ) -> None:
        """`client`: raw key; `record` gives the present configuration."""
        self._votes = ReadVotes(client, verifier)
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
            read = Read(self._number, tuple(operation for operation, _ in part))
            timer = asyncio.get_running_loop().call_later(WAIT_S, self._give_up, read.number)
            self._waiting[read.number] = _Waiting([answer for _, answer in part], timer)
            self._votes.expect(read, self._record())
            self._send(encode(read))

    def take(self, reply: ReadReply) -> bool:
        """Count an answer. False if it proves nothing."""
        try:
            outcome = self._votes.take(reply)
        except BadError:
            return False
        if outcome is not None:
            self._settle(reply.number, outcome)
        return True

    def _settle(self, number: int, outcome: Outcome) -> None:
        waiting = self._waiting.pop(number)
        waiting.timer.cancel()
        equal = sum(result is not None for result in outcome.results)
        self.answered += equal
        self.given_up += len(outcome.results) - equal
        if outcome.refused:
            self._pause_s = min(max(2 * self._pause_s, FIRST_PAUSE_S), LAST_PAUSE_S)
            self._not_before_s = asyncio.get_running_loop().time() + self._pause_s
        elif equal:
            self._pause_s = 0.0
        for answer, result in zip(waiting.answers, outcome.results, strict=True):
            if not answer.done():
                answer.set_result(result)

    def _give_up(self, number: int) -> None:
        if self._votes.give_up(number):
            nothing = (None,) * len(self._waiting[number].answers)
            self._settle(number, Outcome(nothing, refused=True))

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
