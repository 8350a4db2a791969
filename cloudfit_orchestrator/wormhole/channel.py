"""The I/O of one guest's channel: connects, reads frames, writes answers and pushes, and keeps the guest in its bounds.

Flooding is met by not reading: answers then come late, to this guest alone. Malformed input drops the connection with a
counted reason; the agent connects again, after a bounded back-off, as long as the guest is admitted.
"""

import asyncio
import contextlib
import logging
from collections import Counter, deque
from collections.abc import Awaitable, Callable

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
        self._drain = asyncio.Lock()
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
                reader, writer = await asyncio.open_unix_connection(path)
            except (OSError, CloudfitError) as error:
                self.counters["connect-failed"] += 1
                if self.counters["connect-failed"] == 1:
                    why = error.strerror if isinstance(error, OSError) else error.fact[:500]
                    _log.info("cannot connect", extra={"guest": str(self._guest.identity), "why": why})
            else:
                if await self._verified(writer) and await self._connection(reader, writer):
                    delay_s = BACK_OFF_S[0]
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._again.wait(), delay_s)
            delay_s = min(2 * delay_s, BACK_OFF_S[1])

    async def _verified(self, writer: asyncio.StreamWriter) -> bool:
        try:
            await self._verify()
        except CloudfitError as error:
            bad = isinstance(error, BadError)
            self.counters["measurement-failed" if bad else "measurement-unknown"] += 1
            _log.warning("not measured", extra={"guest": str(self._guest.identity), "why": error.fact[:500]})
            writer.close()
            return False
        except asyncio.CancelledError:
            writer.close()
            raise
        return True

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Serve one connection; True if the guest greeted and the connection ended well."""
        self.connected, self.greeted = True, False
        pusher = asyncio.create_task(self._pushes(writer))
        try:
            await self._serve(reader, writer)
        except (BadError, Malformed) as error:
            reason = error.reason if isinstance(error, Malformed) else "frame"
            self.counters[f"malformed-{reason}"] += 1
            _log.warning("malformed input", extra={"guest": str(self._guest.identity), "reason": reason})
            writer.write(error_frame(0, ErrorCode.MALFORMED, str(error)))
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
            _let_go(writer)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        frames = FrameReader(MAX_GUEST_FRAME, stale=True)
        served = 0
        while data := await reader.read(READ_BYTES):
            discarded = frames.discarded
            answers: list[bytes] = []  # of one turn: written together, and before anybody else has the loop
            try:
                for kind, request, body in frames.feed(data):
                    wait_s = self._bucket.take(_price(kind, body))
                    if wait_s > 0:
                        self.counters["throttled"] += 1
                        _write(writer, answers)
                        await asyncio.sleep(wait_s)
                    answers.append(self._desk.answer(kind, request, body))
                    self.counters["served"] += 1
                    if kind == FrameKind.HELLO:
                        self._greeting()
                    served += 1
                    if served % TURN_FRAMES == 0:
                        _write(writer, answers)
                        await self._flush(writer)
                        await asyncio.sleep(0)  # the other guests' turn
            finally:
                _write(writer, answers)
            self.counters["discarded-bytes"] += frames.discarded - discarded
            if not self.greeted and frames.discarded > MAX_STALE_BYTES:
                raise Malformed("no-greeting")
            await self._flush(writer)

    async def _pushes(self, writer: asyncio.StreamWriter) -> None:
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
                        writer.write(frame(FrameKind.RECORD, 0, held.envelope))
                        await self._flush(writer)
            while self._commands_due:
                writer.write(frame(FrameKind.COMMAND, 0, self._commands_due.popleft()))
                await self._flush(writer)

    async def _flush(self, writer: asyncio.StreamWriter) -> None:
        """Wait until the guest has taken what was written: one that does not read is not read from either."""
        if writer.transport.get_write_buffer_size():  # mostly the socket has taken all of it already
            async with self._drain:
                await writer.drain()


def _write(writer: asyncio.StreamWriter, answers: list[bytes]) -> None:
    if answers:
        writer.write(b"".join(answers))
        answers.clear()


def _let_go(writer: asyncio.StreamWriter) -> None:
    """Close now: a guest that does not read must not keep what is left to write, and its socket, for ever."""
    if writer.transport.get_write_buffer_size():
        writer.transport.abort()
    else:
        writer.close()


def _price(kind: int, body: bytes) -> float:
    base = ISSUE_TOKENS if kind == FrameKind.ISSUE else 1.0
    return base + len(body) / BYTES_A_TOKEN
