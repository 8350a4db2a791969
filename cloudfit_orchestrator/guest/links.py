"""One TLS connection of frames `length u32 ‖ body`, with a bounded queue: what does not fit displaces the oldest."""

import asyncio
import socket
import struct
from collections import Counter, deque
from collections.abc import Callable
from typing import Any, cast

from cloudfit_orchestrator.guest.turn import Turn
from cloudfit_orchestrator.model.errors import BadError

FRAMES_A_TURN = 32  # of one connection; then the other connections, and time, have their turn
DEAD_AFTER_S = 3  # without a word from the other kernel; a machine that lost power says nothing when it is back
_LENGTH = struct.Struct(">I")
_WRITE_BYTES = 256 << 10  # handed to TLS at once: joins many small frames, and bounds what a lost connection loses


def notice_dead_peers(connection: socket.socket) -> None:
    """Set a connection up so that it ends soon after its peer is gone, sending or idle."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, DEAD_AFTER_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * DEAD_AFTER_S)


class FrameBuffer:
    """Incremental decoder of frames. Raises BadError at an oversize frame; the stream is unusable then."""

    def __init__(self, limit: int) -> None:
        """`limit`: the largest body, in bytes."""
        self.limit = limit
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The bodies that `data` completes."""
        buffer = self._buffer
        buffer += data
        bodies: list[bytes] = []
        at = 0
        while len(buffer) - at >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(buffer, at)
            if length > self.limit:
                raise BadError(f"frame of {length} bytes, the limit is {self.limit}")
            end = at + _LENGTH.size + length
            if len(buffer) < end:
                break
            bodies.append(bytes(buffer[at + _LENGTH.size : end]))
            at = end
        del buffer[:at]
        return bodies

    @property
    def held(self) -> int:
        """Bytes of the beginning of a frame."""
        return len(self._buffer)


class SendQueue:
    """Frames that wait for a connection. Outlives connections."""

    def __init__(self, limit: int, counters: Counter[str], label: str) -> None:
        """`limit`: bytes of bodies kept; drops are counted as `label`."""
        self._limit = limit
        self._counters = counters
        self._label = label
        self._frames: deque[bytes] = deque()
        self._bytes = 0

    def put(self, body: bytes) -> None:
        """Queue `body`, dropping the oldest where there is no room."""
        self._frames.append(body)
        self._bytes += len(body)
        while self._bytes > self._limit and len(self._frames) > 1:
            self._bytes -= len(self._frames.popleft())
            self._counters[self._label] += 1

    def take(self) -> bytes:
        """The next frames, encoded, about `_WRITE_BYTES` together; empty if there are none."""
        parts: list[bytes] = []
        size = 0
        while self._frames and (not parts or size + len(self._frames[0]) <= _WRITE_BYTES):
            body = self._frames.popleft()
            self._bytes -= len(body)
            size += len(body)
            parts += (_LENGTH.pack(len(body)), body)
        return b"".join(parts)

    @property
    def held(self) -> int:
        """Bytes of bodies that wait."""
        return self._bytes

    def __len__(self) -> int:
        return len(self._frames)


class Link(asyncio.Protocol):
    """One connection. `identify` is asked for the owner of the certificate when the handshake is over."""

    def __init__(
        self,
        *,
        identify: Callable[[Any, bytes], bool],
        received: Callable[[Any, bytes], None],
        ended: Callable[[Any], None],
        limit: int,
        queue: SendQueue,
        counters: Counter[str],
        turn: Turn,
    ) -> None:
        """`identify(link, certificate DER)` returns False for a stranger; `received` gets each body after that. What is
        sent in a `turn` goes out at its end.
        """
        self._identify, self._received, self._ended = identify, received, ended
        self._frames = FrameBuffer(limit)
        self._bodies: deque[bytes] = deque()  # read, and not handed on yet
        self._begun_s: float | None = None  # since when the frame that is being read is the same one
        self._counters = counters
        self._transport: asyncio.Transport | None = None
        self._paused = False
        self._resting = False  # not reading: what was read last is not handed on yet
        self._scheduled = False
        self._turn = turn
        self.queue = queue
        self.closed = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The handshake is over."""
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=2 * _WRITE_BYTES)
        certificate = transport.get_extra_info("ssl_object").getpeercert(binary_form=True)
        if not certificate or not self._identify(self, certificate):
            self.abort("stranger")
            return
        self.flush_soon()

    def data_received(self, data: bytes) -> None:
        """Some bytes, perhaps after `abort`."""
        if self._transport is None:
            return
        try:
            bodies = self._frames.feed(data)
        except BadError:
            self.abort("oversize frame")
            return
        if not self._frames.held:
            self._begun_s = None
        elif bodies or self._begun_s is None:
            self._begun_s = asyncio.get_running_loop().time()
        waiting = bool(self._bodies)
        self._bodies += bodies
        if bodies and not waiting:
            self._hand_on()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  asyncio's signature
        """It is over, for whatever reason."""
        if self._transport is not None and self._frames.held:
            self._counters["truncated frame"] += 1
        self._transport = None
        self._bodies.clear()
        if not self.closed.done():
            self.closed.set_result(None)
            self._ended(self)

    def pause_writing(self) -> None:
        """The other side is slow."""
        self._paused = True

    def resume_writing(self) -> None:
        """It caught up."""
        self._paused = False
        self.flush_soon()

    def send(self, body: bytes) -> None:
        """Queue a frame; what one turn queues goes out together."""
        self.queue.put(body)
        self.flush_soon()

    def limit_frames(self, limit: int) -> None:
        """Accept bodies of at most `limit` bytes from now on."""
        self._frames.limit = limit

    @property
    def held(self) -> int:
        """Bytes that this connection costs: of a half frame, of what waits to be sent, of what TLS and TCP have."""
        written = self._transport.get_write_buffer_size() if self._transport is not None else 0
        return self._frames.held + self.queue.held + written

    def reads_one_frame_since(self, now_s: float) -> float:
        """For how many seconds the frame that is being read has been coming in."""
        return 0.0 if self._begun_s is None else now_s - self._begun_s

    def flush_soon(self) -> None:
        """Write what is queued, when this turn is over."""
        if not self._scheduled:
            self._scheduled = True
            self._turn.later(self._flush)

    def abort(self, reason: str) -> None:
        """Close at once, counting `reason`."""
        if self._transport is not None:
            self._counters[f"closed: {reason}"] += 1
            transport, self._transport = self._transport, None
            transport.abort()

    def _hand_on(self) -> None:
        """Hand on the frames of one turn; while some are left, nothing more is read from the socket."""
        for _ in range(min(FRAMES_A_TURN, len(self._bodies))):
            if self._transport is None:
                return
            self._received(self, self._bodies.popleft())
        if self._transport is None:
            return
        if self._bodies:
            if not self._resting:
                self._transport.pause_reading()
            asyncio.get_running_loop().call_soon(self._hand_on)
        elif self._resting:
            self._transport.resume_reading()
        self._resting = bool(self._bodies)

    def _flush(self) -> None:
        self._scheduled = False
        while self._transport is not None and not self._paused and self.queue:
            self._transport.write(self.queue.take())
