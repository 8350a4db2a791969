"""A client of etcd's KV service that costs little CPU: gRPC over HTTP/2 without TLS, for one kind of call at a time.

The usual Python client spends more CPU on a call than three etcd members do, and would be what is measured. Of HTTP/2
(RFC 9113) this speaks what a unary call needs: a stream a call, header blocks that are written once (literals without
indexing, RFC 7541 §6.2.2), both directions of flow control. A call has succeeded when a whole message and the end of
the stream have come: a gRPC server sends no message beside an error status.
"""

import asyncio
import struct
from collections import deque
from typing import Self, cast

from cloudfit_orchestrator.model.errors import BadInputError, TemporaryError

MAX_VALUE = 48 << 10  # bytes: a request fits into the window that every stream begins with (65,535)
WINDOW = (1 << 31) - 1  # what we let the server send us; renewed when half is used
_FIRST_WINDOW = 65_535  # of both directions (RFC 9113 §6.9.2)
_MAX_FRAME = 16_384  # of what we send; no server accepts less
_MAX_ANSWER = 1 << 20  # bytes of one answer
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST, _SETTINGS, _PING, _GOAWAY, _WINDOW = 0, 1, 3, 4, 6, 7, 8
_END_STREAM, _END_HEADERS, _ACK = 1, 4, 1
_INITIAL_WINDOW_SIZE = 4  # the identifier of a setting
_FRAME = struct.Struct(">BHBBI")  # length as 8 and 16 bits, type, flags, stream


def varint(value: int) -> bytes:
    """Base-128, as protobuf writes it."""
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)


