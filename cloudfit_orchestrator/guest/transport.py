"""Peers and clients over TCP (docs/contracts.md): two simplex connections a pair of replicas, one a client.

A replica dials every peer that it sends to, and only reads from the connections that it accepts from peers. Who is who
is decided in guest/tls.py.
"""

import asyncio
import socket
from collections import Counter
from collections.abc import Callable, Iterable

from cloudfit_orchestrator.bft.messages import MAX_CLIENT_FRAME, MAX_PEER_FRAME
from cloudfit_orchestrator.guest.crowd import Crowd
from cloudfit_orchestrator.guest.dialler import HANDSHAKE_TIMEOUT_S, Dialler
from cloudfit_orchestrator.guest.links import Link, SendQueue, notice_dead_peers
from cloudfit_orchestrator.guest.tls import Directory, Peer
from cloudfit_orchestrator.guest.turn import Turn
from cloudfit_orchestrator.model.record import Client
from cloudfit_orchestrator.wormhole.tls import Credentials

MAX_PEER_QUEUE = 32 << 20  # bytes that wait for one peer: a few chunks, or a window of batches
MAX_CLIENT_QUEUE = 4 << 20  # bytes that wait for one client's connection
MAX_HANDSHAKES = 64  # at once; strangers can occupy no more
ACCEPT_RETRY_S = 0.05
SWEEP_S = 0.25  # between two looks at what connections hold: bounds what they can take in between
_BACKLOG = 128


