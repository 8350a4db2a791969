"""One epoch of one incarnation: the keys of one configuration, and the table of what is allowed when (protocol §2)."""

from collections.abc import Callable
from enum import StrEnum

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloudfit_orchestrator.model.channel import ErrorCode
from cloudfit_orchestrator.model.errors import RefusedError
from cloudfit_orchestrator.model.statement import BEFORE_ACTIVE, Kind
from cloudfit_orchestrator.model.ui import EpochEnd
from cloudfit_orchestrator.wormhole.kss import Kss
from cloudfit_orchestrator.wormhole.refusal import Refusal
from cloudfit_orchestrator.wormhole.usig import Usig

KeyMaker = Callable[[str], Ed25519PrivateKey]  # the key of that label, which no other label of the incarnation has


def fresh_key(label: str) -> Ed25519PrivateKey:
    """A random one: it exists once, in this process."""
    del label
    return Ed25519PrivateKey.generate()


class State(StrEnum):
    """PREPARED: keys exist, ACTIVE(c) does not. FROZEN: refuses like ENDED, but can be undone. ENDED: no keys."""

    PREPARED = "prepared"
    OPEN = "open"
    FROZEN = "frozen"
    ENDED = "ended"


# state, order -> state; what is missing is refused. Orders that change nothing are safe to repeat.
TRANSITIONS: dict[tuple[State, str], State] = {
    (State.PREPARED, "activate"): State.OPEN,
    (State.OPEN, "activate"): State.OPEN,
    (State.FROZEN, "activate"): State.FROZEN,
    (State.ENDED, "activate"): State.ENDED,
    (State.OPEN, "freeze"): State.FROZEN,
    (State.FROZEN, "freeze"): State.FROZEN,
    (State.ENDED, "freeze"): State.ENDED,
    (State.FROZEN, "thaw"): State.OPEN,
    (State.OPEN, "thaw"): State.OPEN,
    (State.PREPARED, "end"): State.ENDED,
    (State.OPEN, "end"): State.ENDED,
    (State.FROZEN, "end"): State.ENDED,
    (State.ENDED, "end"): State.ENDED,
}

_WHY = {
    State.PREPARED: (ErrorCode.NOT_ACTIVE, "is not active yet"),
    State.FROZEN: (ErrorCode.FROZEN, "is frozen"),
    State.ENDED: (ErrorCode.ENDED, "has ended"),
}


class Epoch:
    """Keys and counter of (group, replica, incarnation, c)."""

    def __init__(self, group: str, replica: str, c: int, make: KeyMaker = fresh_key) -> None:
        """Make the keys; nothing but CONFIRM is signed before `activate`."""
        self.c = c
        self.state = State.PREPARED
        self._usig = Usig(group, replica, c, make(f"usig/{c}"))
        self._kss = Kss(group, replica, c, make(f"kss/{c}"))

    @property
    def usig_key(self) -> bytes:
        """Raw public key of the UIs."""
        return self._usig.public_key

    @property
    def kss_key(self) -> bytes:
        """Raw public key of the statements."""
        return self._kss.public_key

    @property
    def cv(self) -> int:
        """The last counter value that was certified; 0 before the first."""
        return self._usig.cv

    def activate(self) -> None:
        """ACTIVE(c) is installed."""
        self._order("activate")

    def freeze(self) -> int:
        """Refuse everything until `thaw`; returns the counter."""
        self._order("freeze")
        return self.cv

    def thaw(self) -> int:
        """Undo `freeze`; returns the counter."""
        self._order("thaw")
        return self.cv

    def end(self) -> EpochEnd:
        """Close for good: the keys are destroyed, EPOCH-END is kept."""
        self._order("end")
        self._kss.destroy()
        return self._usig.end()

    def open_session(self) -> tuple[int, int]:
        """(session, next cv). Also after the end: a restarted guest still has to learn which UIs it got."""
        if self.state is State.PREPARED:
            raise self._refusal()
        return self._usig.open_session()

    def forget_session(self) -> None:
        """See `Usig.forget_session`."""
        self._usig.forget_session()

    def recent(self, session: int) -> list[tuple[int, bytes, bytes]]:
        """See `Usig.recent`."""
        return self._usig.recent(session)

    def create_ui(self, session: int, cv: int, digest: bytes) -> bytes:
        """See `Usig.create_ui`; only in an open epoch."""
        if self.state is not State.OPEN:
            raise self._refusal()
        return self._usig.create_ui(session, cv, digest)

    def sign(self, kind: Kind, body: bytes) -> bytes:
        """See `Kss.sign`; only in an open epoch, but for what may be signed before ACTIVE(c)."""
        if self.state is not State.OPEN and not (self.state is State.PREPARED and kind in BEFORE_ACTIVE):
            raise self._refusal()
        return self._kss.sign(kind, body)

    def _order(self, order: str) -> None:
        to = TRANSITIONS.get((self.state, order))
        if to is None:
            raise RefusedError(f"epoch {self.c} is {self.state}: it cannot {order}")
        self.state = to

    def _refusal(self) -> Refusal:
        code, why = _WHY[self.state]
        return Refusal(code, f"epoch {self.c} {why}")
