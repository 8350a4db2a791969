"""How many connections there may be, and what they may hold: who takes more than his share loses his own first.

A replica that runs out of file descriptors cannot write its log, and one that runs out of memory is gone: so clients
share what is left when peers, disk and wormhole have theirs. Of several clients, the one who has most gives way.
"""

import resource
from collections import Counter
from collections.abc import Iterator

from cloudfit_orchestrator.guest.links import Link

MAX_LINKS_PER_PEER = 2  # a dialler that lost its connection is here again before we notice
MAX_LINKS_PER_CLIENT = 16  # gateways share a key
MAX_CLIENT_LINKS = 4096  # of all clients; each costs some 50 KiB of TLS
MAX_CLIENT_BYTES = 64 << 20  # that all clients' connections hold: half frames, and answers that are not read
FRAME_TIMEOUT_S = 60.0  # for one frame to come in whole: 8 MiB at 1 Mbit/s
FILES_WANTED = 8192
FILES_RESERVED = 384  # for 64 peers both ways, 64 handshakes, and the files of log, snapshots, sockets
MIN_CLIENT_LINKS = 16

Owner = str | bytes  # a peer id, or a client's raw key


def raise_file_limit() -> int:
    """Let this process open as many files as it is allowed to (soft limit to hard limit); how many that are."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES_WANTED if hard == resource.RLIM_INFINITY else min(FILES_WANTED, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return FILES_WANTED if soft == resource.RLIM_INFINITY else soft


class Crowd:
    """The accepted connections, by owner."""

    def __init__(self, counters: Counter[str]) -> None:
        """Raises the limit of open files, by which it sets its own."""
        room = raise_file_limit() - FILES_RESERVED
        self.most = max(MIN_CLIENT_LINKS, min(MAX_CLIENT_LINKS, room))
        self._counters = counters
        self._links: dict[Owner, list[Link]] = {}
        self._of_clients = 0

    def of(self, owner: Owner) -> list[Link]:
        """The connections of one owner, oldest first."""
        return self._links.get(owner, [])

    def join(self, owner: Owner, link: Link) -> None:
        """A connection was identified. Where there are too many, the oldest of its owner ends; or, of all clients, the
        oldest of who has most; or this one, if nobody has more than its owner.
        """
        mine = self._links.setdefault(owner, [])
        mine.append(link)
        client = isinstance(owner, bytes)
        self._of_clients += client
        if len(mine) > (MAX_LINKS_PER_CLIENT if client else MAX_LINKS_PER_PEER):
            self._end(owner, mine[0], "too many connections of one owner")
        elif self._of_clients > self.most:
            greediest = max(self._clients(), key=lambda known: len(self._links[known]))
            if len(self._links[greediest]) > len(mine):
                self._end(greediest, self._links[greediest][0], "too many connections of all clients")
            else:
                self._end(owner, link, "too many connections of all clients")

    def leave(self, owner: Owner, link: Link) -> None:
        """A connection is over, or will be."""
        links = self._links.get(owner, [])
        if link in links:
            links.remove(link)
            self._of_clients -= isinstance(owner, bytes)
            if not links:
                del self._links[owner]

    def sweep(self, now_s: float) -> None:
        """End connections that stopped in the middle of a frame, and those that hold what others need."""
        for owner, links in list(self._links.items()):
            for link in list(links):
                if link.reads_one_frame_since(now_s) > FRAME_TIMEOUT_S:
                    self._end(owner, link, "frame not completed in time")
        held = {client: sum(link.held for link in self._links[client]) for client in self._clients()}
        while sum(held.values()) > MAX_CLIENT_BYTES:
            greediest = max(held, key=lambda client: held[client])
            link = max(self._links[greediest], key=lambda link: link.held)
            held[greediest] -= link.held
            self._end(greediest, link, "holds more memory than its share")

    @property
    def status(self) -> dict[str, int]:
        """Figures."""
        return {"clients": sum(1 for _ in self._clients()), "client links": self._of_clients}

    def _clients(self) -> Iterator[bytes]:
        return (owner for owner in self._links if isinstance(owner, bytes))

    def _end(self, owner: Owner, link: Link, reason: str) -> None:
        self.leave(owner, link)
        link.abort(reason)
