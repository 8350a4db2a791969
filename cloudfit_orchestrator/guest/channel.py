"""The guest's end of the wormhole channel (model/channel.py): pipelined requests, and pushes from the agent."""

import asyncio
import json
import os
import secrets
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cloudfit_orchestrator.guest.ports import FIRST_WAIT_S, LAST_WAIT_S, Port
from cloudfit_orchestrator.guest.turn import Turn
from cloudfit_orchestrator.model.channel import MAX_AGENT_FRAME, ErrorCode, FrameKind, FrameReader, frame, hello
from cloudfit_orchestrator.model.errors import BadError, RefusedError, UnknownError

MAX_OUTSTANDING = 1024  # requests; a replica has at most 64 UIs and a few signatures per slot under way
GREETING_TIMEOUT_S = 5.0  # an agent that holds the port but does not greet is asked again
_READ_BYTES = 256 << 10
_ANSWERS = {
    FrameKind.OPEN_SESSION: FrameKind.SESSION,
    FrameKind.CREATE_UI: FrameKind.UI_CERT,
    FrameKind.RECENT: FrameKind.RECENT_UIS,
    FrameKind.SIGN: FrameKind.SIGNATURE,
    FrameKind.ISSUE: FrameKind.CERTIFICATE,
    FrameKind.END_EPOCH: FrameKind.EPOCH_END,
    FrameKind.REPORT: FrameKind.OK,
}


class ChannelLostError(UnknownError):
    """The connection to the wormhole ended before the answer came: whether it was carried out is unknown."""


class WormholeRefusedError(RefusedError):
    """The wormhole answered ERROR."""

    def __init__(self, code: int, text: str) -> None:
        """`code`: an ErrorCode, or a number that this version does not know."""
        super().__init__(f"the wormhole refused: {text} (code {code})")
        self.code = next((known for known in ErrorCode if known == code), ErrorCode.FORBIDDEN)


@dataclass
class Handlers:
    """What the channel calls, always in the event loop and never re-entrantly from `request`."""

    opened: Callable[[dict[str, Any]], None]  # after each greeting, with the WELCOME; earlier sessions are void
    lost: Callable[[], None]
    record: Callable[[bytes], None]
    command: Callable[[dict[str, Any]], None]


Answered = Callable[[bytes | WormholeRefusedError | ChannelLostError], None]  # the answer's body, or why there is none


