"""A TCP forwarder that delays every byte by the same time in each direction, without reordering or limiting them.

A worker of `processes.Worker`. First object: {"routes": [{"listen": port, "to": name, "delay_s": seconds}]}; each
further one {"targets": {name: "host:port"}} says where a name is. Both are answered by {"ready": true}.
"""

import asyncio
import json
import sys
from collections import deque
from collections.abc import Callable
from typing import Any, cast

from cloudfit_orchestrator.bench.processes import LOOPBACK

MAX_UNDER_WAY = 64 << 20  # bytes of one direction; beyond it the sender waits, as for any full pipe


class Direction(asyncio.Protocol):
    """Reads one side of a connection and writes to `other` after the delay."""

    def __init__(self, delay_s: float, opened: Callable[["Direction"], None] | None = None) -> None:
        """`opened` hears of the connection once it stands; `other` is set by `pair`."""
        self._opened = opened
        self._delay_s = delay_s
        self._under_way: deque[tuple[float, bytes | None]] = deque()  # None: the end
        self._size = 0
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.other: Direction | None = None
        self.full = False  # this side takes no more for now

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Held until the other side stands."""
        self._transport = cast("asyncio.Transport", transport)
        self._transport.pause_reading()
        if self._opened is not None:
            self._opened(self)

    def pair(self, other: "Direction") -> None:
        """Both sides stand: let bytes through."""
        self.other = other
        if self._transport is None:  # it hung up meanwhile
            other.close()
        elif not self._transport.is_reading():
            self._transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        """Send it on its way."""
        self._put(data)
        if self._size > MAX_UNDER_WAY and self._transport is not None:
            self._transport.pause_reading()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  asyncio's signature
        """The other side hears of it as late as of everything."""
        self._transport = None
        self._put(None)

    def pause_writing(self) -> None:
        """The side is slow, or stopped."""
        self.full = True

    def resume_writing(self) -> None:
        """It caught up."""
        self.full = False
        if self.other is not None:
            self.other.arrived()

    def write(self, data: bytes) -> None:
        """To this side."""
        if self._transport is not None:
            self._transport.write(data)

    def close(self) -> None:
        """End this side, once it has what was written."""
        if self._transport is not None:
            self._transport.close()

    def _put(self, data: bytes | None) -> None:
        self._under_way.append((asyncio.get_running_loop().time() + self._delay_s, data))
        self._size += len(data or b"")
        if self._timer is None and not (self.other is not None and self.other.full):
            self._wait()

    def _wait(self) -> None:
        self._timer = asyncio.get_running_loop().call_at(self._under_way[0][0], self.arrived)

    def arrived(self) -> None:
        """Hand over what has been under way for long enough, while the other side takes it."""
        if self._timer is not None:
            self._timer.cancel()
        now_s = asyncio.get_running_loop().time()
        self._timer = None
        blocked = self.other is not None and self.other.full
        while self._under_way and self._under_way[0][0] <= now_s and not blocked:
            data = self._under_way.popleft()[1]
            if self.other is not None and data is not None:
                self.other.write(data)
            elif self.other is not None:
                self.other.close()
            self._size -= len(data or b"")
            blocked = self.other is not None and self.other.full
        if self._under_way and not blocked:
            self._wait()
        if self._size <= MAX_UNDER_WAY // 2 and self._transport is not None and not self._transport.is_reading():
            self._transport.resume_reading()


class Proxy:
    """All routes of one process."""

    def __init__(self) -> None:
        """Forwards nothing yet."""
        self.targets: dict[str, str] = {}
        self._dials: set[asyncio.Task[None]] = set()

    async def listen(self, port: int, to: str, delay_s: float) -> None:
        """Open a route. Raises OSError."""

        def opened(near: Direction) -> None:
            dial = asyncio.get_running_loop().create_task(self._dial(near, to, delay_s))
            self._dials.add(dial)
            dial.add_done_callback(self._dials.discard)

        await asyncio.get_running_loop().create_server(lambda: Direction(delay_s, opened), LOOPBACK, port)

    async def _dial(self, near: Direction, to: str, delay_s: float) -> None:
        host, _, port = self.targets.get(to, "").rpartition(":")
        try:
            if not port:
                raise ConnectionRefusedError(f"{to} is not known yet")
            _, far = await asyncio.get_running_loop().create_connection(lambda: Direction(delay_s), host, int(port))
        except OSError:
            near.close()
            return
        near.pair(far)
        far.pair(near)


async def serve() -> None:
    """Orders, until standard input ends."""
    lines = asyncio.StreamReader(limit=1 << 20)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    proxy = Proxy()
    while line := await lines.readline():
        order: dict[str, Any] = json.loads(line)
        proxy.targets |= order.get("targets", {})
        for route in order.get("routes", []):
            await proxy.listen(route["listen"], route["to"], route["delay_s"])
        print(json.dumps({"ready": True}), flush=True)


if __name__ == "__main__":
    asyncio.run(serve())
