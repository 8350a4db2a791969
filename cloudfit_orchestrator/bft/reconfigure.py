"""From wedges to a confirmed successor (protocol §6): S, its tentative execution, CONFIRM.

S is not unique; the compare-and-swap of ACTIVE makes it so. So every S that is verified is executed on a copy and
confirmed, and until ACTIVE pins one, nothing of any leaves but its confirmation.
"""

from dataclasses import dataclass

from cloudfit_orchestrator.bft.execution import Execution
from cloudfit_orchestrator.bft.messages import NOOP, Named
from cloudfit_orchestrator.bft.ordering import AgreementError, Final, Ordering
from cloudfit_orchestrator.bft.store import StateStore
from cloudfit_orchestrator.model.record import ConfigRecord

MAX_SETS_OF_PEER = 2  # wedge sets of one peer considered on one base: a correct one hands round one, or two if it died


@dataclass(frozen=True, slots=True)
class Outcome:
    """The state after one S."""

    h: int
    digest: bytes
    store: StateStore
    executed: tuple[tuple[int, bytes], ...]  # (slot, batch digest) executed beyond the base's own progress


class Successors:
    """PREPARED records on the present base, and the S's computed for them."""

    def __init__(self) -> None:
        self.prepared: dict[int, tuple[ConfigRecord, bytes]] = {}  # c' -> (record, envelope)
        self.sets: dict[tuple[Named, ...], Outcome | None] = {}
        self._by_final: dict[Final, Outcome] = {}  # many sets give one S, which is executed once
        self._of_peer: dict[str, set[tuple[Named, ...]]] = {}
        self.own_set: tuple[Named, ...] | None = None
        self.needs_state: int | None = None  # slot h* that the own state must reach first

    def newest(self) -> tuple[ConfigRecord, bytes] | None:
        """The newest PREPARED record, the only one that may still become ACTIVE."""
        return self.prepared[max(self.prepared)] if self.prepared else None

    def add_set(self, names: tuple[Named, ...], peer: str) -> bool:
        """`peer` computed S from these wedges. False if it is known, or the peer has named others."""
        of_peer = self._of_peer.setdefault(peer, set())
        if names in self.sets or (peer and len(of_peer) >= MAX_SETS_OF_PEER):
            return False
        of_peer.add(names)
        self.sets[names] = None
        return True

    def choose(self, ordering: Ordering) -> tuple[Named, ...] | None:
        """The own set, once Qv wedges give an S; returned when it is new."""
        if self.own_set is not None:
            return None
        for chosen in ordering.wedge_sets():
            if ordering.final(chosen) is not None:
                self.own_set = chosen
                self.sets.setdefault(self.own_set, None)
                return self.own_set
        return None

    def compute(self, ordering: Ordering, execution: Execution) -> list[Outcome]:
        """Outcomes of sets that could be computed just now."""
        new: list[Outcome] = []
        self.needs_state = None
        for names, known in list(self.sets.items()):
            if known is None:
                outcome = self._compute(ordering, execution, names)
                if outcome is not None:
                    self.sets[names] = outcome
                    new.append(outcome)
        return new

    def _compute(self, ordering: Ordering, execution: Execution, names: tuple[Named, ...]) -> Outcome | None:
        final = ordering.final(names)
        if final is None:
            return None
        if execution.slot < final.h:
            self.needs_state = final.h
            return None
        outcome = self._by_final.get(final) or _execute(ordering, execution, final)
        if outcome is not None:
            self._by_final[final] = outcome
        return outcome

    def outcomes(self) -> list[Outcome]:
        """All computed so far."""
        return [outcome for outcome in self.sets.values() if outcome is not None]


def _execute(ordering: Ordering, execution: Execution, final: Final) -> Outcome | None:
    if execution.slot > final.s_max:
        raise AgreementError(f"executed slot {execution.slot}, a quorum of wedges knows only {final.s_max}")
    steps = []
    beyond: list[tuple[int, bytes]] = []
    for s, digest in final.choices:
        if s <= execution.slot:
            known = execution.history.get(s)
            if known is not None and known != digest:
                raise AgreementError(f"slot {s} was executed otherwise than a quorum of wedges says")
            continue
        checked = ordering.batches.checked(digest)
        if digest != NOOP and checked is None:
            ordering.want_batch(digest)
            return None
        steps.append(checked)
        beyond.append((s, digest))
    store = execution.tentative(steps, ordering.record.parameters.client_window)
    return Outcome(final.s_max, store.root(), store, tuple(beyond))