class Transport:
    """The listener, the connections accepted, and a dialler for each peer that was ever sent to."""

    def __init__(
        self,
        *,
        group: str,
        credentials: Credentials,
        from_peer: Callable[[str, bytes], None],
        from_client: Callable[[bytes, bytes], None],
        turn: Turn | None = None,
    ) -> None:
        """Accepts nobody before `configure`. `turn`: see `Link`."""
        self.credentials = credentials
        self.directory = Directory(group)
        self.counters: Counter[str] = Counter()
        self._from_peer, self._from_client = from_peer, from_client
        self._turn = turn or Turn()
        self._diallers: dict[str, Dialler] = {}
        self._crowd = Crowd(self.counters)
        self._owners: dict[Link, tuple[str | bytes, bytes]] = {}
        self._context = credentials.server_context([])
        self._handshakes: dict[asyncio.Task[None], tuple[socket.socket, str]] = {}  # with the address; oldest first
        self._listener: socket.socket | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def listen(self, host: str, port: int) -> int:
        """Listen on TCP; `port` 0 chooses one. Returns the port. Raises OSError."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family, backlog=_BACKLOG)
        self._listener.settimeout(0)
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._accept(self._listener)), loop.create_task(self._sweep())]
        return int(self._listener.getsockname()[1])

    def configure(self, peers: Iterable[Peer], clients: Iterable[Client]) -> None:
        """Accept and dial exactly these from now on; connections of all others are closed."""
        old, self.directory = self.directory, Directory(self.directory.group, peers, clients)
        self.counters["malformed authority"] += len(self.directory.malformed)
        if set(old.trusted) != set(self.directory.trusted):
            self._context = self.credentials.server_context(self.directory.trusted)
        for link, (_, certificate) in list(self._owners.items()):
            if self.directory.client(certificate) is None and self.directory.peer(certificate) is None:
                link.abort("no longer known")
        for peer_id, dialler in list(self._diallers.items()):
            now = self.directory.peers.get(peer_id)
            same = now is not None and (now.address, now.channel_ca) == (dialler.peer.address, dialler.peer.channel_ca)
            if not same:
                dialler.close()
                del self._diallers[peer_id]

    def send(self, peer_id: str, body: bytes, *, soon: bool = True) -> None:
        """Send to a peer, dialling it the first time. May be lost; to an unknown peer it is, and counted. What need not
        go `soon` waits for what must, or for `flush`.
        """
        peer = self.directory.peers.get(peer_id)
        if peer is None or len(body) > MAX_PEER_FRAME:
            self.counters["not sent: unknown peer" if peer is None else "not sent: too large"] += 1
            return
        dialler = self._diallers.get(peer_id)
        if dialler is None:
            dialler = self._diallers[peer_id] = self._dialler(peer)
        dialler.send(body, soon=soon)

    def flush(self) -> None:
        """Send what waits."""
        for dialler in self._diallers.values():
            dialler.flush()

    def answer(self, client: bytes, body: bytes) -> None:
        """Send to all connections of the client with that raw key."""
        for link in self._crowd.of(client):
            link.send(body)

    async def close(self) -> None:
        """Close everything."""
        tasks = [*self._handshakes, *self._tasks]
        for task in tasks:
            task.cancel()
        for dialler in self._diallers.values():
            dialler.close()
        for link in list(self._owners):
            link.abort("transport closed")
        if self._listener is not None:
            self._listener.close()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, address = await loop.sock_accept(listener)
            except OSError as error:  # e.g. out of file descriptors: later again
                self.counters[f"accept failed: {error.errno}"] += 1
                await asyncio.sleep(ACCEPT_RETRY_S)
                continue
            if len(self._handshakes) >= MAX_HANDSHAKES:
                self._refuse_one()
            notice_dead_peers(connection)
            task = loop.create_task(self._greet(connection))
            self._handshakes[task] = connection, str(address[0])
            task.add_done_callback(self._greeted)
            await asyncio.sleep(0)  # accepting what waits already would not: a flood must not have the loop for itself

    def _refuse_one(self) -> None:
        """Give up a handshake: of the address that has most of them the oldest, the likeliest to be a stranger's."""
        self.counters["refused: too many handshakes"] += 1
        waiting = [(task, address) for task, (_, address) in self._handshakes.items() if not task.cancelling()]
        for most, _ in Counter(address for _, address in waiting).most_common(1):
            next(task for task, address in waiting if address == most).cancel()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            self._crowd.sweep(asyncio.get_running_loop().time())

    async def _greet(self, connection: socket.socket) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                self._make, connection, ssl=self._context, ssl_handshake_timeout=HANDSHAKE_TIMEOUT_S
            )
        except (OSError, TimeoutError) as error:
            self.counters[f"handshake failed: {type(error).__name__}"] += 1
            connection.close()

    def _dialler(self, peer: Peer) -> Dialler:
        return Dialler(
            peer,
            group=self.directory.group,
            credentials=self.credentials,
            received=lambda link, _: link.abort("peer answered on a connection made for sending"),
            limit=0,
            queue=SendQueue(MAX_PEER_QUEUE, self.counters, "dropped for a peer"),
            counters=self.counters,
            turn=self._turn,
        )

    def _greeted(self, task: "asyncio.Task[None]") -> None:
        connection, _ = self._handshakes.pop(task)
        if task.cancelled():  # perhaps before its first step
            connection.close()

    def _make(self) -> Link:
        return Link(
            identify=self._identify,
            received=self._received,
            ended=self._ended,
            limit=MAX_PEER_FRAME,
            queue=SendQueue(MAX_CLIENT_QUEUE, self.counters, "dropped for a client"),
            counters=self.counters,
            turn=self._turn,
        )

    def _identify(self, link: Link, certificate: bytes) -> bool:
        client = self.directory.client(certificate)
        peer_id = None if client is not None else self.directory.peer(certificate)
        if client is not None:
            link.limit_frames(MAX_CLIENT_FRAME)
        owner = client if client is not None else peer_id
        if owner is None:
            return False
        self._owners[link] = owner, certificate
        self._crowd.join(owner, link)
        return True

    def _received(self, link: Link, body: bytes) -> None:
        owner, _ = self._owners[link]
        if isinstance(owner, bytes):
            self._from_client(owner, body)
        else:
            self._from_peer(owner, body)

    def _ended(self, link: Link) -> None:
        owner, _ = self._owners.pop(link, ("", b""))
        self._crowd.leave(owner, link)