class Channel:
    """One connection at a time, made again for ever. Run `run()` as a task."""

    def __init__(self, port: Port, handlers: Handlers, turn: Turn | None = None) -> None:
        """Nothing happens before `run`. What is asked in a `turn` goes out at its end."""
        self._port = port
        self._turn = turn or Turn()
        self._handlers = handlers
        self._waiting: deque[tuple[int, FrameKind, Answered]] = deque()
        self._stream: _FdStream | None = None
        self._last_request = 0
        self.counters: Counter[str] = Counter()

    @property
    def is_open(self) -> bool:
        """Greeted, and not lost since."""
        return self._stream is not None

    def request(self, kind: FrameKind, body: bytes = b"") -> "asyncio.Future[bytes]":
        """Send a request now; the future gives the body of its answer.

        It fails with WormholeRefusedError or ChannelLostError.
        """
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

        def answered(outcome: bytes | WormholeRefusedError | ChannelLostError) -> None:
            if future.done():
                return
            if isinstance(outcome, bytes):
                future.set_result(outcome)
            else:
                future.set_exception(outcome)

        if not self.ask(kind, body, answered):
            future.set_exception(ChannelLostError("the wormhole's channel is not open, or too much is under way"))
        return future

    def ask(self, kind: FrameKind, body: bytes, answered: Answered) -> bool:
        """Send a request now, and call `answered` once; never from within. False, and no call, if it cannot be sent."""
        if self._stream is None or len(self._waiting) >= MAX_OUTSTANDING:
            return False
        self._last_request = self._last_request % 0xFFFFFFFF + 1
        self._waiting.append((self._last_request, kind, answered))
        self._stream.write(frame(kind, self._last_request, body))
        return True

    async def run(self) -> None:
        """Open, greet, read; again after each loss, with a bounded back-off. Ends only when cancelled."""
        wait_s = FIRST_WAIT_S
        while True:
            stream = _FdStream(await self._port.open(), self._turn)
            try:
                await self._serve(stream)
            except (BadError, OSError, TimeoutError, EOFError) as error:
                self.counters[f"lost: {type(error).__name__}"] += 1
            finally:
                greeted = self._stream is not None
                stream.close()
                self._forget()
            wait_s = FIRST_WAIT_S if greeted else min(2 * wait_s, LAST_WAIT_S)
            await asyncio.sleep(wait_s)

    async def _serve(self, stream: "_FdStream") -> None:
        greeting = secrets.randbelow(0xFFFFFFFF) + 1
        reader = FrameReader(MAX_AGENT_FRAME, welcome=greeting)
        late = asyncio.get_running_loop().call_later(GREETING_TIMEOUT_S, stream.fail, TimeoutError())

        def received(data: bytes) -> None:
            for kind, request, body in reader.feed(data):
                if self._stream is None:
                    welcome = _json(body)
                    late.cancel()
                    self._stream = stream
                    self._handlers.opened(welcome)
                else:
                    self._frame(kind, request, body)

        stream.write(hello(greeting))
        try:
            await stream.serve(received)
        finally:
            late.cancel()

    def _frame(self, kind: int, request: int, body: bytes) -> None:
        if request == 0:
            if kind == FrameKind.RECORD:
                self._handlers.record(body)
            elif kind == FrameKind.COMMAND:
                self._handlers.command(_json(body))
            else:
                self.counters["unknown push"] += 1
            return
        if not self._waiting or self._waiting[0][0] != request:
            raise BadError(f"the wormhole answered request {request}, which is not the oldest one open")
        _, asked, answered = self._waiting.popleft()
        if kind == FrameKind.ERROR and len(body) >= 2:
            code = int.from_bytes(body[:2], "big")
            answered(WormholeRefusedError(code, body[2:].decode("utf-8", "replace")))
        elif kind == _ANSWERS[asked]:
            answered(body)
        else:
            answered(ChannelLostError(f"the wormhole answered {asked.name} with kind {kind}"))
            raise BadError(f"the wormhole answered {asked.name} with kind {kind}")

    def _forget(self) -> None:
        was_open, self._stream = self._stream is not None, None
        waiting, self._waiting = self._waiting, deque()
        for _, kind, answered in waiting:
            answered(ChannelLostError(f"the channel was lost before the wormhole answered {kind.name}"))
        if was_open:
            self._handlers.lost()


def _json(body: bytes) -> dict[str, Any]:
    try:
        doc = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadError(f"the wormhole sent what is not JSON: {error}") from error
    if not isinstance(doc, dict):
        raise BadError("the wormhole sent JSON that is not an object")
    return doc


class _FdStream:
    """Reads and writes a non-blocking descriptor of any kind that can be polled (asyncio's pipes refuse some)."""

    def __init__(self, fd: int, turn: Turn) -> None:
        self._fd = fd
        self._turn = turn
        self._loop = asyncio.get_running_loop()
        self._out = bytearray()
        self._received: Callable[[bytes], None]
        self._over: asyncio.Future[None] = self._loop.create_future()
        self._scheduled = False

    async def serve(self, received: Callable[[bytes], None]) -> None:
        """Call `received` with all that comes in, as it comes, until the stream fails: raises why. EOFError: it ended.
        What `received` raises is a failure, too.
        """
        self._received = received
        self._loop.add_reader(self._fd, self._readable)
        await self._over

    def fail(self, error: BaseException) -> None:
        """Nothing more is read; `serve` raises this."""
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
        if not self._over.done():
            self._over.set_exception(error)

    def write(self, data: bytes) -> None:
        """Queue; what one turn queues goes out together. Errors show in `serve`."""
        self._out += data
        if not self._scheduled:
            self._scheduled = True
            self._turn.later(self._flush)

    def close(self) -> None:
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            self._loop.remove_writer(self._fd)
            os.close(self._fd)
            self._fd = -1
        self._out.clear()

    def _readable(self) -> None:
        try:
            data = os.read(self._fd, _READ_BYTES)
            if data:
                self._received(data)
        except (BlockingIOError, InterruptedError):
            return
        except Exception as error:  # noqa: BLE001  whoever awaits `serve` gets it
            self.fail(error)
        else:
            if not data:
                self.fail(EOFError("the host closed the channel"))

    def _flush(self) -> None:
        if self._fd < 0 or not self._out:
            self._scheduled = False
            return
        try:
            del self._out[: os.write(self._fd, self._out)]
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            self._out.clear()  # the reading side sees the same loss
        if self._out:
            self._loop.add_writer(self._fd, self._flush)
        else:
            self._loop.remove_writer(self._fd)
            self._scheduled = False
