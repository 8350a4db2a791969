"""What the core needs of the rooms above it."""

from typing import Protocol

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
