"""The I/O of one guest's channel: connects, reads frames, writes answers and pushes, and keeps the guest in its bounds.

Flooding is met by not reading: answers then come late, to this guest alone. Malformed input drops the connection with a
counted reason; the agent connects again, after a bounded back-off, as long as the guest is admitted.
"""

import asyncio
import contextlib
import logging
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterator
from typing import cast

from cloudfit_orchestrator.model.channel import MAX_GUEST_FRAME, ErrorCode, FrameKind, FrameReader, frame
from cloudfit_orchestrator.model.errors import BadError, CloudfitError
from cloudfit_orchestrator.wormhole.guests import MAX_COMMANDS, Guest
from cloudfit_orchestrator.wormhole.refusal import Malformed
from cloudfit_orchestrator.wormhole.requests import Desk, error_frame
from cloudfit_orchestrator.wormhole.throttle import TokenBucket

READ_BYTES = 16 << 10
TURN_FRAMES = 16  # served in one turn of the loop, before the other guests have theirs
BACK_OFF_S = (0.05, 2.0)  # before connecting again: first, longest; each connection may cost hashing an image
MAX_STALE_BYTES = 8 << 20  # discarded before a greeting: more than a virtqueue and its sockets can hold from before
ISSUE_TOKENS = 20.0  # two hundred microseconds of DER and signing
BYTES_A_TOKEN = 1024.0

Verify = Callable[[], Awaitable[None]]
Find = Callable[[], Awaitable[str]]

_log = logging.getLogger(__name__)


class Channel:
    """One guest's channel, for as long as it is admitted."""

    def __init__(self, path: str | Find, guest: Guest, desk: Desk, bucket: TokenBucket, verify: Verify) -> None:
        """`path`: the unix socket at whose other end is the guest. `verify` raises CloudfitError if it no longer is.

        `path` may be a function that finds the socket before each connection; it raises CloudfitError if there is none.
        `verify` is called on each new connection, before anything is read: the hypervisor's process behind it may be
        another than the one that was measured.
        """
        self._verify = verify
        self._path = path
        self._guest = guest
        self._desk = desk
        self._bucket = bucket
        self._push_due = asyncio.Event()
        self._again = asyncio.Event()
        self._records_due = False
        self._pushed: tuple[bytes, ...] = ()  # the last two records that this process of the guest got
        self._commands_due: deque[bytes] = deque(maxlen=MAX_COMMANDS)
        self.counters: Counter[str] = Counter()
        self.connected = False
        self.greeted = False

    def push_records(self) -> None:
        """A record was installed: the guest gets what concerns it."""
        self._records_due = True
        self._push_due.set()

    def try_again(self) -> None:
        """The machine was started: connect without waiting for the end of the back-off."""
        self._again.set()

    def push_command(self, command: bytes) -> None:
        """A command was given."""
        self._commands_due.append(command)
        self._push_due.set()

    def _greeting(self) -> None:
        """A process of the guest said HELLO: it may know nothing of what was pushed to the one before it."""
        self.greeted = True
        self._pushed = ()
        self._commands_due = deque(self._guest.commands, MAX_COMMANDS)
        self.push_records()

    async def run(self) -> None:
        """Serve until cancelled."""
        delay_s = BACK_OFF_S[0]
        while True:
            self._again.clear()
            try:
                path = self._path if isinstance(self._path, str) else await self._path()
                _, line = await asyncio.get_running_loop().create_unix_connection(_Line, path)
            except (OSError, CloudfitError) as error:
                self.counters["connect-failed"] += 1
                if self.counters["connect-failed"] == 1:
                    why = error.strerror if isinstance(error, OSError) else error.fact[:500]
                    _log.info("cannot connect", extra={"guest": str(self._guest.identity), "why": why})
            else:
                if await self._verified(line) and await self._connection(line):
                    delay_s = BACK_OFF_S[0]
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._again.wait(), delay_s)
            delay_s = min(2 * delay_s, BACK_OFF_S[1])

    async def _verified(self, line: "_Line") -> bool:
        try:
            await self._verify()
        except CloudfitError as error:
            bad = isinstance(error, BadError)
            self.counters["measurement-failed" if bad else "measurement-unknown"] += 1
            _log.warning("not measured", extra={"guest": str(self._guest.identity), "why": error.fact[:500]})
            line.let_go()
            return False
        except asyncio.CancelledError:
            line.let_go()
            raise
        return True

    async def _connection(self, line: "_Line") -> bool:
        """Serve one connection; True if the guest greeted and the connection ended well."""
        self.connected, self.greeted = True, False
        pusher = asyncio.create_task(self._pushes(line))
        try:
            await line.serve(self._answer, lambda discarded: self._discarded(line, discarded))
        except (BadError, Malformed) as error:
            reason = error.reason if isinstance(error, Malformed) else "frame"
            self.counters[f"malformed-{reason}"] += 1
            _log.warning("malformed input", extra={"guest": str(self._guest.identity), "reason": reason})
            line.write(error_frame(0, ErrorCode.MALFORMED, str(error)))
            return False
        except (ConnectionError, TimeoutError):
            self.counters["connection-lost"] += 1
            return self.greeted
        else:
            self.counters["end-of-file"] += 1
            return self.greeted
        finally:
            self.connected = self.greeted = False
            pusher.cancel()
            await asyncio.gather(pusher, return_exceptions=True)
            line.let_go()

    def _answer(self, kind: int, request: int, body: bytes) -> tuple[bytes, float]:
        """The answer to one frame, and for how many seconds the next one has to wait. Raises Malformed."""
        wait_s = self._bucket.take(_price(kind, body))
        if wait_s > 0:
            self.counters["throttled"] += 1
        answer = self._desk.answer(kind, request, body)
        self.counters["served"] += 1
        if kind == FrameKind.HELLO:
            self._greeting()
        return answer, wait_s

    def _discarded(self, line: "_Line", count: int) -> None:
        self.counters["discarded-bytes"] += count
        if not self.greeted and line.discarded > MAX_STALE_BYTES:
            raise Malformed("no-greeting")

    async def _pushes(self, line: "_Line") -> None:
        """Records and commands, in that order, whenever there are some and the guest has greeted."""
        while True:
            await self._push_due.wait()
            self._push_due.clear()
            if not self.greeted:
                continue  # the greeting sets the event again
            if self._records_due:
                self._records_due = False
                records = self._desk.table.records(self._guest.identity.group)
                for held in (records.active, records.prepared):
                    new = held is not None and held.envelope not in self._pushed
                    if held is not None and new and self._desk.table.concerned(self._guest, held):
                        self._pushed = (*self._pushed[-1:], held.envelope)
                        line.write(frame(FrameKind.RECORD, 0, held.envelope))
                        await line.taken()
            while self._commands_due:
                line.write(frame(FrameKind.COMMAND, 0, self._commands_due.popleft()))
                await line.taken()


