"""One counter: the smallest service that shows a lost or a doubled execution."""

import struct

from cloudfit_orchestrator.bft.store import StateStore

_KEY = b"counter"
_NUMBER = struct.Struct(">q")
_REFUSED = b"an operation is a signed 64 bit number to add, and the sum must be one too"


def add(delta: int) -> bytes:
    """The operation that adds `delta`; 0 reads."""
    return _NUMBER.pack(delta)


def value(result: bytes) -> int | None:
    """The counter after an operation, None if it was refused."""
    return int(_NUMBER.unpack(result)[0]) if len(result) == _NUMBER.size else None


class CounterService:
    """See `bft.interfaces.Service`."""

    def execute(self, store: StateStore, operation: bytes) -> bytes:
        """Add and answer with the sum; anything else changes nothing and is answered with a sentence."""
        if len(operation) != _NUMBER.size:
            return _REFUSED
        (delta,) = _NUMBER.unpack(operation)
        held = store.get(_KEY)
        total = delta + (_NUMBER.unpack(held)[0] if held is not None else 0)
        try:
            result = _NUMBER.pack(total)
        except struct.error:
            return _REFUSED
        if delta:
            store.put(_KEY, result)
        return result

    def read(self, store: StateStore, operation: bytes) -> bytes | None:
        """See `bft.interfaces.Readable`: adding nothing changes nothing."""
        return self.execute(store, operation) if operation == add(0) else None
