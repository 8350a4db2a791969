"""The executed state of a replica: the store, what was decided since its last snapshot, and its checkpoints."""

from cloudfit_orchestrator.bft.batch import Checked
from cloudfit_orchestrator.bft.clients import Executed, execute
from cloudfit_orchestrator.bft.interfaces import Service
from cloudfit_orchestrator.bft.store import Snapshot, StateStore
from cloudfit_orchestrator.bft.written import Written

PIN_S = 10.0  # a state that a peer is fetching is kept so long after its last question
MAX_PINS = 8  # so many at a time: whoever asks cannot make us keep more


class Execution:
    """Executes decided slots strictly in order. `slot` is the last one; `store` the state after it."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.written = Written()
        self.store = StateStore()
        self.slot = 0
        self.digests: dict[int, bytes] = {}  # own checkpoints: slot -> root
        self.snapshots: dict[tuple[int, int], Snapshot] = {}  # (c, slot)
        self._pins: dict[tuple[int, int], float] = {}  # snapshots that peers fetch -> when they last asked
        self.history: dict[int, bytes] = {}  # executed slots since the last persisted snapshot -> digest

    def execute(self, slot: int, digest: bytes, batch: Checked | None, width: int) -> list[Executed]:
        """Execute the next slot; `batch` is None for a no-op. Returns the results by client."""
        if slot != self.slot + 1:
            raise ValueError(f"slot {slot} does not follow {self.slot}")
        executed: list[Executed] = []
        if batch is not None:
            executed, keys = execute(self.store, self.service, batch.bodies, width)
            self.written.note(keys, slot)
        self.slot = slot
        self.history[slot] = digest
        return executed

    def tentative(self, slots: list[Checked | None], width: int) -> StateStore:
        """A copy of the state on which `slots` are executed: it can be dropped (protocol §6)."""
        twin = self.store.fork()
        for batch in slots:
            if batch is not None:
                execute(twin, self.service, batch.bodies, width)
        return twin

    def checkpoint(self, c: int) -> Snapshot:
        """Keep the present state as the snapshot of (c, slot)."""
        snapshot = self.store.snapshot()
        self.digests[self.slot] = snapshot.root
        self.snapshots[(c, self.slot)] = snapshot
        return snapshot

    def adopt(self, slot: int, store: StateStore, c: int) -> Snapshot:
        """Take over a state that a quorum certifies."""
        self.store = store
        self.slot = slot
        self.history.clear()
        self.written.begin(slot)
        return self.checkpoint(c)

    def by_root(self, root: bytes, now_s: float) -> tuple[int, Snapshot] | None:
        """(slot, snapshot) of the kept state with that root, which is then kept for a while for who asked."""
        for name, snapshot in self.snapshots.items():
            if snapshot.root == root:
                self._pins.pop(name, None)
                self._pins[name] = now_s
                while len(self._pins) > MAX_PINS:
                    del self._pins[next(iter(self._pins))]
                return name[1], snapshot
        return None

    def pinned(self, now_s: float) -> set[tuple[int, int]]:
        """Snapshots that a peer asked for not long ago."""
        self._pins = {
            name: when for name, when in self._pins.items() if now_s - when < PIN_S and name in self.snapshots
        }
        return set(self._pins)

    def settle(self, keep: set[tuple[int, int]]) -> None:
        """Forget snapshots not in `keep`, and what only they needed."""
        for name in [name for name in self.snapshots if name not in keep]:
            del self.snapshots[name]
        oldest = min((slot for _, slot in self.snapshots), default=0)
        for slot in [s for s in self.history if s <= oldest]:
            del self.history[slot]
        for slot in [s for s in self.digests if s < oldest]:
            del self.digests[slot]