Answer = Callable[[int, int, bytes], tuple[bytes, float]]


class _Line(asyncio.BufferedProtocol):
    """The bytes of one connection. What comes in is answered in the same turn of the event loop, without a task that
    would have to be woken; nothing more is read before all of it is answered, and the guest has taken the answers.
    """

    def __init__(self) -> None:
        """Answers nothing before `serve`, and reads but once."""
        self._transport: asyncio.Transport
        self._buffer = bytearray(READ_BYTES)
        self._frames = FrameReader(MAX_GUEST_FRAME, stale=True)
        self._coming: Iterator[tuple[int, int, bytes]] = iter(())
        self._answer: Answer | None = None  # None: nobody serves yet
        self._told: Callable[[int], None]
        self._again: asyncio.Handle | None = None  # what was read is not answered yet: goes on then
        self._taken = asyncio.Event()
        self._taken.set()
        self._over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._over.add_done_callback(lambda over: over.cancelled() or over.exception())  # perhaps nobody ever serves

    async def serve(self, answer: Answer, discarded: Callable[[int], None]) -> None:
        """Until the guest closes the connection. `answer` gives a frame's answer, and the seconds that the next frame
        has to wait; `discarded` hears of bytes that belong to no frame. What either raises ends it, as do OSErrors.
        """
        self._answer, self._told = answer, discarded
        self._serve()
        await self._over

    def write(self, data: bytes) -> None:
        """Send, or keep until there is room: see `taken`."""
        self._transport.write(data)

    async def taken(self) -> None:
        """Wait until the guest has taken most of what was written."""
        await self._taken.wait()

    def let_go(self) -> None:
        """Close now: a guest that does not read must not keep what is left to write, and its socket, for ever."""
        if self._again is not None:
            self._again.cancel()
        if self._transport.get_write_buffer_size():
            self._transport.abort()
        else:
            self._transport.close()

    @property
    def discarded(self) -> int:
        """Bytes that belonged to no frame, all in all."""
        return self._frames.discarded

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The guest's end is there, and not yet known to be the guest's."""
        self._transport = cast("asyncio.Transport", transport)

    def get_buffer(self, sizehint: int) -> bytearray:  # noqa: ARG002  asyncio's signature
        """Where to read to."""
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """So much was read: all that came before is answered."""
        self._coming = self._frames.feed(bytes(memoryview(self._buffer)[:nbytes]))
        if self._answer is None:  # not in `connection_made`: Python 3.11 begins to read after it all the same
            self._transport.pause_reading()
        else:
            self._serve()

    def pause_writing(self) -> None:
        """The guest does not read: it is not read from either."""
        self._taken.clear()
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        """It has caught up."""
        self._taken.set()
        if self._again is None:
            self._serve()

    def connection_lost(self, exc: Exception | None) -> None:
        """The guest closed it, or we did, or it broke."""
        self._taken.set()
        self._end(exc)

    def _serve(self) -> None:
        """Answer some frames of those that were read, together, and say when the next ones have their turn."""
        self._again = None
        if self._answer is None or self._over.done() or not self._taken.is_set():
            return
        discarded = self._frames.discarded
        answers: list[bytes] = []
        wait_s, more = 0.0, True
        try:
            while more and wait_s <= 0 and len(answers) < TURN_FRAMES:
                coming = next(self._coming, None)
                if coming is None:
                    more = False
                else:
                    answer, wait_s = self._answer(*coming)
                    answers.append(answer)
            self._told(self._frames.discarded - discarded)
        except (BadError, Malformed) as error:
            self._end(error)
        except Exception as error:
            self._end(error)  # whoever awaits `serve` must not wait for ever
            raise
        if answers:
            self._transport.write(b"".join(answers))
        self._go_on(wait_s, more=more)

    def _go_on(self, wait_s: float, *, more: bool) -> None:
        if self._over.done() or not self._taken.is_set():
            self._transport.pause_reading()
        elif not more:
            self._transport.resume_reading()
        else:
            self._transport.pause_reading()
            loop = asyncio.get_running_loop()
            self._again = loop.call_later(wait_s, self._serve) if wait_s > 0 else loop.call_soon(self._serve)

    def _end(self, error: Exception | None) -> None:
        if self._over.done():
            return
        if error is None:
            self._over.set_result(None)
        else:
            self._over.set_exception(error)


def _price(kind: int, body: bytes) -> float:
    base = ISSUE_TOKENS if kind == FrameKind.ISSUE else 1.0
    return base + len(body) / BYTES_A_TOKEN
