"""From wedges to a confirmed successor (protocol §6): S, its tentative execution, CONFIRM.

S is not unique; the compare-and-swap of ACTIVE makes it so. So every S that is verified is executed on a copy and
confirmed, and until ACTIVE pins one, nothing of any leaves but its confirmation.
"""

from dataclasses import dataclass
from itertools import combinations

from cloudfit_orchestrator.bft.configuration import Configuration
from cloudfit_orchestrator.bft.execution import Execution
from cloudfit_orchestrator.bft.logvotes import WEDGE
from cloudfit_orchestrator.bft.merge import Merged
from cloudfit_orchestrator.bft.messages import NOOP, Named
from cloudfit_orchestrator.bft.slots import AgreementError
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

    def choose(self, configuration: Configuration) -> tuple[Named, ...] | None:
        """The own set, once Qv wedges give a merge; returned when it is new."""
        if self.own_set is not None:
            return None
        votes = configuration.votes.of(WEDGE)
        for chosen in combinations(votes, configuration.record.quorums.view_change):
            if configuration.try_merge(chosen) is not None:
                self.own_set = tuple(vote.name for vote in chosen)
                self.sets.setdefault(self.own_set, None)
                return self.own_set
        return None

    def compute(self, configuration: Configuration, execution: Execution) -> list[Outcome]:
        """Outcomes of sets that could be computed just now."""
        new: list[Outcome] = []
        self.needs_state = None
        for names, known in list(self.sets.items()):
            if known is None:
                outcome = self._compute(configuration, execution, names)
                if outcome is not None:
                    self.sets[names] = outcome
                    new.append(outcome)
        return new

    def _compute(self, configuration: Configuration, execution: Execution, names: tuple[Named, ...]) -> Outcome | None:
        votes = configuration.votes.named(WEDGE, names)
        merged = configuration.try_merge(votes) if isinstance(votes, list) else None
        if merged is None:
            return None
        if execution.slot < merged.h:
            self.needs_state = merged.h
            return None
        return _execute(configuration, execution, merged)

    def outcomes(self) -> list[Outcome]:
        """All computed so far."""
        return [outcome for outcome in self.sets.values() if outcome is not None]


def _execute(configuration: Configuration, execution: Execution, merged: Merged) -> Outcome | None:
    if execution.slot > merged.s_max:
        raise AgreementError(f"executed slot {execution.slot}, a quorum of wedges knows only {merged.s_max}")
    steps = []
    beyond: list[tuple[int, bytes]] = []
    for choice in merged.choices:
        if choice.s <= execution.slot:
            known = execution.history.get(choice.s)
            if known is not None and known != choice.batch:
                raise AgreementError(f"slot {choice.s} was executed otherwise than a quorum of wedges says")
            continue
        checked = configuration.batches.checked(choice.batch)
        if choice.batch != NOOP and checked is None:
            configuration.want_batch(choice.batch)
            return None
        steps.append(checked)
        beyond.append((choice.s, choice.batch))
    store = execution.tentative(steps, configuration.record.parameters.client_window)
    return Outcome(merged.s_max, store.root(), store, tuple(beyond))
