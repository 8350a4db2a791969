"""A disk that keeps what was synced, and of the rest what a crash leaves: some of the beginning, or nothing."""

import random
from collections.abc import Mapping

from cloudfit_orchestrator.bft.store import Snapshot

SnapshotId = tuple[int, int]  # (c, slot)


class SimDisk:
    """The write-ahead log and the snapshots of one machine.

    Appends are volatile until `sync`. `rewrite` is atomic: a crash before the sync that follows it may leave the old
    log or the new one, never a mixture. A snapshot is there wholly or not at all.
    """

    def __init__(self) -> None:
        """Empty."""
        self._durable: list[bytes] = []
        self._volatile: list[bytes] = []
        self._rewritten: list[bytes] | None = None  # takes the place of both when synced
        self.snapshots: dict[SnapshotId, Snapshot] = {}

    def __len__(self) -> int:
        """Log records."""
        return len(self._durable) + len(self._volatile)

    def append(self, record: bytes) -> None:
        """Volatile until `sync`."""
        self._volatile.append(record)

    def rewrite(self, records: tuple[bytes, ...]) -> None:
        """Replace everything. Synced by the caller before anything else is written."""
        self._rewritten = list(records)

    @property
    def dirty(self) -> bool:
        """Whether a crash could lose something."""
        return bool(self._volatile) or self._rewritten is not None

    def sync(self) -> None:
        """All that was written survives every crash."""
        if self._rewritten is not None:
            self._durable, self._volatile, self._rewritten = self._rewritten, [], None
            return
        self._durable += self._volatile
        self._volatile.clear()

    def crash(self, rng: random.Random) -> None:
        """What was not synced is kept up to some record, and lost from there: a torn record is cut off when read."""
        if self._rewritten is not None and rng.random() < 0.5:
            self.sync()
        self._rewritten = None
        self._durable += self._volatile[: rng.randint(0, len(self._volatile))]
        self._volatile.clear()

    def lose(self) -> None:
        """Another disk, an empty one, is in its place."""
        self._durable, self._volatile, self._rewritten = [], [], None
        self.snapshots = {}

    @property
    def records(self) -> list[bytes]:
        """The log as a restarted replica finds it."""
        return [*self._durable, *self._volatile]

    def keep_snapshots(self, keep: tuple[SnapshotId, ...]) -> None:
        """Forget all others."""
        self.snapshots = {name: kept for name, kept in self.snapshots.items() if name in keep}

    def found_snapshots(self) -> Mapping[SnapshotId, Snapshot]:
        """The snapshots as a restarted replica finds them."""
        return dict(self.snapshots)
