"""Executions with which readers broke PBFT, succession and transfer: each property did not hold once, as told there."""

from collections.abc import Callable, Iterator
from copy import copy, deepcopy
from itertools import product
from types import SimpleNamespace

import pytest

from cloudfit_orchestrator.bft import recall
from cloudfit_orchestrator.bft.batch import batch_digest, make_batch, split_batch
from cloudfit_orchestrator.bft.checkpoints import Certificate
from cloudfit_orchestrator.bft.effects import Effect, SaveSnapshot, Sign
from cloudfit_orchestrator.bft.messages import (
    Chunk,
    Named,
    Signed,
    StateIndex,
    StateQuery,
    WedgeSet,
    peer_decoder,
)
from cloudfit_orchestrator.bft.pbft.fetching import Fetching
from cloudfit_orchestrator.bft.pbft.messages import (
    MESSAGES,
    WEDGE,
    NewView,
    Phase,
    Prepared,
    Stable,
    ViewChange,
    Vote,
    change_statement,
)
from cloudfit_orchestrator.bft.store import Snapshot
from tests.conformance.group import Group, Node
from tests.unit.bft.test_pbft import EMPTY, batch, change, group_of, node, ordering, tell, view_change, vote

decode = peer_decoder(MESSAGES)


def work(group: Group, requests: int) -> None:
    """One request after the other, executed by all that run."""
    for _ in range(requests):
        group.submit()
        assert group.settle(lambda: all(n.operations == group.issued for n in group.nodes.values() if not n.down), 20)


def hold(of: Node, kind: type[Effect]) -> Callable[[], None]:
    """Effects of a kind wait until what is returned is called: from then on they are carried out as ever."""
    held: list[Effect] = []
    do = of._do

    def waits(effect: Effect) -> None:
        if isinstance(effect, kind):
            held.append(effect)
        else:
            do(effect)

    def release() -> None:
        of._do = do
        for effect in held:
            do(effect)
        of.run()

    of._do = waits
    return release


# ----- the own log
def test_a_restart_keeps_every_batch_that_the_own_log_holds(monkeypatch: pytest.MonkeyPatch):
    """A faulty leader of each 4th view left L batches there; a rewritten log lists them ahead of what names them, and
    beyond 4L the oldest, decided and answered, were let go: all members lost acknowledged requests when all restarted.
    """
    window = 16
    group = group_of(period=window, window=window)
    correct = [node(group, r) for r in ("r0", "r1", "r2")]
    node(group, "r3").silent = node(group, "r3").down = True
    for _ in range(4):
        group.submit()
        assert group.settle(lambda: all(n.operations == group.issued for n in correct), 5)
    batches = ordering(group, "r0").batches
    bundles = [b for s in range(1, 5) for b in split_batch(batches.data(correct[0].decided[1, s]))]
    junk = (make_batch(list(chosen)) for size in (2, 3, 4) for chosen in product(bundles, repeat=size))
    for g in range(3, 27, 4):
        enter_view_of_the_faulty(group, correct, g)
        for s in range(ordering(group, "r0").s_max + 1, window + 1):
            data = next(junk)
            proposal = vote(group, "r3", Phase.PRE_PREPARE, g, s, batch_digest(data), data)
            for member in correct:
                tell(group, member.replica, proposal, sender="r3#4")
        without_votes(group, 1.2)
    before = {n.name: set(map(batch_digest, ordering(group, n.replica).batches.all())) for n in correct}
    assert all(len(held) > 4 * window for held in before.values())
    logs = [member.log for member in correct]
    monkeypatch.setattr(recall, "REWRITE_FACTOR", 0)
    monkeypatch.setattr(recall, "REWRITE_SLACK", 0)
    without_votes(group, 1.2)
    assert all(member.log is not log for member, log in zip(correct, logs, strict=True)), "each log was rewritten"
    group.flying.clear()
    for member in correct:
        member.boot()
    assert {n.name: set(map(batch_digest, ordering(group, n.replica).batches.all())) for n in correct} == before
    assert group.settle(lambda: all(set(group.issued) <= set(n.operations) for n in correct), 60)


def enter_view_of_the_faulty(group: Group, correct: list[Node], g: int) -> None:
    """The correct members time out up to view g, which r3 leads; it sends its NEW-VIEW."""
    voices = [ordering(group, n.replica).voice for n in correct]
    while min(voice.v for voice in voices) < g:
        for member, voice in zip(correct, voices, strict=True):
            if voice.v < g:
                ordering(group, member.replica).suspect()
                member.run()
        without_votes(group, 0.05)
    names = tuple(Named(voice.change.replica, 0, change_statement(voice.change.body)) for voice in voices)
    for member in correct:
        tell(group, member.replica, change(group, "r3", NewView("r3", g, names)), sender="r3#4")
        assert ordering(group, member.replica).e == g


