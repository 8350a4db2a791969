"""Frames of a connection, behind TLS: whatever pieces they come in, the same bodies, or the connection is closed."""

import asyncio
from collections import Counter
from typing import Any

from cloudfit_orchestrator.guest.links import Link, SendQueue
from cloudfit_orchestrator.guest.turn import Turn
from tests.fuzz.choices import Choices

LIMIT = 64
LOOP = asyncio.new_event_loop()


class Wire(asyncio.Transport):
    """The socket's place."""

    def __init__(self) -> None:
        super().__init__()
        self.closed = False
        self.written = bytearray()
        self.reading = True

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self

    def getpeercert(self, *, binary_form: bool) -> bytes:
        assert binary_form
        return b"certificate"

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def write(self, data: Any) -> None:
        self.written += data

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def abort(self) -> None:
        self.closed = True


def run(data: bytes) -> None:
    """The first byte is the size of the pieces."""
    LOOP.run_until_complete(_run(data))


async def _run(data: bytes) -> None:
    choices = Choices(data)
    size = 1 + choices.byte()
    stream = choices.rest()
    counters: Counter[str] = Counter()
    got: list[bytes] = []
    wire = Wire()
    link = Link(
        identify=lambda *_: True,
        received=lambda _, body: got.append(body),
        ended=lambda _: None,
        limit=LIMIT,
        queue=SendQueue(LIMIT, counters, "dropped"),
        counters=counters,
        turn=Turn(),
    )
    link.connection_made(wire)
    for i in range(0, len(stream), size):
        link.data_received(stream[i : i + size])
        assert len(link._frames._buffer) <= LIMIT + 4 + size, "more than one frame is held"
    expected, whole = _bodies(stream)
    while len(got) < len(expected) and not wire.closed:  # noqa: ASYNC110  each turn of the loop hands some on
        await asyncio.sleep(0)
    if whole:
        assert got == expected
        assert not wire.closed
    else:
        assert wire.closed
        assert counters["closed: oversize frame"] == 1
        assert expected[: len(got)] == got
    link.connection_lost(None)


def _bodies(stream: bytes) -> tuple[list[bytes], bool]:
    """What the stream holds by the rule of docs/contracts.md, and whether no frame of it is too large."""
    found: list[bytes] = []
    while len(stream) >= 4:
        length = int.from_bytes(stream[:4], "big")
        if length > LIMIT:
            return found, False
        if len(stream) < 4 + length:
            break
        found.append(stream[4 : 4 + length])
        stream = stream[4 + length :]
    return found, True


def seeds() -> list[bytes]:
    """Whole, empty, half and oversize frames."""
    whole = b"\0\0\0\3abc\0\0\0\0\0\0\0\x40" + bytes(64)
    return [b"\0" + whole, b"\x06" + whole + b"\0\0\0\2x", b"\xff" + whole + b"\0\0\0\x41zz", b"\2\xff\xff\xff\xff"]
