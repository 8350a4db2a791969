"""The batches that a replica holds, by digest, with their verdict."""

from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from cloudfit_orchestrator.bft.batch import BundleChecker, Checked

MAX_LOOSE_BYTES = 16 << 20  # held though no proposal names them: a faulty member can send many, and large ones


@dataclass(slots=True)
class _Held:
    data: bytes
    valid: bool
    checked: Checked | None  # decoded it takes as much room again, which only what is not executed yet may take
    slot: int  # the highest slot that a proposal names it for; -1 if none yet


class Batches:
    """Batches by digest, valid or not, with their verdict."""

    def __init__(self, checker: BundleChecker, max_loose: int) -> None:
        """`max_loose`: batches held that no proposal names yet."""
        self.checker = checker
        self._max_loose = max_loose
        self._held: dict[bytes, _Held] = {}
        self._loose: dict[bytes, None] = {}  # those that no proposal names yet, oldest first
        self._loose_bytes = 0
        self.bytes = 0  # of all that are held

    def add(self, digest: bytes, data: bytes) -> bool:
        """Hold a batch whose digest the caller computed. False if it is held already, or larger than any valid one:
        that is as good as missing, since nobody who is correct votes for it, and a window of such would fill memory
        and disk.
        """
        if digest in self._held or len(data) > self.checker.max_bytes:
            return False
        while self._loose and (len(self._loose) >= self._max_loose or self._loose_bytes + len(data) > MAX_LOOSE_BYTES):
            oldest = next(iter(self._loose))
            self._tighten(oldest)
            self._forget(oldest)
        self._hold(digest, data, self.checker.valid(data))
        return True

    def restore(self, digest: bytes, data: bytes) -> None:
        """Hold a batch of the own log, of which none may be lost: what names it comes later."""
        if digest not in self._held:
            self._hold(digest, data, self.checker.valid(data))
            self.executed(digest)  # most of them were

    def _hold(self, digest: bytes, data: bytes, checked: Checked | None) -> None:
        self._held[digest] = _Held(data, checked is not None, checked, -1)
        self._loose[digest] = None
        self._loose_bytes += len(data)
        self.bytes += len(data)

    def _tighten(self, digest: bytes) -> None:
        if digest in self._loose:
            del self._loose[digest]
            self._loose_bytes -= len(self._held[digest].data)

    def _forget(self, digest: bytes) -> None:
        self.bytes -= len(self._held.pop(digest).data)

    def restored(self, slot: int) -> None:
        """The own log has been read: what no entry names may still be voted for in slots up to `slot`, and is kept
        until these are settled.
        """
        for digest in self._loose:
            self._held[digest].slot = slot
        self._loose.clear()
        self._loose_bytes = 0

    def name(self, digest: bytes, slot: int) -> bool:
        """A proposal names the batch for `slot`. False if it is not held."""
        held = self._held.get(digest)
        if held is None:
            return False
        held.slot = max(held.slot, slot)
        self._tighten(digest)
        return True

    def data(self, digest: bytes) -> bytes | None:
        """The batch, or None."""
        held = self._held.get(digest)
        return held.data if held else None

    def checked(self, digest: bytes) -> Checked | None:
        """The decoded batch if it is held and valid."""
        held = self._held.get(digest)
        if held is None:
            return None
        if held.valid and held.checked is None:
            held.checked = self.checker.valid(held.data)
        return held.checked

    def executed(self, digest: bytes) -> None:
        """The batch need not be at hand decoded any more."""
        if digest in self._held:
            self._held[digest].checked = None

    def valid(self, digest: bytes) -> bool | None:
        """The verdict on a batch, or None if it is not held."""
        held = self._held.get(digest)
        return None if held is None else held.valid

    def drop(self, below: int, but: AbstractSet[bytes] = frozenset()) -> None:
        """Forget batches that only slots up to `below` name, and that are not among `but`."""
        for digest in [d for d, held in self._held.items() if 0 <= held.slot <= below and d not in but]:
            self._forget(digest)

    def all(self) -> list[bytes]:
        """All batches held, also those whose proposal waits: it may be voted for before the log is cut again."""
        return [held.data for held in self._held.values()]
