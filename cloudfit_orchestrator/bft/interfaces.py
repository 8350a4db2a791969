"""What the core needs of the rooms above it."""

from typing import Protocol, runtime_checkable

from cloudfit_orchestrator.bft.store import StateStore


class Service(Protocol):
    """A deterministic service: its whole state is in the store, its result depends on nothing else.

    Keys under `StateStore.RESERVED` belong to the library and are refused by the store it is handed.
    """

    def execute(self, store: StateStore, operation: bytes) -> bytes:
        """Apply one client's `operation` and return its result. A malformed operation returns an error result; it
        never raises, and never changes the store half-way.
        """
        ...


@runtime_checkable
class Readable(Protocol):
    """A service that can answer some operations from the state as it is (protocol §7), without ordering them."""

    def read(self, store: StateStore, operation: bytes) -> bytes | None:
        """What `execute` would return for an operation that changes nothing; None for any other. `store` refuses to be
        changed.
        """
        ...
