"""What the components of a replica need of one another, as checks that any engine must pass (`Ordering`'s promises).

A check takes the algorithm's name, plays deterministic and seeded schedules with real replicas, and raises
AssertionError. `test_properties.py` runs each over every engine; `test_mutants.py` shows that each can fail.
"""

from collections.abc import Callable
from itertools import combinations

from cloudfit_orchestrator.bft.clients import execute
from cloudfit_orchestrator.bft.messages import NOOP
from cloudfit_orchestrator.bft.ordering import Final
from cloudfit_orchestrator.bft.store import StateStore
from cloudfit_orchestrator.model.record import WITH_WORMHOLE, Confirmation, record_hash, seal_record
from tests.conformance.group import CONTROLLER, Group, Node, Notes

SEEDS = range(1, 5)
STEPS = 500


def steps(algorithm: str) -> int:
    """Of a storm: without a wormhole a slot takes three phases among more members."""
    return STEPS if algorithm in WITH_WORMHOLE else 2 * STEPS


def new_group(algorithm: str, seed: int = 1, **more: int) -> Group:
    """The smallest group with f=1."""
    return Group(algorithm, n=3 if algorithm in WITH_WORMHOLE else 4, f=1, seed=seed, **more)


def troubled(algorithm: str, seed: int, *, crash: bool = False) -> Group:
    """A group after a storm, with a faulty member of some kind: silent, lying about its state, or with a lost log."""
    group = new_group(algorithm, seed)
    faulty = list(group.nodes.values())[seed % len(group.nodes)]
    kind = seed % 3
    faulty.silent, faulty.lies = kind == 0, kind == 1
    group.storm(steps(algorithm) // 2, crash=crash)
    if kind == 2:
        faulty.log, faulty.snapshots, faulty.lies = [], {}, True
        faulty.said.clear()
        faulty.boot()
    group.storm(steps(algorithm) // 2, crash=crash)
    return group


def decided(group: Group) -> dict[tuple[int, int], bytes]:
    """(c, slot) -> digest, of all correct members; asserts that they agree."""
    found: dict[tuple[int, int], bytes] = {}
    for node in group.correct:
        for place, digest in node.decided.items():
            known = found.setdefault(place, digest)
            assert known == digest, f"slot {place} is {known.hex()[:8]} and, for {node.name}, {digest.hex()[:8]}"
    return found


def replayed(group: Group, upto: int) -> StateStore:
    """The state after executing what was decided, by the library's own execution on an empty state."""
    store = StateStore()
    slots = {s: digest for (_, s), digest in decided(group).items()}
    for s in range(1, upto + 1):
        if slots[s] != NOOP:
            execute(store, Notes(), group.contents[slots[s]].bodies, group.parameters.client_window)
    return store


# --------------------------------------------------------------------------------------------------------- ordering
def agreement(algorithm: str) -> None:
    """No two correct members decide differently for one slot.

    Source: Castro and Liskov, OSDI'99 §4.2 (safety); Veronese et al., TC'13 (MinBFT), Agreement.
    """
    for seed in SEEDS:
        group = troubled(algorithm, seed)
        decided(group)
        group.finish()
        assert decided(group), "nothing was decided: this shows nothing"


def total_order(algorithm: str) -> None:
    """Slots are decided without a gap, and every correct state is that of the same sequence.

    Source: Schneider, CS'90 (state machine replication, Order); Hadzilacos and Toueg '94, Total Order.
    """
    for seed in SEEDS:
        group = troubled(algorithm, seed)
        assert group.finish()
        slots = sorted(s for _, s in decided(group))
        assert slots == list(range(1, slots[-1] + 1)), f"there are gaps: {slots}"
        for node in group.correct:
            at = node.core._at.execution
            assert at.store.root() == replayed(group, at.slot).root(), f"{node.name} has another state"


def no_creation(algorithm: str) -> None:
    """Only what a client issued is executed, and that at most once.

    Source: Cachin, Guerraoui, Rodrigues '11, Module 3.9, No creation and No duplication.
    """
    for seed in SEEDS:
        group = troubled(algorithm, seed)
        group.finish()
        for node in group.correct:
            assert set(node.operations) <= set(group.issued), f"{node.name} executed what nobody issued"
        once: set[bytes] = set()
        for (_, s), digest in sorted(decided(group).items()):
            if digest == NOOP:
                continue
            for body in group.contents[digest].bodies:
                assert body.client == group.client.public
                for request in body.requests:
                    assert request.operation in group.issued, f"slot {s} holds what nobody issued"
                    once.add(request.operation)
        assert once, "nothing was executed: this shows nothing"


def liveness(algorithm: str) -> None:
    """With f members silent, the first leader among them, all that is issued is executed once messages arrive.

    Source: Castro and Liskov, OSDI'99 §4.5.2 (liveness); Dwork, Lynch, Stockmeyer '88 (after GST).
    """
    for silent in range(2):
        group = new_group(algorithm)
        list(group.nodes.values())[silent].silent = True
        for _ in range(5):
            group.submit()
        assert group.finish(), f"with r{silent} silent something is not executed: {group.issued}"
    for seed in SEEDS:
        group = troubled(algorithm, seed, crash=True)
        assert group.finish(), f"seed {seed}: not all is executed after the network has healed"


# -------------------------------------------------------------------------------------------------------- succession
def _wedge_amid(algorithm: str, seed: int) -> Group:
    """Some members wedge in the middle of traffic, then all."""
    group = new_group(algorithm, seed)
    group.storm(steps(algorithm) // 2)
    for _ in range(3):
        group.submit()
    for _ in range(min(len(group.flying), seed * 7)):
        group.deliver(group.rng.randrange(len(group.flying)))
    group.prepare()
    group.storm(60)
    return group


def wedge(algorithm: str) -> None:
    """After its wedge a correct member adds nothing to a decision: what comes in later is never decided here. It has
    one last word, which a second record on the same base does not change.

    Source: Lamport, Malkhi, Zhou '09 (Vertical Paxos II, a configuration ends); protocol §6.
    """
    for seed in SEEDS:
        group = _wedge_amid(algorithm, seed)
        wedged = lambda: all(node.core._at.ordering.wedged for node in group.correct)  # noqa: E731, B023
        assert group.settle(wedged, 20), "not all have said their last word"
        words = {node.name: own_wedge(node) for node in group.correct}
        late = group.submit()
        group.prepare()
        group.settle(lambda: False, 5)
        assert {node.name: own_wedge(node) for node in group.correct} == words, "a last word has changed"
        for node in group.correct:
            assert late not in node.operations, f"{node.name} executed what came after all wedges"
            names = node.core._at.ordering.wedges()
            assert len({named.replica for named in names}) == len(names), "two last words of one member"


def own_wedge(node: Node) -> object:
    """The name of the member's own last word."""
    return next(named for named in node.core._at.ordering.wedges() if named.replica == node.replica)


def final(algorithm: str) -> None:
    """S of any quorum of wedges holds every slot that a correct member decided, as it was decided; whoever computes it
    from the same wedges gets the same.

    Source: Castro and Liskov, OSDI'99 §4.4; Correia et al., HASE'10 (EBAWA, merge); protocol §6.
    """
    looked = 0
    for seed in SEEDS:
        group = _wedge_amid(algorithm, seed)
        group.settle(lambda: all(node.core._at.ordering.wedged for node in group.correct), 20)  # noqa: B023
        group.settle(lambda: False, 2)
        assert group.active is not None
        slots = decided(group)
        found: dict[object, Final] = {}
        for node in group.correct:
            ordering = node.core._at.ordering
            for names in combinations(ordering.wedges(), group.active.quorums.view_change):
                outcome = ordering.final(names)
                assert outcome is not None, f"{node.name} cannot tell what {names} leave"
                known = found.setdefault(names, outcome)
                assert known == outcome, f"{node.name} computes another S of the same wedges"
                chosen = dict(outcome.choices)
                assert list(chosen) == list(range(outcome.h + 1, outcome.s_max + 1))
                for (c, s), digest in slots.items():
                    if c == group.active.c and s > outcome.h:
                        assert chosen.get(s) == digest, f"slot {s}, decided, is not in S of {names}"
                        looked += 1
    assert looked, "no decided slot was above a checkpoint: this shows nothing"


def install(algorithm: str) -> None:
    """The state after S is that of the successor, with the client table: nothing is lost, nothing is executed twice,
    whatever orders next. Until ACTIVE pins it nothing of it is told to a client.

    Source: Lamport, Malkhi, Zhou '09 (state transfer before activation); protocol §6.
    """
    for following in (algorithm, "pbft", "minbft"):
        for seed in (1, 2):
            group = Group(algorithm, n=4, f=1, seed=seed)
            group.storm(200)
            before = {node.name: len(node.answers) for node in group.correct}
            record = group.prepare(algorithm=following)
            wedged = lambda: all(node.core._at.ordering.wedged for node in group.correct)  # noqa: E731, B023
            assert group.settle(wedged, 20)
            decisions = decided(group)
            group.settle(lambda: bool(group.confirmations(record)), 20)  # noqa: B023
            for node in group.correct:
                for c, reply in node.answers[before[node.name] :]:
                    place = (c, reply.slot)
                    assert place in decisions, f"{node.name} answers slot {place}, which was not decided in c"
            if seed == 2:  # all who confirmed start again: what they confirmed is on their disks
                for node in group.nodes.values():
                    node.boot()
            assert group.settle(lambda: group.activate(record), 40), f"{following} does not follow {algorithm}"  # noqa: B023
            assert group.finish(), f"{algorithm} then {following}: not all is executed"
            for number in range(1, len(group.issued) + 1):
                group.submit(number=number)
            group.settle(lambda: False, 2)
            roots = {node.core._at.execution.store.root() for node in group.correct}
            assert len(roots) == 1, "a repeated request changed a state"


def activate(algorithm: str) -> None:
    """One successor is pinned, by ACTIVE alone: a record that too few have confirmed, or for another state than they
    confirmed, is nobody's; all begin with the pinned state.

    Source: Lamport, Malkhi, Zhou '09 (the master chooses one); protocol §6, S is not unique.
    """
    group = new_group(algorithm)
    for _ in range(6):
        group.submit()
    group.settle(lambda: False, 1)
    record = group.prepare()
    enough = lambda: any(len(s) >= record.confirmations_needed for s in group.confirmations(record).values())  # noqa: E731
    assert group.settle(enough, 30), "no state has f'+k'+1 confirmations"
    assert group.active is not None
    (h, digest), signatures = next(iter(group.confirmations(record).items()))
    good = tuple(Confirmation(replica, signature) for replica, signature in signatures.items())
    prepared = record_hash(seal_record(record, CONTROLLER))
    for at, state, confirmations in ((h + 1, digest, good), (h, bytes(32), good), (h, digest, good[:1])):
        forged = record.activated(
            prepared=prepared, previous=bytes(32), h=at, digest=state, confirmations=confirmations
        )
        for node in group.correct:
            node.core.record(seal_record(forged, CONTROLLER))
            node.run()
            assert node.core.status["c"] == group.active.c, f"{node.name} follows a record that too few confirmed"
    assert group.activate(record)
    assert group.settle(lambda: all(node.core.status["live"] for node in group.correct), 30)
    assert group.active.h >= h
    for node in group.correct:
        at_start = node.core._at.execution.snapshots[record.c, group.active.h]
        assert at_start.root == group.active.digest, f"{node.name} begins with another state"
    assert group.finish()


# ------------------------------------------------------------------------------------------- checkpoints and restarts
def checkpoint(algorithm: str) -> None:
    """A certified state is the executed one, though f members sign others.

    Source: Castro and Liskov, OSDI'99 §4.3 (proof that the checkpoint is correct).
    """
    looked = 0
    for seed in SEEDS:
        group = new_group(algorithm, seed)
        list(group.nodes.values())[seed % len(group.nodes)].lies = True
        group.storm(steps(algorithm))
        for finish in (lambda: True, group.finish):
            assert finish()
            last = max((s for _, s in decided(group)), default=0)
            for node in group.correct:
                for slot, digest in sorted(node.certified):
                    if slot <= last:
                        assert digest == replayed(group, slot).root(), f"a wrong state of slot {slot} is certified"
                        looked += 1
    assert looked, "nothing was certified: this shows nothing"


def restart(algorithm: str) -> None:
    """A member that starts again from its log, wherever it was cut off, says nothing that contradicts what it said, and
    takes part again. (`Node` asserts the first of all that is ever sent.)

    Source: Castro and Liskov, TOCS'02 §4.2 (recovery from stable storage); protocol §2, restart within an epoch.
    """
    for seed in SEEDS:
        group = new_group(algorithm, seed)
        for round_ in range(12):
            group.storm(40)
            node = group.rng.choice(list(group.nodes.values()))
            node.boot()
            if round_ % 4 == 3:
                for other in group.nodes.values():
                    other.boot()
        assert group.finish(), f"seed {seed}: a member that started again does not take part"
        assert group.settle(lambda: all(node.core.status["live"] for node in group.correct), 20)  # noqa: B023
        decided(group)


PROPERTIES: dict[str, Callable[[str], None]] = {
    check.__name__: check
    for check in (
        agreement, total_order, no_creation, liveness, wedge, final, install, activate, checkpoint, restart,
    )
}  # fmt: skip
