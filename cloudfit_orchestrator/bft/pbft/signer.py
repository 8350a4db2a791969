"""Signatures of own messages: asked for until they come. The KSS may refuse for a time, or its channel break."""

from collections.abc import Callable
from functools import partial

from cloudfit_orchestrator.bft.outbox import Outbox
from cloudfit_orchestrator.model.statement import LAYOUT, Kind

MAX_ASKED = 64  # under way at once: half of what the outbox holds for all kinds, and a channel's pipeline
RETRY_S = 0.5


class Signer:
    """Digests that are to be signed, in order. What they stand for is in the log by then."""

    def __init__(self, out: Outbox, c: int) -> None:
        self._out = out
        self._c = c
        self._waiting: dict[bytes, Callable[[bytes], None]] = {}
        self._asked: dict[bytes, float] = {}  # -> when

    def ask(self, digest: bytes, then: Callable[[bytes], None]) -> None:
        """`then(signature)`, some time."""
        self._waiting[digest] = then
        self._pump()

    def _pump(self) -> None:
        for digest in self._waiting:
            if len(self._asked) >= MAX_ASKED:
                return
            if digest not in self._asked:
                self._ask(digest)

    def _ask(self, digest: bytes) -> None:
        self._asked[digest] = self._out.now_s
        self._out.sign(self._c, Kind.PBFT, LAYOUT[Kind.PBFT].pack(digest), partial(self._signed, digest))

    def _signed(self, digest: bytes, signature: bytes) -> None:
        self._asked.pop(digest, None)
        then = self._waiting.pop(digest, None)
        if then is not None:
            then(signature)
        self._pump()

    def tick(self) -> None:
        """Ask again for what has not come."""
        for digest in [d for d, when in self._asked.items() if self._out.now_s - when >= RETRY_S]:
            if digest in self._waiting:
                self._ask(digest)
            else:
                del self._asked[digest]
        self._pump()

    def clear(self) -> None:
        """Nothing that waits is to be said any more."""
        self._waiting.clear()
        self._asked.clear()
