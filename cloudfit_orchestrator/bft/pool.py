"""Clients' bundles that wait to be ordered; bounded, with a clear refusal when full."""

from dataclasses import dataclass

from cloudfit_orchestrator.bft.batch import BUNDLE_BYTES
from cloudfit_orchestrator.bft.messages import BundleBody

MAX_BUNDLES = 4096
MAX_BYTES = 64 << 20
MAX_OF_CLIENT = 512  # bundles of one client: it cannot crowd out the others
MAX_BYTES_OF_CLIENT = 8 << 20  # nor by few and large ones


@dataclass(slots=True)
class Waiting:
    """One bundle."""

    name: bytes  # its `bundle_name`
    data: bytes
    body: BundleBody
    since_s: float


class Pool:
    """Bundles in order of arrival."""

    def __init__(self) -> None:
        self._bundles: dict[bytes, Waiting] = {}
        self._fresh: dict[bytes, Waiting] = {}  # those not proposed by this replica in the current view
        self._kept: dict[bytes, Waiting] = {}  # those of them not handed on either
        self._of_client: dict[bytes, tuple[int, int]] = {}  # client -> bundles, bytes
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._bundles)

    def add(self, name: bytes, data: bytes, body: BundleBody, now_s: float) -> bool:
        """Take a verified bundle in, by its `bundle_name`. False if there is no room."""
        if name in self._bundles:
            return True
        count, size = self._of_client.get(body.client, (0, 0))
        if count >= MAX_OF_CLIENT or size + len(data) > MAX_BYTES_OF_CLIENT:
            return False
        while len(self._bundles) >= MAX_BUNDLES or self._bytes + len(data) > MAX_BYTES:
            if not self._give_way(body.client, len(data)):
                return False
        self._bundles[name] = self._fresh[name] = self._kept[name] = Waiting(name, data, body, now_s)
        self._of_client[body.client] = count + 1, size + len(data)
        self._bytes += len(data)
        return True

    def _give_way(self, client: bytes, size: int) -> bool:
        """The client that has most lets go of its newest bundle that is not proposed here, and sends it again: a few
        clients could keep all the room for ever. False if there is none, or `client` would have as much.
        """
        by_count = len(self._bundles) >= MAX_BUNDLES
        shares = {of: count if by_count else size_of for of, (count, size_of) in self._of_client.items()}
        most = max(shares, key=shares.__getitem__)
        if shares[most] <= shares.get(client, 0) + (1 if by_count else size):
            return False
        newest = next((waiting for waiting in reversed(self._fresh.values()) if waiting.body.client == most), None)
        if newest is None:
            return False
        self.remove(newest.name)
        return True

    def remove(self, name: bytes) -> None:
        """The bundle was executed, or will never be."""
        waiting = self._bundles.pop(name, None)
        self._fresh.pop(name, None)
        self._kept.pop(name, None)
        if waiting is not None:
            self._bytes -= len(waiting.data)
            count, size = self._of_client.pop(waiting.body.client)
            if count > 1:
                self._of_client[waiting.body.client] = count - 1, size - len(waiting.data)

    def take(self, max_requests: int, max_bytes: int) -> list[bytes]:
        """Bundles for the next batch, oldest first; they are marked as proposed."""
        names: list[bytes] = []
        chosen: list[bytes] = []
        for name, waiting in self._fresh.items():
            max_requests -= len(waiting.body.requests)
            max_bytes -= len(waiting.data) + BUNDLE_BYTES
            if max_requests < 0 or max_bytes < 0:
                break
            names.append(name)
            chosen.append(waiting.data)
        for name in names:
            del self._fresh[name]
            self._kept.pop(name, None)
        return chosen

    @property
    def unproposed(self) -> bool:
        """Whether `take` would give something (unless it is too large for any batch)."""
        return bool(self._fresh)

    @property
    def kept(self) -> bool:
        """Whether `to_forward` would give something."""
        return bool(self._kept)

    def release(self) -> None:
        """A new view: what was proposed in the old one may have to be proposed again."""
        self._fresh = dict(self._bundles)
        self._kept = dict(self._bundles)

    def forward_again(self) -> None:
        """They may have found no room where they were handed on to."""
        self._kept = dict(self._fresh)

    def to_forward(self) -> list[Waiting]:
        """Bundles neither proposed here nor handed on yet; from now on they count as handed on."""
        found, self._kept = list(self._kept.values()), {}
        return found

    def oldest_s(self) -> float | None:
        """When the bundle that waits longest arrived."""
        return next((waiting.since_s for waiting in self._bundles.values()), None)

    def bundles(self) -> list[Waiting]:
        """All of them."""
        return list(self._bundles.values())
