"""What the agent holds of one group's configuration chain: the newest ACTIVE and PREPARED record (protocol §6)."""

from dataclasses import dataclass

from cloudfit_orchestrator.model.errors import RefusedError
from cloudfit_orchestrator.model.record import ConfigRecord, Status, record_hash

MAX_SUPERSEDED = 64  # bases that PREPARED records named since the last ACTIVE; one is usual


@dataclass(frozen=True, slots=True)
class Held:
    """A verified record and its envelope."""

    envelope: bytes
    record: ConfigRecord


class GroupRecords:
    """Never goes back. Callers have verified signatures and confirmations."""

    def __init__(self) -> None:
        self.active: Held | None = None
        self.prepared: Held | None = None
        self._superseded: set[int] = set()

    def supersedes(self, c: int) -> bool:
        """Whether a held record ends configuration c: a PREPARED one on base c, or a later ACTIVE one."""
        return c in self._superseded or (self.active is not None and self.active.record.c > c)

    def check(self, new: Held) -> bool:
        """Whether `hold` would change anything; False for what is or was held. Raises RefusedError if it goes back."""
        c = new.record.c
        prepared = new.record.status is Status.PREPARED
        if self.active is not None and c <= self.active.record.c:
            if new.envelope == self.active.envelope or record_hash(new.envelope) == self.active.record.prepared:
                return False
            raise RefusedError(f"{_name(new)} is not later than {_name(self.active)}, which is held")
        if prepared and self.prepared is not None and c <= self.prepared.record.c:
            if new.envelope == self.prepared.envelope:
                return False
            raise RefusedError(f"{_name(new)} is not later than {_name(self.prepared)}, which is held")
        return True

    def hold(self, new: Held) -> None:
        """Take a record that `check` let pass."""
        if new.record.status is Status.PREPARED:
            self.prepared = new
            if new.record.base is not None:
                self._superseded.add(new.record.base)
        else:
            self.active = new
            if self.prepared is not None and self.prepared.record.c <= new.record.c:
                self.prepared = None
            self._superseded = {base for base in self._superseded if base >= new.record.c}
        if len(self._superseded) > MAX_SUPERSEDED:
            self._superseded.discard(min(self._superseded))


def _name(held: Held) -> str:
    return f"{held.record.status} record c={held.record.c} of {held.record.group}"
