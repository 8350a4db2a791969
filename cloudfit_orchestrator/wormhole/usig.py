"""The USIG of one epoch (MinBFT, TC'13 §4; protocol §2): a counter that certifies each value once and skips none."""

from collections import deque

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloudfit_orchestrator.model.channel import ErrorCode
from cloudfit_orchestrator.model.signing import DIGEST_BYTES, SIGNATURE_BYTES, public_bytes
from cloudfit_orchestrator.model.ui import RECENT_UIS, EpochEnd, epoch_end_bytes, ui_bytes
from cloudfit_orchestrator.wormhole.refusal import Refusal


class Usig:
    """Counter and key. Knows nothing of who may ask when: see `epoch.Epoch`."""

    def __init__(self, group: str, replica: str, c: int, key: Ed25519PrivateKey | None = None) -> None:
        """Make the key, unless it is given. The first counter value is 1."""
        self._group = group
        self._replica = replica
        self._c = c
        self._key: Ed25519PrivateKey | None = key or Ed25519PrivateKey.generate()
        self.public_key = public_bytes(self._key)
        self.cv = 0  # the last counter value that was certified
        self._recent: deque[tuple[int, bytes, bytes]] = deque(maxlen=RECENT_UIS)
        self._session = 0  # the newest; numbers never repeat, so an older one stays stale for ever
        self._valid = False
        self._end: EpochEnd | None = None

    def open_session(self) -> tuple[int, int]:
        """(session, next cv). Any older session is stale from now on."""
        self._session += 1
        self._valid = True
        return self._session, self.cv + 1

    def forget_session(self) -> None:
        """The guest greeted anew: the session of its earlier process ends."""
        self._valid = False

    def create_ui(self, session: int, cv: int, digest: bytes) -> bytes:
        """The certificate of (cv, digest). Raises Refusal; then nothing has changed, so what was pipelined behind the
        refused call is refused as well, its counter being too high.
        """
        self._check_session(session)
        if self._key is None:
            raise Refusal(ErrorCode.ENDED, f"epoch {self._c} has ended")
        if cv != self.cv + 1:
            raise Refusal(ErrorCode.WRONG_COUNTER, f"counter {cv} of epoch {self._c}, the next is {self.cv + 1}")
        certificate = self._key.sign(ui_bytes(self._group, self._replica, self._c, cv, digest))
        self.cv = cv
        self._recent.append((cv, digest, certificate))
        return certificate

    def recent(self, session: int) -> list[tuple[int, bytes, bytes]]:
        """The last <= 64 (cv, digest, certificate), oldest first."""
        self._check_session(session)
        return list(self._recent)

    def end(self) -> EpochEnd:
        """Close for good: sign EPOCH-END, destroy the key. The same statement on repetition."""
        if self._key is not None:
            _, digest, certificate = self._recent[-1] if self._recent else (0, bytes(DIGEST_BYTES), b"")
            unsigned = EpochEnd(
                self._replica, self._c, self.cv, digest, certificate or bytes(SIGNATURE_BYTES), bytes(SIGNATURE_BYTES)
            )
            signature = self._key.sign(epoch_end_bytes(self._group, unsigned))
            self._end = EpochEnd(self._replica, self._c, self.cv, digest, unsigned.last_certificate, signature)
            self._key = None
        assert self._end is not None
        return self._end

    def _check_session(self, session: int) -> None:
        if not self._valid or session != self._session:
            raise Refusal(ErrorCode.STALE_SESSION, f"session {session} of epoch {self._c} is not the newest")