def without_votes(group: Group, seconds: float) -> None:
    """Time passes in a network through which no PREPARE and no COMMIT comes."""
    until = group.now_s + seconds
    while group.now_s < until:
        while group.flying:
            if isinstance(decode(group.flying[0][2]), Vote):
                group.flying.pop(0)
            else:
                group.deliver()
        group.tick()


# ----- changes of view
def test_views_far_ahead_push_no_real_one_out():
    """Four NEW-VIEWs of far views that one faulty member leads took the place of all others: no view ever began."""
    group = group_of()
    node(group, "r0").silent = True
    far = 4 * 10**12
    for i, g in enumerate((far, far, far + 4, far + 4)):
        names = tuple(Named(r, 0, bytes([i]) + r.encode() * 15 + b".") for r in ("r1", "r2", "r3"))
        for r in ("r1", "r2", "r3"):
            tell(group, r, change(group, "r0", NewView("r0", g, names)))
    group.submit()
    assert group.settle(lambda: all(n.operations == group.issued for n in group.correct), 30)


def test_a_leader_holds_what_its_unsigned_new_view_names():
    """Until its NEW-VIEW was signed a leader let go of a VIEW-CHANGE named there once its faulty sender asked for a
    later view: nobody else had it, so each view of a correct leader was lost.
    """
    group = group_of()
    r1 = ordering(group, "r1")
    r1.suspect()
    node(group, "r1").run()
    sign = hold(node(group, "r1"), Sign)  # from here on signatures take their time
    named = view_change(group, "r0", 1)  # nobody else hears it
    tell(group, "r1", view_change(group, "r2", 1), sender="r2#3")
    tell(group, "r1", named)
    assert 1 in r1.voice._new_views
    group.tick()
    tell(group, "r1", view_change(group, "r0", 5))
    assert r1.changes.by_name(change_statement(named.body)) == named
    sign()
    assert group.settle(lambda: all(ordering(group, r).e == 1 for r in ("r1", "r2", "r3")), 5)


def certificates(group: Group, *slots: int) -> Iterator[Prepared]:
    """r0 proposes the slots; who prepared them is known to the faulty r3 alone."""
    for s in slots:
        data = batch(group, s)
        digest = batch_digest(data)
        proposal = vote(group, "r0", Phase.PRE_PREPARE, 0, s, digest, data)
        for r in ("r1", "r2"):
            tell(group, r, proposal)
        prepares = (Signed(r, vote(group, r, Phase.PREPARE, 0, s, digest).signature) for r in ("r1", "r2"))
        yield Prepared(s, 0, digest, proposal.signature, tuple(prepares))
    group.flying.clear()


def test_names_of_what_nobody_has_keep_nothing_from_being_fetched():
    """The eight names that sort first were asked for, again and again: nine made-up ones, and a wedge that one member
    alone had heard was fetched by nobody; no successor began.
    """
    group = group_of()
    node(group, "r3").silent = node(group, "r3").down = True
    members = ("r0", "r1", "r2")
    proved = tuple(certificates(group, 1, 2))
    wedges = [change(group, "r3", ViewChange("r3", WEDGE, 0, EMPTY, (), proved[:i])) for i in range(3)]
    bogus = [tuple(Named(r, 0, bytes(30) + bytes([1, 3 * i + j])) for j, r in enumerate(members)) for i in range(3)]
    record = group.prepare()  # all wedge
    late, group.flying = group.flying, []
    for r, wedge in zip(members, wedges, strict=True):
        lies = [WedgeSet(1, record.c, names) for names in bogus[:2]]
        tell(group, r, change(group, "r3", NewView("r3", 3, bogus[2])), wedge, *lies, sender="r3#4")
    own = {r: ordering(group, r).voice.change for r in members}
    for to, of in (("r0", "r1"), ("r1", "r0"), ("r2", "r0")):  # with r3's each has a quorum, and another one
        tell(group, to, own[of], sender=node(group, of).name)
    group.flying += late  # from here on the network is good
    assert group.settle(lambda: group.activate(record), 60)


class NamesOnly:
    """Stands for an engine and its host: nothing is asked for but names."""

    def __init__(self) -> None:
        self.record = self.changes = self._at = self
        self.c, self.e, self.waiting = 1, 0, False
        self.beacons: dict[str, object] = {}
        self.others = ["r1#2", "r2#3", "r3#4"]
        self.execution = SimpleNamespace(slot=0)
        self.wanted: set[bytes] = set()


