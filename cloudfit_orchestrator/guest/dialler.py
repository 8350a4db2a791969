"""Keeps one connection to a replica: dials, checks who answered, and dials again with a bounded back-off."""

import asyncio
import random
import socket
from collections import Counter
from collections.abc import Callable

from cloudfit_orchestrator.guest.links import Link, SendQueue, notice_dead_peers
from cloudfit_orchestrator.guest.tls import Directory, Peer
from cloudfit_orchestrator.guest.turn import Turn
from cloudfit_orchestrator.model.errors import BadError
from cloudfit_orchestrator.wormhole.tls import Credentials

HANDSHAKE_TIMEOUT_S = 10.0  # under TCG a handshake takes tens of milliseconds
CONNECT_TIMEOUT_S = 2.0  # the kernel would wait longer between its own tries than a machine needs to boot
FIRST_WAIT_S = 0.05
LAST_WAIT_S = 2.0
MAX_PORT = 65535


class Dialler:
    """One peer, for as long as it is wanted. Frames wait in `queue` while there is no connection."""

    def __init__(
        self,
        peer: Peer,
        *,
        group: str,
        credentials: Credentials,
        received: Callable[[Link, bytes], None],
        limit: int,
        queue: SendQueue,
        counters: Counter[str],
        turn: Turn,
    ) -> None:
        """Begins to dial. `received` gets the bodies that come back, of at most `limit` bytes. `turn`: see `Link`."""
        self.peer = peer
        self._directory = Directory(group, [peer])
        self._credentials = credentials
        self._received = received
        self._limit = limit
        self._queue = queue
        self._counters = counters
        self._turn = turn
        self._link: Link | None = None
        self._task = asyncio.get_running_loop().create_task(self._run())

    @property
    def connected(self) -> bool:
        """Whether a frame sent now would leave now."""
        return self._link is not None

    def send(self, body: bytes, *, soon: bool = True) -> None:
        """Queue a frame; one that need not go `soon` waits for the next that must, or for `flush`."""
        self._queue.put(body)
        if soon:
            self.flush()

    def flush(self) -> None:
        """Send what is queued, at the end of this turn."""
        if self._link is not None and self._queue:
            self._link.flush_soon()

    def close(self) -> None:
        """Stop, dropping what waits."""
        self._task.cancel()
        if self._link is not None:
            self._link.abort("peer forgotten")

    async def _run(self) -> None:
        host, _, port = self.peer.address.rpartition(":")
        if not port.isascii() or not port.isdigit() or int(port) > MAX_PORT:
            self._counters["malformed address"] += 1
            return
        loop = asyncio.get_running_loop()
        wait_s = FIRST_WAIT_S
        while True:
            try:
                context = self._credentials.client_context(self.peer.channel_ca)
                connection = await _connect(host.strip("[]"), int(port))
                _, link = await loop.create_connection(
                    self._make,
                    sock=connection,
                    ssl=context,
                    server_hostname="",
                    ssl_handshake_timeout=HANDSHAKE_TIMEOUT_S,
                )
            except (OSError, TimeoutError, BadError) as error:
                self._counters[f"dial failed: {type(error).__name__}"] += 1
            else:
                made_s = loop.time()
                self._link = link
                await link.closed
                self._link = None
                if loop.time() - made_s > LAST_WAIT_S:
                    wait_s = FIRST_WAIT_S  # not so where the peer accepts and hangs up
            await asyncio.sleep(wait_s * random.uniform(0.5, 1))
            wait_s = min(2 * wait_s, LAST_WAIT_S)

    def _make(self) -> Link:
        return Link(
            identify=lambda _, certificate: self._directory.peer(certificate) == self.peer.peer_id,
            received=self._received,
            ended=lambda _: None,
            limit=self._limit,
            queue=self._queue,
            counters=self._counters,
            turn=self._turn,
        )


async def _connect(host: str, port: int) -> socket.socket:
    """A TCP connection. Raises OSError or TimeoutError."""
    loop = asyncio.get_running_loop()
    family, kind, protocol, _, address = (await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM))[0]
    connection = socket.socket(family, kind, protocol)
    try:
        connection.settimeout(0)
        notice_dead_peers(connection)
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            await loop.sock_connect(connection, address)
    except BaseException:
        connection.close()
        raise
    return connection
