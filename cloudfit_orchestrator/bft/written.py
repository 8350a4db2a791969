"""What a read depends on: the keys that it looked at, and the slot in which they were written last (protocol §7)."""

import zlib
from collections.abc import Iterable, Iterator

from cloudfit_orchestrator.bft.store import ServiceView, StateStore
from cloudfit_orchestrator.model.errors import RefusedError


class Written:
    """In which slot keys were written last, by 1,024 classes of keys."""

    CLASSES = 1024

    def __init__(self) -> None:
        self._last = [0] * self.CLASSES
        self._any = 0

    def begin(self, slot: int) -> None:
        """A state was taken over: all that is known is that nothing was written after `slot`."""
        self._last = [slot] * self.CLASSES
        self._any = slot

    def note(self, keys: Iterable[bytes], slot: int) -> None:
        """`keys` were written in `slot`."""
        last, classes = self._last, self.CLASSES
        for key in keys:
            last[zlib.crc32(key) % classes] = slot
            self._any = slot

    def last(self, keys: Iterable[bytes]) -> int:
        """The last slot in which one of `keys`, or one of its class, was written."""
        return max((self._last[zlib.crc32(key) % self.CLASSES] for key in keys), default=0)

    def last_of_all(self) -> int:
        """The last slot in which anything was written."""
        return self._any


class ReadView(ServiceView):
    """A store that a service may only read; remembers what it read."""

    def __init__(self, store: StateStore) -> None:
        super().__init__(store)
        self.keys: list[bytes] = []
        self.all = False  # it looked for keys: any write may matter
        self.looked = 0  # entries that it went through so

    def get(self, key: bytes) -> bytes | None:
        """See `StateStore`."""
        self.keys.append(key)
        return super().get(key)

    def items(self, prefix: bytes = b"", after: bytes | None = None) -> Iterator[tuple[bytes, bytes]]:
        """See `StateStore`."""
        self.all = True
        return self._counted(super().items(prefix, after))

    def _counted(self, items: Iterator[tuple[bytes, bytes]]) -> Iterator[tuple[bytes, bytes]]:
        for item in items:
            self.looked += 1
            yield item

    def put(self, key: bytes, value: bytes) -> bool:
        """Refused."""
        del key, value
        raise RefusedError("a read changes nothing")

    def delete(self, key: bytes) -> bool:
        """Refused."""
        del key
        raise RefusedError("a read changes nothing")