def test_no_name_is_hidden_by_who_guesses_whose_turn_it_is():
    """Where a question began followed from how many names there were. A faulty leader that named more or less of what
    nobody has, as the next turn required, kept the one that mattered from ever being asked of who had it.
    """
    engine, asked = NamesOnly(), []
    fetching = Fetching(engine, engine, SimpleNamespace(every=lambda *_: True, send=lambda *sent: asked.append(sent)))
    matters = b"m" * 32

    def turn(of: Fetching, names: set[bytes]) -> tuple[str, tuple[bytes, ...]]:
        of._of.changes.wanted = names
        of.fetch()
        peer, question = asked.pop()
        return peer, question.digests

    def bait(count: int) -> set[bytes]:
        return {bytes(31) + bytes([i]) for i in range(count)} | {b"x" * 31 + bytes([i]) for i in range(16 - count)}

    def dodges() -> bool:
        """The faulty leader has names ready with which the next question is not the one that matters."""
        tries = ({matters, *bait(count)} for count in range(17))
        chosen = next((names for names in tries if matters not in turn(copied(fetching), names)[1]), None)
        return chosen is not None and bool(turn(fetching, chosen))

    most = 3 * 4  # each peer has at most 33 names to be asked for, eight at a time
    assert not all(dodges() for _ in range(most + 1))


def copied(fetching: Fetching) -> Fetching:
    """Fetching as it stands, to be tried."""
    twin = copy(fetching)
    twin._turns, twin._rota = deepcopy(fetching._turns), deepcopy(fetching._rota)
    return twin


# ----- succession
def test_nobody_confirms_a_state_that_its_disk_does_not_hold():
    """A transferred state was confirmed while its snapshot was still being written: had its holder crashed then, ACTIVE
    would have pinned a state that nobody has.
    """
    group = group_of()
    late = node(group, "r3")
    late.down = True
    work(group, 40)
    group.settle(lambda: False, 3)
    group.flying.clear()
    late.boot()
    saved = hold(late, SaveSnapshot)
    assert group.settle(lambda: late.core.status["slot"] >= 40, 30)
    assert (1, 40) not in late.snapshots
    record = group.prepare()

    def confirmed() -> set[str]:
        return {replica for signatures in group.confirmations(record).values() for replica in signatures}

    group.settle(lambda: False, 10)
    assert confirmed() == {"r0", "r1", "r2"}
    saved()
    assert group.settle(lambda: "r3" in confirmed(), 10)


# ----- transfer
def left_behind() -> tuple[Group, Node, Certificate, Certificate, Snapshot]:
    """r3 missed all; certificates and a state that only the faulty r0 still has, then those that the others have."""
    group = group_of()
    late = node(group, "r3")
    late.down = True
    found = []
    for _ in range(2):
        work(group, 40)
        group.settle(lambda: False, 15)
        found.append(ordering(group, "r1").statements.newest)
        if len(found) == 1:
            kept = node(group, "r0").core._at.execution.snapshots[1, found[0].slot]
    assert (1, found[0].slot) not in node(group, "r1").snapshots
    group.flying.clear()
    late.boot()
    return group, late, *found, kept


def stable(certificate: Certificate) -> Stable:
    return Stable(1, certificate.slot, certificate.digest, certificate.signatures)


def index(snapshot: Snapshot, slot: int) -> StateIndex:
    return StateIndex(snapshot.root, slot, b"".join(snapshot.chunk_hashes))


def asks(group: Group, root: bytes | None = None) -> bool:
    """Whether a question of r3 for the index (of that state) is under way."""
    queries = (decode(body) for sender, _, body in group.flying if sender == "r3#4")
    return any(isinstance(query, StateQuery) and root in (None, query.root) for query in queries)


def catches_up(group: Group, late: Node, attack: Callable[[], None], seconds: float = 60) -> bool:
    """Whether r3 gets to slot 80 while r0 sends it nothing but its `attack`, quicker than the others."""
    until = group.now_s + seconds
    while late.core.status["slot"] < 80 and group.now_s < until:
        attack()
        group.flying = [x for x in group.flying if (x[0], x[1]) != ("r0#1", "r3#4")]
        group.deliver_all()
        group.tick()
    return late.core.status["slot"] >= 80


def test_a_transfer_is_not_turned_back_to_an_older_state():
    """Who answered first, with the index of an older certified state that nobody else had, turned the transfer back."""
    group, late, old, new, kept = left_behind()
    tell(group, "r3", stable(old), stable(new))
    answered = []

    def attack() -> None:
        if asks(group):
            answered.append(group.now_s)
            tell(group, "r3", index(kept, old.slot))
            assert late.core._catchup.transfer.slot == new.slot

    assert catches_up(group, late, attack)
    assert answered


def test_chunks_that_nobody_asked_for_keep_no_transfer_alive():
    """Each chunk that came counted as news: a transfer that only a faulty member could serve was never given up."""
    group, late, old, new, kept = left_behind()
    tell(group, "r3", stable(old))
    late.core.tick(group.now_s)
    late.run()
    assert asks(group, kept.root)
    tell(group, "r3", index(kept, old.slot))
    assert late.core._catchup.transfer.indexed
    group.submit()
    sent = []

    def attack() -> None:
        if not sent or group.now_s - sent[-1] >= 1:
            sent.append(group.now_s)
            tell(group, "r3", Chunk(kept.root, 7, b"", missing=True))

    assert catches_up(group, late, attack)
    assert len(sent) > 1
    assert new.slot == 80