def field(number: int, content: bytes) -> bytes:
    """A length-delimited protobuf field."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def fields(message: bytes) -> dict[int, list[int | bytes]]:
    """The fields of a protobuf message by number; only varints and length-delimited ones. Raises ValueError."""
    found: dict[int, list[int | bytes]] = {}
    at = 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            if at >= len(message):
                raise ValueError("protobuf message ends early")
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        tag = number()
        if tag & 7 == 0:
            found.setdefault(tag >> 3, []).append(number())
        elif tag & 7 == 2:
            length = number()
            if at + length > len(message):
                raise ValueError("protobuf message ends early")
            found.setdefault(tag >> 3, []).append(message[at : at + length])
            at += length
        else:
            raise ValueError(f"protobuf wire type {tag & 7} is not expected")
    return found


def _text(value: bytes) -> bytes:
    assert len(value) < 0x7F  # one byte of length, no Huffman code
    return bytes([len(value)]) + value


def _header_block(path: bytes, authority: bytes) -> bytes:
    """Indexed fields of the static table where there are, else literals without indexing."""
    return (
        b"\x83\x86"  # :method POST, :scheme http
         b"\x04" + _text(path)  # name 4: :path
        + b"\x01" + _text(authority)  # name 1: :authority
        + b"\x0f\x10" + _text(b"application/grpc")  # name 31: content-type
        + b"\x00" + _text(b"te") + _text(b"trailers")
    )  # fmt: skip


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """One HTTP/2 frame."""
    return _FRAME.pack(len(payload) >> 16, len(payload) & 0xFFFF, kind, flags, stream) + payload


class _Call:
    __slots__ = ("answer", "data", "since_s")

    def __init__(self, answer: "asyncio.Future[bytes]", since_s: float) -> None:
        self.answer = answer
        self.since_s = since_s
        self.data = b""


class Connection(asyncio.Protocol):
    """One connection; calls of one loop iteration leave in one write."""

    def __init__(self, authority: str) -> None:
        """`authority`: host:port."""
        self._put = _header_block(b"/etcdserverpb.KV/Put", authority.encode())
        self._range = _header_block(b"/etcdserverpb.KV/Range", authority.encode())
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._out: list[bytes] = []
        self._calls: dict[int, _Call] = {}
        self._waiting: deque[tuple[int, bytes]] = deque()  # for room in the server's window
        self._next_stream = 1
        self._room = _FIRST_WINDOW
        self._received = 0
        self._error: str | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Say what we accept: no header table, windows without a practical limit."""
        self._transport = cast("asyncio.Transport", transport)
        settings = struct.pack(">HIHI", 1, 0, _INITIAL_WINDOW_SIZE, WINDOW)
        more = struct.pack(">I", WINDOW - _FIRST_WINDOW)
        self._transport.write(_PREFACE + frame(_SETTINGS, 0, 0, settings) + frame(_WINDOW, 0, 0, more))

    def connection_lost(self, exc: Exception | None) -> None:
        """All calls under way fail."""
        self._fail(f"connection to etcd lost: {exc or 'closed'}")

    def put(self, key: bytes, value: bytes) -> "asyncio.Future[bytes]":
        """KV.Put; the future fails with TemporaryError."""
        return self._call(self._put, field(1, key) + field(2, value))

    def range(self, key: bytes) -> "asyncio.Future[bytes]":
        """KV.Range of one key, linearizable as etcd does it by default; the RangeResponse."""
        return self._call(self._range, field(1, key))

    def give_up(self, before_s: float) -> None:
        """Fail the calls that began before that time of the loop's clock; oldest first, as they stand."""
        for stream, call in list(self._calls.items()):
            if call.since_s >= before_s:
                break
            call.data = b""
            self._end(stream, "etcd did not answer in time")

    def close(self) -> None:
        """Hang up."""
        if self._transport is not None:
            self._transport.abort()

    def _call(self, headers: bytes, message: bytes) -> "asyncio.Future[bytes]":
        loop = asyncio.get_running_loop()
        future: asyncio.Future[bytes] = loop.create_future()
        if self._error is not None:
            future.set_exception(TemporaryError(self._error))
            return future
        stream, self._next_stream = self._next_stream, self._next_stream + 2
        self._calls[stream] = _Call(future, loop.time())
        self._say(frame(_HEADERS, _END_HEADERS, stream, headers))
        body = b"\0" + len(message).to_bytes(4, "big") + message
        if self._waiting or len(body) > self._room:
            self._waiting.append((stream, body))
        else:
            self._send_body(stream, body)
        return future

    def _send_body(self, stream: int, body: bytes) -> None:
        self._room -= len(body)
        for at in range(0, len(body), _MAX_FRAME):
            last = at + _MAX_FRAME >= len(body)
            self._say(frame(_DATA, _END_STREAM if last else 0, stream, body[at : at + _MAX_FRAME]))

    def _say(self, data: bytes) -> None:
        if not self._out:
            asyncio.get_running_loop().call_soon(self._flush)
        self._out.append(data)

    def _flush(self) -> None:
        data = b"".join(self._out)
        self._out.clear()
        if self._transport is not None:
            self._transport.write(data)

    def data_received(self, data: bytes) -> None:
        """Take whole frames."""
        buffer = self._buffer
        buffer += data
        at = 0
        while len(buffer) - at >= _FRAME.size:
            high, low, kind, flags, stream = _FRAME.unpack_from(buffer, at)
            end = at + _FRAME.size + (high << 16 | low)
            if len(buffer) < end:
                break
            self._frame(kind, flags, stream & 0x7FFFFFFF, bytes(buffer[at + _FRAME.size : end]))
            at = end
        del buffer[:at]

    def _frame(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == _DATA:
            self._data(stream, payload)
        elif kind == _RST:
            self._end(stream, f"etcd reset the call: code {int.from_bytes(payload, 'big')}")
        elif kind == _SETTINGS and not flags & _ACK:
            self._say(frame(_SETTINGS, _ACK, 0, b""))
        elif kind == _PING and not flags & _ACK:
            self._say(frame(_PING, _ACK, 0, payload))
        elif kind == _WINDOW and stream == 0:
            self._room += int.from_bytes(payload, "big")
            while self._waiting and len(self._waiting[0][1]) <= self._room:
                self._send_body(*self._waiting.popleft())
        elif kind == _GOAWAY:
            self._fail("etcd says it goes away")
        if kind in (_DATA, _HEADERS) and flags & _END_STREAM:
            self._end(stream, "etcd answered with an error status")

    def _data(self, stream: int, payload: bytes) -> None:
        call = self._calls.get(stream)
        if call is not None and len(call.data) <= _MAX_ANSWER:
            call.data += payload
        self._received += len(payload)
        if self._received > WINDOW // 2:
            self._say(frame(_WINDOW, 0, 0, struct.pack(">I", self._received)))
            self._received = 0

    def _end(self, stream: int, error: str) -> None:
        call = self._calls.pop(stream, None)
        if call is None or call.answer.done():
            return
        if len(call.data) >= 5 and len(call.data) == 5 + int.from_bytes(call.data[1:5], "big"):
            call.answer.set_result(call.data[5:])
        else:
            call.answer.set_exception(TemporaryError(error))

    def _fail(self, error: str) -> None:
        self._error = self._error or error
        for call in self._calls.values():
            if not call.answer.done():
                call.answer.set_exception(TemporaryError(self._error))
        self._calls.clear()
        self._waiting.clear()


class EtcdTarget:
    """One member's KV service over several connections, used in turn; an asynchronous context manager."""

    def __init__(self, address: str, connections: int, *, timeout_s: float) -> None:
        """`address`: host:port; `timeout_s`: of one call."""
        self._timeout_s = timeout_s
        self._address = address
        self._wanted = connections
        self._connections: list[Connection] = []
        self._turn = 0

    async def __aenter__(self) -> Self:
        host, _, port = self._address.rpartition(":")
        loop = asyncio.get_running_loop()
        for _ in range(self._wanted):
            _, made = await loop.create_connection(lambda: Connection(self._address), host, int(port))
            self._connections.append(made)
        self._watching = loop.create_task(self._watch())
        return self

    async def __aexit__(self, *error: object) -> None:
        self._watching.cancel()
        for connection in self._connections:
            connection.close()

    async def put(self, key: bytes, value: bytes) -> None:
        """Set. Raises TemporaryError, BadInputError if the value is too large for this client."""
        if len(value) > MAX_VALUE:
            raise BadInputError(f"value of {len(value)} bytes; this client of etcd sends {MAX_VALUE} at most")
        await self._next().put(key, value)

    async def get(self, key: bytes) -> bytes | None:
        """The value, or None: RangeResponse.kvs[0].value. Raises TemporaryError."""
        entries = fields(await self._next().range(key)).get(2, [])
        if not entries:
            return None
        assert isinstance(entries[0], bytes)
        value = fields(entries[0]).get(5, [b""])[0]
        return value if isinstance(value, bytes) else None

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(1)
            for connection in self._connections:
                connection.give_up(loop.time() - self._timeout_s)

    def _next(self) -> Connection:
        self._turn += 1
        return self._connections[self._turn % len(self._connections)]
